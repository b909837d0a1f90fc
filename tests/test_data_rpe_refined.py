"""RPE-Refined: its items as rows about whole photos of 3DPW."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data.rows import validate_row
from chatpose_hf.data.rpe_refined import RpeRefined


BUS = "3DPW/imageFiles/downtown_runForBus_01/image_00326.jpg"
CAFE = "3DPW/imageFiles/downtown_cafe_00/image_00326.jpg"
UPRIGHT = [math.pi, 0.0, 0.0, *np.linspace(-1, 1, 69).tolist()]


def jpeg(seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (48, 27, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_item(id="000000", image=BUS, description="The man is about to sit down", **changes):
    """An item with the keys and types of the released files."""
    return {
        "id": id,
        "image": f"{id}.png",
        "real_image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{description}, can you give the SMPL pose of this person?"},
            {"from": "gpt", "value": "Sure, it is <POSE>."},
        ],
        "ground_truth": {
            "id": 36452,
            "image_id": 29095,
            "person_id": 0,
            "joint_cam": [[0.0, 0.0, 5.0]] * 24,
            "joint_img": [[885.2, 552.7]] * 24,
            "fitted_joint_cam": [[0.0, 0.0, 5.0]] * 24,
            "openpose_result": [[872.1, 428.5, 0.79]] * 18,
            "smpl_param": {"shape": [0.1] * 10, "pose": UPRIGHT, "trans": [0.0, 0.2, 5.0], "gender": "male"},
            "bbox": [738.8, 404.2, 290.0, 395.3],
        },
        **changes,
    }


def with_pose(pose):
    item = make_item()
    return item["ground_truth"] | {"smpl_param": item["ground_truth"]["smpl_param"] | {"pose": pose}}


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write(folder, items, attribute="behavior", place="RPE-refined/"):
    put(folder, f"{place}refine_vqa_{attribute}_withGT.json", json.dumps(items).encode())
    return RpeRefined(folder)


def test_rows_when_files_are_there_then_each_item_is_one_with_its_photo_pose_and_description(tmp_path):
    put(tmp_path, BUS, jpeg(1))
    put(tmp_path, CAFE, jpeg(2))
    write(tmp_path, [make_item(description="Wears a red coat. The taller one")], "outfits")
    source = write(tmp_path, [make_item(), make_item("000001", CAFE), make_item("000002")])
    assert source.parts() == ["test/behavior", "test/outfits"]
    rows = list(source)
    for row in rows:
        validate_row(row)
    assert source.skipped == {}
    assert [row["id"] for row in rows] == [
        f"behavior/{BUS}/000000",
        f"behavior/{CAFE}/000001",
        f"behavior/{BUS}/000002",
        f"outfits/{BUS}/000000",
    ]
    assert {row["task"] for row in rows} == {"rpe"}
    assert [row["images"][0]["bytes"] for row in rows] == [jpeg(1), jpeg(2), jpeg(1), jpeg(1)]
    assert rows[0]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None},
                {
                    "type": "text",
                    "text": "The man is about to sit down, can you give the SMPL pose of this person?",
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Sure, it is "},
                {"type": "pose", "text": None},
                {"type": "text", "text": "."},
            ],
        },
    ]
    assert rows[0]["captions"] == [{"kind": "phrase", "text": "The man is about to sit down"}]
    assert rows[3]["captions"] == [{"kind": "phrase", "text": "Wears a red coat. The taller one"}]
    for row in rows:
        assert len(row["poses"]) == 1
        assert row["poses"][0].dtype == np.float32
        # Upright and facing the camera, untouched
        np.testing.assert_array_equal(row["poses"][0], np.array(UPRIGHT, np.float32).reshape(24, 3))
        assert row["pose_mask"] == [[True] * 24]


@pytest.mark.parametrize("place", ["", "RPE-refined/"])
@pytest.mark.parametrize("photo", [BUS, BUS.removeprefix("3DPW/")])
def test_rows_when_the_folder_is_the_repository_or_3dpw_then_both_files_are_found(place, photo, tmp_path):
    put(tmp_path, photo, jpeg(1))
    source = write(tmp_path, [make_item()], place=place)
    assert [row["images"][0]["bytes"] for row in source] == [jpeg(1)]


FAULT = "an item without a photo, question, answer or pose of 72 numbers"
UNUSABLE = {
    "no item": (3, FAULT),
    "no photo": ({**make_item(), "real_image": None}, "refused name of a photo"),
    "no conversation": (make_item(conversations=[]), FAULT),
    "question is a number": (make_item(conversations=[{"value": 1}, {"value": "Sure, <POSE>."}]), FAULT),
    "no truth": (make_item(ground_truth=None), FAULT),
    "short pose": (make_item(ground_truth=with_pose(UPRIGHT[:69])), FAULT),
    "ragged pose": (make_item(ground_truth=with_pose([1, [2]])), FAULT),
    "huge number": (make_item(ground_truth=with_pose([10**400] * 72)), FAULT),
    "NaN": (make_item(ground_truth=with_pose([math.nan] * 72)), "`poses`: expected finite numbers"),
    "answer without pose": (
        make_item(conversations=[{"value": "<image>\nWho, can you?"}, {"value": "Sure."}]),
        "`poses`: expected one for each pose part of `messages`",
    ),
    "no description": (make_item(description=""), "`captions`: expected a text"),
    "missing": (make_item(image=CAFE), "missing image of downtown_cafe_00"),
    "a long name": (make_item(image="3DPW/a/" + "x" * 3000), "missing image of a"),
    "damaged": (make_item(image="3DPW/imageFiles/cut/image_00000.jpg"), "damaged image of cut"),
    "out of the folder": (make_item(image="3DPW/../../secret.jpg"), "refused name of a photo"),
    "absolute": (make_item(image="/etc/passwd"), "refused name of a photo"),
    "absolute after 3DPW": (make_item(image="3DPW//etc/passwd"), "refused name of a photo"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_rows_when_an_item_is_unusable_then_it_alone_is_skipped_with_a_reason(fault, tmp_path):
    folder = tmp_path / "data"
    put(tmp_path, "secret.jpg", jpeg(1))
    put(folder, BUS, jpeg(1))
    put(folder, "3DPW/imageFiles/cut/image_00000.jpg", jpeg(1)[:-50])
    item, reason = UNUSABLE[fault]
    source = write(folder, [make_item("a"), item, make_item("b")])
    assert [row["id"][-1] for row in source] == ["a", "b"]
    assert source.skipped == {reason: 1}


DAMAGED = {
    "cut off": (json.dumps([make_item()]).encode()[:-40], "expected UTF-8 JSON in"),
    "no UTF-8": (json.dumps([make_item()]).encode().replace(b"The man", b"The m\xe9n"), "expected UTF-8 JSON in"),
    "an object": (b"{}", "expected an array of items in"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_read_part_when_the_file_is_damaged_then_the_error_names_it_and_others_are_read(fault, tmp_path):
    put(tmp_path, BUS, jpeg(1))
    source = write(tmp_path, [make_item()], "pose")
    content, message = DAMAGED[fault]
    put(tmp_path, "refine_vqa_shape_withGT.json", content)
    assert source.parts() == ["test/pose", "test/shape"]
    assert len(list(source.rows("test/pose"))) == 1
    with pytest.raises(ValueError, match=rf"{message} .*refine_vqa_shape_withGT.json"):
        list(source.rows("test/shape"))


def test_parts_when_no_file_is_there_then_says_which_are_expected(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"refine_vqa_\{behavior,outfits,pose,shape\}_withGT.json in .*found none"
    ):
        RpeRefined(tmp_path).parts()


# -- beside the poses --


def with_truth(id="000000", image=BUS, seed=0, drop=(), drop_parameters=(), **changes):
    rng = np.random.default_rng(seed)
    truth = make_item()["ground_truth"] | {"fitted_joint_cam": rng.normal(0, 1, (24, 3)).tolist()}
    parameters = truth["smpl_param"] | {"shape": rng.normal(0, 1, 10).tolist()}
    parameters |= {name: changes.pop(name) for name in ("shape", "gender") if name in changes}
    truth["smpl_param"] = {name: value for name, value in parameters.items() if name not in drop_parameters}
    truth |= changes
    return make_item(id, image, ground_truth={name: value for name, value in truth.items() if name not in drop})


def test_truths_then_are_of_the_item_in_the_order_asked(tmp_path):
    behavior = [with_truth(seed=1), with_truth("000001", CAFE, 2, gender="female"), with_truth("000002", seed=3)]
    outfits = [with_truth(seed=4, gender="Neutral")]
    write(tmp_path, outfits, "outfits", place="")
    source = write(tmp_path, [3, {"id": 1}, *behavior])  # no photo is needed
    asked = [
        (f"behavior/{BUS}/000002", behavior[2], "male"),
        (f"outfits/{BUS}/000000", outfits[0], "neutral"),
        (f"behavior/{CAFE}/000001", behavior[1], "female"),
        (f"behavior/{BUS}/000000", behavior[0], "male"),
        (f"behavior/{BUS}/000002", behavior[2], "male"),
    ]
    truths = source.truths([id for id, _, _ in asked])
    assert len(truths) == len(asked)
    for truth, (_, item, gender) in zip(truths, asked, strict=True):
        given = item["ground_truth"]
        np.testing.assert_allclose(truth.joints, given["fitted_joint_cam"], rtol=1e-6)
        np.testing.assert_allclose(truth.betas, given["smpl_param"]["shape"], rtol=1e-6)
        assert truth.joints.dtype == truth.betas.dtype == np.float32
        assert truth.gender == gender
        assert truth.known.dtype == bool
        assert truth.known.tolist() == [True] * 24


def test_truths_when_of_rows_then_their_ids_are_known(tmp_path):
    put(tmp_path, BUS, jpeg(1))
    write(tmp_path, [with_truth(3), with_truth(4)], "shape")  # ids are numbers in the released files
    source = write(tmp_path, [with_truth("a"), with_truth("b/c")])
    ids = [row["id"] for row in source]
    assert len(ids) == 4
    assert len(source.truths(ids)) == 4
    assert source.truths([]) == []


def test_truths_when_two_items_have_the_same_id_then_the_first_counts_as_in_rows(tmp_path):
    put(tmp_path, BUS, jpeg(1))
    source = write(tmp_path, [with_truth(seed=1), with_truth(seed=2)])
    (row,) = source
    (truth,) = source.truths([row["id"]])
    np.testing.assert_allclose(truth.joints, with_truth(seed=1)["ground_truth"]["fitted_joint_cam"], rtol=1e-6)


@pytest.mark.parametrize(
    "id",
    [
        f"behavior/{BUS}/000009",
        f"behavior/{CAFE}/000000",
        f"behavior/{BUS}",
        f"summary/{BUS}/000000",
        f"../{BUS}/000000",
        "",
    ],
)
def test_truths_when_the_files_have_no_such_item_then_error_names_row_and_file(tmp_path, id):
    source = write(tmp_path, [with_truth()])
    with pytest.raises(ValueError, match="other files") as caught:
        source.truths([f"behavior/{BUS}/000000", id])
    assert repr(id) in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_truths_when_the_attributes_file_is_absent_then_error_names_it(tmp_path):
    source = write(tmp_path, [with_truth()])
    with pytest.raises(FileNotFoundError, match=r"refine_vqa_pose_withGT.json"):
        source.truths([f"pose/{BUS}/000000"])


WRONG_TRUTHS = {
    "not fitted": (with_truth(drop=["fitted_joint_cam"]), "expected `fitted_joint_cam` and `smpl_param` with"),
    "no parameters": (with_truth(drop=["smpl_param"]), "expected `fitted_joint_cam` and `smpl_param` with"),
    "no shape": (with_truth(drop_parameters=["shape"]), "`smpl_param` with shape and gender"),
    "no gender": (with_truth(drop_parameters=["gender"]), "`smpl_param` with shape and gender"),
    "no truth": (make_item(ground_truth=None), "got None"),
    "22 joints": (with_truth(fitted_joint_cam=[[0.0] * 3] * 22), r"shape \(24, 3\), got \(22, 3\)"),
    "NaN joint": (with_truth(fitted_joint_cam=[[math.nan] * 3] * 24), "finite numbers in `fitted_joint_cam`"),
    "ragged": (with_truth(fitted_joint_cam=[[0.0], [0.0, 1.0]]), "expected numbers of shape"),
    "null": (with_truth(fitted_joint_cam=None), r"shape \(24, 3\), got \(\)"),
    "16 betas": (with_truth(shape=[0.0] * 16), r"`shape` of shape \(10,\), got \(16,\)"),
    "huge betas": (with_truth(shape=[10**400] * 10), "expected numbers of shape"),
    "gender": (with_truth(gender="unknown"), "expected one of m, male, f, female, n, neutral as `gender`"),
    "gender list": (with_truth(gender=["male"]), "expected one of m, male, f, female, n, neutral as `gender`"),
}


@pytest.mark.parametrize("fault", WRONG_TRUTHS)
def test_truths_when_an_item_is_of_another_layout_then_error_names_row_and_file_and_others_are_read(tmp_path, fault):
    item, message = WRONG_TRUTHS[fault]
    source = write(tmp_path, [item, with_truth("000001")])
    assert len(source.truths([f"behavior/{BUS}/000001"])) == 1
    with pytest.raises(ValueError, match=message) as caught:
        source.truths([f"behavior/{BUS}/000001", f"behavior/{BUS}/000000"])
    assert f"behavior/{BUS}/000000" in str(caught.value)
    assert "refine_vqa_behavior_withGT.json" in str(caught.value)
