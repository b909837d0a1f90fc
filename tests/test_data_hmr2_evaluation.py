"""HMR2's evaluation npz files and 3DPW's pictures, in a small tree of their layout."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data import hmr2_evaluation
from chatpose_hf.data.hmr2_evaluation import Hmr2Evaluation
from chatpose_hf.data.rows import validate_row


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


def test_human36m_when_without_poses_then_all_are_counted_and_3dpw_is_read(tmp_path):
    write(tmp_path, labels([FIRST]))
    names = [f"images/S9_Directions_1.60457274_{frame:06d}.jpg" for frame in (1, 6, 11)]
    absent = dict.fromkeys(("body_pose", "has_body_pose", "betas", "has_betas", "gender"))
    write(tmp_path, labels(names, **absent), "h36m_val_p2", pictures=())
    rows, source = read(tmp_path)
    assert source.parts() == ["test/3dpw_test-0000", "test/h36m_val_p2-0000"]
    assert len(rows) == 1
    assert source.skipped == {"no body pose": 3}


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
