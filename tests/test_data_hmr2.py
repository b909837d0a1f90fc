"""HMR2's training shards: which people become rows, and what torn and hostile shards do."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.data import hmr2
from chatpose_hf.data.hmr2 import Hmr2Training
from chatpose_hf.data.rows import validate_row
from chatpose_hf.person_crop import crop_person


POSE = np.linspace(-0.5, 0.5, 72).astype(np.float32)
SET = "coco-train-2014-pruned"


def in_object_array(value):
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def make_person(**changes):
    """A person as `data.pyd` has one."""
    keypoints = np.zeros((44, 3), np.float32)
    keypoints[:5] = 40, 60, 0.9
    return {
        "keypoints_2d": keypoints,
        "keypoints_3d": np.zeros((44, 4), np.float32),
        "center": np.array([40.0, 60.0], np.float32),
        "scale": np.array([0.15, 0.3], np.float32),  # 30 x 60 pixels
        "body_pose": POSE,
        "betas": np.full(10, 0.5, np.float32),
        "has_body_pose": np.array(1.0),
        "has_betas": np.array(1.0),
        "extra_info": {
            "fitting_loss": in_object_array({"reprojection_loss": np.float32(100.0)}),
            "detection_npz_idx": 0,
        },
        **changes,
    }


def make_picture():
    """Each place has its own colour."""
    y, x = np.mgrid[:120, :160]
    return Image.fromarray(np.stack([x, y * 2, (x + y) // 2], axis=-1).astype(np.uint8))


def encoded(image, name="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, name, quality=95)
    return buffer.getvalue()


JPEG = encoded(make_picture())


def write_shard(folder, members, name=SET, shard="000000"):
    path = folder / "dataset_tars" / name / f"{shard}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_sample(key, *people):
    return [(f"{key}.jpg", JPEG), (f"{key}.data.pyd", pickle.dumps(list(people), 4))]


def read(folder):
    source = Hmr2Training(folder)
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows, source.skipped


def test_row_of_a_person_when_valid_then_has_the_pose_and_the_crop(tmp_path):
    other = make_person(center=np.array([120.0, 50.0]), scale=np.array([0.2, 0.1]), body_pose=-POSE)
    write_shard(tmp_path, make_sample("images/COCO_0", make_person(), other))
    rows, skipped = read(tmp_path)
    assert list(pickle.loads(pickle.dumps(Hmr2Training(tmp_path))))[1]["images"] == rows[1]["images"]
    assert [row["id"] for row in rows] == [f"{SET}/000000/images/COCO_0/0", f"{SET}/000000/images/COCO_0/1"]
    assert skipped == {}
    for row, pose, box in zip(rows, (POSE, -POSE), ((25, 30, 55, 90), (100, 40, 140, 60)), strict=True):
        assert row["task"] == "pose_estimation"
        assert row["source"] == "hmr2"
        np.testing.assert_array_equal(row["poses"], [pose.reshape(24, 3)])
        assert row["pose_mask"] == [[True] * 24]
        crop = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert crop.format == "JPEG"
        wanted = crop_person(make_picture(), box, 336)
        assert crop.size == wanted.size == (336, 336)
        assert abs(np.asarray(crop, float) - np.asarray(wanted, float)).mean() < 3


def test_members_when_in_other_orders_and_formats_then_read_and_others_ignored(tmp_path):
    labels = pickle.dumps([make_person()], 2)
    png = encoded(make_picture(), "PNG")
    members = [
        ("a.data.pyd", labels), ("a.detection.npz", b"no zip"), ("a.jpeg", JPEG), ("note.txt", b"x"),
        ("b.PNG", png), ("b.data.pyd", labels), ("d/e.v1/c.jpg", JPEG), ("d/e.v1/c.data.pyd", labels),
    ]  # fmt: skip
    write_shard(tmp_path, members)
    rows, skipped = read(tmp_path)
    assert [row["id"].removeprefix(f"{SET}/000000/") for row in rows] == ["a/0", "b/0", "d/e.v1/c/0"]
    assert skipped == {}


def test_parts_when_any_of_three_folders_is_given_then_the_same_shards_and_splits(tmp_path):
    root = tmp_path / "hmr2_training_data"
    for name, shard in (("coco-val", "000000"), ("mpii-train", "000001"), ("mpii-train", "000000"), ("bedlam", "0")):
        write_shard(root, make_sample(f"{name}{shard}", make_person()), name, shard)
    parts = ["train/mpii-train_000000", "train/mpii-train_000001", "val/coco-val_000000"]
    assert Hmr2Training(root).parts() == parts
    assert Hmr2Training(root / "dataset_tars").parts() == parts
    of_set = Hmr2Training(root / "dataset_tars" / "mpii-train")
    assert of_set.parts() == parts[:2]
    rows = {row["id"]: row["licence"] for row in of_set}
    assert list(rows) == ["mpii-train/000000/mpii-train000000/0", "mpii-train/000001/mpii-train000001/0"]
    assert all("MPII" in licence for licence in rows.values())
    assert "COCO" in next(Hmr2Training(root).rows(parts[2]))["licence"]


@pytest.mark.parametrize("flag", [True, 1, 1.0, np.array(1.0), np.array([1]), np.float32(1), np.bool_(True)])
def test_flag_when_on_in_any_form_then_a_row(tmp_path, flag):
    write_shard(tmp_path, make_sample("a", make_person(has_body_pose=flag, has_betas=flag)))
    rows, skipped = read(tmp_path)
    assert (len(rows), skipped) == (1, {})


def few_keypoints():
    keypoints = make_person()["keypoints_2d"]
    keypoints[4, 2] = 0.29
    return keypoints


def with_loss(loss):
    return {"fitting_loss": in_object_array({"reprojection_loss": loss})}


def with_beta(beta):
    betas = np.zeros(10, np.float32)
    betas[9] = beta
    return betas


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_body_pose": np.array(0.0), "body_pose": np.zeros(72)}, "no body pose"),
        ({"has_body_pose": False, "body_pose": None}, "no body pose"),
        ({"has_body_pose": float("nan")}, "no body pose"),
        ({"has_betas": np.float64(0)}, "no shape fitted with the pose"),
        ({"betas": with_beta(-3.01)}, "|beta| over 3"),
        ({"betas": with_beta(3)}, None),
        ({"keypoints_2d": few_keypoints()}, "fewer than 5 keypoints"),
        ({"extra_info": with_loss(np.array(31000.0))}, "reprojection loss of 31000 or more"),
        ({"extra_info": in_object_array(with_loss(40000))}, "reprojection loss of 31000 or more"),
        ({"extra_info": with_loss(30999.0)}, None),
        ({"extra_info": with_loss(None)}, None),
        ({"extra_info": {"fitting_loss": in_object_array({})}}, None),
        ({"extra_info": {}}, None),
        ({"extra_info": None}, None),
        ({"body_pose": np.full(72, np.nan)}, "`poses`: expected finite numbers"),
        ({"body_pose": np.zeros(69)}, "damaged labels of a person"),
        ({"body_pose": "text"}, "damaged labels of a person"),
        ({"scale": np.array(0.3)}, "damaged labels of a person"),
        ({"has_body_pose": np.ones(2)}, "damaged labels of a person"),
        ({"center": np.array([900.0, 60.0])}, "a box that is none of the picture"),
        ({"scale": np.array([0.1, np.nan])}, "a box that is none of the picture"),
    ],
)
def test_person_when_unusable_then_left_out_with_the_reason(tmp_path, changes, reason):
    write_shard(tmp_path, make_sample("a", make_person(**changes), make_person()))
    rows, skipped = read(tmp_path)
    assert [row["id"][-1] for row in rows] == (["0", "1"] if reason is None else ["1"])
    assert skipped == ({} if reason is None else {reason: 1})


def test_person_when_no_dictionary_or_without_a_field_then_left_out_alone(tmp_path):
    incomplete = make_person()
    del incomplete["center"]
    write_shard(tmp_path, make_sample("a", incomplete, 5, make_person()))
    rows, skipped = read(tmp_path)
    assert [row["id"][-1] for row in rows] == ["2"]
    assert skipped == {"damaged labels of a person": 2}


def kernel(offset):
    """scipy.ndimage's Gaussian of sigma 2, by its definition."""
    weights = {step: np.exp(-(step**2) / 8) for step in range(-8, 9)}
    return weights.get(offset, 0) / sum(weights.values())


@pytest.fixture(scope="module")
def root_with_histogram(tmp_path_factory):
    """AMASS's poses are all the rest pose, but once a wrist was elsewhere."""
    root = tmp_path_factory.mktemp("hmr2")
    histogram = np.zeros((21, 100, 100, 100), np.uint8)
    for place, count in COUNTS.items():
        histogram[place] = count
    np.save(root / "amass_poses_hist100_SMPL+H_G.npy", histogram)
    yield root
    hmr2._load_densities.cache_clear()


COUNTS = {**{(joint, 50, 50, 50): 2 for joint in range(21)}, (20, 0, 99, 40): 1}


def test_densities_when_a_histogram_is_given_then_smoothed_along_bins_and_joints(root_with_histogram):
    densities = hmr2._load_densities(root_with_histogram / "amass_poses_hist100_SMPL+H_G.npy")
    assert densities.shape == (21, 100, 100, 100)
    for place in [
        (3, 50, 50, 50),
        (5, 44, 51, 50),
        (0, 42, 58, 50),
        (18, 3, 97, 40),
        (12, 0, 99, 40),
        (11, 0, 99, 40),
    ]:
        expected = sum(
            count * np.prod([kernel(a - b) for a, b in zip(place, center, strict=True)])
            for center, count in COUNTS.items()
        )
        np.testing.assert_allclose(densities[place], expected / 43 / (2 * np.pi / 100) ** 3, rtol=1e-5)


def test_pose_when_a_histogram_is_there_then_must_be_likely_in_every_joint(root_with_histogram):
    turned, far, foot, hand, at_the_edge = np.zeros((5, 24, 3), np.float32)
    turned[17] = 2 * np.pi - 0.1, 0, 0  # the same as by -0.1
    far[18] = 0, 1, 0
    foot[10] = 0, 0, 1  # nothing there, and the threshold of feet is 0
    hand[22] = 0, 1, 0  # not in the histogram
    at_the_edge[1] = np.pi, 0, 0
    people = [make_person(body_pose=pose.reshape(72)) for pose in (turned, far, foot, hand, at_the_edge)]
    nan = make_person(body_pose=np.full(72, np.nan))
    write_shard(root_with_histogram, make_sample("a", *people, nan))
    rows, skipped = read(root_with_histogram)
    assert [row["id"][-1] for row in rows] == ["0", "3"]
    assert skipped == {"a joint's rotation unlikely in AMASS": 3, "`poses`: expected finite numbers": 1}
    of_set = Hmr2Training(root_with_histogram / "dataset_tars" / SET)
    assert of_set.settings()["histogram"]
    assert len(list(of_set)) == 2


def test_histogram_when_of_another_shape_or_of_objects_then_an_error_names_it(tmp_path):
    write_shard(tmp_path, make_sample("a", make_person()))
    assert not Hmr2Training(tmp_path).settings()["histogram"]
    path = tmp_path / "amass_poses_hist100_SMPL+H_G.npy"
    for array, match in ((np.zeros((21, 10, 10, 10)), r"hist100.*shape \(21, 100"), (in_object_array({}), "hist100")):
        np.save(path, array)
        with pytest.raises(ValueError, match=match):
            list(Hmr2Training(tmp_path))


def test_sample_when_upstream_calls_it_corrupt_then_left_out(tmp_path):
    key = "aic-train-vitpose/0a047f0124ae48f8eee15a9506ce1449ee1ba669"
    members = make_sample(key, make_person()) + make_sample("aic-train-vitpose/0a", make_person())
    write_shard(tmp_path, members, "aic-train-vitpose")
    rows, skipped = read(tmp_path)
    assert len(rows) == 1
    assert skipped == {"corrupt by upstream's list": 1}


def test_sample_when_a_file_is_missing_or_damaged_then_left_out_alone(tmp_path):
    labels = pickle.dumps([make_person(), make_person()], 4)
    members = [
        ("no_labels.jpg", JPEG),
        ("no_image.data.pyd", labels),
        ("cut_image.jpg", JPEG[:1500]), ("cut_image.data.pyd", labels),
        ("gif.jpg", encoded(make_picture(), "GIF")), ("gif.data.pyd", labels),
        ("cut_labels.jpg", JPEG), ("cut_labels.data.pyd", labels[:-20]),
        ("other_labels.jpg", JPEG), ("other_labels.data.pyd", pickle.dumps({"a": 1})),
        *make_sample("good", make_person()),
    ]  # fmt: skip
    write_shard(tmp_path, members)
    rows, skipped = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SET}/000000/good/0"]
    assert skipped == {"missing labels": 1, "missing image": 2, "damaged image": 4, "damaged labels": 2}


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return __import__("os").system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_labels_when_hostile_then_nothing_runs(tmp_path, protocol):
    marker = tmp_path / "marker"
    person = make_person(extra_info={"fitting_loss": in_object_array({"reprojection_loss": Touch(marker)})})
    payload = pickle.dumps([person], protocol)
    pickle.loads(payload)
    assert marker.exists()
    marker.unlink()
    write_shard(tmp_path, [("bad.jpg", JPEG), ("bad.data.pyd", payload), *make_sample("good", make_person())])
    rows, skipped = read(tmp_path)
    assert not marker.exists()
    assert [row["id"] for row in rows] == [f"{SET}/000000/good/0"]
    assert skipped == {"damaged labels": 1}


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_members_when_links_devices_or_outside_then_refused(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    labels = pickle.dumps([make_person()], 4)
    members = [
        special("folder.jpg", tarfile.DIRTYPE),
        special("link.jpg", tarfile.SYMTYPE, str(secret)), ("link.data.pyd", labels),
        special("hard.jpg", tarfile.LNKTYPE, str(secret)), ("hard.data.pyd", labels),
        special("device.jpg", tarfile.CHRTYPE), special("pipe.data.pyd", tarfile.FIFOTYPE),
        ("/etc/absolute.jpg", JPEG), ("/etc/absolute.data.pyd", labels),
        ("../up.jpg", JPEG), ("../up.data.pyd", labels),
        *make_sample("good", make_person()),
    ]  # fmt: skip
    write_shard(tmp_path, members)
    rows, skipped = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SET}/000000/good/0"]
    assert skipped == {
        "refused member that is a link or a device": 4,
        "refused name of a member": 4,
        "missing image": 2,
    }


def test_member_when_too_large_then_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hmr2, "_MAX_MEMBER_BYTES", len(JPEG))
    labels = pickle.dumps([make_person()], 4)
    write_shard(tmp_path, [("a.jpg", JPEG + b"\0"), ("a.data.pyd", labels), *make_sample("b", make_person())])
    rows, skipped = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SET}/000000/b/0"]
    assert skipped == {f"refused member of more than {len(JPEG)} bytes": 1, "missing image": 1}


def test_member_when_its_name_is_no_utf8_then_the_id_is_text(tmp_path):
    path = write_shard(tmp_path, make_sample("caf__", make_person()))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, content in make_sample("caf\xe9", make_person()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert b"caf\xe9.jpg" in path.read_bytes()
    rows, _ = read(tmp_path)
    assert [row["id"] for row in rows] == [f"{SET}/000000/caf\N{REPLACEMENT CHARACTER}/0"]


def test_shard_when_cut_off_anywhere_then_an_error_names_it(tmp_path):
    path = write_shard(tmp_path, [*make_sample("a", make_person(has_body_pose=0)), ("a.txt", bytes(600))])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 1024  # after the zeros of a.txt
    assert list(Hmr2Training(tmp_path)) == []
    for size in [0, 1, *range(500, end + 512, 100), end + 511]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pruned/000000\.tar`: .*(truncated|damaged|empty)"):
            list(Hmr2Training(tmp_path))


def test_shard_when_garbled_then_an_error_names_it(tmp_path):
    path = write_shard(tmp_path, make_sample("a", make_person()))
    whole = path.read_bytes()
    second = whole.index(b"a.data.pyd")
    for content in (whole[:second] + b"X" + whole[second + 1 :], b"<html>" * 1000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pruned/000000\.tar`"):
            list(Hmr2Training(tmp_path))


def test_shard_when_a_member_leads_back_to_itself_then_refused(tmp_path, monkeypatch):
    path = write_shard(tmp_path, make_sample("a", make_person()))
    header = tarfile.TarInfo("b.jpg")
    header.size = -512
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    contents = iter([None] * 100)  # ends what would not
    monkeypatch.setattr(Hmr2Training, "_read_member", lambda *arguments: next(contents))
    with pytest.raises(ValueError, match=r"'b\.jpg' announces -512 bytes"):
        list(Hmr2Training(tmp_path))


def test_shard_when_of_another_layout_or_absent_then_an_error_names_it(tmp_path):
    path = write_shard(tmp_path, [("a.json", b"{}")])
    with pytest.raises(ValueError, match=r"<key>\.data\.pyd in .*000000\.tar, found none"):
        list(Hmr2Training(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"000000\.tar"):
        list(Hmr2Training(tmp_path).read_part(f"train/{SET}_000000"))
    with pytest.raises(FileNotFoundError, match=r"expected dataset_tars/<set>/000000\.tar"):
        Hmr2Training(tmp_path).parts()
