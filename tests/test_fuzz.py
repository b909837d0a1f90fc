"""What strangers send, at random: nothing but the documented errors comes of it.

`FUZZ_EXAMPLES=10000 python -m pytest -n 0 tests/test_fuzz.py` draws so many inputs of each kind, new ones each time; the
default is a few, always the same. Figures: docs/security.md.
"""

import base64
import contextlib
import copy
import io
import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from handler_server import load_handler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_smpl_files import make_model as make_body
from PIL import Image
from transformers import HfArgumentParser

from chatpose_hf.array_files import load_array_pickle
from chatpose_hf.batch_generate import load_prompts
from chatpose_hf.cli import main
from chatpose_hf.data.mocap_files import load_amc, load_bvh
from chatpose_hf.data.rows import RowError, validate_row
from chatpose_hf.data.source import load_jsonl
from chatpose_hf.image_files import open_upload
from chatpose_hf.pose_files import load_poses
from chatpose_hf.settings_file import parse_settings
from chatpose_hf.smpl_files import load_smpl_file
from chatpose_hf.training import LossArguments


COUNT = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=COUNT or 25,
    derandomize=not COUNT,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

SPECIAL = [
    "<POSE>",
    "<image>",
    "<s>",
    "</s>",
    "USER:",
    "ASSISTANT:",
    "{{ 7 * 7 }}",
    "\0",
    "\ud800",
    "<script>",
    "../..",
    "‮",
    "🧍",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=8), st.just(" ")), max_size=6).map("".join)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 10**30, -(2**63), 1e308, float("nan"), float("inf")])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all values in a JSON value, its own first."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def edited(draw, seeds):
    """A valid JSON value with a few of its parts replaced, removed, doubled or joined by others."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "double"])):
            case "replace":
                parent[path[-1]] = draw(JSON)
            case "remove":
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(TEXTS)] = draw(JSON)
            case "add" | "double" if isinstance(parent, list):
                parent.append(parent[path[-1]] if draw(st.booleans()) else draw(JSON))
    return value if draw(st.integers(0, 20)) else draw(JSON)


@st.composite
def damaged(draw, seeds):
    """A file's bytes with a few of them changed, removed, doubled or cut off."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["change", "change", "change", "write", "remove", "double", "cut"])):
            case "change" if at < len(content):
                content[at] = draw(
                    st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1, draw(st.integers(0, 255))])
                )
            case "write":
                content[at : at + length] = draw(st.binary(max_size=length))
            case "remove":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "cut" if draw(st.booleans()):
                del content[at:]
    return bytes(content)


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def picture(kind):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    return buffer.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
POSES = np.random.default_rng(0).normal(0, 0.3, (2, 156)).astype(np.float32)
BODY = make_body(vertices=48)
REPLY = {"prompt": "He runs.", "id": "a", "reply": "<POSE>", "poses": [{"theta": [0.1] * 72}]}
BVH = b"""HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Chest
  {
    OFFSET 0 5.21 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 5.45 0
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.033333
8.03 35.01 88.36 -3.41 14.78 -164.35 13.09 40.30 -24.60
7.81 35.10 86.47 -3.78 12.94 -166.97 12.64 42.57 -22.34
"""
ASF = b""":version 1.10
:name x
:units
  mass 1.0
  length 0.45
  angle deg
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name lhipjoint
     direction 0.66 -0.7 0.25
     length 2.4
     axis 0 0 0  XYZ
  end
  begin
     id 2
     name lfemur
     direction 0.34 -0.93 0
     length 7.1
     axis 0 0 20  XYZ
    dof rx ry rz
    limits (-160.0 20.0)
           (-70.0 70.0)
           (-60.0 70.0)
  end
:hierarchy
  begin
    root lhipjoint
    lhipjoint lfemur
  end
"""
AMC = b"""#!OML:ASF x
:FULLY-SPECIFIED
:DEGREES
1
root 9.37 17.88 -17.31 -2.01 -3.83 -3.49
lfemur 1.0 2.0 3.0
2
root 9.37 17.88 -17.31 -2.01 -3.83 -3.49
lfemur 1.0 2.0 3.0
"""


@fuzz
@given(
    damaged(
        [
            pickle.dumps({name: BODY[name] for name in ("J_regressor", "kintree_table")}, protocol)
            for protocol in (0, 2, 4)
        ]
    )
)
def test_pickles(content):
    with contextlib.suppress(ValueError):
        load_array_pickle(content)


@fuzz
@given(
    st.one_of(
        damaged([npz(**{name: npy(value) for name, value in BODY.items()})]),
        st.tuples(st.sampled_from(sorted(BODY)), damaged([npy(BODY["weights"]), npy(BODY["f"])])).map(
            lambda edit: npz(**{**{name: npy(value) for name, value in BODY.items()}, edit[0]: edit[1]})
        ),
        damaged([pickle.dumps(BODY, 2)]),
    ),
)
def test_body_files(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / ("body.npz" if content[:1] == b"P" else "body.pkl")
    file.write_bytes(content)
    with contextlib.suppress(ValueError):
        load_smpl_file(file)


@fuzz
@given(
    st.one_of(
        damaged([npz(poses=npy(POSES)), npz(poses=npy(POSES), theta=npy(POSES[:, :72]))]),
        damaged([npy(POSES), npy(POSES[:, :72]), npy(POSES[:, :72].reshape(2, 24, 3))]).map(
            lambda content: npz(poses=content)
        ),
    ),
    st.sampled_from([None, "camera", "y-up", "z-up", "x"]),
)
def test_pose_files(tmp_path_factory, content, frame):
    file = tmp_path_factory.getbasetemp() / "pose.npz"
    file.write_bytes(content)
    with contextlib.suppress(ValueError):
        poses, names = load_poses(file, frame)
        assert poses.shape[1:] == (24, 3)
        assert torch.isfinite(poses).all()
        assert len(poses) == len(names)


@fuzz
@given(
    edited([REPLY, {**REPLY, "id": 3, "poses": REPLY["poses"] * 2}]), st.sampled_from(["reply.json", "replies.jsonl"])
)
def test_replies(tmp_path_factory, reply, name):
    file = tmp_path_factory.getbasetemp() / name
    file.write_text(json.dumps(reply), encoding="utf-8")
    with contextlib.suppress(ValueError):
        poses, _ = load_poses(file)
        assert torch.isfinite(poses).all()


@fuzz
@given(damaged(PICTURES))
def test_pictures(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "picture"
    file.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert open_upload(file).mode == "RGB"


@fuzz
@given(damaged([BVH]), damaged([AMC]), damaged([ASF]))
def test_motions(tmp_path_factory, bvh, amc, asf):
    folder = tmp_path_factory.getbasetemp()
    for name, content in (("a.bvh", bvh), ("a.amc", amc), ("a.asf", asf)):
        (folder / name).write_bytes(content)
    with contextlib.suppress(ValueError):
        load_bvh(folder / "a.bvh")
    with contextlib.suppress(ValueError):
        load_amc(folder / "a.amc", folder / "a.asf")


@fuzz
@given(
    st.one_of(
        edited(
            [{"prompt": "He runs.", "image": "picture.png", "id": "a"}, {"prompt": "a", "image": ["picture.png"]}]
        ).map(lambda value: json.dumps(value).encode()),
        damaged([b'{"prompt": "He runs.", "id": 1}\n\n{"prompt": "She sits."}\n']),
    )
)
def test_prompt_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "picture.png").write_bytes(PICTURES[0])
    (folder / "prompts.jsonl").write_bytes(content)
    with contextlib.suppress(ValueError):
        assert load_prompts(folder / "prompts.jsonl")
    with contextlib.suppress(ValueError):
        load_jsonl(folder / "prompts.jsonl")


@fuzz
@given(
    st.one_of(
        edited([{"ce_loss_weight": 1.0, "joint_error": "rotmat_l1", "joint_weights": {"head": 2}}]).map(
            lambda value: yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")
        ),
        damaged([b"ce_loss_weight: 1.0\njoint_weights: [head=2, neck=1]\n"]),
    )
)
def test_settings_files(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_bytes(content)
    with contextlib.suppress(ValueError, SystemExit), contextlib.redirect_stderr(io.StringIO()):
        parse_settings(HfArgumentParser(LossArguments, prog="chatpose train"), [str(file)], lists=["joint_weights"])


ROW = {
    "id": "a",
    "source": "b",
    "task": "text_to_pose",
    "licence": "c",
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "He runs."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "pose"}]},
    ],
    "images": [{"bytes": None, "path": "a.png"}],
    "poses": [np.zeros((24, 3)).tolist()],
    "pose_mask": [[True] * 24],
    "captions": [{"kind": "human", "text": "He runs."}],
}


def test_the_row_itself_is_valid():
    validate_row(ROW)


@fuzz
@given(edited([ROW]))
def test_rows(row):
    with contextlib.suppress(RowError):
        validate_row(row)


@fuzz
@given(
    edited(
        [
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "He runs."}, {"type": "image"}, {"type": "pose"}],
                },
                {"role": "assistant", "content": "<POSE>"},
            ]
        ]
    ),
    st.lists(TEXTS, max_size=3),
    st.integers(0, 3),
    edited([[[[[0.1] * 3] * 24]]]),
    st.booleans(),
)
def test_processor(processor, chat, texts, num_images, poses, asks_masks):
    images = [Image.new("RGB", (30 + 10 * index, 28)) for index in range(num_images)]
    with contextlib.suppress(ValueError):
        batch = processor(images=images or None, text=texts, padding=True, return_tensors="pt")
        assert (batch["input_ids"] == processor.image_token_id).sum() == num_images * processor.num_image_tokens
    with contextlib.suppress(ValueError):
        batch = processor(text=texts, poses=poses, padding=True, return_tensors="pt")
        if poses is not None:
            assert (batch["input_ids"] == processor.pose_token_id).sum() == len(batch["pose_labels"])
    with contextlib.suppress(ValueError):
        processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=asks_masks
        )


@pytest.fixture(scope="module")
def handler(tmp_path_factory, processor, model):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_handler(ROOT / "model_card").EndpointHandler(str(folder))


REQUESTS = [
    {"inputs": "He runs.", "parameters": {"max_new_tokens": 1, "force_pose": True, "do_sample": True, "top_p": 0.5}},
    {
        "inputs": {"text": "He runs.", "image": base64.b64encode(PICTURES[0]).decode()},
        "parameters": {"max_new_tokens": 1},
    },
    {
        "inputs": [
            {"role": "user", "content": [{"type": "image", "image": base64.b64encode(PICTURES[1]).decode()}]},
            {"role": "assistant", "content": "<POSE>"},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ],
        "parameters": {"max_new_tokens": 1},
    },
]


@fuzz
@given(
    st.one_of(
        edited(REQUESTS),
        damaged(PICTURES).map(
            lambda content: {**REQUESTS[1], "inputs": {"text": "a", "image": base64.b64encode(content).decode()}}
        ),
    )
)
def test_handler(handler, request_body):
    with contextlib.suppress(ValueError):
        answer = handler(request_body)
        assert len(answer["poses"]) == answer["text"].count("<POSE>")


COMMAND_WORDS = [
    "generate",
    "chat",
    "render",
    "data",
    "train",
    "eval",
    "train-retrieval",
    "publish",
    "convert",
    "convert-smpl",
    "env",
    "app",
    "--prompts",
    "--image",
    "--box",
    "--output",
    "--model",
    "--body",
    "--frame",
    "--view",
    "--limit",
    "--input",
    "--photo",
    "--repo",
    "--merge",
    "--results",
    "--count",
    "--seed",
    "--help",
    "--device",
    "cmu",
    "synthetic",
    "none",
    "pose.npz",
    "picture.png",
    "prompts.jsonl",
    "reply.json",
    "out",
    "1",
    "-1",
    "nan",
    "a/b",
]
WORDS = st.one_of(
    st.sampled_from([*COMMAND_WORDS, ""]), TEXTS.filter(lambda text: "/" not in text and "\\" not in text)
)


@fuzz
@given(st.lists(WORDS, max_size=8))
def test_command_line(monkeypatch, arguments):
    # Where they are right, `app` would serve for ever and `generate` load for long; there is no such model.
    with tempfile.TemporaryDirectory() as folder:
        check_command(Path(folder), monkeypatch, arguments)


def check_command(folder, monkeypatch, arguments):
    (folder / "pose.npz").write_bytes(npz(poses=npy(POSES)))
    (folder / "reply.json").write_text(json.dumps(REPLY))
    (folder / "picture.png").write_bytes(PICTURES[0])
    (folder / "prompts.jsonl").write_text('{"prompt": "He runs."}\n')
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            status = main(
                [*arguments, "--model", "none"] if {"app", "generate", "chat"} & set(arguments) else arguments
            )
        except SystemExit as error:
            status = error.code
    assert status in (0, 1, 2)
    assert "Traceback" not in errors.getvalue()
    if status != 0:
        assert errors.getvalue().strip()
