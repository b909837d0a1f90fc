"""The judge of benchmarks/bench_understanding.py against poses written by hand, and the prompts that it asks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_rows import make_row, write_splits
from PIL import Image

from chatpose_hf.data.key_poses import make_pose


sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_understanding
from bench_understanding import (
    LAUNCHER,
    Prompt,
    judge_instructions,
    judge_named,
    keep_letters,
    load_texts,
    make_prompts,
)
from pose_conditions import CONDITIONS, find_held, make_points, mirror


def turn_over(turns: dict) -> dict:
    """The turns of the mirrored pose."""
    swapped = {"l_": "r_", "r_": "l_"}
    return {swapped.get(name[:2], name[:2]) + name[2:]: [x, -y, -z] for name, (x, y, z) in turns.items()}


def both(**turns: list[float]) -> dict:
    """The turns of left joints, and of the right ones as in a mirror."""
    left = {f"l_{name}": turn for name, turn in turns.items()}
    return left | turn_over(left)


STANDING = both(shoulder=[0, 0, -75])
# Degrees about x, y, z, as in examples/key_poses, beside hanging arms: plus z lifts the left arm, minus y takes it forward;
# minus x lifts a thigh, plus x bends a knee. Of what has a side, the left.
SIDED = {
    "arm_up": {"l_collar": [0, 0, 20], "l_shoulder": [0, 0, 65]},
    "arm_side": {"l_shoulder": [0, 0, 0]},
    "arm_front": {"l_shoulder": [0, -85, 0]},
    "hand_hip": {"l_shoulder": [87, -45, -27], "l_elbow": [0, -88, 5]},
    "hand_head": {"l_shoulder": [-93, -44, 71], "l_elbow": [0, -64, -48]},
    "hand_other_shoulder": {"l_shoulder": [-45, -114, 60], "l_elbow": [0, -95, -54]},
    "hand_back": {"l_shoulder": [25, 68, -93], "l_elbow": [0, -54, -9]},
    "elbow_90": {"l_elbow": [0, -90, 0]},
    "hand_knee": {
        **{"pelvis": [25, 0, 0], "spine1": [25, 0, 0], "spine2": [15, 0, 0], "l_shoulder": [-6, -76, -52]},
        **both(hip=[-55, 0, 0], knee=[45, 0, 0]),
    },
    "knee_up": {"l_hip": [-90, 0, 0], "l_knee": [90, 0, 0]},
    "knee_90": {"l_knee": [90, 0, 0]},
    "leg_front": {"l_hip": [-60, 0, 0]},
    "leg_back": {"l_hip": [40, 0, 0]},
    "leg_side": {"l_hip": [0, 0, 45]},
    "heel_up": {"l_knee": [125, 0, 0]},
    "one_leg": {"r_hip": [-40, 0, 0], "r_knee": [80, 0, 0]},
    "lunge": {"l_hip": [-70, 0, 0], "l_knee": [75, 0, 0], "r_hip": [35, 0, 0], "r_knee": [20, 0, 0]},
    "step": {"l_hip": [-20, 0, 0], "r_hip": [18, 0, 0]},
    "kneel_one": {"l_knee": [90, 0, 0], "r_hip": [-90, 0, 0], "r_knee": [90, 0, 0]},
    "lie_side": {"pelvis": [0, 0, -90]},
    "lean_side": {"spine1": [0, 0, -15], "spine2": [0, 0, -10]},
    "twist": {"spine1": [0, 15, 0], "spine2": [0, 15, 0], "spine3": [0, 10, 0]},
    "head_turn": {"neck": [0, 25, 0], "head": [0, 25, 0]},
    "head_tilt": {"neck": [0, 0, -15], "head": [0, 0, -15]},
}
BOTH = {
    **{f"{name}, both": both(**{key[2:]: turn for key, turn in SIDED[name].items()}) for name in list(SIDED)[:8]},
    "hand_other_shoulder, both": both(shoulder=[-45, -114, 60], elbow=[0, -95, -54]),
    "hand_knee, both": SIDED["hand_knee"] | {"r_shoulder": [-6, 76, 52]},
    "hands_chest": both(shoulder=[28, -68, -15], elbow=[0, -113, 35]),
    "arms_crossed": both(shoulder=[30, -106, -18], elbow=[0, -88, 3]),
    "touch_toes": {
        **{"pelvis": [90, 0, 0], "spine1": [30, 0, 0], "spine2": [20, 0, 0], "spine3": [15, 0, 0]},
        **both(hip=[-90, 0, 0], shoulder=[0, -62, 70]),
    },
    "legs_apart": both(hip=[0, 0, 25]),
    "sit": both(hip=[-90, 0, 0], knee=[90, 0, 0]),
    "sit_floor": both(hip=[-100, 0, 0], knee=[40, 0, 0]),
    "sit_floor_straight": both(hip=[-90, 0, 0]),
    "sit_cross_legged": both(hip=[-99, 79, -16], knee=[131, 30, -19], ankle=[55, 0, 0]),
    "kneel": both(knee=[90, 0, 0], ankle=[60, 0, 0]),
    "squat": {"pelvis": [25, 0, 0]} | both(hip=[-120, -15, 0], knee=[125, 0, 0], ankle=[-30, 0, 0]),
    "lie_back": {"pelvis": [-90, 0, 0]},
    "lie_front": {"pelvis": [90, 0, 0]},
    "all_fours": {"pelvis": [85, 0, 0]} | both(hip=[-85, 0, 0], knee=[90, 0, 0], shoulder=[0, -81, 0]),
    "bend_front": {"pelvis": [45, 0, 0], "spine1": [20, 0, 0]} | both(hip=[-45, 0, 0]),
    "lean_front": {"spine1": [15, 0, 0], "spine2": [15, 0, 0]},
    "lean_back": {"spine1": [-15, 0, 0], "spine2": [-15, 0, 0]},
    "look_up": {"neck": [-25, 0, 0], "head": [-30, 0, 0]},
    "look_down": {"neck": [20, 0, 0], "head": [20, 0, 0]},
}


def place(*turns: dict) -> np.ndarray:
    return make_points(torch.stack([make_pose(STANDING | each) for each in turns]))


def turns_of(name: str, side: str) -> dict:
    if side == "right":
        return turn_over(SIDED[name])
    return SIDED[name] if side else BOTH[f"{name}, both" if name in SIDED else name]


def test_points_when_turned_round_then_are_those_of_the_body_that_faces_us():
    turned = {"pelvis": [0, 130, 0], "l_shoulder": [0, -85, 0]}
    (points, facing, mirrored) = place(turned, {"l_shoulder": [0, -85, 0]}, {"r_shoulder": [0, 85, 0]})
    np.testing.assert_allclose(points, facing, atol=1e-5)
    np.testing.assert_allclose(mirror(facing), mirrored, atol=1e-4)
    head, nose, crown, left_hip = facing[15], facing[24], facing[25], facing[1]
    assert nose[2] > head[2] + 0.1
    assert crown[1] > head[1] + 0.1
    assert left_hip[0] > 0.1


def test_conditions_when_listed_then_each_has_a_pose():
    assert {name.removesuffix(", both") for name in (*SIDED, *BOTH)} == set(CONDITIONS)


@pytest.mark.parametrize("name", SIDED)
def test_sided_condition_when_the_pose_is_written_by_hand_then_it_alone_holds(name):
    pose, standing = place(SIDED[name], {})
    held = [find_held(points, [(name, side)])[0] for points in (pose, mirror(pose)) for side in ("left", "right")]
    assert held == [True, False, False, True]
    assert find_held(standing, [(name, "left"), (name, "right")]) == [False, False]


@pytest.mark.parametrize("name", BOTH)
def test_condition_of_no_side_when_the_pose_is_written_by_hand_then_holds(name):
    pose, standing = place(BOTH[name], {})
    part = (name.removesuffix(", both"), "")
    assert find_held(pose, [part]) == find_held(mirror(pose), [part]) == [True]
    assert find_held(standing, [part]) == find_held(None, [part]) == [False]


def test_postures_when_of_another_kind_then_fail():
    """Each of these is taken for no other."""
    kinds = ["sit", "kneel", "squat", "lie_back", "lie_front", "all_fours", "bend_front", "sit_floor_straight"]
    for name, pose in zip(kinds, place(*map(BOTH.get, kinds)), strict=True):
        assert [other for other in kinds if find_held(pose, [(other, "")]) == [True]] == [name]


def test_prompts_when_drawn_then_differ_and_one_body_can_fulfil_each():
    prompts, dropped = make_prompts(300)
    assert make_prompts(300) == (prompts, 0)
    assert dropped == 0
    assert len({keep_letters(prompt.text) for prompt in prompts}) == 300
    assert {name for prompt in prompts for name, _ in prompt.parts} == set(CONDITIONS)
    assert not [prompt.text for prompt in prompts if set("[]{}|") & set(prompt.text)]
    # The poses written by hand, one put on top of the other.
    bodies = place(*({k: v for part in prompt.parts for k, v in turns_of(*part).items()} for prompt in prompts))
    failed = [prompt for prompt, body in zip(prompts, bodies, strict=True) if not all(find_held(body, prompt.parts))]
    assert failed == []
    standing = place({})[0]
    assert not any(all(find_held(standing, prompt.parts)) for prompt in prompts)


def test_prompts_when_trained_on_then_others_are_asked():
    prompts, _ = make_prompts(20)
    told = [f"Well: {prompts[0].text.upper()}!", prompts[3].text]
    others, dropped = make_prompts(20, told)
    assert dropped >= 1
    assert not {prompts[0].text, prompts[3].text} & {prompt.text for prompt in others}
    assert [len(prompt.parts) for prompt in others] == [len(prompt.parts) for prompt in prompts]


def test_texts_when_rows_have_captions_and_questions_then_are_all_of_both_splits(tmp_path):
    rows = [make_row(number) for number in range(2)]
    rows[1]["captions"] = [{"kind": "human", "text": "She kneels."}]
    texts = load_texts([write_splits(tmp_path / "rows", rows[:1], rows[1:])])
    asked = [row["messages"][0]["content"][-1]["text"] for row in rows]
    assert {*asked, "She kneels.", "It is "} <= set(texts)


def test_instructions_when_answered_rightly_mirrored_and_not_then_are_told_apart():
    wanted = Prompt("Lift the left arm.", (("arm_up", "left"),))
    prompts = [wanted, wanted, wanted, Prompt("Sit.", (("sit", ""),))]
    turns = [SIDED["arm_up"], turn_over(SIDED["arm_up"]), None, BOTH["sit"]]
    answers = [{"text": "It is.", "pose": None if each is None else make_pose(STANDING | each)} for each in turns]
    figures, records = judge_instructions(prompts, answers)
    found = {figure["name"]: (figure["percent"], figure["count"]) for figure in figures}
    assert found["satisfied"] == (50, 4)
    assert found["satisfied, a side named"] == (pytest.approx(100 / 3), 3)
    assert found["left and right confused"] == (pytest.approx(100 / 3), 3)
    assert found["condition sit"] == (100, 1)
    assert found["satisfied, of 2 conditions"] == (None, 0)
    assert [record["failed"] for record in records] == [[], ["arm_up left"], ["arm_up left"], []]


def test_named_poses_when_answered_then_the_nearest_decides():
    poses = torch.stack([make_pose(STANDING | BOTH[name]) for name in ("sit", "kneel", "squat")])
    turned = make_pose({**STANDING, **BOTH["kneel"], "pelvis": [0, 70, 0]})
    answers = [{"pose": poses[0]}, {"pose": turned}, {"pose": poses[0]}, {"pose": None}]
    top1, top5 = judge_named("explicit", answers, [0, 1, 2, 2], poses)
    assert (top1["percent"], top5["percent"], top1["count"]) == (50, 75, 4)


def test_launcher_when_something_was_run_then_gives_its_own_memory():
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-c", "print('x'); import sys; sys.exit(3)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, seconds, memory = json.loads(done.stdout.splitlines()[-1])
    assert status == 3
    assert 0 < seconds < 60
    assert 1 < memory < 100  # this process has several hundred


def test_questions_of_no_pose_when_read_then_are_596_that_differ():
    questions = json.loads((ROOT / "benchmarks" / "unrelated.json").read_text())
    assert len({keep_letters(question) + "".join(filter(str.isdigit, question)) for question in questions}) == 596


def test_script_when_run_with_a_tiny_model_then_writes_figures_and_a_sheet(
    tmp_path, model, processor, monkeypatch, capsys
):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    start = [{"name": "import", "seconds": 1.0, "peak_mib": 2.0, "rounds": []}]
    monkeypatch.setattr(bench_understanding, "measure_start", lambda *_: start)
    files = ["--json", str(tmp_path / "figures.json"), "--sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(sys, "argv", ["bench", str(tmp_path / "model"), "--limit", "3", *files])
    bench_understanding.main()
    record = json.loads((tmp_path / "figures.json").read_text())
    assert list(record["results"]) == ["cold start", "instructions", "named poses", "pose token"]
    assert [figure["count"] for figure in record["results"]["pose token"]] == [9, 3]
    assert [len(record[name]) for name in ("answers", "answers to something else")] == [3, 3]
    assert "satisfied by the answers to other prompts" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").width > 256
