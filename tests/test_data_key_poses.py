"""Named poses in files of our own: rows of both splits, which share poses and no sentence."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from chatpose_hf.body import JOINT_NAMES, BodyModel
from chatpose_hf.data.key_poses import KeyPoses, make_pose


ITEM = {
    "name": "salute",
    "turns": {"l_shoulder": [0, 0, -75], "r_shoulder": [0, 0, 60.5]},
    "explicit": ["The right hand is at the brow.", "Salute.", "A stiff salute."],
    "implicit": ["The general walks by.", "A soldier greets."],
}


def write(folder, items, name="gestures"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(items))
    return KeyPoses(folder)


def test_rows_when_of_both_splits_then_share_poses_and_no_sentence(tmp_path):
    source = write(tmp_path / "poses", [ITEM])
    assert source.parts() == ["train/gestures", "val/gestures"]
    train, val = (list(source.rows(part)) for part in source.parts())
    assert [row["id"] for row in train] == ["gestures/salute", "gestures/salute/spg"]
    assert [row["task"] for row in val] == ["text_to_pose", "spg"]
    for row in (*train, *val):
        np.testing.assert_array_equal(row["poses"][0], make_pose(ITEM["turns"]).numpy())
        assert row["pose_mask"][0] == [joint < 22 for joint in range(24)]
    texts = [
        {caption["text"] for row in rows for caption in row["captions"] if caption["kind"] != "name"}
        for rows in (train, val)
    ]
    assert texts[0] >= {*ITEM["explicit"][:-1], *ITEM["implicit"][:-1]}
    assert texts[1] == {"A stiff salute.", "A soldier greets."}
    assert not texts[0] & texts[1]
    assert {caption["kind"] for caption in train[0]["captions"]} == {"human", "geometry"}
    assert [caption["kind"] for caption in val[1]["captions"]] == ["name", "implicit", "human"]


def test_rows_when_situations_are_many_then_they_stand_in_several(tmp_path):
    texts = [f"Situation {number}." for number in range(46)]
    source = write(tmp_path / "poses", [{**ITEM, "implicit": texts}])
    train, val = (list(source.rows(part)) for part in source.parts())
    assert [row["id"].removeprefix("gestures/salute") for row in train] == ["", "/spg", "/spg/1", "/spg/2"]
    asked = [[c["text"] for c in row["captions"] if c["kind"] == "implicit"] for row in train[1:]]
    assert [text for some in asked for text in some] == texts[:-1]
    assert [len(some) for some in asked] == [20, 20, 5]
    assert [c["text"] for c in val[1]["captions"] if c["kind"] == "implicit"] == texts[-1:]


def test_pose_when_turned_in_degrees_then_stands_as_written():
    """An arm that hangs, of somebody who faces the camera: y is down."""
    joints = BodyModel.load().joints(make_pose({"l_shoulder": [0, 0, -90]}))
    shoulder, wrist = (joints[JOINT_NAMES.index(name)] for name in ("l_shoulder", "l_wrist"))
    assert wrist[1] - shoulder[1] > 0.4
    # Half a turn about x, either way.
    torch.testing.assert_close(make_pose({})[0].abs(), torch.tensor([torch.pi, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": {"tail": [0, 0, 1]}}, "pose 0 of .*: expected `turns` of SMPL's first 22 joints"),
        ({"turns": {"head": [0, 1]}}, "three angles in degrees for head"),
        ({"turns": {"head": [0, 1, float("nan")]}}, "three angles in degrees for head"),
        ({"explicit": ["One."]}, "at least 2 different sentences as `explicit`"),
        ({"implicit": ["One.", "One."]}, "at least 2 different sentences as `implicit`"),
        ({"more": 1}, "expected explicit, implicit, name, turns"),
    ],
)
def test_item_when_it_is_none_then_the_file_and_the_fault_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        list(write(tmp_path / "poses", [{**ITEM, **changes}]))


@pytest.mark.parametrize("content", ["{}", "[", "3"])
def test_file_when_of_another_layout_then_is_named(tmp_path, content):
    (tmp_path / "poses.json").write_text(content)
    with pytest.raises(ValueError, match=r"poses\.json"):
        list(KeyPoses(tmp_path))


def test_folder_when_empty_then_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"GROUP\.json"):
        KeyPoses(tmp_path).parts()


def test_poses_of_this_project_then_are_many_different_and_told_in_words_of_their_own():
    source = KeyPoses(ROOT / "examples" / "key_poses")
    rows = [row for part in source.parts() if part.startswith("train") for row in source.rows(part)]
    assert not source.skipped
    told = [row for row in rows if row["task"] == "text_to_pose"]
    assert len(told) >= 150
    texts = [
        caption["text"] for row in rows for caption in row["captions"] if caption["kind"] in ("human", "implicit")
    ]
    names = {(row["id"].split("/spg")[0], c["text"]) for row in rows for c in row["captions"] if c["kind"] == "name"}
    assert len({name for _, name in names}) == len(names) == len(told)
    # Explicit sentences stand in two rows of a pose.
    by_pose = {row["id"].split("/spg")[0]: set() for row in rows}
    for row in rows:
        by_pose[row["id"].split("/spg")[0]] |= {
            c["text"] for c in row["captions"] if c["kind"] in ("human", "implicit")
        }
    assert sum(map(len, by_pose.values())) == len(set(texts)), "a sentence of two poses"
    assert all(len(sentences) >= 90 for sentences in by_pose.values())
    joints = BodyModel.load().joints(torch.tensor(np.stack([row["poses"][0] for row in told])))
    joints = joints - joints[:, :1]
    # Of the joint that differs most: some poses differ in the head alone.
    distances = (joints[:, None] - joints[None]).norm(dim=-1).amax(-1) + torch.eye(len(joints))
    assert distances.min() > 0.03, "two names for one pose"
