"""The checkpoint that comes with the package: what it weighs, that it loads as any other, that it understood the main things."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from chatpose_hf import CHATPOSE_TINY, ChatPoseForConditionalGeneration, ChatPosePipeline, ChatPoseProcessor
from chatpose_hf.body import JOINT_NAMES, BodyModel
from chatpose_hf.cli import main


FOLDER = Path(CHATPOSE_TINY)


@pytest.fixture(scope="module")
def pipe():
    model = ChatPoseForConditionalGeneration.from_pretrained(CHATPOSE_TINY)
    return ChatPosePipeline(model=model, processor=ChatPoseProcessor.from_pretrained(CHATPOSE_TINY), device="cpu")


def test_files_are_small_and_of_formats_that_run_nothing():
    files = [path for path in FOLDER.iterdir() if path.name != "__pycache__"]  # pip writes it beside what it installs
    weights = [path for path in files if path.suffix not in (".py", ".json", ".jinja", ".md")]
    assert [path.name for path in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size < 25e6
    for path in FOLDER.glob("*.py"):
        assert path.read_bytes() == (ROOT / "src" / "chatpose_hf" / path.name).read_bytes(), path.name
    assert len(list(FOLDER.glob("*.py"))) == 6


def test_weights_are_float32_wherever_they_are_loaded(pipe):
    assert {weight.dtype for weight in pipe.model.parameters()} == {torch.float32}


def ask(pipe, text):
    (reply,) = pipe([text], max_new_tokens=64)
    assert len(reply["poses"]) == 1, reply["text"]
    joints = BodyModel.load("default").joints(reply["poses"][0]["theta"].view(1, 24, 3))[0]
    x, y, z = (joints * torch.tensor([1.0, -1.0, -1.0])).T  # y up, the person facing +z, the left at +x
    return [dict(zip(JOINT_NAMES, values.tolist(), strict=False)) for values in (x, y, z)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_arm_is_raised_on_the_side_that_was_said(pipe, side):
    _, y, _ = ask(pipe, f"Raise the {side} arm above the head.")
    up, down = ("l", "r") if side == "left" else ("r", "l")
    assert y[f"{up}_wrist"] > y["head"]
    assert y[f"{down}_wrist"] < y["spine3"]


def test_postures_differ_as_their_words_do(pipe):
    _, y, _ = ask(pipe, "A person stands upright with the arms hanging at the sides.")
    standing = y["pelvis"] - y["l_ankle"]
    assert standing > 0.7
    assert y["l_wrist"] < y["spine1"]
    _, y, _ = ask(pipe, "a person sitting on a chair")
    assert 0.2 < y["pelvis"] - y["l_ankle"] < standing - 0.25
    assert abs(y["l_knee"] - y["l_hip"]) < 0.2
    _, y, _ = ask(pipe, "Lie on your back.")
    assert abs(y["head"] - y["pelvis"]) < 0.2
    assert abs(y["l_ankle"] - y["pelvis"]) < 0.3


@pytest.mark.parametrize("text", ["Hello!", "What is the capital of Norway?", "How do I bake bread?"])
def test_other_talk_is_answered_without_a_pose(pipe, text):
    (reply,) = pipe([text], max_new_tokens=64)
    assert reply["poses"] == []
    assert reply["text"].endswith((".", "!", "?"))


def test_the_command_takes_it_where_no_model_is_named(tmp_path, capsys):
    assert main(["generate", "She kneels on one knee.", "--output", str(tmp_path / "out")]) == 0
    assert "24 joint rotations" in capsys.readouterr().out
    assert (tmp_path / "out" / "picture.png").is_file()


def test_auto_classes_load_it_where_the_package_is_not(pipe, tmp_path):
    code = """
import sys, json
sys.modules["chatpose_hf"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "text", "text": "Raise the left arm."}]}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
output = model.generate(**processor.apply_chat_template(chat, **options), max_new_tokens=32, return_dict_in_generate=True)
(reply,) = processor.post_process_poses(output)
print(json.dumps(reply["poses"][0]["theta"].tolist()))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, CHATPOSE_TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (reply,) = pipe(["Raise the left arm."], max_new_tokens=32)
    expected = reply["poses"][0]["theta"]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-4, rtol=0)
