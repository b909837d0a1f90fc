"""A saved folder in a process where the package does not exist: what somebody who downloads a checkpoint meets."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from make_tiny_checkpoint import make_model, make_processor


BEGIN = """
import json, sys
sys.modules["chatpose_hf"] = None  # importing it fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import pipeline
folder, other = sys.argv[1:]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "tiny-chatpose"
    processor = make_processor()
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_clean(code, folder, tmp_path):
    """Runs code far from the sources; returns what its last line printed, as JSON."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", BEGIN + code, str(folder), str(tmp_path / "other")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


ANSWER = """
inputs = processor(text="USER: <image>\\nq ASSISTANT:", images=Image.new("RGB", (30, 40), "red"), return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=6, force_pose=True, return_dict_in_generate=True)
reply = processor.post_process_poses(output)[0]
"""


def test_auto_classes_load_and_answer_as_the_package_does(folder, tmp_path):
    code = (
        """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
names = []
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    names.append(type(model).__name__)
"""
        + ANSWER
        + """
print(json.dumps([config.model_type, type(processor).__name__, names, reply["text"], reply["poses"][0]["theta"].tolist()]))
"""
    )
    model_type, processor_name, names, text, theta = run_clean(code, folder, tmp_path)
    assert (model_type, processor_name) == ("chatpose", "ChatPoseProcessor")
    assert names == ["ChatPoseForConditionalGeneration"] * 3

    from PIL import Image

    from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor

    names = {"model": ChatPoseForConditionalGeneration.from_pretrained(folder).eval(), "Image": Image}
    names["processor"] = ChatPoseProcessor.from_pretrained(folder)
    exec(ANSWER, names)
    assert text == names["reply"]["text"]
    assert theta == pytest.approx(names["reply"]["poses"][0]["theta"].tolist(), abs=1e-4)


def test_pipelines_load(folder, tmp_path):
    code = """
pipe = pipeline("image-text-to-pose", model=folder, trust_remote_code=True)
replies = pipe(["a", {"text": "b", "images": Image.new("RGB", (9, 9))}], batch_size=2, max_new_tokens=6, force_pose=True)
by_default = pipeline(model=folder, task="image-text-to-text", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
said = by_default(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
print(json.dumps([type(pipe).__name__, [len(reply["poses"][0]["theta"]) for reply in replies], type(said).__name__]))
"""
    assert run_clean(code, folder, tmp_path) == ["ChatPosePipeline", [72, 72], "str"]


def test_saving_again_from_remote_code_gives_a_folder_that_loads(folder, tmp_path):
    code = (
        """
for source, target in ((folder, other), (other, None)):
    model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    if target:
        model.save_pretrained(target)
        processor.save_pretrained(target)
"""
        + ANSWER
        + """
pipe = pipeline("image-text-to-pose", model=other, trust_remote_code=True)
print(json.dumps([len(reply["poses"]), len(pipe("a", max_new_tokens=6, force_pose=True)["poses"])]))
"""
    )
    assert run_clean(code, folder, tmp_path) == [1, 1]
    copied = {path.name: path.read_bytes() for path in (tmp_path / "other").glob("*.py")}
    assert copied == {name: (ROOT / "src" / "chatpose_hf" / name).read_bytes() for name in copied}
    assert set(copied) >= {
        "rotations.py",
        "configuration_chatpose.py",
        "modeling_chatpose.py",
        "processing_chatpose.py",
        "person_crop.py",
        "pipeline_chatpose.py",
    }


def test_new_model_from_remote_code_starts_at_the_rest_pose(folder, tmp_path):
    code = """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
print(json.dumps(model.pose_head(torch.zeros(32))[0].tolist()))
"""
    assert run_clean(code, folder, tmp_path) == [1, 0, 0, 0, -1, 0]


def test_converted_checkpoint_answers_as_the_original(converted, official, tmp_path):
    golden = json.loads((official / "golden.json").read_text(encoding="utf-8"))
    sample = golden["samples"]["image0"]
    strings = golden["tokenization"]["strings"]
    code = f"""
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
image = Image.open({str(official / "images" / sample["image"])!r})
inputs = processor(text={sample["prompt"]!r}, images=image, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
image_id = processor.image_token_id
ids = [processor.tokenizer(text.replace("[SEG]", "<POSE>")).input_ids for text in {strings!r}]
ids = [[-200 if i == image_id else i for i in row] for row in ids]
print(json.dumps([output.sequences[0, output.prompt_length:].tolist(), ids, type(processor.tokenizer).__name__]))
"""
    generated, ids, tokenizer_class = run_clean(code, converted, tmp_path)
    assert generated == sample["generated_ids"]
    assert tokenizer_class == "ChatPoseTokenizer"
    assert ids == golden["tokenization"]["variants"]["new_tags"]["ids"]


def test_push_to_hub_sends_the_code_files(monkeypatch):
    """What would be uploaded, without a network: the folder that `push_to_hub` prepares."""
    from types import SimpleNamespace

    from huggingface_hub import HfApi
    from transformers.utils import PushToHubMixin

    sent = set()
    repo = SimpleNamespace(repo_id="somebody/chatpose")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda _, folder, *__, **___: sent.update(os.listdir(folder))
    )
    processor = make_processor()
    make_model(processor).push_to_hub("somebody/chatpose")
    processor.push_to_hub("somebody/chatpose")
    assert sent >= {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "chat_template.jinja",
        "rotations.py",
        "configuration_chatpose.py",
        "modeling_chatpose.py",
        "processing_chatpose.py",
        "person_crop.py",
        "pipeline_chatpose.py",
    }
