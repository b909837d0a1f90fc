"""Every command and every Python block of the README, on tiny checkpoints of the same layout and names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from make_tiny_checkpoint import make_image_processor, make_model, make_processor, make_tokenizer
from test_data_posescript import write_amass, write_release
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor


README_FILE = ROOT / "README.md"
README = README_FILE.read_text(encoding="utf-8")


def blocks(language, heading=None):
    text = README if heading is None else re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def desk(official, tmp_path_factory):
    """A working directory with what the README's reader has: the original's download, a photo, a LLaVA."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "CHATPOSE-V0").symlink_to(official / "checkpoint")
    (desk / "openai").mkdir()
    (desk / "openai" / "clip-vit-large-patch14-336").symlink_to(official / "vision_tower")
    shutil.copyfile(official / "images" / "wide.png", desk / "photo.png")

    # Two to test on: nothing is retrieved from one.
    write_release(desk / "PoseScript" / "posescript_release", splits={"train": [2, 0, 1], "test": [4, 3]})
    write_amass(desk / "PoseScript" / "AMASS")

    llava = desk / "llava-hf" / "llava-1.5-7b-hf"
    processor = make_processor()
    settings = make_model(processor).config.to_dict()
    settings = {name: settings[name] for name in ("vision_config", "text_config", "image_token_index")}
    LlavaForConditionalGeneration(LlavaConfig(**settings, image_seq_length=4)).save_pretrained(llava)
    tokenizer = make_tokenizer()  # as published: `<image>`, but no `<POSE>`
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    LlavaProcessor(
        make_image_processor(),
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        chat_template=None,
        vision_feature_select_strategy="default",
    ).save_pretrained(llava)
    return desk


def run(command, desk):
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "SMPL_MODEL_DIR": "",
        "HF_MODULES_CACHE": str(desk / ".modules"),
    }
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_run_and_python_blocks(desk):
    (desk / "questions.jsonl").write_text('{"prompt": "He runs. Give the SMPL pose.", "image": "photo.png"}\n')
    out = run(["bash", "-euc", "".join(blocks("bash", "Run"))], desk)
    assert "wrote chatpose-13b" in out
    assert "<POSE>" in out
    files = {"reply.json", "pose.npz", "body.glb", "picture.png", "page.html"}
    assert {path.name for path in (desk / "out").iterdir()} == files
    assert "24 joint rotations" in out.split("wrote chatpose-13b")[0], "the first command shows a pose"
    assert (desk / "answers.png").is_file()
    out = run(["bash", "-euc", "".join(blocks("bash", "Data"))], desk)
    assert "text_to_pose 3" in out
    assert "pose_estimation" in out
    assert (desk / "rows" / "synthetic" / "sheet.png").is_file()
    out = run(["bash", "-euc", "".join(blocks("bash", "Train"))], desk)
    assert "wrote poser" in out
    assert "24 joint rotations" in out
    assert "dry run: nothing was sent" in out
    out = run(["bash", "-euc", "".join(blocks("bash", "Evaluate"))], desk)
    assert "pa_mpjpe_mm" in out
    assert (desk / "results" / "report.html").is_file()
    first, second, third = blocks("python")  # the second goes on from the first
    (expected,) = blocks("text")
    assert expected.count("<POSE>") == expected.count("torch.Size([72])") == 2
    printed = run([sys.executable, "-c", first + second], desk)
    assert printed.startswith(expected)
    replies = printed.removeprefix(expected)
    assert replies.count("<POSE>") == replies.count("torch.Size([23, 3])") == 2
    printed = run([sys.executable, "-c", third], desk)
    assert printed == "torch.Size([1, 13718, 3]) torch.Size([1, 24, 3]) default\n"
    example = [sys.executable, str(ROOT / "examples" / "chat_about_a_photo.py"), "chatpose-13b", "photo.png", "talk"]
    assert run(example, desk).count("(1 poses)") == 2
    assert (desk / "talk" / "turn_2" / "page.html").is_file()


def test_install_and_test_commands_are_what_ci_runs():
    assert "pip install" in blocks("bash", "Install")[0]
    assert blocks("bash", "Test") == ["python -m pytest\n"]
    script = (ROOT / ".ci" / "run").read_text()
    assert "commands Install" in script
    assert "commands Test" in script


def test_links_lead_somewhere():
    for page in (README_FILE, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{link} in {page}"


def test_length():
    assert len(README.splitlines()) <= 150
