"""AMASS's motions: yaw, the frames taken, texts from files or from geometry, and files that are none."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from chatpose_hf.data.amass import AmassMotions, face_camera, find_motion
from chatpose_hf.data.prepare import prepare_rows
from chatpose_hf.data.rows import load_rows, validate_row
from chatpose_hf.pose_files import remove_yaw


HALF_PI = np.pi / 2


def turn(axis, angle):
    """A rotation about x, y or z, as in a textbook."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array(
        {
            "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
            "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
        }[axis]
    )


def to_rotvec(rotmat):
    """By the matrix's real eigenvector, the sign from its skew part."""
    values, vectors = np.linalg.eig(rotmat)
    axis = np.real(vectors[:, np.argmin(abs(values - 1))])
    skew = np.array([rotmat[2, 1] - rotmat[1, 2], rotmat[0, 2] - rotmat[2, 0], rotmat[1, 0] - rotmat[0, 1]])
    return axis * np.arctan2(axis @ skew / 2, (np.trace(rotmat) - 1) / 2)


def to_rotmat(rotvec):
    """Rodrigues' formula."""
    angle = np.linalg.norm(rotvec)
    x, y, z = np.asarray(rotvec, dtype=float) / (angle or 1.0)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew


def root_poses(*rotmats):
    poses = torch.zeros(len(rotmats), 24, 3, dtype=torch.float64)
    poses[:, 0] = torch.from_numpy(np.stack([to_rotvec(rotmat) for rotmat in rotmats]))
    return poses


def write_motion(path, num_frames=240, rate=120.0, joints=52, yaw=0.7, **arrays):
    """AMASS's keys and types. The left elbow's angle about z tells the frame, in hundredths; fingers are bent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    poses = np.zeros((num_frames, joints, 3))
    poses[:, 0] = to_rotvec(turn("z", yaw) @ turn("x", HALF_PI))
    poses[:, 18, 2] = np.arange(num_frames) / 100
    poses[:, 22:] = 0.9
    fields = {
        "poses": poses.reshape(num_frames, joints * 3),
        "trans": np.zeros((num_frames, 3)),
        "betas": np.zeros(16),
        "dmpls": np.zeros((num_frames, 8)),
        "gender": np.array("female"),
        "mocap_framerate": np.array(rate),
    }
    np.savez(path, **{name: value for name, value in {**fields, **arrays}.items() if value is not None})
    return path


def read(source):
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows


def frames(rows):
    return [int(row["id"].rpartition(":")[2]) for row in rows]


def texts(row):
    return [(caption["kind"], caption["text"]) for caption in row["captions"]]


# --- yaw


@pytest.mark.parametrize("yaw", [0.0, 0.4, -2.5, np.pi, 3.5])
def test_remove_yaw_when_upright_then_any_heading_gives_a_quarter_turn_about_x(yaw):
    poses = remove_yaw(root_poses(turn("z", yaw) @ turn("x", HALF_PI)))
    np.testing.assert_allclose(poses[0, 0], [HALF_PI, 0, 0], atol=1e-12)


@pytest.mark.parametrize("yaw", [0.0, 0.4, -2.5, 3.5])
def test_face_camera_when_upright_then_diag_1_minus1_minus1(yaw):
    poses = face_camera(root_poses(turn("z", yaw) @ turn("x", HALF_PI)).numpy())
    assert poses.dtype == np.float32
    np.testing.assert_allclose(to_rotmat(poses[0, 0]), np.diag([1, -1, -1]), atol=1e-6)


def test_face_camera_when_lying_on_the_back_then_a_quarter_turn_about_x():
    poses = face_camera(np.zeros((1, 24, 3)))
    np.testing.assert_allclose(poses[0, 0], [HALF_PI, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(poses[0, 1:], 0)


@pytest.mark.parametrize("tilt", [-1.5, -0.6, 0.0, 0.9, 1.56])
def test_remove_yaw_when_tilted_then_rebuilds_with_the_yaw_of_the_decomposition_zero(tilt):
    headings = [turn("z", yaw) @ turn("y", tilt) @ turn("x", roll) for yaw in (0.0, 2.0) for roll in (-2.9, 0.3, 1.6)]
    poses = remove_yaw(root_poses(*headings))[:, 0].numpy()
    for pose, roll in zip(poses, (-2.9, 0.3, 1.6) * 2, strict=True):
        np.testing.assert_allclose(to_rotmat(pose), turn("y", tilt) @ turn("x", roll), atol=1e-9)


@pytest.mark.parametrize("side", [1, -1])
def test_remove_yaw_when_lying_on_the_side_then_every_heading_gives_the_same(side):
    # At the pole only c - a (or c + a) is defined: all of these are one posture in different headings.
    angles = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, -3.0), (-1.3, 0.4)]
    poses = root_poses(*(turn("z", c) @ turn("y", side * HALF_PI) @ turn("x", a) for c, a in angles))
    for pose in remove_yaw(poses)[:, 0].numpy():
        np.testing.assert_allclose(to_rotmat(pose), turn("y", side * HALF_PI), atol=1e-6)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("noise", [1e-8, -1e-8, 1e-5, -1e-3])
def test_remove_yaw_when_nearly_on_the_side_then_still_only_turns_about_the_vertical(side, noise):
    before = root_poses(turn("z", 0.8) @ turn("y", side * (HALF_PI + noise)) @ turn("x", 0.5))
    after = to_rotmat(remove_yaw(before)[0, 0].numpy())
    applied = after @ to_rotmat(before[0, 0].numpy()).T
    np.testing.assert_allclose(applied[2], [0, 0, 1], atol=1e-9)
    if abs(noise) < 1e-6:
        np.testing.assert_allclose(after, turn("y", side * HALF_PI), atol=1e-7)


def test_remove_yaw_when_a_pose_is_nan_then_the_others_are_as_without_it():
    poses = root_poses(turn("z", 1.0) @ turn("x", HALF_PI), np.eye(3))
    poses[1, 0, 0] = torch.nan
    yaw_free = remove_yaw(poses)
    assert yaw_free[1, 0].isnan().any()
    np.testing.assert_allclose(yaw_free[0, 0], [HALF_PI, 0, 0], atol=1e-12)


@pytest.mark.parametrize("count", [52, 55])
def test_face_camera_when_the_body_has_fingers_then_they_are_left_out(count):
    poses = np.full((1, count, 3), 0.9)
    poses[0, 1:22] = np.arange(63).reshape(21, 3) / 50
    made = face_camera(poses.reshape(1, -1))[0]
    np.testing.assert_allclose(made[1:22], poses[0, 1:22], atol=1e-6)
    np.testing.assert_array_equal(made[22:], 0)


def test_face_camera_when_there_is_no_pose_then_none_comes():
    assert face_camera(np.zeros((0, 156))).shape == (0, 24, 3)


@pytest.mark.parametrize(("frame", "root"), [("y-up", turn("y", 0.7)), ("camera", turn("y", 0.7) @ turn("x", np.pi))])
def test_face_camera_when_the_frame_is_another_then_its_vertical_is_the_axis(frame, root):
    made = face_camera(root_poses(root).numpy(), frame)
    np.testing.assert_allclose(to_rotmat(made[0, 0]), np.diag([1, -1, -1]), atol=1e-6)


# --- names


@pytest.mark.parametrize("there", ["BMLrub", "BioMotionLab_NTroje"])
@pytest.mark.parametrize("asked", ["BMLrub", "BioMotionLab_NTroje"])
def test_find_motion_when_a_subset_has_its_other_name_then_finds_it(tmp_path, there, asked):
    path = write_motion(tmp_path / there / "rub001" / "0005_jogging_poses.npz", 1)
    assert find_motion(tmp_path, f"{asked}/rub001/0005_jogging_poses.npz") == path
    assert find_motion(tmp_path, f"{asked}/rub001/0006_jogging_poses.npz") is None


def test_find_motion_when_an_old_name_is_deeper_in_the_path_then_it_stays(tmp_path):
    path = write_motion(tmp_path / "CMU" / "MPI_Limits" / "SSM_synced_poses.npz", 1)
    assert find_motion(tmp_path, "CMU/MPI_Limits/SSM_synced_poses.npz") == path
    # A name that begins with another's is not that other's.
    write_motion(tmp_path / "HDM05" / "a_poses.npz", 1)
    assert find_motion(tmp_path, "MPI_HDM05_more/a_poses.npz") is None


@pytest.mark.parametrize("name", ["../a.npz", "/etc/passwd", "CMU/../../a.npz", "..\\a.npz", ""])
def test_find_motion_when_the_name_leads_out_then_refuses(tmp_path, name):
    with pytest.raises(ValueError, match=r"refused the path|expected a file name"):
        find_motion(tmp_path, name)


def test_find_motion_when_the_name_is_no_file_name_then_finds_none(tmp_path):
    assert find_motion(tmp_path, "a/" * 3000 + "b" * 3000) is None
    assert find_motion(tmp_path, "CMU/\ud800.npz") is None
    assert find_motion(tmp_path, ".") is None


# --- without texts


def test_amass_when_read_then_a_pose_each_half_second_faces_the_camera(tmp_path):
    write_motion(tmp_path / "ACCAD" / "s 1" / "walk_poses.npz")
    source = AmassMotions(tmp_path)
    rows = read(source)
    assert frames(rows) == [0, 60, 120, 180]
    assert rows[1]["id"] == "ACCAD/s 1/walk_poses.npz:60"
    for row in rows:
        pose = row["poses"][0]
        assert pose.shape == (24, 3)
        np.testing.assert_allclose(to_rotmat(pose[0]), np.diag([1, -1, -1]), atol=1e-6)
        np.testing.assert_allclose(pose[18], [0, 0, int(row["id"].rpartition(":")[2]) / 100], atol=1e-6)
        np.testing.assert_array_equal(pose[22:], 0)
        assert row["pose_mask"] == [[joint < 22 for joint in range(24)]]
        assert {kind for kind, _ in texts(row)} == {"geometry"}
    assert source.skipped == {}


def test_amass_when_only_the_yaw_differs_then_the_rows_do_not(tmp_path):
    for name, yaw in (("a", 0.0), ("b", 2.5)):
        write_motion(tmp_path / name / "walk_poses.npz", yaw=yaw)
    of_a, of_b = read(AmassMotions(tmp_path / "a")), read(AmassMotions(tmp_path / "b"))
    assert [texts(row) for row in of_a] == [texts(row) for row in of_b]
    assert [row["messages"] for row in of_a] == [row["messages"] for row in of_b]


@pytest.mark.parametrize(
    ("rate", "seconds", "expected"),
    [
        (120.0, 1.0, [0, 120]),
        (60, 0.5, [0, 30, 60, 90, 120, 150, 180, 210]),
        (29.97, 3.0, [0, 90, 180]),
        (79.9, 1.0, [0, 80, 160]),
        (100.0, 0.7, [0, 70, 140, 210]),
        (1.0, 0.001, list(range(240))),
        (120.0, 1e300, [0]),
    ],
)
def test_amass_when_the_rate_or_the_step_differs_then_poses_are_taken_by_time(tmp_path, rate, seconds, expected):
    write_motion(tmp_path / "walk_poses.npz", rate=rate)
    (tmp_path / "texts.csv").write_text("file,text\nwalk_poses.npz,Walks.\n")
    assert frames(read(AmassMotions(tmp_path, seconds=seconds))) == expected


def test_amass_when_files_are_smplx_then_reads_their_body_and_rate(tmp_path):
    write_motion(tmp_path / "walk_stageii.npz", joints=55, mocap_framerate=None, mocap_frame_rate=np.array(240))
    rows = read(AmassMotions(tmp_path))
    assert frames(rows) == [0, 120]
    np.testing.assert_allclose(rows[1]["poses"][0][18], [0, 0, 1.2], atol=1e-6)
    np.testing.assert_array_equal(rows[1]["poses"][0][22:], 0)


@pytest.mark.parametrize("shape", [(240, 72), (240, 24, 3)])
def test_amass_when_poses_are_smpl_then_the_frame_must_be_stated(tmp_path, shape):
    poses = np.zeros((240, 24, 3))
    poses[:, 0] = [0, 0.4, 0]
    poses[:, 22] = 0.2
    write_motion(tmp_path / "walk.npz", poses=poses.reshape(shape))
    source = AmassMotions(tmp_path)
    assert read(source) == []
    assert source.skipped == {"SMPL poses of no stated frame: `AmassMotions(folder, frame=...)` states it": 1}
    rows = read(AmassMotions(tmp_path, frame="y-up"))
    assert frames(rows) == [0, 60, 120, 180]
    np.testing.assert_allclose(to_rotmat(rows[0]["poses"][0][0]), np.diag([1, -1, -1]), atol=1e-6)
    np.testing.assert_allclose(rows[0]["poses"][0][22], [0.2, 0.2, 0.2], atol=1e-6)
    assert all(rows[0]["pose_mask"][0])


def test_amass_when_folders_are_splits_then_rows_are_of_them(tmp_path):
    for folder in ("train/CMU/01", "val/CMU/02", "test", "SFU"):
        write_motion(tmp_path / folder / "walk_poses.npz", 60)
    assert AmassMotions(tmp_path).parts() == ["train/0+SFU", "test/0+test", "train/0+train+CMU+01", "val/0+val+CMU+02"]


def test_amass_when_a_folder_has_many_files_then_its_parts_have_each_once(tmp_path):
    folder = tmp_path / "a+b %2F" / "é[*]"
    for number in range(120):
        write_motion(folder / f"{number:03}_poses.npz", 1)
    source = AmassMotions(tmp_path)
    parts = source.parts()
    assert len(parts) == 3
    assert all(part.count("/") == 1 and "*" not in part for part in parts)
    rows = read(source)
    assert [row["id"] for row in rows] == [f"a+b %2F/é[*]/{number:03}_poses.npz:0" for number in range(120)]


def test_amass_when_files_are_hidden_then_they_are_passed_over(tmp_path):
    write_motion(tmp_path / "CMU" / "walk_poses.npz", 1)
    (tmp_path / "CMU" / "._walk_poses.npz").write_bytes(b"macOS")
    write_motion(tmp_path / ".trash" / "walk_poses.npz", 1)
    source = AmassMotions(tmp_path)
    assert len(read(source)) == 1
    assert source.skipped == {}


def test_amass_when_there_is_no_motion_then_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected motions \(.npz\)"):
        AmassMotions(tmp_path).parts()


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": -1}, {"seconds": np.nan}, {"frame": "up"}])
def test_amass_when_an_option_is_wrong_then_says_so(tmp_path, options):
    with pytest.raises(ValueError, match=r"seconds|frame"):
        AmassMotions(tmp_path, **options)


# --- files that are none


def test_amass_when_files_are_of_no_use_then_the_others_are_read_and_each_has_its_reason(tmp_path):
    folder = tmp_path / "CMU" / "01"
    good = write_motion(folder / "good_poses.npz", 60)
    (folder / "cut_poses.npz").write_bytes(good.read_bytes()[:-300])
    (folder / "empty_poses.npz").write_bytes(b"")
    np.savez(folder / "shape.npz", betas=np.zeros(16), gender=np.array("male"))
    write_motion(folder / "lower_poses.npz", 60, poses=np.zeros((60, 66)))
    write_motion(folder / "scalar_poses.npz", 60, poses=np.array(1.0))
    write_motion(folder / "none_poses.npz", 0)
    for name, rate in (("timeless", None), ("stopped", np.array(0.0)), ("nan_rate", np.array(np.nan))):
        write_motion(folder / f"{name}_poses.npz", 60, mocap_framerate=rate)
    write_motion(folder / "rates_poses.npz", 60, mocap_framerate=np.array([120.0, 60.0]))
    source = AmassMotions(tmp_path)
    rows = read(source)
    assert [row["id"] for row in rows] == ["CMU/01/good_poses.npz:0"]
    assert source.skipped == {
        "damaged motion": 3,
        "no `poses` in the file": 1,
        "`poses` not of shape (T, 156), (T, 165), (T, 72) or (T, 24, 3)": 2,
        "no frame rate in the file": 3,
    }
    assert "cut_poses.npz" in source.skipped_examples["damaged motion"][0]
    assert source.skipped_examples["no `poses` in the file"] == ["CMU/01/shape.npz"]


@pytest.mark.parametrize(("joint", "value"), [(0, np.nan), (18, np.nan), (3, np.inf), (5, 1e300), (0, 1e300)])
def test_amass_when_a_pose_has_no_finite_numbers_then_that_pose_alone_is_left_out(tmp_path, joint, value):
    poses = np.zeros((240, 52, 3))
    poses[60, joint, 1] = value
    write_motion(tmp_path / "walk_poses.npz", poses=poses.reshape(240, 156))
    source = AmassMotions(tmp_path)
    assert frames(read(source)) == [0, 120, 180]
    assert source.skipped == {"`poses`: expected finite numbers": 1}
    assert source.skipped_examples == {"`poses`: expected finite numbers": ["walk_poses.npz:60"]}


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_amass_when_an_array_is_a_pickle_then_it_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    payload = np.empty((), dtype=object)
    payload[()] = Payload(f"touch {marker}")
    write_motion(tmp_path / "in" / "walk_poses.npz", poses=payload)
    write_motion(tmp_path / "in" / "run_poses.npz", mocap_framerate=payload)
    write_motion(tmp_path / "in" / "sit_poses.npz", 60, gender=payload)  # of no interest: never read
    source = AmassMotions(tmp_path / "in")
    assert frames(read(source)) == [0]
    assert source.skipped == {"damaged motion": 2}
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()


# --- with texts


def write_texts(folder, records, kind):
    if kind == "jsonl":
        (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return
    lines = ["file,frame,start,end,text"]
    for record in records:
        values = [str(record.get(key, "")) for key in ("file", "frame", "start", "end", "text")]
        lines.append(",".join('"' + value.replace('"', '""') + '"' for value in values))
    (folder / "texts.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_amass_when_texts_name_frames_and_spans_then_those_poses_have_them(tmp_path, kind):
    write_motion(tmp_path / "CMU" / "walk_poses.npz")
    write_motion(tmp_path / "CMU" / "unsaid_poses.npz")
    walk = "CMU/walk_poses.npz"
    records = [
        {"file": walk, "frame": 7, "text": 'He says "hop",\nand hops.'},
        {"file": walk, "frame": 7, "text": "Hops."},
        {"file": walk, "start": 0.5, "end": 1.0, "text": "Walks."},
        {"file": walk, "start": 1.4, "text": "Stops."},
        {"file": walk, "end": 0.2, "text": "Begins."},
        {"file": walk, "start": 1.1, "end": 1.2, "text": "Blinks."},
    ]
    write_texts(tmp_path, records, kind)
    source = AmassMotions(tmp_path)
    rows = read(source)
    said = {frame: [text for _, text in texts(row)] for frame, row in zip(frames(rows), rows, strict=True)}
    assert said == {
        0: ["Begins."],
        7: ['He says "hop",\nand hops.', "Hops."],
        60: ["Walks."],
        120: ["Walks."],
        138: ["Blinks."],
        180: ["Stops."],
    }
    assert {kind for row in rows for kind, _ in texts(row)} == {"human"}
    np.testing.assert_allclose(rows[1]["poses"][0][18], [0, 0, 0.07], atol=1e-6)
    assert source.skipped == {}


def test_amass_when_texts_name_what_is_not_there_then_each_has_its_reason(tmp_path):
    write_motion(tmp_path / "val" / "walk_poses.npz")
    write_motion(tmp_path / "val" / "timeless_poses.npz", mocap_framerate=None)
    records = [
        {"file": "val/walk_poses.npz", "frame": 239, "text": "Last."},
        {"file": "val/walk_poses.npz", "frame": 240, "text": "After."},
        {"file": "val/walk_poses.npz", "start": 2.5, "end": 3, "text": "After."},
        {"file": "val/timeless_poses.npz", "frame": 3, "text": "Third."},
        {"file": "val/timeless_poses.npz", "text": "Whole."},
        {"file": "CMU/absent_poses.npz", "frame": 3, "text": "Third."},
    ]
    write_texts(tmp_path, records, "jsonl")
    source = AmassMotions(tmp_path)
    assert source.parts() == ["train/0+CMU", "val/0+val"]
    assert sorted(row["id"] for row in read(source)) == ["val/timeless_poses.npz:3", "val/walk_poses.npz:239"]
    assert source.skipped == {
        "text of a time after the motion's end": 2,
        "no frame rate in the file": 1,
        "missing motion": 1,
    }
    assert source.skipped_examples["missing motion"] == ["CMU/absent_poses.npz"]


def test_amass_when_texts_have_a_subsets_old_name_then_it_is_found(tmp_path):
    write_motion(tmp_path / "HDM05" / "bk" / "walk_poses.npz")
    write_texts(tmp_path, [{"file": "./MPI_HDM05/bk/walk_poses.npz", "frame": 3, "text": "Walks."}], "csv")
    assert [row["id"] for row in read(AmassMotions(tmp_path))] == ["MPI_HDM05/bk/walk_poses.npz:3"]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"file": "../a.npz", "text": "Walks."}, "refused the path"),
        ({"file": "/a.npz", "text": "Walks."}, "refused the path"),
        ({"text": "Walks."}, "expected a file name"),
        ({"file": "a.npz", "text": " "}, "`text`"),
        ({"file": "a.npz"}, "`text`"),
        ({"file": "a.npz", "text": "Walks.", "frame": "x"}, "could not convert"),
        ({"file": "a.npz", "text": "Walks.", "frame": -1}, "`frame`"),
        ({"file": "a.npz", "text": "Walks.", "frame": 1.5}, "`frame`"),
        ({"file": "a.npz", "text": "Walks.", "frame": "nan"}, "`frame`"),
        ({"file": "a.npz", "text": "Walks.", "frame": 1, "start": 1}, "as well as"),
        ({"file": "a.npz", "text": "Walks.", "start": 2, "end": 1}, "`start`"),
        ({"file": "a.npz", "text": "Walks.", "start": -1}, "`start`"),
        ({"file": "a.npz", "text": "Walks.", "end": "nan"}, "`end`"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_amass_when_a_line_of_texts_is_wrong_then_says_which(tmp_path, record, fault, kind):
    write_texts(tmp_path, [{"file": "a.npz", "text": "Walks."}, record], kind)
    with pytest.raises(ValueError, match=rf"record 2 of .*texts\.{kind}: .*{fault}"):
        AmassMotions(tmp_path).parts()


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("texts.csv", b"file,text\na.npz,caf\xe9\n", "expected UTF-8 CSV"),
        ("texts.csv", b"file,text\na.npz," + b"a" * 200_000, "expected UTF-8 CSV"),
        ("texts.csv", b"name;words\na.npz;Walks.\n", "expected `file`, `text`"),
        ("texts.jsonl", b'{"file": "a.npz", "text": "caf\xe9"}\n', "expected a UTF-8 JSON object"),
        ("texts.jsonl", b'["a.npz", "Walks."]\n', "expected a JSON object"),
        ("texts.jsonl", b'{"file": ["a.npz"], "text": "Walks."}\n', "expected `file`, `text`"),
        ("texts.jsonl", b'{"file": "a.npz", "text": "Walks.", "frame": [1]}\n', "expected `file`, `text`"),
        ("texts.jsonl", b'{"file": "a.npz", "text": "Walks.", "frame": 1' + b"0" * 400 + b"}\n", "expected `file`"),
    ],
)
def test_amass_when_the_file_of_texts_is_another_then_says_so(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=fault) as caught:
        AmassMotions(tmp_path).parts()
    assert name in str(caught.value)


def test_amass_when_prepared_then_the_rows_load_and_settings_hold_the_options(tmp_path):
    write_motion(tmp_path / "in" / "test" / "CMU" / "walk_poses.npz")
    prepare_rows(AmassMotions(tmp_path / "in"), tmp_path / "out")
    assert len(load_rows(tmp_path / "out", "test")) == 4
    with pytest.raises(ValueError, match="name another folder"):
        prepare_rows(AmassMotions(tmp_path / "in", seconds=1.0), tmp_path / "out")
