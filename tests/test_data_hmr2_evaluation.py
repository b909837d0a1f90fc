"""HMR2's evaluation npz files and 3DPW's pictures, in a small tree of their layout."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data import hmr2_evaluation
from chatpose_hf.data.hmr2_evaluation import Hmr2Evaluation
from chatpose_hf.data.rows import validate_row
from chatpose_hf.data.source import Source


FIRST = "imageFiles/downtown_arguing_00/image_00000.jpg"
SECOND = "imageFiles/downtown_arguing_00/image_00001.jpg"


def labels(names, **changes):
    count = len(names)
    arrays = {
        "imgname": np.array(names),
        "center": np.full((count, 2), 60.0),
        "scale": np.full(count, 60.0),
        "body_pose": np.arange(count * 72, dtype=np.float64).reshape(count, 72) / 100,
        "betas": np.zeros((count, 10)),
        "has_body_pose": np.ones(count),
        "has_betas": np.ones(count),
        "body_keypoints_2d": np.zeros((count, 25, 3)),
        "extra_keypoints_3d": np.zeros((count, 19, 4)),
        "gender": np.array(["m"] * count),
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def write(folder, arrays, name="3dpw_test", pictures=(FIRST, SECOND)):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    np.savez(path, **arrays)
    for picture in pictures:
        write_image(folder, picture)
    return path


def write_image(folder, name, image=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (120, 160), (10, 200, 30))).save(path, quality=100, subsampling=0)
    return path


def read(folder):
    source = Hmr2Evaluation(folder, image_size=32)
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows, source


def names_of(rows):
    return [row["id"].removeprefix("3dpw_test/imageFiles/downtown_arguing_00/image_0000") for row in rows]


def test_rows_when_3dpw_then_poses_are_those_of_the_file(tmp_path):
    """They are in the camera frame already."""
    write(tmp_path, labels([FIRST, SECOND, FIRST]))
    rows, source = read(tmp_path)
    assert source.parts() == ["test/3dpw_test-0000"]
    assert [row["id"] for row in rows] == [f"3dpw_test/{FIRST}/0", f"3dpw_test/{FIRST}/2", f"3dpw_test/{SECOND}/1"]
    assert source.skipped == {}
    for row, number in zip(rows, (0, 2, 1), strict=True):
        wanted = (72 * number + np.arange(72)).reshape(24, 3) / 100
        assert row["poses"][0].dtype == np.float32
        np.testing.assert_allclose(row["poses"][0], wanted, rtol=1e-6)
        assert row["pose_mask"] == [[True] * 24]
        assert row["task"] == "pose_estimation"
        assert "non-commercial" in row["licence"]


def test_crop_when_scale_is_60_then_the_box_has_60_pixels(tmp_path):
    """By 3:4 the square's side is 80: around (60, 60), x and y from 20 to 100. Over 200 the box would be larger."""
    write(tmp_path, labels([FIRST]))
    image = Image.new("RGB", (120, 160), "white")
    image.paste((255, 0, 0), (20, 20, 100, 100))
    write_image(tmp_path, FIRST, image)
    rows, _ = read(tmp_path)
    with Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])) as crop:
        assert (crop.size, crop.format) == ((32, 32), "JPEG")
        pixels = np.asarray(crop.convert("RGB"), dtype=int)
    assert (abs(pixels - [255, 0, 0]) < 30).all()
    write(tmp_path, labels([FIRST], scale=np.array([66.0])), pictures=())
    rows, _ = read(tmp_path)
    with Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])) as crop:
        assert crop.convert("RGB").getpixel((0, 0))[1] > 200  # the white around it


@pytest.mark.parametrize("form", ["S", ">U60", "<U60"])
def test_rows_when_names_are_bytes_or_of_either_byte_order_then_are_read(tmp_path, form):
    write(tmp_path, labels([FIRST, SECOND], imgname=np.array([FIRST, SECOND]).astype(form)))
    assert names_of(read(tmp_path)[0]) == ["0.jpg/0", "1.jpg/1"]


@pytest.mark.parametrize("pictures", [".", "3DPW"])
@pytest.mark.parametrize("place", [".", "hmr2_evaluation_data"])
def test_folder_when_files_lie_deeper_then_are_found(tmp_path, place, pictures):
    write(tmp_path / place, labels([FIRST]), pictures=())
    write_image(tmp_path / pictures, FIRST)
    assert len(read(tmp_path)[0]) == 1


HUMAN36M = [f"images/S9_Directions_1.60457274_{frame:06d}.jpg" for frame in (1, 6, 11)]
NO_POSES = dict.fromkeys(("body_pose", "has_body_pose", "betas", "has_betas", "gender", "body_keypoints_2d"))


def human36m(names=tuple(HUMAN36M), **changes):
    """Every joint but 13 and 15, as motion capture fills them."""
    joints = np.random.default_rng(1).normal(0, 0.5, (len(names), 19, 4))
    joints[..., 3] = 1
    joints[:, [13, 15]] = 0
    keypoints = {"extra_keypoints_2d": np.zeros((len(names), 19, 3)), "extra_keypoints_3d": joints}
    return labels(list(names), **{**NO_POSES, **keypoints, **changes})


@pytest.mark.parametrize("pictures", [".", "Human3.6M", "h36m"])
def test_human36m_when_it_has_no_poses_then_rows_have_poses_that_nobody_knows(tmp_path, pictures):
    write(tmp_path, labels([FIRST]))
    write(tmp_path / "hmr2_evaluation_data", human36m(), "h36m_val_p2", pictures=())
    for name in HUMAN36M:
        write_image(tmp_path / pictures, name)
    rows, source = read(tmp_path)
    assert source.parts() == ["test/3dpw_test-0000", "test/h36m_val_p2-0000"]
    assert source.skipped == {}
    assert [row["id"] for row in rows[1:]] == [f"h36m_val_p2/{name}/{index}" for index, name in enumerate(HUMAN36M)]
    for row in rows[1:]:
        assert row["task"] == "pose_estimation"
        assert row["pose_mask"] == [[False] * 24]
        np.testing.assert_array_equal(row["poses"], np.zeros((1, 24, 3)))
        assert row["poses"][0].dtype == np.float32
        assert "Human3.6M" in row["licence"]
        with Image.open(io.BytesIO(row["images"][0]["bytes"])) as crop:
            assert crop.size == (32, 32)


def test_human36m_when_it_is_trained_on_then_the_pose_has_no_loss(tmp_path, processor, model):
    write(tmp_path, human36m(), "h36m_val_p2", HUMAN36M)
    outputs = model(**ChatPoseCollator(processor)(read(tmp_path)[0]))
    assert outputs.pose_rotmats.shape == (3, 24, 3, 3)
    assert outputs.loss.isfinite()
    assert outputs.pose_loss == 0


def test_human36m_when_of_nobody_a_joint_is_known_then_is_counted(tmp_path):
    joints = human36m()["extra_keypoints_3d"]
    joints[0, :, 3] = 0
    joints[1, 4, 0] = np.nan
    write(tmp_path, human36m(extra_keypoints_3d=joints), "h36m_val_p2", HUMAN36M)
    rows, source = read(tmp_path)
    assert [row["id"] for row in rows] == [f"h36m_val_p2/{HUMAN36M[2]}/2"]
    assert source.skipped == {"no 3D joints": 2}


def test_human36m_when_pictures_are_missing_then_its_people_are_counted(tmp_path):
    write(tmp_path, human36m(), "h36m_val_p2", HUMAN36M[:1])
    rows, source = read(tmp_path)
    assert len(rows) == 1
    assert source.skipped == {"missing image of h36m_val_p2": 2}


def test_rows_when_there_are_neither_poses_nor_joints_then_all_are_counted(tmp_path):
    write(tmp_path, human36m(extra_keypoints_3d=None), "h36m_val_p2", HUMAN36M)
    rows, source = read(tmp_path)
    assert rows == []
    assert source.skipped == {"no body pose": 3}


def test_file_when_it_has_joints_of_another_number_then_error_names_it(tmp_path):
    path = write(tmp_path, human36m(extra_keypoints_3d=np.zeros((3, 17, 4))), "h36m_val_p2", HUMAN36M)
    with pytest.raises(
        ValueError, match=r"expected `extra_keypoints_3d` of shape \(3, 19, 4\), got \(3, 17, 4\)"
    ) as got:
        read(tmp_path)
    assert str(path) in str(got.value)


def test_rows_when_the_flag_is_off_then_no_body_pose(tmp_path):
    write(tmp_path, labels([FIRST, FIRST, SECOND, SECOND], has_body_pose=np.array([0.0, 1.0, 0.0, 0.0])))
    rows, source = read(tmp_path)
    assert names_of(rows) == ["0.jpg/1"]
    assert source.skipped == {"no body pose": 3}


def test_parts_when_there_are_many_images_then_each_is_read_once_and_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hmr2_evaluation, "_IMAGES_PER_PART", 2)
    names = [f"imageFiles/a/image_{frame:05d}.jpg" for frame in range(5)]
    write(tmp_path, labels([*names, *names]), pictures=names)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or open_image(*args, **options))
    source = Hmr2Evaluation(tmp_path, image_size=32)
    parts = source.parts()
    assert parts == ["test/3dpw_test-0000", "test/3dpw_test-0001", "test/3dpw_test-0002"]
    ids = [[row["id"].rsplit("/", 1)[1] for row in source.rows(part)] for part in parts]
    assert ids == [["0", "5", "1", "6"], ["2", "7", "3", "8"], ["4", "9"]]
    assert len(opened) == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body_pose": np.full((2, 72), [[np.nan], [0.5]])}, "`poses`: expected finite numbers"),
        ({"center": np.array([[np.nan, 60], [60, 60]])}, "a box that is none of the picture"),
        ({"center": np.array([[600.0, 60], [60, 60]])}, "a box that is none of the picture"),
        ({"scale": np.array([0.0, 60])}, "a box that is none of the picture"),
        ({"scale": np.array([1e9, 60])}, "a box that is none of the picture"),
    ],
)
def test_rows_when_numbers_are_unusable_then_that_person_alone_is_skipped(tmp_path, changes, reason):
    write(tmp_path, labels([FIRST, FIRST], **changes))
    rows, source = read(tmp_path)
    assert names_of(rows) == ["0.jpg/1"]
    assert source.skipped == {reason: 1}


def test_images_when_missing_or_damaged_then_their_people_are_counted(tmp_path):
    third = "imageFiles/b/image_00000.jpg"
    write(tmp_path, labels([FIRST, SECOND, SECOND, third]), pictures=(FIRST, third))
    (tmp_path / third).write_bytes((tmp_path / third).read_bytes()[:-100])
    rows, source = read(tmp_path)
    assert names_of(rows) == ["0.jpg/0"]
    assert source.skipped == {"missing image of 3dpw_test": 2, "damaged image of 3dpw_test": 1}


@pytest.mark.parametrize("name", ["../secret.jpg", "imageFiles/../../secret.jpg", "..\\secret.jpg", "/etc/passwd"])
def test_image_when_its_name_leads_out_then_is_refused(tmp_path, name):
    write_image(tmp_path, "secret.jpg")
    write(tmp_path / "data", labels([name, FIRST]))
    rows, source = read(tmp_path / "data")
    assert names_of(rows) == ["0.jpg/1"]
    assert source.skipped == {"refused name of an image": 1}


@pytest.mark.parametrize("name", ["x" * 300, "imageFiles", "a\udcff.jpg", "imageFiles/\n"])
def test_image_when_its_name_is_none_then_is_missing(tmp_path, name):
    write(tmp_path, labels([FIRST, name]))
    rows, source = read(tmp_path)
    assert names_of(rows) == ["0.jpg/0"]
    assert source.skipped == {"missing image of 3dpw_test": 1}


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["imgname", "body_pose"])
def test_file_when_hostile_then_nothing_runs(tmp_path, name):
    marker = tmp_path / "ran"
    hostile = np.array([Payload(marker), None], dtype=object)
    path = write(tmp_path, labels([FIRST, SECOND], **{name: hostile}))
    source = Hmr2Evaluation(tmp_path)
    (part,) = source.parts()
    with pytest.raises(ValueError, match=f"`{name}` is an array of type `object`") as caught:
        list(source.rows(part))
    assert str(path) in str(caught.value)
    assert not marker.exists()
    np.load(path, allow_pickle=True)[name]
    assert marker.exists()


def test_file_when_arrays_not_asked_for_hold_objects_then_is_read(tmp_path):
    write(tmp_path, labels([FIRST], gender=np.array([None], dtype=object)))
    assert len(read(tmp_path)[0]) == 1


LAYOUTS = {
    "names absent": ({"imgname": None}, "expected an array `imgname`"),
    "names are numbers": ({"imgname": np.zeros(2)}, "`imgname` is an array of type `float64`"),
    "names are no UTF-8": ({"imgname": np.array([b"\xff\xfe", b"a"])}, "utf-8"),
    "flags absent": ({"has_body_pose": None}, "found no has_body_pose"),
    "poses of SMPL-X": ({"body_pose": np.zeros((2, 165))}, r"expected `body_pose` of shape \(2, 72\), got \(2, 165\)"),
    "fewer poses": ({"body_pose": np.zeros((1, 72))}, r"expected `body_pose` of shape \(2, 72\), got \(1, 72\)"),
    "scale of two": ({"scale": np.ones((2, 2))}, r"expected `scale` of shape \(2,\), got \(2, 2\)"),
    "center of three": ({"center": np.ones((2, 3))}, r"expected `center` of shape \(2, 2\), got \(2, 3\)"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_file_when_of_another_layout_then_error_names_it(tmp_path, layout):
    changes, message = LAYOUTS[layout]
    path = write(tmp_path, labels([FIRST, SECOND], **changes))
    source = Hmr2Evaluation(tmp_path)
    (part,) = source.parts()
    with pytest.raises(ValueError, match=message) as caught:
        list(source.rows(part))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_file_when_truncated_then_error_names_it_and_the_other_is_read(tmp_path, share):
    write(tmp_path, labels([FIRST]))
    path = write(tmp_path, labels([FIRST]), "h36m_val_p2")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    source = Hmr2Evaluation(tmp_path, image_size=32)
    whole, damaged = source.parts()
    assert len(list(source.rows(whole))) == 1
    with pytest.raises(ValueError, match="cannot read") as caught:
        list(source.rows(damaged))
    assert str(path) in str(caught.value)


def test_file_when_names_announce_more_than_there_is_then_is_refused(tmp_path):
    path = write(tmp_path, labels([FIRST], imgname=None))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<U0", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("imgname.npy", header.getvalue())
    source = Hmr2Evaluation(tmp_path)
    with pytest.raises(ValueError, match=r"imgname"):
        list(source.rows(source.parts()[0]))


def test_folder_when_without_files_then_error_says_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"3dpw_test.npz or h36m_val_p2.npz.*hmr2_evaluation_data.tar.gz"):
        Hmr2Evaluation(tmp_path).parts()


def test_source_when_sent_to_another_process_then_rows_are_the_same(tmp_path):
    write(tmp_path, labels([FIRST, SECOND]))
    source = Hmr2Evaluation(tmp_path)
    rows = [list(each) for each in (source, pickle.loads(pickle.dumps(source)))]
    assert [[row["id"], row["messages"], row["images"]] for row in rows[0]] == [
        [row["id"], row["messages"], row["images"]] for row in rows[1]
    ]


# -- beside the poses --


IDS = [f"3dpw_test/{FIRST}/0", f"3dpw_test/{SECOND}/1", f"3dpw_test/{FIRST}/2"]


def truth_labels(**changes):
    rng = np.random.default_rng(0)
    joints = rng.normal(0, 1, (3, 19, 4))
    joints[..., 3] = np.arange(3 * 19).reshape(3, 19) % 3 / 2  # 0, 0.5, 1
    given = {"extra_keypoints_3d": joints, "betas": rng.normal(0, 1, (3, 10)), "gender": np.array(["m", "f", "m"])}
    return labels([FIRST, SECOND, FIRST], **{**given, **changes})


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 2, 1], []])
def test_truths_then_are_the_lines_of_the_file_in_the_order_asked(tmp_path, order):
    arrays = truth_labels()
    write(tmp_path, arrays, pictures=())  # no picture is needed
    truths = Hmr2Evaluation(tmp_path).truths([IDS[person] for person in order])
    assert len(truths) == len(order)
    for truth, person in zip(truths, order, strict=True):
        confidences = arrays["extra_keypoints_3d"][person, :, 3]
        assert truth.known.dtype == bool
        assert truth.known.tolist() == [value > 0 for value in confidences]
        wanted = [point if value > 0 else [0, 0, 0] for *point, value in arrays["extra_keypoints_3d"][person]]
        np.testing.assert_allclose(truth.joints, wanted, rtol=1e-6)
        np.testing.assert_allclose(truth.betas, arrays["betas"][person], rtol=1e-6)
        assert truth.gender == ("male", "female", "male")[person]
        assert truth.joints.dtype == truth.betas.dtype == np.float32


def test_truths_when_of_rows_then_their_ids_are_known(tmp_path):
    write(tmp_path, truth_labels())
    write(tmp_path, human36m(), "h36m_val_p2", HUMAN36M)
    rows, source = read(tmp_path)
    ids = [row["id"] for row in rows]
    assert len(ids) == 6
    assert len(source.truths(ids)) == 6


def test_truths_when_of_both_files_then_each_is_read_once(tmp_path, monkeypatch):
    write(tmp_path, truth_labels())
    arrays = human36m()
    write(tmp_path / "hmr2_evaluation_data", arrays, "h36m_val_p2")
    opened = []
    open_fields = hmr2_evaluation._open_fields
    monkeypatch.setattr(hmr2_evaluation, "_open_fields", lambda path: opened.append(path.stem) or open_fields(path))
    ids = [IDS[0], f"h36m_val_p2/{HUMAN36M[1]}/1", IDS[1], f"h36m_val_p2/{HUMAN36M[0]}/0"]
    truths = Hmr2Evaluation(tmp_path).truths(ids)
    assert sorted(opened) == ["3dpw_test", "h36m_val_p2"]
    assert [truth.gender for truth in truths] == ["male", None, "female", None]
    for truth, person in ((truths[1], 1), (truths[3], 0)):
        assert truth.betas is None
        assert truth.known.tolist() == [joint not in (13, 15) for joint in range(19)]
        np.testing.assert_allclose(truth.joints, arrays["extra_keypoints_3d"][person, :, :3], rtol=1e-6)


@pytest.mark.parametrize(
    "genders",
    [np.array([b"m", b"f", b"m"]), np.array(["M", "F", "M"]), np.array(["male", "female", "Male"])],
)
def test_genders_when_bytes_or_capitals_or_words_then_are_the_same(tmp_path, genders):
    write(tmp_path, truth_labels(gender=genders))
    assert [truth.gender for truth in Hmr2Evaluation(tmp_path).truths(IDS)] == ["male", "female", "male"]


def test_betas_when_their_flag_is_off_or_they_are_absent_then_are_none(tmp_path):
    write(tmp_path, truth_labels(has_betas=np.array([1.0, 0.0, 1.0])))
    assert [truth.betas is None for truth in Hmr2Evaluation(tmp_path).truths(IDS)] == [False, True, False]
    write(tmp_path, truth_labels(has_betas=None))
    assert all(truth.betas is not None for truth in Hmr2Evaluation(tmp_path).truths(IDS))
    write(tmp_path, truth_labels(betas=None, gender=None))
    assert {(truth.betas, truth.gender) for truth in Hmr2Evaluation(tmp_path).truths(IDS)} == {(None, None)}


@pytest.mark.parametrize(
    "id",
    [
        f"3dpw_test/{FIRST}/1",  # another picture's person
        f"3dpw_test/{FIRST}/3",
        f"3dpw_test/{FIRST}/-1",
        f"3dpw_test/{FIRST}/00",
        f"3dpw_test/{FIRST}/",
        f"3dpw_test/{FIRST}/\u0660",  # a digit, to Python
        f"3dpw_test/{FIRST}/{'9' * 5000}",
        f"3dpw_test/{FIRST}",
        "3dpw_test",
        "",
        f"/{FIRST}/0",
        f"3dpw_test//{FIRST}/0",
        f"h36m_val_p2/{HUMAN36M[0]}/0",  # that file is not there
        f"../3dpw_test/{FIRST}/0",
    ],
)
def test_truths_when_the_file_has_no_such_person_then_error_names_row_and_file(tmp_path, id):
    write(tmp_path, truth_labels(), pictures=())
    with pytest.raises(ValueError, match="other files") as caught:
        Hmr2Evaluation(tmp_path).truths([IDS[0], id])
    assert repr(id)[:100] in str(caught.value)
    assert str(tmp_path) in str(caught.value)


WRONG_TRUTHS = {
    "NaN joint": ({"extra_keypoints_3d": np.full((3, 19, 4), np.nan)}, "finite numbers in `extra_keypoints_3d`"),
    "infinite betas": ({"betas": np.full((3, 10), np.inf)}, "finite numbers in `betas`"),
    "beyond float32": ({"betas": np.full((3, 10), 1e300)}, "finite numbers in `betas`"),
    "17 joints": ({"extra_keypoints_3d": np.zeros((3, 17, 4))}, r"shape \(3, 19, 4\), got \(3, 17, 4\)"),
    "no confidence": ({"extra_keypoints_3d": np.zeros((3, 19, 3))}, r"shape \(3, 19, 4\), got \(3, 19, 3\)"),
    "no joints": ({"extra_keypoints_3d": None}, "found no extra_keypoints_3d"),
    "betas of SMPL-X": ({"betas": np.zeros((3, 11))}, r"`betas` of shape \(3, 10\), got \(3, 11\)"),
    "fewer betas": ({"betas": np.zeros((2, 10))}, r"`betas` of shape \(3, 10\), got \(2, 10\)"),
    "flags of two": ({"has_betas": np.ones((3, 2))}, r"`has_betas` of shape \(3,\), got \(3, 2\)"),
    "unknown gender": ({"gender": np.array(["x"] * 3)}, "expected one of m, male, f, female, n, neutral"),
    "fewer genders": ({"gender": np.array(["m"])}, "expected 3 texts in `gender`, got 1"),
    "genders are numbers": ({"gender": np.zeros(3)}, "`gender` is an array of type `float64`"),
    "genders are objects": ({"gender": np.array(["m", None, 1], object)}, "`gender` is an array of type `object`"),
    "no names": ({"imgname": None}, "found no imgname"),
}


@pytest.mark.parametrize("fault", WRONG_TRUTHS)
def test_truths_when_the_file_is_of_another_layout_then_error_names_it(tmp_path, fault):
    changes, message = WRONG_TRUTHS[fault]
    path = write(tmp_path, truth_labels(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        Hmr2Evaluation(tmp_path).truths(IDS)
    assert str(path) in str(caught.value)


def test_truths_when_one_person_is_damaged_then_error_names_the_row_and_others_are_read(tmp_path):
    arrays = truth_labels()
    arrays["extra_keypoints_3d"][1, 7, 2] = np.nan
    write(tmp_path, arrays)
    source = Hmr2Evaluation(tmp_path)
    assert len(source.truths([IDS[0], IDS[2]])) == 2
    with pytest.raises(ValueError, match="finite") as caught:
        source.truths(IDS)
    assert IDS[1] in str(caught.value)


def test_truths_when_a_source_has_none_then_says_so(tmp_path):
    class Plain(Source):
        name, licence, parts, read_part = "plain", "none", None, None

    with pytest.raises(ValueError, match="plain says nothing beside the poses of its rows"):
        Plain(tmp_path).truths(["a"])
