"""BEDLAM's npz files and pictures, in a small tree of their layout."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data import bedlam
from chatpose_hf.data import source as source_file
from chatpose_hf.data.bedlam import Bedlam
from chatpose_hf.data.rows import validate_row


SCENE = "20221010_3_1000_batch01hand_6fps"
CLOSEUP = "20221019_1_250_highbmihand_closeup_suburb_b_6fps"
FIRST = "seq_000000/seq_000000_0000.png"
SECOND = "seq_000000/seq_000000_0005.png"


def labels(names, width=165, **changes):
    count = len(names)
    poses = np.arange(count * width, dtype=np.float64).reshape(count, width) / 1000
    arrays = {
        "imgname": np.array(names),
        "center": np.full((count, 2), 60.0),
        "scale": np.full(count, 40 / 200),
        "pose_cam": poses,
        "pose_world": poses + 1,
        "shape": np.zeros((count, 11)),
        "gtkps": np.zeros((count, 127, 3)),
        "cam_int": np.tile(np.eye(3), (count, 1, 1)),
        "gender": np.array(["neutral"] * count),
        "motion_info": np.array([{"a": 1}] * count, dtype=object),  # a pickle inside, never read
        "sub": np.array(["s"] * count),
    }
    return {**arrays, **changes}


def write_labels(folder, scene, arrays):
    path = folder / "training_labels" / "all_npz_12_training" / f"{scene}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_image(folder, scene, name, image=None):
    path = folder / "training_images" / scene / "png" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (160, 90), (10, 200, 30))).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    write_labels(tmp_path, SCENE, labels([FIRST, FIRST, SECOND]))
    write_image(tmp_path, SCENE, FIRST)
    write_image(tmp_path, SCENE, SECOND)
    return tmp_path


def read(folder, **options):
    source = Bedlam(folder, image_size=32, **options)
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows, source


def picture(row):
    return Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")


def test_rows_when_smpl_x_then_take_22_joints_and_mask_the_hands(tree):
    rows, source = read(tree)
    assert [row["id"] for row in rows] == [f"{SCENE}/{FIRST}/0", f"{SCENE}/{FIRST}/1", f"{SCENE}/{SECOND}/2"]
    assert source.skipped == {}
    for number, row in enumerate(rows):
        wanted = np.zeros((24, 3))
        wanted[:22] = (number * 165 + np.arange(66)).reshape(22, 3) / 1000
        np.testing.assert_allclose(row["poses"][0], wanted, rtol=1e-6)  # in the camera frame as they are
        assert row["pose_mask"] == [[joint < 22 for joint in range(24)]]
        assert row["task"] == "pose_estimation"
        assert "non-commercial" in row["licence"]


def test_rows_when_smpl_then_take_all_24_joints(tree):
    write_labels(tree, SCENE, labels([FIRST], width=72))
    rows, _ = read(tree)
    np.testing.assert_allclose(rows[0]["poses"][0], np.arange(72).reshape(24, 3) / 1000, rtol=1e-6)
    assert rows[0]["pose_mask"] == [[True] * 24]


def test_crop_when_scale_is_over_200_then_the_box_has_that_many_pixels(tree):
    """A box of 40 pixels: by 3:4 the square's side is 53.3; around (60, 60) it ends below the picture of 90 rows at 86.7."""
    image = Image.new("RGB", (160, 90), "white")
    image.paste((255, 0, 0), (34, 34, 86, 86))
    write_image(tree, SCENE, FIRST, image)
    rows, _ = read(tree)
    pixels = np.asarray(picture(rows[0]), dtype=int)
    assert pixels.shape == (32, 32, 3)
    assert (abs(pixels[2:-2, 2:-2] - [255, 0, 0]) < 30).all()


def test_closeup_when_lying_on_its_side_then_is_turned_clockwise(tmp_path):
    write_labels(tmp_path, CLOSEUP, labels([FIRST], center=np.array([[45.0, 80.0]]), scale=np.array([60 / 200])))
    # The left edge of the stored picture is the top of the upright one.
    stored = Image.new("RGB", (160, 90), (0, 0, 255))
    stored.paste((255, 0, 0), (0, 0, 80, 90))
    write_image(tmp_path, CLOSEUP, FIRST, stored)
    rows, _ = read(tmp_path)
    pixels = np.asarray(picture(rows[0]), dtype=int)
    assert pixels[4, 16, 0] > 200
    assert pixels[27, 16, 2] > 200


def test_closeup_when_upright_already_then_stays(tmp_path):
    write_labels(tmp_path, CLOSEUP, labels([FIRST], center=np.array([[45.0, 80.0]]), scale=np.array([60 / 200])))
    upright = Image.new("RGB", (90, 160), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 90, 80))
    write_image(tmp_path, CLOSEUP, FIRST, upright)
    pixels = np.asarray(picture(read(tmp_path)[0][0]), dtype=int)
    assert pixels[4, 16, 0] > 200
    assert pixels[27, 16, 2] > 200


def test_parts_when_people_of_a_picture_are_far_apart_then_it_is_opened_once(tmp_path, monkeypatch):
    """The files have one person's whole sequence after another's."""
    monkeypatch.setattr(bedlam, "_IMAGES_PER_PART", 2)
    names = [f"seq_000000/seq_000000_{frame:04d}.png" for frame in (0, 5, 10, 15, 20)]
    write_labels(tmp_path, SCENE, labels([*names, *names[1:]]))
    write_labels(tmp_path, CLOSEUP, labels(np.array([name.encode() for name in names[:1]])))
    for name in names:
        write_image(tmp_path, SCENE, name)
    write_image(tmp_path, CLOSEUP, names[0])
    opened = []
    monkeypatch.setattr(source_file, "open_image", lambda path: opened.append(path) or Image.open(path))
    source = Bedlam(tmp_path, image_size=32)
    parts = [f"train/{SCENE}-0000", f"train/{SCENE}-0001", f"train/{SCENE}-0002", f"train/{CLOSEUP}-0000"]
    assert source.parts() == parts
    people = [[int(row["id"].rsplit("/", 1)[1]) for row in source.rows(part)] for part in parts]
    assert people == [[0, 1, 5], [2, 6, 3, 7], [4, 8], [0]]
    assert len(opened) == 6
    assert [int(row["id"].rsplit("/", 1)[1]) for row in Bedlam(tmp_path, image_size=32).rows(parts[1])] == people[1]


def test_parts_when_a_file_is_damaged_then_the_others_are_read(tree):
    path = write_labels(tree, CLOSEUP, labels([FIRST]))
    path.write_bytes(path.read_bytes()[:1000])
    source = Bedlam(tree, image_size=32)
    assert source.parts() == [f"train/{SCENE}-0000", f"train/{CLOSEUP}-0000"]
    assert len(list(source.rows(f"train/{SCENE}-0000"))) == 3
    with pytest.raises(ValueError, match=path.name):
        list(source.rows(f"train/{CLOSEUP}-0000"))


@pytest.mark.parametrize("place", ["", "images/"])
def test_rows_when_the_folder_is_laid_out_otherwise_then_labels_and_pictures_are_found(place, tmp_path):
    np.savez(tmp_path / f"{SCENE}.npz", **labels([FIRST]))
    np.savez(tmp_path / "agora-bfh.npz", **labels([FIRST]))  # another data set's
    path = tmp_path / place / SCENE / "png" / FIRST
    path.parent.mkdir(parents=True)
    Image.new("RGB", (160, 90)).save(path)
    rows, source = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SCENE}/{FIRST}/0"]
    assert source.parts() == [f"train/{SCENE}-0000"]


def test_split_when_the_folder_is_of_validation_then_is_val(tree):
    path = tree / "training_labels" / "all_npz_12_validation" / "20221018_1_250_batch01hand_6fps.npz"
    path.parent.mkdir()
    np.savez(path, **labels([FIRST]))
    assert [part.split("/")[0] for part in Bedlam(tree).parts()] == ["train", "val"]


def test_image_when_missing_or_damaged_or_outside_then_is_counted(tree):
    (tree / "training_images" / SCENE / "png" / FIRST).unlink()
    damaged = tree / "training_images" / SCENE / "png" / SECOND
    damaged.write_bytes(damaged.read_bytes()[:60])
    write_labels(tree, SCENE, labels([FIRST, FIRST, SECOND, "../../../secret.png"]))
    rows, source = read(tree)
    assert rows == []
    assert source.skipped == {
        f"missing image of {SCENE}": 2,
        f"damaged image of {SCENE}": 1,
        "refused name of an image": 1,
    }


def test_pose_when_nan_then_is_counted_and_the_others_stay(tree):
    arrays = labels([FIRST, SECOND])
    arrays["pose_cam"][0, 5] = np.nan
    write_labels(tree, SCENE, arrays)
    rows, source = read(tree)
    assert len(rows) == 1
    assert source.skipped == {"`poses`: expected finite numbers": 1}


def test_box_when_outside_of_the_picture_then_is_counted(tree):
    write_labels(tree, SCENE, labels([FIRST, SECOND], center=np.array([[60.0, 60.0], [5000.0, 60.0]])))
    rows, source = read(tree)
    assert len(rows) == 1
    assert source.skipped == {"a box that is none of the picture": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pose_cam": np.zeros((2, 100))}, r"`pose_cam` \(2, 165\) or \(2, 72\)"),
        ({"center": np.zeros(2)}, r"`center` \(2, 2\)"),
        ({"imgname": np.array([b"\xff\xfe.png", b"x.png"])}, "utf-8"),
        ({"imgname": np.array([FIRST, SECOND], dtype=object)}, r"imgname\.astype\(str\)"),
        ({"scale": np.array([1.0, 2.0], dtype=object)}, "objects in it would be a pickle"),
    ],
)
def test_labels_when_of_another_layout_then_the_file_is_named(tree, changes, message):
    path = write_labels(tree, SCENE, {**labels([FIRST, SECOND]), **changes})
    with pytest.raises(ValueError, match=message) as caught:
        read(tree)
    assert path.name in str(caught.value)


def test_labels_when_truncated_or_without_an_array_then_the_file_is_named(tree):
    path = write_labels(tree, SCENE, labels([FIRST]))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=path.name):
        read(tree)
    arrays = labels([FIRST])
    del arrays["pose_cam"]
    write_labels(tree, SCENE, arrays)
    with pytest.raises(ValueError, match="found no pose_cam"):
        read(tree)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_labels_when_hostile_then_nothing_runs(tree, tmp_path):
    marker = tmp_path / "marker"
    objects = np.array([Payload(marker)], dtype=object)
    path = write_labels(tree, SCENE, labels([FIRST], imgname=objects))
    with pytest.raises(ValueError, match="would be a pickle"):
        read(tree)
    assert not marker.exists()
    # In a field that is not read it does no harm.
    write_labels(tree, SCENE, labels([FIRST], motion_info=objects))
    assert len(read(tree)[0]) == 1
    assert not marker.exists()
    # The payload is live.
    with zipfile.ZipFile(path) as file:
        content = file.read("motion_info.npy")
    pickle.loads(content[content.index(b"\x80") :])
    assert marker.exists()


def test_labels_when_none_or_twice_then_says_so(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="all_npz_12_training"):
        Bedlam(tmp_path / "training_images").parts()
    other = tree / "smpl"
    other.mkdir()
    np.savez(other / f"{SCENE}.npz", **labels([FIRST], width=72))
    with pytest.raises(ValueError, match="one kind"):
        Bedlam(tree).parts()
