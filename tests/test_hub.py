"""Publishing: what a release holds, that it is checked before it leaves, and what arrives at a Hub on this machine."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard, constants
from make_tiny_checkpoint import make_model, make_processor
from safetensors.torch import load_file, save_file
from test_architecture import HUB_FILES

from chatpose_hf import ChatPoseForConditionalGeneration, hub
from chatpose_hf.hub import check_release, make_release, publish


RUN = {"base_model": "somebody/base", "method": "full", "step": 12, "body": "default"}
RESULTS = {
    "task": "text-to-pose",
    "dataset": "somebody/posescript",
    "split": "test",
    "body": "default",
    "metrics": {"model": {"pa_mpjpe_mm": 61.25}},
}
WHOLE = {
    *(f"{name}.py" for name in HUB_FILES),
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "handler.py",
    "model.safetensors",
    "processor_config.json",
    "requirements.txt",
    "tokenizer.json",
    "tokenizer_config.json",
}


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved ChatPose, as a training leaves it: with a good deal that nobody else should get."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    processor = make_processor()
    make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    write(folder / "run.json", RUN)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
        "rng_state_0.pth",
        "pytorch_model.bin",
        "trainer_state.json",
        "config.yaml",
        ".env",
        "train.py",
        "runs/events",
        "checkpoint-1/model.safetensors",
    ):
        write(folder / name, "private")
    write(folder / "modeling_chatpose.py", "raise SystemExit('not what was reviewed')")
    return folder


@pytest.fixture(scope="module")
def adapter(whole, tmp_path_factory):
    """An adapter on `whole`, whose pose head and updates are not the base's."""
    adapters = pytest.importorskip("chatpose_hf.adapters", reason="needs the extra `train`")
    folder = tmp_path_factory.mktemp("adapted") / "run"
    base = ChatPoseForConditionalGeneration.from_pretrained(whole)
    tuning = adapters.TuningArguments(lora_r=2)
    model = adapters.prepare_model(base, tuning, base=str(whole))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    write(folder / "run.json", {**RUN, "base_model": "somebody/else", "method": "lora"})
    write(folder / "optimizer.pt", "private")
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """The load check takes seconds: tests of other things go without it."""
    monkeypatch.setattr(hub, "check_release", lambda folder: "checked")


# A release folder


def test_release_of_a_whole_model_holds_what_is_needed_and_nothing_else(whole, tmp_path):
    paths = make_release(whole, tmp_path / "release", repo_id="me/poser")
    assert names_in(tmp_path / "release") == WHOLE | {"run.json"}
    assert paths == sorted(tmp_path / "release" / name for name in WHOLE | {"run.json"})
    for name in HUB_FILES:
        source = ROOT / "src" / "chatpose_hf" / f"{name}.py"
        assert (tmp_path / "release" / source.name).read_bytes() == source.read_bytes()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "release" / name).read_bytes() == (whole / name).read_bytes()
    card = ModelCard.load(tmp_path / "release" / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "| Steps | 12 |" in card.text
    assert 'model_id = "me/poser"' in card.text


def test_release_of_an_adapter_holds_no_code(adapter, whole, tmp_path):
    make_release(adapter, tmp_path / "release")
    code = {f"{name}.py" for name in HUB_FILES}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    left_out = code | {"config.json", "generation_config.json", "handler.py", "model.safetensors", "requirements.txt"}
    assert names_in(tmp_path / "release") == (WHOLE - left_out) | weights | {"run.json"}
    card = ModelCard.load(tmp_path / "release" / "README.md")
    assert card.data.library_name == "peft"
    # The adapter's own word for its base counts, not the record's.
    assert f"Base model: `{whole}`" in card.text


def test_merged_release_is_the_base_with_the_adapter(adapter, whole, tmp_path):
    from chatpose_hf.adapters import load_trained

    make_release(adapter, tmp_path / "release", merge=True)
    assert names_in(tmp_path / "release") == WHOLE | {"run.json"}
    model, _ = load_trained(adapter)
    merged = ChatPoseForConditionalGeneration.from_pretrained(tmp_path / "release")
    torch.testing.assert_close(dict(merged.state_dict()), dict(model.state_dict()))
    base = load_file(whole / "model.safetensors")["pose_head.linear_2.weight"]
    assert (merged.pose_head.linear_2.weight - base).abs().max() > 0.1
    assert ModelCard.load(tmp_path / "release" / "README.md").data.library_name == "transformers"


def test_results_go_into_card_and_release(whole, tmp_path):
    write(tmp_path / "measured.json", RESULTS)
    make_release(whole, tmp_path / "release", results=[tmp_path / "measured.json"])
    assert names_in(tmp_path / "release") - WHOLE == {"run.json", "results.json", ".eval_results/results.yaml"}
    assert json.loads((tmp_path / "release" / "results.json").read_text(encoding="utf-8")) == RESULTS
    data = ModelCard.load(tmp_path / "release" / "README.md").data
    assert [result.metric_value for result in data.eval_results] == [61.25]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "expected model.safetensors in the folder"),
        ("tokenizer_config.json", None, "expected tokenizer_config.json in the folder"),
        ("config.json", None, r"expected a folder with adapter_config.json or config.json"),
        ("config.json", {"model_type": "chatpose"}, "expected `auto_map` in config.json"),
        ("config.json", {"auto_map": {"AutoConfig": "a.B"}}, "expected `custom_pipelines` in config.json"),
        ("processor_config.json", {"a": 1}, "expected `auto_map` in processor_config.json"),
        ("run.json", "{", "expected JSON in .*run.json"),
        ("run.json", ["step"], "expected an object in .*run.json, got list"),
        ("run.json", {"step": "many"}, "`step` of run.json"),
        ("results.json", 3, "expected an object in .*results.json, got int"),
        ("results.json", [{"task": "a"}], r"`dataset` in results\[0\]"),
        ("adapter_config.json", {"peft_type": "LORA"}, "expected `base_model_name_or_path`"),
    ],
)
def test_incomplete_folder_is_refused_and_leaves_nothing(whole, tmp_path, name, content, message):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        write(folder / name, content)
    with pytest.raises(ValueError, match=message):
        make_release(folder, tmp_path / "release")
    assert list(tmp_path.iterdir()) == [folder]


def test_existing_folder_is_not_written_over(whole, tmp_path):
    (tmp_path / "release").mkdir()
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        make_release(whole, tmp_path / "release")


def test_whole_model_is_not_merged(whole, tmp_path):
    with pytest.raises(ValueError, match="expected an adapter to merge"):
        make_release(whole, tmp_path / "release", merge=True)


# The check


def test_check_loads_without_the_package_and_asks_for_a_pose(whole, tmp_path):
    make_release(whole, tmp_path / "release")
    transcript = check_release(tmp_path / "release")
    assert transcript.startswith("ChatPoseForConditionalGeneration, 65,408 weights, transformers ")
    assert "1 x 24 rotations, orthonormal to " in transcript
    assert "<POSE>" in transcript


def test_check_finds_missing_weights(whole, tmp_path):
    make_release(whole, tmp_path / "release")
    path = tmp_path / "release" / "model.safetensors"
    weights = load_file(path)
    del weights["pose_head.linear_1.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"'missing_keys': .*pose_head\.linear_1\.bias"):
        check_release(tmp_path / "release")


def test_check_finds_code_that_needs_the_package(whole, tmp_path):
    make_release(whole, tmp_path / "release")
    with open(tmp_path / "release" / "rotations.py", "a", encoding="utf-8") as file:
        file.write("\nimport chatpose_hf.rotations\n")
    with pytest.raises(RuntimeError, match=r"clean process.*\n(.*\n)*.*chatpose_hf"):
        check_release(tmp_path / "release")


def test_check_merges_an_adapter_whose_base_is_here(adapter, whole, tmp_path):
    make_release(adapter, tmp_path / "release")
    transcript = check_release(tmp_path / "release")
    assert transcript.startswith("adapter of ")
    assert f"for {whole}; merged: ChatPoseForConditionalGeneration" in transcript


def test_check_says_when_the_base_is_elsewhere(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "run")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    write(folder / "adapter_config.json", {**config, "base_model_name_or_path": "somebody/not-in-any-cache"})
    assert "not on this machine, so no pose was asked for" in check_release(folder)


def test_check_finds_a_pose_that_is_none(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "run")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("pose_head.linear_2.bias"))
    weights[name].fill_(torch.nan)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"expected 24 rotations a pose.*nan"):
        check_release(folder)


@pytest.mark.parametrize("content", ["", "not safetensors at all"])
def test_check_finds_a_damaged_adapter(adapter, tmp_path, content):
    folder = shutil.copytree(adapter, tmp_path / "run")
    write(folder / "adapter_model.safetensors", content)
    with pytest.raises(RuntimeError, match=r"cannot read .*adapter_model.safetensors"):
        check_release(folder)


# Publishing


class HubStub(ThreadingHTTPServer):
    """The parts of the Hub's API that a commit needs; remembers what arrived."""

    def __init__(self, files=(), is_private=False, metadata_errors=()):
        super().__init__(("127.0.0.1", 0), HubStubHandler)
        self.files = files
        self.is_private = is_private
        self.metadata_errors = metadata_errors
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def calls(self):
        return [call for call, _ in self.requests]

    def body(self, call):
        return next(body for name, body in self.requests if name == call)


class HubStubHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, content, status=200):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((f"GET {path}", None))
        if "/tree/" in path:
            return self.reply(
                [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.files]
            )
        return self.reply({"id": "me/poser", "private": self.server.is_private})

    def do_POST(self):
        path = urlsplit(self.path).path
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in content.splitlines()]
        body = lines if "/commit/" in path else lines[0]
        self.server.requests.append((f"POST {path}", body))
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in self.server.metadata_errors]
            return self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/repos/create":
            return self.reply({"url": f"{self.server.url}/me/poser", "name": "me/poser"})
        if "/preupload/" in path:
            names = [file["path"] for file in body["files"]]
            return self.reply({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if "/branch/" in path:
            return self.reply({})
        return self.reply({"commitUrl": f"{self.server.url}/me/poser/commit/abc", "commitOid": "a" * 40})


@pytest.fixture
def serve(monkeypatch):
    """Starts a Hub here; `serve(**of_the_stub)` gives it and the client for it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = []

    def start(**options):
        server = HubStub(**options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server, HfApi(endpoint=server.url, token="hf_test")

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


class NoApi:
    def __getattr__(self, name):
        raise AssertionError(f"asked the Hub: {name}")


def test_without_push_nothing_is_sent_and_nothing_stays(whole, tmp_path, unchecked):
    folder = shutil.copytree(whole, tmp_path / "run")
    release = publish(folder, "me/poser", api=NoApi())
    assert release.files.keys() == WHOLE | {"run.json"}
    assert release.files["model.safetensors"] == (whole / "model.safetensors").stat().st_size
    assert (release.transcript, release.deleted, release.commit_url) == ("checked", [], None)
    assert list(tmp_path.iterdir()) == [folder]


def test_push_sends_the_release_in_one_commit(whole, tmp_path, unchecked, serve):
    server, api = serve()
    release = publish(whole, "me/poser", push=True, output=tmp_path / "kept", api=api)
    assert release.commit_url == f"{server.url}/me/poser/commit/abc"
    assert server.calls() == [
        "POST /api/repos/create",
        "GET /api/models/me/poser/tree/main",
        "POST /api/validate-yaml",
        "POST /api/models/me/poser/preupload/main",
        "POST /api/models/me/poser/commit/main",
    ]
    assert server.body("POST /api/validate-yaml")["content"] == (tmp_path / "kept" / "README.md").read_text()
    header, *entries = server.body("POST /api/models/me/poser/commit/main")
    assert header["key"] == "header"
    assert {entry["key"] for entry in entries} == {"file"}
    sent = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"]) for entry in entries}
    assert sent == {name: (tmp_path / "kept" / name).read_bytes() for name in names_in(tmp_path / "kept")}
    assert sent.keys() == release.files.keys() == WHOLE | {"run.json"}


def test_push_removes_what_an_earlier_release_left(adapter, unchecked, serve):
    ours = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "results.json"]
    server, api = serve(files=[*ours, "config.json", "README.md", ".gitattributes", "pictures/run.png", "notes.md"])
    release = publish(adapter, "me/poser", merge=True, push=True, api=api)
    assert release.deleted == ours
    entries = server.body("POST /api/models/me/poser/commit/main")
    assert [entry["value"]["path"] for entry in entries if entry["key"] == "deletedFile"] == ours


def test_push_to_a_branch_makes_it(whole, unchecked, serve):
    server, api = serve()
    publish(whole, "me/poser", push=True, revision="v1", api=api)
    assert "POST /api/models/me/poser/branch/v1" in server.calls()
    assert server.calls()[-1] == "POST /api/models/me/poser/commit/v1"


def test_private_push_to_a_public_repository_is_refused(whole, unchecked, serve):
    server, api = serve(is_private=False)
    with pytest.raises(ValueError, match="me/poser exists and is public"):
        publish(whole, "me/poser", private=True, push=True, api=api)
    assert server.body("POST /api/repos/create")["visibility"] == "private"
    assert not any("commit" in call for call in server.calls())
    server, api = serve(is_private=True)
    assert publish(whole, "me/poser", private=True, push=True, api=api).commit_url


def test_metadata_that_the_hub_refuses_stops_the_push(whole, unchecked, serve):
    server, api = serve(metadata_errors=['"license" must be one of ...'])
    with pytest.raises(ValueError, match='"license" must be one of'):
        publish(whole, "me/poser", push=True, api=api)
    assert not any("commit" in call or "preupload" in call for call in server.calls())


@pytest.mark.skipif(
    version("huggingface_hub").startswith("1."), reason="huggingface_hub 1 asks huggingface.co, whatever the endpoint"
)
def test_card_passes_the_checker_of_huggingface_hub(whole, tmp_path, serve, monkeypatch):
    server, _ = serve()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    write(tmp_path / "measured.json", RESULTS)
    make_release(whole, tmp_path / "release", results=[tmp_path / "measured.json"])
    card = ModelCard.load(tmp_path / "release" / "README.md")
    card.validate()
    assert server.body("POST /api/validate-yaml") == {"repoType": "model", "content": str(card)}


def test_release_that_fails_its_check_is_not_sent_or_kept(whole, tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("does not load")

    monkeypatch.setattr(hub, "check_release", fail)
    with pytest.raises(RuntimeError, match="does not load"):
        publish(whole, "me/poser", push=True, output=tmp_path / "kept", api=NoApi())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("repo_id", ["poser", "me/po ser", "a/b/c", "me/--"])
def test_bad_repository_id_is_refused_first(tmp_path, repo_id):
    with pytest.raises(ValueError, match=r"(?i)repo"):
        publish(tmp_path / "absent", repo_id, api=NoApi())


def test_adapter_of_a_local_base_is_refused_unless_merged(adapter, tmp_path, unchecked):
    with pytest.raises(ValueError, match="expected an adapter for a base on the Hub"):
        publish(adapter, "me/poser", api=NoApi())
    assert "model.safetensors" in publish(adapter, "me/poser", merge=True, api=NoApi()).files
