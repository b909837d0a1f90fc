"""Instructions from a grammar in files: rows that say what their poses do, of the person's own left and right."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT

from chatpose_hf.body import JOINT_NAMES, PARENTS, BodyModel
from chatpose_hf.data.instruction_states import draw_poses, load_grammar
from chatpose_hf.data.instructions import Instructions, _to_participle, _to_third, draw_plan
from chatpose_hf.data.rows import validate_row
from chatpose_hf.rotations import rotvec_to_rotmat


SHIPPED = ROOT / "examples" / "instructions"
STANDING = {
    "name": "standing",
    "part": "body",
    "leaves": ["arm"],
    "turns": {"l_shoulder": [[0, 0], [0, 0], [-80, -70]], "r_shoulder": [[0, 0], [0, 0], [70, 80]]},
    "checks": [],
    "do": ["stand"],
    "is": ["standing"],
}
SIDE = {
    "name": "to the side",
    "part": "arm",
    "turns": {"l_shoulder": [[0, 0], [0, 0], [-10, 10]]},
    "checks": [["outward", "l_wrist", "l_shoulder", 0.38]],
    "do": ["stretch {the} {side} arm out"],
    "is": ["{the} {side} arm [is] stretched out"],
}


def write(folder, states):
    folder.mkdir(exist_ok=True)
    (folder / "states.json").write_text(json.dumps(states))
    return folder


def place_joints(pose):
    """Joints `(24, 3)` one by one from the root, camera frame: a slow twin of the body model."""
    rest = BodyModel.load("default").rest_joints.numpy()
    turns = rotvec_to_rotmat(torch.tensor(np.asarray(pose))).numpy()
    places, frames = [rest[0]], [turns[0]]
    for joint in range(1, 24):
        parent = PARENTS[joint]
        places.append(places[parent] + frames[parent] @ (rest[joint] - rest[parent]))
        frames.append(frames[parent] @ turns[joint])
    return np.stack(places)


def test_rows_then_are_valid_and_depend_on_seed_and_number_alone():
    few, many = list(Instructions(SHIPPED, count=40)), list(Instructions(SHIPPED, count=60))
    for row in many:
        validate_row(row)
        assert row["task"] == "text_to_pose"
        assert row["pose_mask"][0] == [joint < 22 for joint in range(24)]
        words = " ".join(part["text"] or "" for message in row["messages"] for part in message["content"])
        assert not set("{}[]") & set(words)
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one["poses"], other["poses"])
        assert one["messages"] == other["messages"]
    others = list(Instructions(SHIPPED, seed=1, count=40))
    assert sum(a["messages"] == b["messages"] for a, b in zip(few, others, strict=False)) < 5


def test_parts_then_are_of_both_splits():
    parts = Instructions(SHIPPED, count=80_000).parts()
    assert len(parts) == len(set(parts)) == 40
    assert [part for part in parts if part.startswith("val/")] == ["val/00019", "val/00039"]


def test_row_when_short_then_has_wordings_of_one_pose_and_when_a_chat_then_is_kept_as_drawn():
    rows = list(Instructions(SHIPPED, count=400))
    chats = [row for row in rows if not row["captions"]]
    assert 0.08 < len(chats) / len(rows) < 0.22
    for row in chats:
        assert len(row["poses"]) == len(row["messages"]) // 2 in (2, 3)
    for row in rows:
        if row["captions"]:
            texts = [caption["text"] for caption in row["captions"]]
            assert len(row["poses"]) == 1
            assert len(set(texts)) == len(texts) <= 3
    assert np.mean([len(row["captions"]) for row in rows if row["captions"]]) > 2


def test_side_then_is_the_persons_own(tmp_path):
    """An arm that is spoken of is out to its side, the person's left at the camera's right; the other one hangs."""
    seen = set()
    for row in Instructions(write(tmp_path / "states", [STANDING, SIDE]), count=60):
        if len(row["poses"]) > 1:
            continue
        text = row["captions"][0]["text"]
        joints = dict(zip(JOINT_NAMES, place_joints(row["poses"][0]), strict=True))
        for side, sign in (("left", 1), ("right", -1)):
            way = joints[f"{side[0]}_wrist"] - joints[f"{side[0]}_shoulder"]
            if f"{side} arm" in text.lower():
                assert sign * way[0] > 0.4, text
                seen.add(side)
            else:
                assert way[1] > 0.4, "y is down"
    assert seen == {"left", "right"}


def test_states_of_this_project_then_hold_what_they_say_and_name_their_side():
    grammar = load_grammar(SHIPPED)  # refuses a state that no draw can hold
    choices = {choice for chosen in grammar.choices.values() for choice in chosen} | set(grammar.postures)
    assert len({choice.name for choice in choices}) >= 70
    for choice in choices:
        assert choice.checks or choice.name == "standing", choice.name
        assert len(choice.do) >= 3 or choice.side == "both", choice.name
        if choice.side in ("left", "right"):
            assert all(choice.side in text for text in (*choice.do, *choice.tell)), choice.name
        if choice.side == "both":
            assert not any(
                "both arm " in text or "{side}" in text for text in (*choice.do, *choice.tell, *choice.undo)
            )
    source = Instructions(SHIPPED, count=1500)
    assert len(list(source)) > 1485, source.skipped


def test_mirrored_states_then_have_mirrored_joints():
    grammar = load_grammar(SHIPPED)
    swap = [JOINT_NAMES.index({"l_": "r_", "r_": "l_"}.get(name[:2], name[:2]) + name[2:]) for name in JOINT_NAMES]
    by_side = {(c.name, c.side): c for chosen in grammar.choices.values() for c in chosen}
    lefts = [choice for (_, side), choice in by_side.items() if side == "left"]
    assert len(lefts) >= 40
    for left in lefts:
        sides = []
        for choice in (left, by_side[left.name, "right"]):
            pose = np.zeros((24, 3), dtype=np.float32)
            pose[choice.joints] = np.radians(choice.low)
            sides.append(place_joints(pose))
        rest = place_joints(np.zeros((24, 3), dtype=np.float32))
        assert np.abs(rest - rest[swap] * [-1, 1, 1]).max() < 1e-3, "the body is symmetric"
        assert np.abs(sides[0] - sides[1][swap] * [-1, 1, 1]).max() < 3e-3, left.name


def test_chat_when_refined_then_keeps_the_rest():
    grammar = load_grammar(SHIPPED)
    plans = [draw_plan(grammar, random.Random(number)) for number in range(400)]
    plans = [plan for plan in plans if len(plan.poses) > 1]
    drawn, faults = draw_poses(grammar, [(plan.poses, plan.rng) for plan in plans])
    assert faults.count("") > 0.97 * len(plans)
    kept = 0
    for plan, poses in zip(plans, drawn, strict=True):
        for (before, after), (one, other) in zip(pairwise(plan.poses), pairwise(poses), strict=True):
            assert before != after, plan.texts
            changed = {joint for choice in set(before) ^ set(after) for joint in choice.joints.tolist()}
            same = [joint for joint in range(24) if joint not in changed]
            np.testing.assert_array_equal(one[same], other[same])
            said = {joint for choice in {*before[1:]} & {*after[1:]} for joint in choice.joints.tolist()}
            np.testing.assert_array_equal(one[list(said)], other[list(said)])
            kept += bool(said)
    assert kept > 20


@pytest.mark.parametrize(
    ("order", "third", "participle"),
    [
        ("raise the arm", "raises the arm", "raising the arm"),
        ("put it", "puts it", "putting it"),
        ("lie down", "lies down", "lying down"),
        ("cross the legs", "crosses the legs", "crossing the legs"),
        ("squat", "squats", "squatting"),
        ("go down", "goes down", "going down"),
        ("lean back", "leans back", "leaning back"),
        ("bow", "bows", "bowing"),
    ],
)
def test_verb_then_is_inflected(order, third, participle):
    assert (_to_third(order), _to_participle(order)) == (third, participle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": {"tail": [[0, 0]] * 3}}, "`turns` of SMPL's first 22 joints"),
        ({"turns": {"l_shoulder": [0, 0, 0]}}, r"three ranges \[low, high\] in degrees for l_shoulder"),
        ({"turns": {"l_shoulder": [[0, 0], [0, 0], [0, float("nan")]]}}, "three ranges .* for l_shoulder"),
        ({"do": []}, "texts as `do`"),
        ({"checks": [["over", "l_wrist", "head", 0.1]]}, "a check of above, before"),
        ({"checks": [["above", "l_wrist", "tail", 0.1]]}, "a check of above, before"),
        ({"checks": [["above", "l_wrist", "head", 0.3]]}, "`turns` that hold `checks`, got none .*left, standing"),
        ({"more": 1}, "expected checks, do, is, name, part, turns"),
        ({"name": "standing"}, "a name of its own"),
        ({"leaves": ["tail"]}, "parts or states as `leaves`, got .*tail"),
    ],
)
def test_state_when_it_is_none_then_the_file_the_state_and_the_fault_are_named(tmp_path, changes, message):
    state = {**SIDE, **changes}
    source = Instructions(write(tmp_path / "states", [STANDING, state]), count=10)
    with pytest.raises(ValueError, match=rf"state '{state['name']}' of .*states\.json: .*{message}"):
        list(source)


def test_folder_when_without_states_or_posture_then_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"GROUP\.json"):
        list(Instructions(tmp_path, count=1))
    with pytest.raises(ValueError, match="a state `standing` of part `body`"):
        list(Instructions(write(tmp_path / "states", [SIDE]), count=1))
    with pytest.raises(ValueError, match="at least 1 row"):
        Instructions(tmp_path, count=0)
