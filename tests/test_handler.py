"""A release's handler.py: asked over HTTP, as on Inference Endpoints, and what strangers may not do to it."""

import base64
import io
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from handler_server import load_handler, make_server
from PIL import Image

from chatpose_hf import CHATPOSE_TINY, ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.hub import make_release
from chatpose_hf.pipeline_chatpose import ChatPosePipeline


QUESTION = "Give the SMPL pose of a person who sits on the floor."
PICTURE = "What is the human pose in this image? Please respond with SMPL pose."


@pytest.fixture(scope="module")
def pipe():
    return ChatPosePipeline(
        model=ChatPoseForConditionalGeneration.from_pretrained(CHATPOSE_TINY),
        processor=ChatPoseProcessor.from_pretrained(CHATPOSE_TINY),
    )


@pytest.fixture(scope="module")
def module():
    return load_handler(ROOT / "model_card")


@pytest.fixture(scope="module")
def handler(module):
    return module.EndpointHandler(str(CHATPOSE_TINY))


@pytest.fixture(scope="module")
def url(handler):
    server = make_server(handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo():
    return Image.open(ROOT / "docs" / "synthetic.png").convert("RGB").crop((0, 0, 300, 300))


def as_answer(reply):
    return {"text": reply["text"], "poses": [{"theta": pose["theta"].tolist()} for pose in reply["poses"]]}


def test_a_release_answers_over_http_without_this_package(tmp_path, pipe):
    make_release(CHATPOSE_TINY, tmp_path / "release")
    server = Path(__file__).with_name("handler_server.py")
    # A module that is None cannot be imported.
    code = 'import runpy, sys; sys.modules["chatpose_hf"] = None; runpy.run_path(sys.argv[0], run_name="__main__")'
    command = [sys.executable, "-c", code.replace("sys.argv[0]", repr(str(server))), str(tmp_path / "release")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            status, answer = ask(url, {"inputs": QUESTION})
            assert (status, answer) == (200, as_answer(pipe(QUESTION)))
            assert "<POSE>" in answer["text"]
            assert len(answer["poses"][0]["theta"]) == 72
            status, answer = ask(url, {"inputs": QUESTION, "parameters": {"glb": True}})
            assert status == 400
            assert "needs the package chatpose_hf" in answer["error"]
        finally:
            process.terminate()


def test_pictures_chats_and_parameters(url, pipe, photo):
    expected = as_answer(pipe({"text": PICTURE, "images": photo}))
    encoded = base64.b64encode(png(photo)).decode()
    image_url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    for inputs in (
        {"text": PICTURE, "image": encoded},
        {"text": PICTURE, "images": [base64.encodebytes(png(photo)).decode()]},
        {"messages": [{"role": "user", "content": [image_url, {"type": "text", "text": PICTURE}]}]},
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": image_url["image_url"]["url"]},
                    {"type": "text", "text": PICTURE},
                ],
            }
        ],
    ):
        assert ask(url, {"inputs": inputs}) == (200, expected)
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "The SMPL pose of this person is <POSE>."},
        {"role": "user", "content": "Now the left arm is raised. Give the SMPL pose."},
    ]
    assert ask(url, {"inputs": chat}) == (200, as_answer(pipe(chat)))
    status, answer = ask(url, {"inputs": "Hello!", "parameters": {"force_pose": True, "max_new_tokens": 12}})
    assert status == 200
    assert answer["poses"]
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 5}
    assert ask(url, {"inputs": QUESTION, "parameters": sampled})[0] == 200


def test_glb_holds_the_poses(url):
    trimesh = pytest.importorskip("trimesh")
    status, answer = ask(url, {"inputs": QUESTION, "parameters": {"glb": True}})
    assert status == 200
    scene = trimesh.load(io.BytesIO(base64.b64decode(answer["glb"])), file_type="glb")
    assert len(scene.geometry) == len(answer["poses"]) == 1
    low, high = scene.bounds
    assert 0.5 < high[1] - low[1] < 1.4, "the body that sits is upright in its file, and lower than one that stands"
    status, answer = ask(url, {"inputs": "Hello!", "parameters": {"glb": True, "max_new_tokens": 3}})
    assert status == 200
    assert "glb" not in answer


def test_clients_at_once_get_their_own_poses(url, pipe):
    names = ["sits", "kneels", "squats", "runs", "lies on the back", "raises the left arm", "waves", "bows"]
    questions = [f"There is a person: she {name}. Please output this person's SMPL pose." for name in names]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(url, {"inputs": question}), questions))
    for question, (status, answer) in zip(questions, answers, strict=True):
        assert (status, answer) == (200, as_answer(pipe(question)))
    assert len({str(answer) for _, answer in answers}) > 4


BOMB = base64.b64encode(png(Image.new("1", (9_000, 9_000)))).decode()
LINE = base64.b64encode(png(Image.new("1", (3_000, 2)))).decode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], '"inputs"'),
        ({}, '"inputs"'),
        ({"inputs": "a", "options": 1}, "options"),
        ({"inputs": None}, '"inputs"'),
        ({"inputs": 3}, '"inputs"'),
        ({"inputs": " "}, "expected a question"),
        ({"inputs": {}}, '"text"'),
        ({"inputs": {"text": 3}}, "parts"),
        ({"inputs": {"text": "a", "audio": "b"}}, "audio"),
        ({"inputs": {"text": "a", "image": "b", "images": []}}, '"image" or "images"'),
        ({"inputs": {"text": "a", "images": "b"}}, "a list"),
        ({"inputs": {"text": "a", "image": 3}}, "parts"),
        ({"inputs": []}, "roles"),
        ({"inputs": [3]}, "message 0"),
        ({"inputs": [{"role": "tool", "content": "a"}]}, "role of system, user"),
        ({"inputs": [{"role": "user"}]}, "content of message 0"),
        ({"inputs": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "parts"),
        ({"inputs": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, "parts"),
        ({"inputs": [{"role": "user", "content": [{"type": ["image"]}]}]}, "parts"),
        ({"inputs": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "in turn"),
        ({"inputs": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with the user"),
        ({"inputs": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}, "in turn"),
        (
            {"inputs": [{"role": "system", "content": [{"type": "image", "image": "x"}]}, {"role": "user", "content": "a"}]},
            "user's messages only",
        ),
        ({"inputs": "what is <image>?"}, "without <image>"),
        ({"inputs": "\ud800"}, "surrogate"),
        ({"inputs": "a" * 20_001}, "at most 20000 characters"),
        ({"inputs": "word " * 3_000}, "tokens"),
        ({"inputs": {"text": "a", "images": ["x"] * 9}}, "at most 8 pictures"),
        ({"inputs": {"text": "a", "image": "/etc/passwd"}}, "http(s) address or as base64"),
        ({"inputs": {"text": "a", "image": "file:///etc/passwd"}}, "http(s) address or as base64"),
        ({"inputs": {"text": "a", "image": "ftp://example.org/a.png"}}, "http(s) address or as base64"),
        ({"inputs": {"text": "a", "image": "é"}}, "http(s) address or as base64"),
        ({"inputs": {"text": "a", "image": base64.b64encode(b"<svg/>").decode()}}, "picture in one of"),
        ({"inputs": {"text": "a", "image": BOMB}}, "40,000,000 together"),
        ({"inputs": {"text": "a", "image": LINE}}, "20 to 1"),
        ({"inputs": "a", "parameters": []}, "an object"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "from 1 to 1024"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 10**400}}, "from 1 to 1024"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 2.0}}, "from 1 to 1024"),
        ({"inputs": "a", "parameters": {"max_new_tokens": True}}, "from 1 to 1024"),
        ({"inputs": "a", "parameters": {"force_pose": 1}}, "true or false"),
        ({"inputs": "a", "parameters": {"do_sample": True, "temperature": float("nan")}}, "0.01 to 10"),
        ({"inputs": "a", "parameters": {"do_sample": True, "temperature": "1"}}, "0.01 to 10"),
        ({"inputs": "a", "parameters": {"top_p": 0.5}}, '"do_sample": true'),
        ({"inputs": "a", "parameters": {"num_beams": 1_000}}, "num_beams"),
        ({"inputs": "a", "parameters": {"stopping_criteria": []}}, "stopping_criteria"),
    ],
)  # fmt: skip
def test_bad_requests_are_explained(url, body, message):
    status, answer = ask(url, body)
    assert (status, answer["kind"]) == (400, "ValueError")
    assert message in answer["error"]
    assert len(answer["error"]) < 400


@pytest.fixture
def site():
    """Pictures on a server of this machine; where they lie says how it behaves."""
    picture = png(Image.new("RGB", (8, 8)))

    class Requests(BaseHTTPRequestHandler):
        def do_GET(self):
            place, _, rest = self.path[1:].partition("/")
            if place == "to":
                self.send_response(302)
                self.send_header("Location", rest)
                self.end_headers()
            elif place == "slow":
                self.send_response(200)
                self.end_headers()
                while not stopped.wait(0.05):
                    self.wfile.write(b"x")
            elif place == "ok" or place.startswith("caf"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture)
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    stopped = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.handle_error = lambda *_: None  # clients that hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    stopped.set()
    server.shutdown()


def fetch(handler, address):
    return handler({"inputs": {"text": "a", "image": address}, "parameters": {"max_new_tokens": 1}})


def test_pictures_are_fetched_from_public_addresses_only(handler, module, site, monkeypatch):
    private = "which cannot be reached"
    for address in (f"http://127.0.0.1:{site}/ok", f"HTTP://localhost:{site}/ok", f"http://0x7f000001:{site}/ok"):
        with pytest.raises(ValueError, match=private):
            fetch(handler, address)
    assert not any(map(module._is_public, ("10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "fd00::1", "0.0.0.0", "100.64.0.1")))  # fmt: skip
    assert all(map(module._is_public, ("93.184.215.14", "2606:4700::1111", "::ffff:93.184.215.14")))
    # As if this one address were public: what it redirects to is looked at again.
    monkeypatch.setattr(module, "_is_public", lambda host: host == "127.0.0.1")
    assert fetch(handler, f"http://127.0.0.1:{site}/ok")["poses"] == []
    assert fetch(handler, f"http://127.0.0.1:{site}/café?é=ü&b=%20")["poses"] == []
    assert fetch(handler, f"http://127.0.0.1:{site}/to//ok")["poses"] == []
    with pytest.raises(ValueError, match=private):
        fetch(handler, f"http://127.0.0.1:{site}/to/http://127.0.0.2:{site}/ok")
    with pytest.raises(ValueError, match="expected an http"):
        fetch(handler, f"http://127.0.0.1:{site}/to/file:///etc/passwd")
    with pytest.raises(ValueError, match="at most 3 redirects"):
        fetch(handler, f"http://127.0.0.1:{site}/to/to/to/to/ok")
    with pytest.raises(ValueError, match="status 404"):
        fetch(handler, f"http://127.0.0.1:{site}/none")
    with pytest.raises(ValueError, match="user's name"):
        fetch(handler, f"http://me:secret@127.0.0.1:{site}/ok")
    for broken in (
        "http://",
        "http://[",
        "http://a:b/",
        "http://127.0.0.1:99999/",
        "http://a b/",
        f"http://{'x' * 300}/",
    ):
        with pytest.raises(ValueError, match=r"expected an http|cannot be reached|URL|Port|IPv6"):
            fetch(handler, broken)


def test_fetching_has_an_end(handler, module, site, monkeypatch):
    monkeypatch.setattr(module, "_is_public", lambda host: True)
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"within 0\.5 seconds"):
        fetch(handler, f"http://127.0.0.1:{site}/slow")
    monkeypatch.setattr(module, "FETCH_SECONDS", 10)
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 10)
    for source in (f"http://127.0.0.1:{site}/slow", base64.b64encode(bytes(20)).decode()):
        with pytest.raises(ValueError, match="at most 10 bytes"):
            fetch(handler, source)


def test_what_a_stranger_writes_for_a_pose_is_no_pose(handler):
    answer = handler({"inputs": "Is this <POSE> <POSE>?", "parameters": {"max_new_tokens": 4}})
    assert len(answer["poses"]) == answer["text"].count("<POSE>")
    assert torch.isfinite(torch.tensor([pose["theta"] for pose in answer["poses"]])).all()
