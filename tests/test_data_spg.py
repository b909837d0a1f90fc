"""Situations for poses: from the table, by geometry, and from a model."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_server import ChatServer
from conftest import ROOT
from named_poses import ARMS_DOWN, POSES, both, make_pose

from chatpose_hf.data.rows import load_rows, validate_row, write_rows
from chatpose_hf.data.source import Source
from chatpose_hf.data.spg import SITUATIONS, Spg, check_situations, find_kinds
from chatpose_hf.pose_files import turn_frame
from chatpose_hf.rotations import rotmat_to_rotvec, rotvec_to_rotmat


# The kinds each pose of the example is of: nothing else is true of it.
KINDS = {
    "T-pose": ["arms out to the sides"],
    "standing, arms down": ["standing at ease"],
    "arms up": ["both hands high"],
    "left arm raised": ["one hand high"],
    "right arm forward": ["one arm to the front"],
    "hands on hips": ["hands on the hips"],
    "sitting": ["sitting on a seat"],
    "sitting cross-legged": ["sitting cross-legged"],
    "kneeling on the right knee": ["kneeling on one knee"],
    "kneeling on both knees": ["kneeling on both knees"],
    "squatting, arms forward": ["squatting deeply"],
    "bowing": ["bowing"],
    "standing on the left leg": ["standing on one leg"],
    "running": ["running"],
    "head turned to the left": ["standing at ease"],
    "lying on the back": ["lying on the back"],
}
# One for each of the other kinds; degrees as in the example.
MORE = {
    "sitting on the heels": ARMS_DOWN | both(hip=(-70, 0, 0), knee=(155, 0, 0), ankle=(60, 0, 0)),
    "one arm out to the side": {"l_shoulder": (0, 0, -75)},
    "both arms to the front": both(shoulder=(0, -85, 0)),
    "hands on the head": both(collar=(0, 0, 10), shoulder=(0, 10, 40), elbow=(0, -30, 110)),
    "a hand at the ear": {**ARMS_DOWN, "l_shoulder": (-39, -55, -30), "l_elbow": (1, -124, 77)},
    "arms crossed": both(shoulder=(1, -60, -62), elbow=(28, -86, -6)),
    "hands together before the chest": both(shoulder=(-1, -39, -67), elbow=(15, -102, 0)),
    "hands behind the back": both(shoulder=(2, 34, -75), elbow=(-9, 11, -31)),
    "hands on the knees": {"pelvis": (55, 0, 0)}
    | both(hip=(-95, 0, 0), knee=(60, 0, 0), ankle=(-20, 0, 0), shoulder=(1, -49, -55)),
    "bent down to the feet": {"pelvis": (100, 0, 0), "spine1": (20, 0, 0)}
    | both(hip=(-100, 0, 0), shoulder=(0, -85, 0)),
    "climbing a step": {**ARMS_DOWN, "l_hip": (-60, 0, 0), "l_knee": (60, 0, 0)},
    "walking": {**ARMS_DOWN, "l_hip": (-25, 0, 0), "r_hip": (22, 0, 0), "l_knee": (5, 0, 0), "r_knee": (10, 0, 0)},
    "lunging": {**ARMS_DOWN, "l_hip": (-75, 0, 0), "l_knee": (75, 0, 0), "r_hip": (50, 0, 0)},
    "kicking to the front": {**ARMS_DOWN, "l_hip": (-90, 0, 0)},
    "a leg stretched to the back": {**ARMS_DOWN, "pelvis": (70, 0, 0), "l_hip": (-70, 0, 0)},
    "sitting on the ground with the legs out": ARMS_DOWN | both(hip=(-90, 0, 0)),
    "on all fours": {"pelvis": (85, 0, 0)} | both(hip=(-85, 0, 0), knee=(90, 0, 0), shoulder=(0, -85, 0)),
    "push-up": {"pelvis": (68, 0, 0)} | both(shoulder=(0, -68, 0), ankle=(20, 0, 0)),
    "lying face down": {**ARMS_DOWN, "pelvis": (90, 0, 0)},
    "lying on a side": {**ARMS_DOWN, "pelvis": (0, 0, 90)},
    "upside down": both(shoulder=(0, 0, 80)) | {"pelvis": (180, 0, 0)},
}


def stack(turns: dict) -> torch.Tensor:
    return torch.stack([make_pose(of_joints) for of_joints in turns.values()])


def mirrored(poses: torch.Tensor) -> torch.Tensor:
    """Left and right swapped: x turns round, so of axis-angle y and z do."""
    swap = [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22]
    upright = turn_frame(poses, "y-up", inverse=True)[:, swap] * torch.tensor([1.0, -1.0, -1.0])
    return turn_frame(upright, "y-up")


def turned(poses: torch.Tensor, degrees: float) -> torch.Tensor:
    """About the vertical."""
    turn = rotvec_to_rotmat(torch.tensor([0.0, math.radians(degrees), 0.0]))
    root = rotmat_to_rotvec(turn @ rotvec_to_rotmat(poses[:, 0]))
    return torch.cat([root[:, None], poses[:, 1:]], dim=1)


def test_find_kinds_of_named_poses_then_the_right_one_and_no_other():
    assert dict(zip(POSES, find_kinds(stack(POSES)), strict=True)) == KINDS


def test_find_kinds_of_a_pose_for_each_kind_then_that_one_and_no_other():
    found = dict(zip(MORE, find_kinds(stack(MORE)), strict=True))
    assert found == {name: [name] for name in MORE}
    assert {kind.name for kind in SITUATIONS} == {name for names in KINDS.values() for name in names} | MORE.keys()


@pytest.mark.parametrize("degrees", [0, 37, 90, 180, 301])
def test_find_kinds_of_mirrored_and_turned_poses_then_the_same(degrees):
    poses = stack({**POSES, **MORE})
    kinds = find_kinds(poses)
    assert find_kinds(turned(poses, degrees)) == kinds
    assert find_kinds(mirrored(turned(poses, degrees))) == kinds


def test_find_kinds_when_a_pose_is_nearly_of_a_kind_then_none():
    nearly = {
        "one arm half up": {**ARMS_DOWN, "l_shoulder": (0, 0, 30)},
        "half a squat": ARMS_DOWN | both(hip=(-60, 0, 0), knee=(60, 0, 0)) | {"pelvis": (5, 0, 0)},
        "leaning": {**ARMS_DOWN, "pelvis": (30, 0, 0)},
        "standing, arms swept back": both(shoulder=(40, 0, -75)),
        "kneeling on one knee, arms up": POSES["kneeling on the right knee"] | both(shoulder=(0, 0, 65)),
        "sitting, arms up": POSES["sitting"] | both(shoulder=(0, 0, 65)),
    }
    assert find_kinds(stack(nearly)) == [[]] * len(nearly)


def test_situations_are_usable():
    texts = [text for kind in SITUATIONS for text in kind.situations]
    assert len(set(texts)) == len(texts)
    assert len(SITUATIONS) >= 25
    for kind in SITUATIONS:
        assert 3 <= len(kind.situations) <= 6
        for text in kind.situations:
            assert check_situations([text], "x" * 300) == [text]


def test_find_kinds_of_motion_capture_then_few_and_not_many_at_once():
    path = ROOT.parent / "shared" / "data" / "cmu_poses" / "train.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not in this checkout")
    upright = torch.from_numpy(np.load(path)["poses_yaw0"][::2].astype(np.float64))
    poses = turn_frame(upright, "y-up").float()
    kinds = find_kinds(poses)
    share = np.mean([bool(of_pose) for of_pose in kinds])
    assert 0.03 < share < 0.5
    assert np.mean([len(of_pose) > 1 for of_pose in kinds]) < 0.02
    assert find_kinds(mirrored(poses)) == kinds
    assert len({name for of_pose in kinds for name in of_pose}) >= 8


class Rows(Source):
    """Makes rows."""

    name, licence = "some-source", "its own terms"

    def parts(self):
        return []

    def read_part(self, part):
        return iter(())


@pytest.fixture
def folder(tmp_path):
    """Rows as `chatpose data` writes them: 16 named poses with captions, one of another task, one known in part."""
    make = Rows(tmp_path).make_row
    rows = [
        make(
            name,
            "text_to_pose",
            [make_pose(turns)],
            [("geometry", f"{name}, says a program."), ("human", f"It is {name}.")],
        )
        for name, turns in POSES.items()
    ]
    other = make("other", "spg", [make_pose({})], [("implicit", "a scarecrow")])
    half_known = [joint != 18 for joint in range(24)]
    in_part = make("in part", "text_to_pose", [make_pose({})], [("geometry", "A person.")], pose_mask=half_known)
    odd = make("odd", "text_to_pose", [torch.rand(24, 3) * 2], [("geometry", "Something odd.")])
    folder = tmp_path / "rows"
    (folder / "train").mkdir(parents=True)
    (folder / "val").mkdir()
    write_rows(folder / "train" / "a.parquet", [*rows, other, in_part, odd])
    write_rows(folder / "val" / "b.parquet", rows[:1])
    return folder


def test_spg_from_the_table_then_a_row_for_each_pose_of_a_kind(folder):
    source = Spg(folder)
    assert source.parts() == ["train/a", "val/b"]
    rows = {row["id"]: row for row in source.rows("train/a")}
    assert list(rows) == [f"{name}/spg" for name in POSES]
    situations = {kind.name: kind.situations for kind in SITUATIONS}
    before = {row["id"]: row for row in load_rows(folder / "train" / "a.parquet")}
    for name in POSES:
        row = rows[f"{name}/spg"]
        validate_row(row)
        assert (row["task"], row["source"], row["licence"]) == ("spg", "spg", "its own terms")
        np.testing.assert_array_equal(np.float32(row["poses"]), np.float32(before[name]["poses"]))
        assert row["pose_mask"] == before[name]["pose_mask"]
        implicit = [text["text"] for text in row["captions"] if text["kind"] == "implicit"]
        assert implicit == [text for kind in KINDS[name] for text in situations[kind]]
        assert row["captions"][len(implicit) :] == before[name]["captions"]
        asked = row["messages"][0]["content"][0]["text"]
        assert any(text in asked for text in implicit)
    assert source.skipped == {
        "a row that asks for something else than one described pose": 1,
        "a pose that is known in part only": 1,
        "no situation for the pose": 1,
    }
    assert source.skipped_examples["a pose that is known in part only"] == ["in part"]


def test_spg_from_cmu_poses_then_their_rows_and_captions(tmp_path):
    upright = turn_frame(stack(POSES), "y-up", inverse=True)
    ids = [f"cmu_{number}" for number in range(len(POSES))]
    np.savez(tmp_path / "train.npz", poses_yaw0=upright.numpy().astype(np.float16))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"id": id}) + "\n" for id in ids))
    written = [{"text": "Somebody like a T.", "kind": "explicit"}, {"text": "A scarecrow.", "kind": "implicit"}]
    (tmp_path / "captions.jsonl").write_text(json.dumps({"id": "cmu_0", "captions": written}) + "\n")
    source = Spg(tmp_path)
    assert source.parts() == ["train/train"]
    rows = list(source)
    assert [row["id"] for row in rows] == [f"{id}/spg" for id in ids]
    assert source.skipped == {"a row that asks for something else than one described pose": 1}
    for row, pose, kinds in zip(rows, stack(POSES), KINDS.values(), strict=True):
        validate_row(row)
        assert (row["source"], row["licence"][:3]) == ("spg", "CMU")
        np.testing.assert_allclose(row["poses"][0], pose, atol=2e-3)
        assert row["captions"][0]["text"] in {t for kind in SITUATIONS if kind.name in kinds for t in kind.situations}
    assert {"kind": "human", "text": "Somebody like a T."} in rows[0]["captions"]


def answer_with(*situations):
    return json.dumps({"situations": list(situations)})


def test_spg_from_a_model_then_its_situations_and_no_request_the_second_time(folder, tmp_path):
    endpoint_of = pytest.importorskip("chatpose_hf.data.endpoint").Endpoint
    pytest.importorskip("openai", reason="needs the package openai")

    def reply(number, prompt, urls):
        caption = re.search(r'^"(.*)"$', prompt, re.MULTILINE).group(1)
        own = f"somebody in situation {caption[6:9]}"
        return f"```json\n{answer_with(own, 'somebody whose knee is bent', ' a  bus driver ')}\n```"

    with ChatServer(reply) as server:
        source = Spg(folder, endpoint=endpoint_of(server.url, "m", cache=tmp_path / "cache.jsonl"))
        rows = list(source)
        prompts = [request["messages"][0]["content"][0]["text"] for request in server.requests]
        assert len(prompts) == 18  # the val row's is the same as a train row's
        assert sum("It is T-pose." in prompt for prompt in prompts) == 1  # a human's words, where there are some
        assert not any("says a program" in prompt for prompt in prompts)
        assert len(list(Spg(folder, endpoint=endpoint_of(server.url, "m", cache=tmp_path / "cache.jsonl")))) == 19
        assert len(server.requests) == 18
    row = next(row for row in rows if row["id"] == "T-pose/spg")
    assert [text["text"] for text in row["captions"]] == [
        "somebody in situation T-p", "a bus driver", "T-pose, says a program.", "It is T-pose.",
    ]  # fmt: skip
    assert len(rows) == 19
    assert source.settings()["model"] == "m"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I cannot do that.", "missing answer: the model gave no JSON object"),
        ('{"situations": "a bus driver"}', "no usable situation in the model's answer"),
        ('{"situations": [1, null, "", "It is T-pose.", "  "]}', "no usable situation in the model's answer"),
        (
            answer_with(
                "x" * 1000,
                "a man with elbows at 90 degrees",
                "a man whose left arm aches",
                "a man in <image>",
                "one in <POSE> here",
            ),
            "no usable situation in the model's answer",
        ),
    ],
)
def test_spg_when_the_model_is_of_no_use_then_skipped_and_the_run_goes_on(folder, answer, reason):
    endpoint_of = pytest.importorskip("chatpose_hf.data.endpoint").Endpoint
    pytest.importorskip("openai", reason="needs the package openai")
    good = answer_with("somebody under the shower")
    with ChatServer(lambda number, prompt, urls: answer if "T-pose" in prompt else good) as server:
        source = Spg(folder, endpoint=endpoint_of(server.url, "m"))
        assert len(list(source.rows("train/a"))) == 17
    assert source.skipped[reason] == 1
    assert source.skipped_examples[reason] == ["T-pose"]


def test_spg_when_the_key_is_wrong_then_the_part_fails_with_advice(folder):
    endpoint_of = pytest.importorskip("chatpose_hf.data.endpoint").Endpoint
    pytest.importorskip("openai", reason="needs the package openai")
    with ChatServer(lambda *_: "{}", key="another") as server, pytest.raises(ValueError, match="OPENAI_API_KEY"):
        list(Spg(folder, endpoint=endpoint_of(server.url, "m", "secret")).rows("train/a"))


@pytest.mark.parametrize("fault", ["cut", "no parquet", "columns"])
def test_spg_when_a_file_is_damaged_then_an_error_names_it(folder, fault):
    path = folder / "train" / "a.parquet"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "no parquet":
        path.write_text("hello")
    else:
        pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match=r"expected rows as `chatpose data` writes them in .*a\.parquet"):
        list(Spg(folder).rows("train/a"))


def test_spg_when_files_are_absent_then_says_what_was_expected(folder, tmp_path):
    (folder / "train" / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.parquet"):
        list(Spg(folder).rows("train/a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="make them with `chatpose data`"):
        Spg(tmp_path / "empty").parts()
