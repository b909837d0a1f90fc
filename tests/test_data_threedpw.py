"""3DPW's sequence files, as Python 2 wrote them, and its pictures, in a small tree of their layout."""

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data import threedpw
from chatpose_hf.data.rows import validate_row
from chatpose_hf.data.threedpw import ThreeDPW


SEQUENCE = "downtown_arguing_00"
UPRIGHT = np.diag([1.0, -1.0, -1.0])  # from a world with y up to a camera with y down
FRAMES = 3


def dumps_python_2(value):
    """Protocol 2 as cPickle of Python 2 writes it: texts and arrays' bytes are byte strings."""
    return b"\x80\x02" + _dump(value) + b"."


def _dump(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_dump(key) + _dump(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_dump, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_dump, value)) + b"t"
    if isinstance(value, str | bytes):
        content = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(content)) + content
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        order = value.dtype.byteorder.replace("=", "<").encode()
        dtype = b"cnumpy\ndtype\n" + _dump((value.dtype.str[1:], 0, 1)) + b"R"
        dtype += b"(K\x03U\x01" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        return empty + b"(K\x01" + _dump(value.shape) + dtype + b"\x89" + _dump(value.tobytes()) + b"tb"
    raise TypeError(type(value))


def rodrigues(rotvec):
    angle = np.linalg.norm(rotvec)
    x, y, z = rotvec / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def sequence(num_people=2, **changes):
    generator = np.random.default_rng(0)
    cameras = np.tile(np.eye(4), (FRAMES, 1, 1))
    cameras[:, :3, :3] = UPRIGHT
    cameras[:, :3, 3] = [0.5, -1.0, 3.0]
    keypoints = np.zeros((FRAMES, 3, 18))
    keypoints[:, 0] = np.linspace(50, 70, 18)
    keypoints[:, 1] = np.linspace(30, 90, 18)
    keypoints[:, 2] = 0.9
    fields = {
        "sequence": SEQUENCE,
        "poses": [generator.normal(0, 0.5, (FRAMES, 72)) for _ in range(num_people)],
        "betas": [np.zeros(300) for _ in range(num_people)],
        "genders": ["m", "f"][:num_people],
        "poses2d": [keypoints.copy() for _ in range(num_people)],
        "cam_poses": cameras,
        "campose_valid": [np.ones(FRAMES, np.uint8) for _ in range(num_people)],
        "trans": [np.zeros((FRAMES, 3)) for _ in range(num_people)],
        "v_template_clothed": [np.zeros((5, 3)) for _ in range(num_people)],
    }
    return {**fields, **changes}


def write(folder, fields, name=SEQUENCE, split="train", pictures=range(FRAMES)):
    path = folder / "sequenceFiles" / split / f"{name}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dumps_python_2(fields) if isinstance(fields, dict) else fields)
    for frame in pictures:
        picture = folder / "imageFiles" / name / f"image_{frame:05d}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 160), (20 * frame, 200, 30)).save(picture)
    return path


def read(folder, parts=None):
    source = ThreeDPW(folder, image_size=32)
    rows = [row for part in parts or source.parts() for row in source.rows(part)]
    for row in rows:
        validate_row(row)
    return rows, source


def test_the_writer_of_this_test_when_read_by_python_then_gives_the_fields():
    """The readers' input is a real pickle."""
    fields = sequence()
    loaded = pickle.loads(dumps_python_2(fields), encoding="latin1")
    np.testing.assert_array_equal(loaded["poses"][1], fields["poses"][1])
    assert loaded["campose_valid"][0].dtype == np.uint8
    assert loaded["genders"] == ["m", "f"]


def test_rows_when_two_people_then_one_for_each_in_each_frame(tmp_path):
    write(tmp_path, sequence())
    rows, source = read(tmp_path)
    names = [f"{SEQUENCE}/image_{frame:05d}/{person}" for frame in range(FRAMES) for person in range(2)]
    assert [row["id"] for row in rows] == names
    assert source.skipped == {}
    for row in rows:
        assert row["task"] == "pose_estimation"
        assert row["pose_mask"] == [[True] * 24]
        assert "non-commercial" in row["licence"]
        with Image.open(io.BytesIO(row["images"][0]["bytes"])) as picture:
            assert (picture.size, picture.format) == ((32, 32), "JPEG")


def test_pose_when_the_camera_is_turned_then_the_orientation_is_and_the_body_is_not(tmp_path):
    fields = sequence()
    turns = [UPRIGHT @ rodrigues(np.array([0.1, 0.7 * frame, -0.2])) for frame in range(FRAMES)]
    fields["cam_poses"][:, :3, :3] = turns
    write(tmp_path, fields)
    rows, _ = read(tmp_path)
    for number, row in enumerate(rows):
        frame, person = divmod(number, 2)
        given = fields["poses"][person][frame].reshape(24, 3)
        pose = row["poses"][0]
        assert pose.dtype == np.float32
        np.testing.assert_allclose(rodrigues(pose[0].astype(float)), turns[frame] @ rodrigues(given[0]), atol=1e-5)
        np.testing.assert_allclose(pose[1:], given[1:], atol=1e-6)


def test_pose_when_upright_in_the_world_then_is_the_half_turn_of_the_camera_frame(tmp_path):
    fields = sequence(1)
    fields["poses"][0][:, :3] = 0
    write(tmp_path, fields)
    rows, _ = read(tmp_path)
    for row in rows:
        np.testing.assert_allclose(rodrigues(row["poses"][0][0].astype(float)), UPRIGHT, atol=1e-6)


def test_crop_when_joints_are_seen_then_is_the_square_around_them(tmp_path):
    """
    Joints between (50, 30) and (70, 90): the larger side 60, times 1.2, is 72; by 3:4 the square's side is 96, so it
    spans x 12 to 108 and y 12 to 108. A joint far off, of a confidence under 0.3, does not count.
    """
    fields = sequence(1)
    fields["poses2d"][0][:, :, 0] = fields["poses2d"][0][:, :, 1]
    fields["poses2d"][0][:, :2, 0] = [50, 30]
    fields["poses2d"][0][:, :, 5] = [0, 0, 0.1]
    path = write(tmp_path, fields)
    picture = Image.new("RGB", (120, 160), "white")
    picture.paste((255, 0, 0), (12, 12, 108, 108))
    picture.save(tmp_path / "imageFiles" / path.stem / "image_00000.jpg", quality=100, subsampling=0)
    rows, _ = read(tmp_path)
    with Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])) as crop:
        pixels = np.asarray(crop.convert("RGB"), dtype=int)
    assert (abs(pixels - [255, 0, 0]) < 30).all()
    picture.paste("white", (0, 0, 120, 160))
    picture.paste((255, 0, 0), (16, 16, 104, 104))
    picture.save(tmp_path / "imageFiles" / path.stem / "image_00000.jpg", quality=100, subsampling=0)
    with Image.open(io.BytesIO(read(tmp_path)[0][0]["images"][0]["bytes"])) as crop:
        pixels = np.asarray(crop.convert("RGB"), dtype=int)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] > 200).all()  # the white around it, no smaller square


def test_parts_when_three_splits_then_validation_is_val(tmp_path):
    write(tmp_path / "3DPW", sequence(1), "a", "train")
    write(tmp_path / "3DPW", sequence(1), "b", "validation")
    write(tmp_path / "3DPW", sequence(1), "c", "test")
    rows, source = read(tmp_path)
    assert source.parts() == ["train/a", "val/b", "test/c"]
    assert len({row["id"] for row in rows}) == 3 * FRAMES


def test_rows_when_the_camera_is_invalid_or_joints_are_few_then_are_skipped(tmp_path):
    fields = sequence()
    fields["campose_valid"][0][1] = 0
    fields["poses2d"][1][2, 2, 5:] = 0  # five left
    fields["poses2d"][1][1, 2, 6:] = 0  # six are enough
    write(tmp_path, fields)
    rows, source = read(tmp_path)
    assert [row["id"].removeprefix(f"{SEQUENCE}/image_0000") for row in rows] == ["0/0", "0/1", "1/1", "2/0"]
    assert source.skipped == {"no valid camera": 1, "fewer than 6 detected joints": 1}


@pytest.mark.parametrize("field", ["poses", "cam_poses"])
def test_rows_when_numbers_are_nan_then_that_frame_alone_is_skipped(tmp_path, field):
    fields = sequence(1)
    numbers = fields["poses"][0] if field == "poses" else fields["cam_poses"]
    numbers[1] = np.nan
    write(tmp_path, fields)
    rows, source = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SEQUENCE}/image_0000{frame}/0" for frame in (0, 2)]
    assert source.skipped == {"`poses`: expected finite numbers": 1}


@pytest.mark.parametrize("value", [np.nan, 1e9, 55.0])
def test_rows_when_joints_span_no_box_then_that_person_alone_is_skipped(tmp_path, value):
    fields = sequence()
    fields["poses2d"][0][1, :2] = value
    write(tmp_path, fields)
    rows, source = read(tmp_path)
    assert len(rows) == 2 * FRAMES - 1
    assert source.skipped == {"joints that span no box of the picture": 1}


def test_image_when_two_people_then_is_decoded_once(tmp_path, monkeypatch):
    write(tmp_path, sequence())
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or open_image(*args, **options))
    assert len(list(ThreeDPW(tmp_path))) == 2 * FRAMES
    assert len(opened) == FRAMES


def test_images_when_missing_or_damaged_then_their_people_are_counted(tmp_path):
    write(tmp_path, sequence(), pictures=range(2))
    picture = tmp_path / "imageFiles" / SEQUENCE / "image_00001.jpg"
    picture.write_bytes(picture.read_bytes()[:-100])
    rows, source = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SEQUENCE}/image_00000/{person}" for person in range(2)]
    assert source.skipped == {f"missing image of {SEQUENCE}": 2, f"damaged image of {SEQUENCE}": 2}
    assert source.skipped_examples[f"missing image of {SEQUENCE}"] == ["image_00002.jpg"]


def test_sequence_when_its_name_leads_elsewhere_then_the_files_own_counts(tmp_path):
    write(tmp_path / "data", sequence(1, sequence="../../secret"))
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (120, 160)).save(secret / "image_00000.jpg")
    rows, source = read(tmp_path / "data")
    assert [row["id"] for row in rows] == [f"{SEQUENCE}/image_0000{frame}/0" for frame in range(FRAMES)]
    assert source.skipped == {}


def test_sequence_when_texts_are_no_utf_8_then_is_read(tmp_path):
    write(tmp_path, sequence(1, genders=["\xff\xfe"]))
    assert len(read(tmp_path)[0]) == FRAMES


LAYOUTS = {
    "a field absent": ({"campose_valid": None}, "found no campose_valid"),
    "SMPL-X": ({"poses": [np.zeros((FRAMES, 165))] * 2}, r"expected `poses` of shape \(3, 72\), got \(3, 165\)"),
    "other frames": (
        {"poses": [np.zeros((FRAMES + 1, 72))] * 2},
        r"expected `poses` of shape \(3, 72\), got \(4, 72\)",
    ),
    "untransposed": (
        {"poses2d": [np.zeros((FRAMES, 18, 3))] * 2},
        r"`poses2d` of shape \(3, 3, 18\), got \(3, 18, 3\)",
    ),
    "other people": ({"poses": [np.zeros((FRAMES, 72))]}, "shorter|longer"),
    "camera of 3 rows": ({"cam_poses": np.zeros((FRAMES, 3, 4))}, r"expected `cam_poses` of shape \(3, 4, 4\)"),
    "camera is a text": ({"cam_poses": "here"}, "cannot read"),
    "validity of one number": ({"campose_valid": [1, 1]}, r"expected `campose_valid` of shape \(3,\), got \(\)"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_file_when_of_another_layout_then_error_names_it(tmp_path, layout):
    changes, message = LAYOUTS[layout]
    fields = {name: value for name, value in sequence(**changes).items() if value is not None}
    path = write(tmp_path, fields)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_file_when_truncated_then_error_names_it_and_others_are_read(tmp_path, share):
    write(tmp_path, sequence(1), "whole")
    content = dumps_python_2(sequence())
    path = write(tmp_path, content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cannot read") as caught:
        read(tmp_path, [f"train/{SEQUENCE}"])
    assert str(path) in str(caught.value)
    assert len(read(tmp_path, ["train/whole"])[0]) == FRAMES


def test_file_when_hostile_then_nothing_runs(tmp_path):
    marker = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR".encode()
    content = b"\x80\x02}(T\x05\x00\x00\x00poses" + payload + _dump(sequence())[2:] + b"."
    write(tmp_path, content)
    with pytest.raises(ValueError, match=r"system"):
        read(tmp_path)
    assert not marker.exists()
    pickle.loads(content, encoding="latin1")
    assert marker.exists()


def test_file_when_gone_after_listing_then_error_names_it(tmp_path):
    path = write(tmp_path, sequence())
    source = ThreeDPW(tmp_path)
    parts = source.parts()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=SEQUENCE):
        list(source.rows(parts[0]))


def test_folder_when_empty_then_error_says_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sequenceFiles.zip"):
        ThreeDPW(tmp_path).parts()


def test_source_when_sent_to_another_process_then_rows_are_the_same(tmp_path):
    write(tmp_path, sequence())
    source = ThreeDPW(tmp_path)
    rows = [list(each.rows(f"train/{SEQUENCE}")) for each in (source, pickle.loads(pickle.dumps(source)))]
    assert [[row["id"], row["messages"], row["images"]] for row in rows[0]] == [
        [row["id"], row["messages"], row["images"]] for row in rows[1]
    ]


# -- beside the poses --


OTHER = "outdoors_fencing_01"


def with_shapes(seed=0, **changes):
    rng = np.random.default_rng(seed)
    return sequence(**{"betas": [rng.normal(0, 1, 300), rng.normal(0, 1, 10)], **changes})


def test_truths_then_are_shape_and_gender_of_the_person_in_the_order_asked(tmp_path):
    first, other = with_shapes(1), with_shapes(2, genders=["f", "f"])
    write(tmp_path / "3DPW", first, pictures=())
    write(tmp_path / "3DPW", other, OTHER, "validation", pictures=())
    asked = [(SEQUENCE, 2, 1), (OTHER, 0, 0), (SEQUENCE, 0, 0), (SEQUENCE, 2, 1), (OTHER, 1, 0), (SEQUENCE, 1, 1)]
    truths = ThreeDPW(tmp_path).truths([f"{name}/image_{frame:05d}/{person}" for name, frame, person in asked])
    assert len(truths) == len(asked)
    for truth, (name, _, person) in zip(truths, asked, strict=True):
        fields = first if name == SEQUENCE else other
        assert truth.betas.dtype == np.float32
        np.testing.assert_allclose(truth.betas, fields["betas"][person][:10], rtol=1e-6)
        assert truth.gender == {"m": "male", "f": "female"}[fields["genders"][person]]
        assert truth.joints is None
        assert truth.known is None


def test_truths_when_of_rows_then_their_ids_are_known(tmp_path):
    write(tmp_path, with_shapes())
    write(tmp_path, with_shapes(), OTHER, "test")
    rows, source = read(tmp_path)
    assert len(source.truths([row["id"] for row in rows])) == 4 * FRAMES
    assert source.truths([]) == []


def test_truths_when_of_many_rows_then_each_sequence_is_read_once(tmp_path, monkeypatch):
    for name in (SEQUENCE, OTHER):
        write(tmp_path, with_shapes(), name, pictures=())
    opened = []
    read_limited = threedpw.read_limited
    monkeypatch.setattr(threedpw, "read_limited", lambda path: opened.append(path.stem) or read_limited(path))
    ids = [f"{name}/image_{frame:05d}/{n}" for frame in range(FRAMES) for name in (SEQUENCE, OTHER) for n in (0, 1)]
    assert len(ThreeDPW(tmp_path).truths(ids)) == len(ids)
    assert sorted(opened) == [SEQUENCE, OTHER]


def test_truths_when_written_by_python_3_then_genders_may_be_bytes(tmp_path):
    fields = with_shapes(genders=[b"M", "F"])
    write(tmp_path, pickle.dumps(fields))
    ids = [f"{SEQUENCE}/image_00000/{person}" for person in (0, 1)]
    assert [truth.gender for truth in ThreeDPW(tmp_path).truths(ids)] == ["male", "female"]


@pytest.mark.parametrize(
    "id",
    [
        f"{SEQUENCE}/image_0000{FRAMES}/0",
        f"{SEQUENCE}/image_00000/2",
        f"{SEQUENCE}/image_00000/-1",
        f"{SEQUENCE}/image_-0001/0",
        f"{SEQUENCE}/image_00000",
        f"{SEQUENCE}/image_00000/0/0",
        f"{SEQUENCE}/image_00000/0\n",
        f"{SEQUENCE}/image_00000/{'9' * 5000}",
        f"{SEQUENCE}/picture_00000/0",
        f"a/{SEQUENCE}/image_00000/0",
        "downtown_cafe_00/image_00000/0",
        "../secret/image_00000/0",
        "",
    ],
)
def test_truths_when_the_files_have_no_such_person_then_error_names_row_and_file(tmp_path, id):
    write(tmp_path / "3DPW", with_shapes(), pictures=())
    with pytest.raises(ValueError, match="other files") as caught:
        ThreeDPW(tmp_path).truths([f"{SEQUENCE}/image_00000/0", id])
    assert repr(id)[:100] in str(caught.value)
    assert str(tmp_path / "3DPW" / "sequenceFiles") in str(caught.value)


def test_truths_when_two_splits_have_the_sequence_then_is_refused(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, with_shapes(), split=split)
    with pytest.raises(ValueError, match=f"expected one file {SEQUENCE}.pkl in .*found 2"):
        ThreeDPW(tmp_path).truths([f"{SEQUENCE}/image_00000/0"])


WRONG_TRUTHS = {
    "no betas": ({"betas": None}, "found no betas"),
    "no genders": ({"genders": None}, "found no genders"),
    "nine betas": ({"betas": [np.zeros(9)] * 2}, r"expected `betas` of shape \(10,\), got \(9,\)"),
    "betas of frames": ({"betas": [np.zeros((FRAMES, 10))] * 2}, r"expected `betas` of shape \(10,\), got \(3, 10\)"),
    "betas of one": ({"betas": [np.zeros(10)]}, "`betas` and `genders` of each person, got 1 and 2"),
    "NaN": ({"betas": [np.full(10, np.nan)] * 2}, "finite numbers in `betas`"),
    "a text": ({"betas": ["tall", "small"]}, "expected numbers of shape"),
    "unknown gender": ({"genders": ["m", "\xff"]}, "expected one of m, male, f, female"),
    "gender is a number": ({"genders": [0, 1]}, "expected one of m, male, f, female"),
    "betas are a number": ({"betas": 3}, "cannot read"),
}


@pytest.mark.parametrize("fault", WRONG_TRUTHS)
def test_truths_when_the_sequence_is_of_another_layout_then_error_names_it(tmp_path, fault):
    changes, message = WRONG_TRUTHS[fault]
    path = write(tmp_path, {name: value for name, value in with_shapes(**changes).items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        ThreeDPW(tmp_path).truths([f"{SEQUENCE}/image_00000/0"])
    assert str(path) in str(caught.value)


def test_truths_when_the_file_is_hostile_then_nothing_runs(tmp_path):
    marker = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR".encode()
    write(tmp_path, b"\x80\x02}(T\x05\x00\x00\x00betas" + payload + _dump(with_shapes())[2:] + b".")
    with pytest.raises(ValueError, match="system"):
        ThreeDPW(tmp_path).truths([f"{SEQUENCE}/image_00000/0"])
    assert not marker.exists()
