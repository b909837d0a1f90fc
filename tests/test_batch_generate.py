"""A file of prompts to a file of replies: order, resume, and what is refused before anything is answered."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from make_tiny_checkpoint import make_model, make_processor

from chatpose_hf import ChatPosePipeline
from chatpose_hf.batch_generate import generate_replies, load_prompts
from chatpose_hf.processes import find_processes


SETTINGS = {"model": "tiny"}
LIMITS = {"max_new_tokens": 6, "force_pose": True}


@pytest.fixture(scope="module")
def pipe():
    processor = make_processor()
    return ChatPosePipeline(model=make_model(processor), processor=processor, device="cpu")


@pytest.fixture
def prompts_file(tmp_path, images):
    images[0].save(tmp_path / "a.png")
    images[1].save(tmp_path / "b.png")
    lines = [
        {"prompt": "first", "image": "a.png"},
        {"prompt": "second, é", "id": "two"},
        {"prompt": "third", "image": ["a.png", str(tmp_path / "b.png")], "id": 30},
        {"prompt": "fourth,\u2028on two lines", "image": None},
        {"prompt": "fifth"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    return path


def run(pipe, prompts_file, folder, **options):
    settings = {"settings": SETTINGS, "state": find_processes(), "batch_size": 2, **LIMITS, **options}
    return generate_replies(lambda: pipe, load_prompts(prompts_file), folder, **settings)


def test_replies_in_order(pipe, prompts_file, tmp_path, images):
    path = run(pipe, prompts_file, tmp_path / "out")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]
    assert [record["id"] for record in records] == [1, "two", 30, 4, 5]
    assert [record["prompt"] for record in records] == [
        "first",
        "second, é",
        "third",
        "fourth,\u2028on two lines",
        "fifth",
    ]
    assert [len(record["images"]) for record in records] == [1, 0, 2, 0, 0]
    for record in records:
        assert "<POSE>" in record["reply"]
        assert all(len(pose["theta"]) == 72 for pose in record["poses"])
    # the same words as one at a time
    alone = pipe({"text": "first", "images": [images[0]]}, **LIMITS)
    assert records[0]["reply"] == alone["text"]
    assert records[0]["poses"][0]["theta"] == pytest.approx(alone["poses"][0]["theta"].tolist(), abs=1e-4)


# Longest first, the pictures counting most: what a batch holds is of one length.
BATCHES = [["third", "first"], ["fourth,\u2028on two lines", "second, é"], ["fifth"]]


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
@pytest.mark.parametrize("tail", [b"", b'{"batch": 2, "rec'])
def test_a_run_goes_on_where_it_stopped(pipe, prompts_file, tmp_path, monkeypatch, lines, tail):
    whole = run(pipe, prompts_file, tmp_path / "whole").read_bytes()
    path = run(pipe, prompts_file, tmp_path / "cut")
    path.unlink()
    kept = tmp_path / "cut" / "process-0.jsonl"
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:lines]) + tail)
    asked = []
    preprocess = ChatPosePipeline.preprocess
    monkeypatch.setattr(
        ChatPosePipeline, "preprocess", lambda self, inputs: asked.append(inputs["text"]) or preprocess(self, inputs)
    )
    assert run(pipe, prompts_file, tmp_path / "cut").read_bytes() == whole
    assert asked == [prompt for batch in BATCHES[lines:] for prompt in batch]


def test_a_finished_run_loads_no_model(pipe, prompts_file, tmp_path):
    whole = run(pipe, prompts_file, tmp_path / "out").read_bytes()
    assert run(None, prompts_file, tmp_path / "out").read_bytes() == whole


def test_another_folder_is_asked_for(pipe, prompts_file, tmp_path):
    path = run(pipe, prompts_file, tmp_path / "out")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings: model 'tiny' and now 'big'; name another folder"):
        run(pipe, prompts_file, tmp_path / "out", settings={"model": "big"})
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "something else"}')
    with pytest.raises(ValueError, match=r"other settings: prompts '5, sha256:\w+' and now '1, sha256:"):
        run(pipe, other, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another run is writing"):
        run(pipe, prompts_file, tmp_path / "out")
    assert path.read_bytes() == before
    settings = (tmp_path / "out" / "settings.json").read_bytes()
    (tmp_path / "out" / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json, which says how they were made, cannot be read"):
        run(pipe, prompts_file, tmp_path / "out")
    (tmp_path / "out" / "settings.json").write_bytes(settings)
    (tmp_path / "out" / "process-0.jsonl").write_bytes(b"hello\n")
    with pytest.raises(ValueError, match="is no batch of ours"):
        run(pipe, prompts_file, tmp_path / "out")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("hello", "expected a JSON object in line 2"),
        ("[1]", r'expected {"prompt": "...".*in line 2'),
        ('{"text": "a"}', r'expected {"prompt"'),
        ('{"prompt": " "}', r'expected {"prompt"'),
        ('{"prompt": "a", "images": "b.png"}', "got also images"),
        ('{"prompt": "a", "image": 3}', "expected a file name"),
        ('{"prompt": "a", "image": "nowhere.png"}', r"no file `nowhere\.png` \(`image` in line 2"),
        ('{"prompt": "a", "image": "prompts.jsonl"}', "cannot identify image file"),
        (r'{"prompt": "\ud800 half"}', "expected text that UTF-8 can write"),
        ('{"prompt": "a", "id": [1]}', "expected a text or a number as `id`"),
        ('{"prompt": "a", "id": 1}', "ids that differ, got 1 in lines 1 and 2"),
    ],
)
def test_bad_lines_are_named_before_anything_is_answered(tmp_path, line, match):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=match):
        load_prompts(path)


def test_files_of_windows_editors(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert [(prompt.id, prompt.prompt) for prompt in load_prompts(path)] == [(1, "a"), (3, "b")]
    path.write_bytes('{"prompt": "é"}'.encode("latin1"))
    with pytest.raises(ValueError, match=r"expected UTF-8 text in .*prompts\.jsonl"):
        load_prompts(path)


def test_other_refusals(pipe, prompts_file, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        load_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "token.jsonl").write_text('{"prompt": "what is <image>?"}')
    with pytest.raises(ValueError, match="a prompt without `<image>`, got one with id 1"):
        run(pipe, tmp_path / "token.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match="batch size of at least 1, got 0"):
        run(pipe, prompts_file, tmp_path / "out", batch_size=0)


def test_a_killed_run_loses_and_doubles_nothing(pipe, prompts_file, tmp_path):
    """The command, killed without warning after its first replies, then called again on two processes."""
    pipe.save_pretrained(tmp_path / "tiny")
    prompts_file.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(60)))
    arguments = ["generate", "--prompts", str(prompts_file), "--model", str(tmp_path / "tiny"), "--force-pose"]
    arguments += ["--max-new-tokens", "40", "--batch-size", "3", "--device", "cpu", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "chatpose_hf.cli", *arguments]
    kept = tmp_path / "out" / "process-0.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (kept.is_file() and kept.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < kept.read_bytes().count(b"\n") < 20, "the test must stop the run in its middle"
    assert not (tmp_path / "out" / "replies.jsonl").exists()
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "chatpose_hf.cli"]
    command = [sys.executable, *launch, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("60 replies; wrote") == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == [f"question {n}" for n in range(60)]
    assert all(record["poses"] for record in records)
    assert (tmp_path / "out" / "process-1.jsonl").stat().st_size, "the second process has done its part"
