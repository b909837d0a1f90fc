"""The command: every verb on a tiny model, and what it says when something is wrong."""

import io
import json
import sys

import numpy as np
import pytest
import torch
import trimesh
from make_smpl_files import dump_model
from make_smpl_files import make_model as make_model_file
from make_tiny_checkpoint import make_model, make_processor
from PIL import Image

from chatpose_hf.atomic_write import npz_bytes
from chatpose_hf.cli import main
from chatpose_hf.pose_files import poses_to_amass


FILES = ["body.glb", "page.html", "picture.png", "pose.npz", "reply.json"]


@pytest.fixture(autouse=True)
def no_smpl_files(monkeypatch):
    monkeypatch.delenv("SMPL_MODEL_DIR", raising=False)


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
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert [printed.count(f"wrote {output / name}") for name in FILES] == [1] * 5
    with np.load(output / "pose.npz", allow_pickle=False) as arrays:
        assert arrays["poses"].shape == (len(record["poses"]), 156)
        np.testing.assert_allclose(arrays["theta"], [pose["theta"] for pose in record["poses"]], rtol=1e-6)
    assert record["body"] == "default"


def test_generate_about_the_person_in_a_box_then_sees_the_crop(folder, picture, tmp_path, capsys):
    """The same answer as to a picture that is the crop already, and another than to the whole."""
    processor = make_processor()
    with Image.open(picture) as photo:
        processor.crop_person(photo, (4, 2, 20, 30)).save(tmp_path / "crop.png")
    poses = []
    for arguments in (
        ["--image", str(picture), "--box", "4", "2", "20", "30"],
        ["--image", str(tmp_path / "crop.png")],
        ["--image", str(picture)],
    ):
        output = tmp_path / str(len(poses))
        main(["generate", "What is the pose?", *arguments, "--model", str(folder), "--output", str(output), *SHORT])
        poses.append(json.loads((output / "reply.json").read_text(encoding="utf-8"))["poses"])
    assert poses[0] == poses[1] != poses[2]
    assert main(["generate", "What is the pose?", "--box", "4", "2", "20", "30", "--model", str(folder)]) == 1
    assert "expected one `--image` for `--box`, got 0" in capsys.readouterr().err


def test_generate_uses_the_smpl_file_that_is_there(folder, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SMPL_NEUTRAL.pkl").write_bytes(dump_model(make_model_file("smpl")))
    arguments = ["generate", "What is the pose?", "--model", str(folder), *SHORT, "--output"]
    monkeypatch.setenv("SMPL_MODEL_DIR", str(tmp_path / "models"))
    assert main([*arguments, str(tmp_path / "smpl")]) == 0
    assert json.loads((tmp_path / "smpl" / "reply.json").read_text())["body"] == "SMPL (SMPL_NEUTRAL.pkl)"
    mesh = trimesh.load_scene(tmp_path / "smpl" / "body.glb", process=False)
    assert len(mesh.geometry["pose_1"].vertices) == 6890
    assert main([*arguments, str(tmp_path / "default"), "--body", "default"]) == 0
    mesh = trimesh.load_scene(tmp_path / "default" / "body.glb", process=False)
    assert len(mesh.geometry["pose_1"].vertices) == 13718
    # a body that is not there is said before the model is asked
    assert main([*arguments, str(tmp_path / "none"), "--body", "smplx"]) == 1
    assert not (tmp_path / "none").exists()


def test_generate_a_file_of_prompts(folder, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "id": "b"}\n{"prompt": "three"}\n')
    arguments = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--model", str(folder), *SHORT]
    for _ in range(2):
        assert main([*arguments, "--output", str(tmp_path / "out"), "--batch-size", "2"]) == 0
        assert "3 replies; wrote" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert [(record["id"], record["prompt"]) for record in records] == [(1, "one"), ("b", "two"), (3, "three")]
    assert main(["render", str(tmp_path / "out" / "replies.jsonl"), "--output", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").is_file()


def test_render(tmp_path, capsys, monkeypatch, picture):
    poses = torch.zeros(20, 24, 3)
    poses[:, 0, 0] = torch.linspace(2, 4, 20)
    (tmp_path / "walk.npz").write_bytes(npz_bytes(poses_to_amass(poses)))
    monkeypatch.chdir(tmp_path)
    assert main(["render", "walk.npz"]) == 0
    assert (
        capsys.readouterr().out
        == "16 of 20 poses, evenly chosen; `--limit` takes more\nwrote walk.png (default body)\n"
    )
    assert Image.open("walk.png").size[0] == 1024
    assert main(["render", "walk.npz", "--output", "walk.bvh"]) == 0
    assert "Frames: 20" in (tmp_path / "walk.bvh").read_text()
    assert main(["render", "walk.npz", "--limit", "1", "--view", "-30", "--output", "one.png"]) == 0
    assert Image.open("one.png").size == (512, 512)
    # 0 degrees is the front, not "no view named"
    for view in ("0", "front"):
        assert main(["render", "walk.npz", "--limit", "1", "--view", view, "--output", f"{view}.png"]) == 0
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "front.png").read_bytes()
    np.savez("bare.npz", poses=np.zeros((1, 72), dtype=np.float32))
    assert main(["render", "bare.npz"]) == 1
    assert "does not say which frame" in capsys.readouterr().err
    photo = ["--photo", str(picture), "--box", "2", "2", "30", "38", "--output", "over.png"]
    assert main(["render", "bare.npz", "--frame", "y-up", *photo]) == 0
    assert Image.open("over.png").size == (32, 40)
    assert main(["render", "walk.npz", *photo]) == 1
    assert "`--photo` takes one pose" in capsys.readouterr().err
    assert main(["render", "walk.npz", "--output", "nowhere/a.png"]) == 1
    assert main(["render", "walk.npz", "--output", "walk.npz"]) == 1
    assert "got the input itself" in capsys.readouterr().err
    assert main(["render", "walk.npz", "--view", "nan"]) == 1
    assert main(["render", "walk.npz", "--output", "WALK.PLY"]) == 0
    assert (tmp_path / "WALK.PLY").read_bytes().startswith(b"ply")
    capsys.readouterr()
    assert main(["render", "walk.npz", "--view", "below"]) == 1
    assert "expected a view of front" in capsys.readouterr().err


def test_convert_smpl(tmp_path, capsys):
    (tmp_path / "model.pkl").write_bytes(dump_model(make_model_file("smpl", vertices=120)))
    assert main(["convert-smpl", str(tmp_path / "model.pkl"), str(tmp_path / "model.npz")]) == 0
    assert "posedirs                 120x3x207" in capsys.readouterr().out
    with np.load(tmp_path / "model.npz", allow_pickle=False) as arrays:
        assert arrays["J_regressor"].shape == (24, 120)
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    assert main(["convert-smpl", str(tmp_path / "evil.pkl"), str(tmp_path / "evil.npz")]) == 1
    assert "refused `os.system`" in capsys.readouterr().err
    assert not (tmp_path / "evil.npz").exists()


def test_chat_keeps_the_conversation(folder, picture, tmp_path, capsys, monkeypatch):
    lines = [
        f"/image {picture}",
        "first",
        "what is <image>?",
        "/image nowhere.png",
        "second",
        "/new",
        "third",
        "/quit",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", str(folder), "--output", str(tmp_path / "out"), *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("chatpose: ") == 3
    assert "nowhere.png" in captured.err
    assert "expected one picture for each `<image>`" in captured.err
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/reply.json"))]
    assert [record["prompt"] for record in records] == ["first", "second", "third"]
    assert [len(record["images"]) for record in records] == [1, 0, 0]
    pages = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "out").glob("*/page.html"))]
    # a page shows its conversation; a new one starts empty
    assert [page.count('"role":"user"') for page in pages] == [1, 2, 1]


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

    assert "cannot load a ChatPose checkpoint" in failure("generate", "a", "--model", str(tmp_path / "nowhere"))
    (tmp_path / "text.png").write_text("no picture")
    assert "is no picture" in failure("generate", "a", "--image", str(tmp_path / "text.png"), "--model", str(folder))
    assert "No such file" in failure("generate", "a", "--image", "nowhere.png", "--model", str(folder))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert "expected a ChatPose checkpoint, got one of model type 'llama'" in failure(
        "generate", "a", "--model", str(tmp_path / "llama")
    )
    assert "expected either a prompt or `--prompts FILE`" in failure("generate", "--model", str(folder))
    assert "no device 'nope' here" in failure("generate", "a", "--model", str(folder), "--device", "nope")
    assert "got an empty prompt" in failure("generate", " ", "--model", str(folder))
    for output in (tmp_path / "text.png", tmp_path / "text.png" / "below"):
        for question in (["a"], ["--prompts", "a.jsonl"]):
            assert "expected a folder as `--output`, got the file" in failure(
                "generate", *question, "--model", str(folder), "--output", str(output)
            )
    assert "`--prompts` needs `--output DIR`" in failure("generate", "--prompts", "a.jsonl", "--model", str(folder))
    for wrong in (["dance"], ["app", "--port", "99999"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


@pytest.mark.parametrize(
    ("command", "absent", "extra"),
    [
        ("eval text-to-pose --data rows --output out", "sklearn.feature_extraction.text", "eval"),
        ("train --model x --train_data y --output_dir z", "peft", "train"),
    ],
)
def test_command_when_its_packages_are_missing_then_names_the_extra(monkeypatch, capsys, command, absent, extra):
    """Before anything is asked or trained."""
    for name in [name for name in sys.modules if name.startswith("chatpose_hf.")]:
        if name.rpartition(".")[2] in ("evaluation", "measures", "baselines", "training", "adapters"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    assert main(command.split()) == 1
    assert f"pip install 'chatpose_hf[{extra}]'" in capsys.readouterr().err
