"""The command: every verb on a tiny model, and what it says when something is wrong."""

import io
import json

import numpy as np
import pytest
from make_tiny_checkpoint import make_model, make_processor

from chatpose_hf.cli import NO_MODEL, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    processor = make_processor()
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(images, tmp_path):
    path = tmp_path / "picture.png"
    images[0].save(path)
    return path


SHORT = ["--max-new-tokens", "8", "--force-pose", "--device", "cpu"]


def test_generate_prints_and_writes(folder, picture, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["generate", "What is the pose?", "--image", str(picture), "--model", str(folder)]
    assert main([*arguments, "--output", str(output), *SHORT]) == 0
    printed = capsys.readouterr().out
    record = json.loads((output / "reply.json").read_text(encoding="utf-8"))
    assert record["reply"] in printed
    assert "pose 1: 24 joint rotations" in printed
    assert record["prompt"] == "What is the pose?"
    assert record["images"] == [str(picture)]
    with np.load(output / "pose.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["poses"], [pose["theta"] for pose in record["poses"]], rtol=1e-6)


def test_chat_keeps_the_conversation(folder, picture, tmp_path, capsys, monkeypatch):
    lines = [f"/image {picture}", "first", "/image nowhere.png", "second", "/new", "third", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(folder), "--output", str(tmp_path / "out"), *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("chatpose: ") == 3
    assert "nowhere.png" in captured.err
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/reply.json"))]
    assert [record["prompt"] for record in records] == ["first", "second", "third"]
    assert [len(record["images"]) for record in records] == [1, 0, 0]


def test_convert_prints_the_table(official, tmp_path, capsys):
    output = tmp_path / "converted"
    tower = ["--vision-tower", str(official / "vision_tower")]
    assert main(["convert", str(official / "checkpoint"), str(output), *tower]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.N.self_attn.q_proj.weight" in printed
    assert "language_model.model.layers.N.self_attn.q_proj.weight" in printed
    assert "-> (left out)" in printed
    assert "144x64" in printed
    question = "What is the human pose in this image? Please respond with SMPL pose."
    image = ["--image", str(official / "images" / "wide.png")]
    assert main(["generate", question, *image, "--model", str(output), "--device", "cpu"]) == 0
    assert "The SMPL format of this person's pose is <POSE> ." in capsys.readouterr().out
    assert main(["convert", str(official / "checkpoint"), str(output), *tower]) == 1
    assert "is not an empty folder" in capsys.readouterr().err


def test_env(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "transformers" in printed
    assert "chatpose_hf" in printed


def test_errors_are_explained(folder, picture, tmp_path, capsys):
    def failure(*arguments):
        assert main([*arguments]) == 1
        return capsys.readouterr().err

    assert NO_MODEL in failure("generate", "a")
    assert "cannot load a ChatPose checkpoint" in failure("generate", "a", "--model", str(tmp_path / "nowhere"))
    (tmp_path / "text.png").write_text("no picture")
    assert "is not a picture" in failure(
        "generate", "a", "--image", str(tmp_path / "text.png"), "--model", str(folder)
    )
    assert "No such file" in failure("generate", "a", "--image", "nowhere.png", "--model", str(folder))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "expected a ChatPose checkpoint, got one of model type 'llama'" in failure(
        "generate", "a", "--model", str(tmp_path / "llama")
    )
    with pytest.raises(SystemExit, match="2"):
        main(["dance"])
