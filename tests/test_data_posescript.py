"""PoseScript over AMASS: both versions' files, both of AMASS's naming schemes, and whatever is missing or damaged."""

import json
import os
import pickle

import numpy as np
import pytest
from test_data_amass import HALF_PI, Payload, frames, read, texts, to_rotmat, to_rotvec, turn, write_motion

from chatpose_hf.data import posescript
from chatpose_hf.data.posescript import PoseScript
from chatpose_hf.data.prepare import prepare_rows
from chatpose_hf.data.rows import load_rows


ACCAD = "ACCAD/Female1General_c3d/A1 - Stand_poses.npz"
RUB = "BioMotionLab_NTroje/rub001/0005_jogging_poses.npz"
HDM = "MPI_HDM05/bk/HDM_bk_01-01_01_120_poses.npz"
PLACES = {
    "0": ["AMASS", ACCAD, 3],
    "1": ["AMASS", ACCAD, 0],
    "2": ["AMASS", RUB, 7],
    "3": ["AMASS", HDM, 2],
    "4": ["AMASS", RUB, 1],
}
HUMAN = {"0": "Standing, the left arm bent.", "3": ["He kneels.", "A kneeling man."]}
AUTOMATIC = {id: [f"N2 of {id}.", f"N6 of {id}.", f"N7 of {id}."] for id in PLACES}
SPLITS = {"train": [2, 0, 1], "val": [3], "test": [4]}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_release(folder, places=PLACES, human=HUMAN, automatic=AUTOMATIC, splits=SPLITS):
    """Version 2's files."""
    write_json(folder / "ids_2_dataset_sequence_and_frame_index_100k.json", places)
    write_json(folder / "posescript_human_6293.json", human)
    write_json(folder / "posescript_auto_100k.json", automatic)
    for split in ("train", "val", "test"):
        write_json(folder / f"{split}_ids_100k.json", splits.get(split, []))
    return folder


def write_release_1(folder):
    write_json(folder / "ids_2_dataset_sequence_and_frame_index.json", PLACES)
    write_json(folder / "human6293.json", {"0": "Standing, the left arm bent."})
    for letter in "ABCDEF":
        write_json(folder / f"automatic_{letter}.json", {id: f"{letter} of {id}." for id in PLACES})
    write_json(folder / "train_ids.json", [2, 0, 1])
    write_json(folder / "val_ids.json", [3])


def write_amass(folder, *sequences):
    for sequence in sequences or (ACCAD, RUB, HDM):
        write_motion(folder / sequence, 10)


@pytest.fixture
def whole(tmp_path):
    write_release(tmp_path / "posescript_release")
    write_amass(tmp_path / "AMASS")
    return tmp_path


def ids(rows):
    return [int(row["id"].split(":")[0]) for row in rows]


def test_posescript_when_version_2_then_a_row_for_each_pose_of_each_split(whole):
    source = PoseScript(whole)
    assert source.parts() == ["train/ACCAD-0", "train/BMLrub-0", "val/HDM05-0", "test/BMLrub-0"]
    by_part = {part: ids(source.rows(part)) for part in source.parts()}
    assert by_part == {"train/ACCAD-0": [1, 0], "train/BMLrub-0": [2], "val/HDM05-0": [3], "test/BMLrub-0": [4]}
    rows = read(source)
    assert rows[1]["id"] == f"0:{ACCAD}:3"
    assert source.skipped == {}


def test_posescript_when_read_then_poses_face_the_camera_and_hands_are_masked(whole):
    for row in read(PoseScript(whole)):
        pose = row["poses"][0]
        assert pose.dtype == np.float32
        np.testing.assert_allclose(to_rotmat(pose[0]), np.diag([1, -1, -1]), atol=1e-6)
        np.testing.assert_allclose(pose[18], [0, 0, frames([row])[0] / 100], atol=1e-7)
        # What the original took for hands are fingers, 0.9 in these files.
        np.testing.assert_array_equal(pose[22:], 0)
        assert row["pose_mask"] == [[True] * 22 + [False] * 2]
        assert row["task"] == "text_to_pose"


def test_posescript_when_tilted_and_turned_then_only_the_yaw_is_gone(tmp_path):
    write_release(tmp_path / "posescript_release")
    poses = np.zeros((10, 52, 3))
    poses[:, 0] = to_rotvec(turn("z", 2.2) @ turn("y", -0.4) @ turn("x", 1.1))
    poses[0, 0] = to_rotvec(turn("z", -0.6) @ turn("y", HALF_PI) @ turn("x", 0.3))
    write_motion(tmp_path / "AMASS" / ACCAD, poses=poses.reshape(10, 156))
    on_the_side, tilted = read(PoseScript(tmp_path))
    expected = turn("x", HALF_PI) @ turn("y", -0.4) @ turn("x", 1.1)
    np.testing.assert_allclose(to_rotmat(tilted["poses"][0][0]), expected, atol=1e-6)
    expected = turn("x", HALF_PI) @ turn("y", HALF_PI)
    np.testing.assert_allclose(to_rotmat(on_the_side["poses"][0][0]), expected, atol=1e-6)


def test_posescript_when_captions_are_texts_or_lists_then_a_row_has_all_of_them(whole):
    of_id = {ids([row])[0]: texts(row) for row in read(PoseScript(whole))}
    automatic = [("automatic", "N2 of 0."), ("automatic", "N6 of 0."), ("automatic", "N7 of 0.")]
    assert of_id[0] == [("human", "Standing, the left arm bent."), *automatic]
    assert of_id[3][:2] == [("human", "He kneels."), ("human", "A kneeling man.")]
    assert [kind for kind, _ in of_id[2]] == ["automatic"] * 3


@pytest.mark.parametrize("name", ["posescript_release", "posescript_dataset_release"])
def test_posescript_when_version_1_then_reads_its_files(tmp_path, name):
    write_release_1(tmp_path / name)
    write_amass(tmp_path / "AMASS")
    source = PoseScript(tmp_path)
    assert source.parts() == ["train/ACCAD-0", "train/BMLrub-0", "val/HDM05-0"]
    rows = read(source)
    assert sorted(ids(rows)) == [0, 1, 2, 3]
    of_id = {ids([row])[0]: texts(row) for row in rows}
    assert of_id[0] == [
        ("human", "Standing, the left arm bent."),
        *[("automatic", f"{letter} of 0.") for letter in "ABCDEF"],
    ]


@pytest.mark.parametrize(
    ("given", "release", "amass"),
    [
        (".", "posescript_release", "amass"),
        (".", "posescript_release", "AMASS/smplh"),
        ("r", "r", "r/AMASS"),
        ("r", "r", "AMASS"),
    ],
)
def test_posescript_when_folders_lie_otherwise_then_finds_them(tmp_path, given, release, amass):
    write_release(tmp_path / release)
    write_amass(tmp_path / amass)
    assert len(read(PoseScript(tmp_path / given))) == 5


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("BioMotionLab_NTroje", "BMLrub"),
        ("DFaust_67", "DFaust"),
        ("Eyes_Japan_Dataset", "EyesJapanDataset"),
        ("MPI_HDM05", "HDM05"),
        ("MPI_Limits", "PosePrior"),
        ("MPI_Limits", "MPI_Limits_PosePrior"),
        ("MPI_mosh", "MoSh"),
        ("SSM_synced", "SSM"),
        ("TCD_handMocap", "TCDHands"),
        ("Transitions_mocap", "Transitions"),
    ],
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_posescript_when_a_sub_dataset_has_its_other_name_then_finds_it(tmp_path, asked, there, is_swapped):
    if is_swapped:
        asked, there = there, asked
    write_release(
        tmp_path / "posescript_release", {"0": ["AMASS", f"{asked}/s/a_poses.npz", 0]}, splits={"train": [0]}
    )
    write_amass(tmp_path / "AMASS", f"{there}/s/a_poses.npz")
    assert len(read(PoseScript(tmp_path))) == 1


def test_posescript_when_sub_datasets_or_sequences_are_missing_then_they_are_counted_by_name(tmp_path):
    places = {
        **PLACES,
        "5": ["AMASS", "ACCAD/s/absent_poses.npz", 1],
        "6": ["AMASS", "Future/s/a_poses.npz", 1],
    }
    automatic = {id: ["Stands."] for id in places}
    splits = {"train": [0, 1, 2, 4, 5, 6], "val": [3]}
    write_release(tmp_path / "posescript_release", places, HUMAN, automatic, splits)
    write_amass(tmp_path / "AMASS", ACCAD)
    source = PoseScript(tmp_path)
    assert source.parts() == ["train/ACCAD-0", "train/BMLrub-0", "train/other-0", "val/HDM05-0"]
    assert ids(read(source)) == [1, 0]
    assert source.skipped == {
        "missing AMASS sequence": 1,
        "missing AMASS sub-dataset BMLrub": 2,
        "missing AMASS sub-dataset Future": 1,
        "missing AMASS sub-dataset HDM05": 1,
    }
    assert RUB in source.skipped_examples["missing AMASS sub-dataset BMLrub"]


def test_posescript_when_missing_files_come_then_the_next_run_has_them(tmp_path):
    write_release(tmp_path / "in" / "posescript_release")
    write_amass(tmp_path / "in" / "AMASS", ACCAD)
    prepare_rows(PoseScript(tmp_path / "in"), tmp_path / "out")
    assert len(load_rows(tmp_path / "out")) == 2
    write_amass(tmp_path / "in" / "AMASS")
    prepare_rows(PoseScript(tmp_path / "in"), tmp_path / "out")
    assert len(load_rows(tmp_path / "out")) == 3
    assert len(load_rows(tmp_path / "out", "test")) == 1


def test_posescript_when_no_sub_dataset_is_there_then_says_what_to_get(tmp_path):
    write_release(tmp_path / "posescript_release")
    write_amass(tmp_path / "AMASS", "unknown/a_poses.npz")
    with pytest.raises(FileNotFoundError, match=r"SMPL\+H G.*ACCAD, .*amass\.is\.tue\.mpg\.de"):
        PoseScript(tmp_path).parts()


def test_posescript_when_the_release_is_not_there_then_says_what_to_get(tmp_path):
    write_amass(tmp_path / "AMASS")
    with pytest.raises(FileNotFoundError, match=r"posescript_release_v2\.zip"):
        PoseScript(tmp_path).parts()


@pytest.mark.parametrize("name", ["val_ids_100k.json", "posescript_auto_100k.json"])
def test_posescript_when_a_file_of_the_release_is_missing_then_names_it(whole, name):
    (whole / "posescript_release" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PoseScript(whole).parts()


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("ids_2_dataset_sequence_and_frame_index_100k.json", b"[1]", "expected a JSON object"),
        ("train_ids_100k.json", b'{"1": 1}', "expected a JSON list of integers"),
        ("train_ids_100k.json", b'["1"]', "expected a JSON list of integers"),
        ("train_ids_100k.json", b"[1, 2", "expected UTF-8 JSON"),
        ("posescript_human_6293.json", b'["He kneels."]', "expected a JSON object"),
        ("posescript_auto_100k.json", b'{"1": ["caf\xe9"]}', "expected UTF-8 JSON"),
        ("posescript_auto_100k.json", b'{"1": ["Stan', "expected UTF-8 JSON"),
    ],
)
def test_posescript_when_a_file_of_the_release_is_another_then_names_it(whole, name, content, fault):
    (whole / "posescript_release" / name).write_bytes(content)
    with pytest.raises(ValueError, match=fault) as caught:
        list(PoseScript(whole))
    assert name in str(caught.value)


def test_posescript_when_a_file_of_the_release_changes_then_it_is_read_again(whole):
    source = PoseScript(whole)
    assert len(read(source)) == 5
    write_release(whole / "posescript_release", splits={"val": [3]})
    assert source.parts() == ["val/HDM05-0"]


def test_posescript_when_poses_are_of_no_use_then_each_has_its_reason_and_the_rest_is_read(tmp_path):
    places = {
        "0": ["AMASS", ACCAD, 3],
        "1": ["AMASS", ACCAD, 10],
        "2": ["AMASS", ACCAD, -1],
        "3": ["AMASS", ACCAD, "3"],
        "4": ["AMASS", ACCAD],
        "5": ["HumanAct", ACCAD, 3],
        "6": ["AMASS", "ACCAD/../../secret_poses.npz", 0],
        "7": ["AMASS", "/etc/passwd", 0],
        "8": ["AMASS", "a" * 5000, 0],
        "9": None,
        "11": ["AMASS", ACCAD, 4],
        "12": ["AMASS", ACCAD, 5],
        "13": ["AMASS", ACCAD, 6],
        "14": ["AMASS", ACCAD, 7],
    }
    automatic = {
        **{str(id): ["Stands."] for id in range(11)},
        "12": [" ", 7, None],
        "13": {"text": "Stands."},
        "14": [3, "Sits."],
    }
    write_release(tmp_path / "in" / "posescript_release", places, {}, automatic, {"train": [*range(15), 0]})
    write_amass(tmp_path / "in" / "AMASS", ACCAD)
    write_motion(tmp_path / "in" / "secret_poses.npz")
    source = PoseScript(tmp_path / "in")
    assert ids(read(source)) == [0, 14]
    assert source.skipped == {
        "`id`: came before": 1,
        "frame outside of the AMASS sequence": 2,
        "no AMASS sequence and frame named for the pose": 5,
        "refused the name of an AMASS sequence": 2,
        f"missing AMASS sub-dataset {'a' * 50}": 1,
        "no caption": 3,
        "caption that is no text": 5,
    }


def test_posescript_when_names_are_hostile_then_parts_are_still_files_of_the_output(tmp_path):
    names = ["../../evil/a_poses.npz", "/tmp/evil/a_poses.npz", "..", ".", "", "\0/a", "\ud800/a", "CON*[/a"]
    places = {str(id): ["AMASS", name, 0] for id, name in enumerate(names)}
    automatic = {id: ["Stands."] for id in places}
    write_release(tmp_path / "posescript_release", places, {}, automatic, {"train": list(range(len(names)))})
    write_amass(tmp_path / "AMASS", ACCAD)
    source = PoseScript(tmp_path)
    assert source.parts() == ["train/other-0"]
    assert read(source) == []
    assert sum(source.skipped.values()) == len(names)


def test_posescript_when_sequences_are_damaged_or_of_another_layout_then_says_which(whole):
    path = whole / "AMASS" / RUB
    path.write_bytes(path.read_bytes()[:500])
    write_motion(whole / "AMASS" / ACCAD, 10, joints=55)
    write_motion(whole / "AMASS" / HDM, poses=None)
    source = PoseScript(whole)
    assert read(source) == []
    layout = 'missing AMASS "SMPL+H G" file with `poses` of shape (T, 156), got another ("SMPL-X G"?)'
    assert source.skipped == {layout: 2, "damaged AMASS sequence": 3}
    assert source.skipped_examples[layout] == [f"{whole / 'AMASS' / ACCAD}: (10, 165)"]
    assert str(path) in source.skipped_examples["damaged AMASS sequence"][0]


def test_posescript_when_a_pose_is_nan_then_it_alone_is_left_out(whole):
    poses = np.zeros((10, 156))
    poses[3, 0] = np.nan
    write_motion(whole / "AMASS" / ACCAD, poses=poses)
    source = PoseScript(whole)
    assert sorted(ids(read(source))) == [1, 2, 3, 4]
    assert source.skipped == {"`poses`: expected finite numbers": 1}


def test_posescript_when_an_array_is_a_pickle_then_it_does_not_run(whole):
    marker = whole / "ran"
    payload = np.empty((10, 156), dtype=object)
    payload[3, 3] = Payload(f"touch {marker}")
    write_motion(whole / "AMASS" / ACCAD, poses=payload)
    source = PoseScript(whole)
    assert sorted(ids(read(source))) == [2, 3, 4]
    assert source.skipped == {"damaged AMASS sequence": 2}
    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()


def test_posescript_when_a_sub_dataset_is_large_then_it_is_cut_and_each_file_opened_once(whole, monkeypatch):
    places = {str(id): ["AMASS", f"CMU/{id % 3}/a_poses.npz", id % 10] for id in range(30)}
    automatic = {id: ["Stands."] for id in places}
    write_release(whole / "posescript_release", places, {}, automatic, {"train": list(range(30))})
    write_amass(whole / "AMASS", *{place[1] for place in places.values()})
    monkeypatch.setattr(posescript, "_PART_SIZE", 20)
    opened = []
    read_limited = posescript.read_limited
    monkeypatch.setattr(posescript, "read_limited", lambda path: opened.append(path) or read_limited(path))
    source = PoseScript(whole)
    assert source.parts() == ["train/CMU-0", "train/CMU-1"]
    assert [len(list(source.rows(part))) for part in source.parts()] == [20, 10]
    assert [os.path.relpath(path, whole / "AMASS" / "CMU") for path in opened] == [
        "0/a_poses.npz",
        "1/a_poses.npz",
        "2/a_poses.npz",
    ]


def test_posescript_when_sent_to_another_process_then_the_rows_are_the_same(whole):
    source = PoseScript(whole, seed=3)
    part = source.parts()[0]
    posescript._load_parts.cache_clear()
    sent = pickle.loads(pickle.dumps(source))
    one, two = list(source.rows(part)), list(sent.rows(part))
    assert [row["id"] for row in one] == [row["id"] for row in two]
    assert [row["messages"] for row in one] == [row["messages"] for row in two]
