"""The chat app in a real browser, on a tiny model; and its parts without one."""

import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import make_model, make_processor
from PIL import Image

from chatpose_hf import ChatPosePipeline, app
from chatpose_hf.app import launch_app, show_chat, stream_reply
from chatpose_hf.body import BodyModel
from chatpose_hf.export import Turn, poses_to_amass


SPACE = Path(__file__).parent.parent / "examples" / "space"
MAX_NEW_TOKENS = 8
EMPTY = {"text": "", "poses": []}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pipe(model, processor):
    return ChatPosePipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def url(pipe):
    pytest.importorskip("gradio", reason="needs the package gradio")
    demo = launch_app(
        pipe,
        BodyModel.load("default"),
        port=free_port(),
        max_new_tokens=MAX_NEW_TOKENS,
        max_file_size="1mb",
        prevent_thread_lock=True,
        quiet=True,
    )
    yield demo.local_url
    demo.close()


class Visitor:
    """Somebody at the app, in a browser profile of their own."""

    def __init__(self, browser, url, width=1280, height=800):
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.box = self.page.locator("#question textarea")
        self.box.wait_for()

    def ask(self, prompt, *files):
        if files:
            self.upload(*files)
        self.box.fill(prompt)
        self.box.press("Enter")

    def upload(self, *files):
        self.page.locator("#question input[type=file]").set_input_files(files)

    def see(self, text):
        self.page.get_by_text(text).last.wait_for()

    def bubbles(self, role):
        return self.page.locator(f"#chat .message.{role}").all_inner_texts()

    def download(self, name):
        button = self.page.get_by_role("button", name=name)
        with self.page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == name
        return Path(download.value.path()).read_bytes()

    def poses(self):
        with np.load(io.BytesIO(self.download("pose.npz")), allow_pickle=False) as arrays:
            return arrays["poses"]

    def body_pixels(self):
        """How many pixels of the 3D view are not background, once there are some."""
        canvas = self.page.locator("#body canvas")
        canvas.wait_for()
        for _ in range(40):
            picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
            drawn = np.abs(picture - picture[-1, 0]).sum(-1) > 30
            if drawn.mean() > 0.02:
                return int(drawn.sum()), len(np.unique(picture.reshape(-1, 3), axis=0))
            self.page.wait_for_timeout(250)
        raise AssertionError("the 3D view stayed empty")


@pytest.fixture
def visit(browser, url):
    visitors = []

    def start(**size):
        visitors.append(Visitor(browser, url, **size))
        return visitors[-1]

    yield start
    for visitor in visitors:
        visitor.context.close()


def expected_poses(pipe, *contents, force_pose=True):
    """What the pipeline answers to these questions, one after the other: its last poses, as they are downloaded."""
    messages = []
    for content in contents:
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in content
        ]
        messages.append({"role": "user", "content": parts})
        reply = pipe(messages, max_new_tokens=MAX_NEW_TOKENS, force_pose=force_pose)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply["text"]}]})
    thetas = torch.stack([pose["theta"] for pose in reply["poses"]]).unflatten(1, (24, 3))
    return poses_to_amass(thetas)["poses"]


def test_a_chat_shows_text_body_picture_and_files(visit, url, pipe):
    visitor = visit()
    page = visitor.page
    # HTML and Markdown stay text: nothing is fetched from elsewhere.
    first = 'raise <b>both</b> arms **high** <img src="http://example.com/a.png"> <POSE>'
    page.get_by_label("Force a pose").check()
    visitor.ask(first)
    visitor.see("[pose 1]")
    assert visitor.bubbles("user") == [first]
    assert visitor.box.input_value() == ""
    page.locator("#picture img").wait_for()
    pixels, colors = visitor.body_pixels()
    assert pixels > 5000
    assert colors > 100
    picture = page.locator("#picture img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert picture[0] > picture[1] > 100

    poses = visitor.poses()
    assert poses.shape == (1, 156)
    assert np.isfinite(poses).all()
    np.testing.assert_allclose(poses, expected_poses(pipe, [first]), atol=1e-5)
    assert visitor.download("body.glb").startswith(b"glTF")
    assert b"raise \\u003cb>both" in visitor.download("page.html")

    second = "and now the left one"
    visitor.ask(second)
    visitor.see("[pose 2]")
    page.locator("#body").get_by_text("Pose 2").wait_for()
    assert visitor.bubbles("user") == [first, second]
    assert len(visitor.bubbles("bot")) == 2
    np.testing.assert_allclose(visitor.poses(), expected_poses(pipe, [first], [second]), atol=1e-5)
    assert visitor.body_pixels()[0] > 5000

    # An answer without a pose leaves the body of the one before, and says so.
    page.get_by_label("Force a pose").uncheck()
    visitor.ask("why?")
    page.wait_for_function("document.querySelectorAll('#chat .message.bot').length == 3")
    page.locator("#question button.submit-button").wait_for()
    assert "[pose" not in visitor.bubbles("bot")[2]
    page.locator("#body").get_by_text("Pose 2").wait_for()

    page.get_by_role("button", name="New chat").click()
    visitor.see("Ask for a pose, or show a picture")
    page.locator("#picture").wait_for(state="detached")
    assert page.get_by_role("button", name="pose.npz").is_disabled()
    page.get_by_label("Force a pose").check()
    visitor.ask(second)
    visitor.see("[pose 1]")
    page.locator("#body").get_by_text("Pose 1").wait_for()
    np.testing.assert_allclose(visitor.poses(), expected_poses(pipe, [second]), atol=1e-5)

    foreign = [request for request in visitor.requests if not request.startswith((url, "data:", "blob:"))]
    assert foreign == []


def test_an_uploaded_picture_is_shown_and_read(visit, pipe, images, tmp_path):
    path = tmp_path / "photo.png"
    images[0].save(path)
    visitor = visit(width=390, height=844)
    visitor.page.get_by_label("Force a pose").check()
    visitor.ask("what is the pose in this image?", path)
    visitor.see("[pose 1]")
    assert visitor.page.locator("#chat .message.user img").evaluate("image => image.naturalWidth") == 32
    visitor.page.locator("#body").get_by_text("Pose 1").wait_for()
    expected = expected_poses(pipe, [images[0], "what is the pose in this image?"])
    np.testing.assert_allclose(visitor.poses(), expected, atol=1e-5)
    # Gradio's own button to send the picture elsewhere is not there.
    assert visitor.page.get_by_role("button", name="Share").count() == 0
    # Nothing is wider than a telephone.
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_cannot_be_answered_is_explained_and_kept(visit, tmp_path):
    visitor = visit()
    page = visitor.page
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (50_000, 10)).save(tmp_path / "wide.png")
    (tmp_path / "huge.png").write_bytes(bytes(2 << 20))

    def clear():
        while page.get_by_role("button", name="Remove file").count():
            page.get_by_role("button", name="Remove file").first.click()
        while page.get_by_test_id("toast-close").count():
            page.get_by_test_id("toast-close").first.click()
            page.wait_for_timeout(400)  # it slides away

    for name, message in [("text.png", "is no picture that can be read"), ("wide.png", "50000 x 10 pixels")]:
        visitor.ask(f"a question about {name}", tmp_path / name)
        visitor.see(message)
        assert visitor.box.input_value() == f"a question about {name}"
        clear()
    visitor.box.fill("still here")
    visitor.upload(tmp_path / "huge.png")
    visitor.see("File(s) exceed the maximum allowed size")
    assert visitor.box.input_value() == "still here"
    clear()
    visitor.ask("a literal <image>")
    visitor.see("Please leave out <image>")
    assert visitor.box.input_value() == "a literal <image>"
    clear()
    visitor.ask("long " * 2000)
    visitor.see("as many as the model reads")
    clear()
    page.get_by_label("Force a pose").check()
    visitor.ask("a question that can be answered")
    visitor.see("[pose 1]")
    assert visitor.bubbles("user") == ["a question that can be answered"]


def test_visitors_do_not_see_each_other(visit, pipe):
    visitors = [visit(), visit()]
    prompts = ["sit down", "stand up"]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.page.get_by_label("Force a pose").check()
        visitor.ask(prompt)  # the second waits for the first in the queue
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.page.locator("#body").get_by_text("Pose 1").wait_for()
        assert visitor.bubbles("user") == [prompt]
        np.testing.assert_allclose(visitor.poses(), expected_poses(pipe, [prompt]), atol=1e-5)


def test_an_answer_can_be_stopped_and_left(visit, pipe):
    visitor = visit()
    page = visitor.page
    page.get_by_label("Force a pose").check()
    visitor.ask("first")
    page.locator("#body").get_by_text("Pose 1").wait_for()
    slow = pipe.model.register_forward_hook(lambda *_: time.sleep(0.4))
    try:
        visitor.ask("second")
        page.locator("#question .stop-button").click()
        page.locator("#question .submit-button").wait_for()
        assert visitor.bubbles("user") == ["first", "second"]
        assert "[pose" not in visitor.bubbles("bot")[1]  # the forced one would have come last
        visitor.ask("third")
        page.locator("#question .stop-button").wait_for()
        page.get_by_role("button", name="New chat").click()
        visitor.see("Ask for a pose, or show a picture")
        page.wait_for_timeout(1500)  # a late word, or the old chat's files, would come now
        assert visitor.bubbles("user") == []
        assert page.locator("#picture").count() == 0
        assert page.locator("#question .submit-button").count() == 1
    finally:
        slow.remove()


def test_chats_in_memory_are_limited(pipe, monkeypatch):
    pytest.importorskip("gradio", reason="needs the package gradio")
    monkeypatch.setattr(app, "MAX_SESSIONS", 3)
    demo = launch_app(pipe, BodyModel.load("default"), port=free_port(), prevent_thread_lock=True, quiet=True)
    try:
        holder = demo.app.state_holder
        for number in range(9):
            assert holder[str(number)]
        assert list(holder.session_data) == ["6", "7", "8"]
        assert demo._queue.ANALYTICS_MAX_EVENTS == 100  # a table of them is made with each question
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{demo.local_url}monitoring/summary")
    finally:
        demo.close()


def test_the_space_answers(tmp_path):
    pytest.importorskip("gradio", reason="needs the package gradio")
    processor = make_processor()
    make_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    port = free_port()
    environment = {
        **os.environ,
        "CHATPOSE_MODEL": str(tmp_path / "model"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
    }
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(240):
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
                        assert response.status == 200
                        assert b'"ChatPose"' in response.read()
                        break
                except OSError:
                    time.sleep(0.25)
            else:
                raise AssertionError((tmp_path / "log").read_text())
        finally:
            server.terminate()
            server.wait(20)


def test_the_space_says_what_it_needs():
    front_matter = re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    fields = dict(line.split(": ", 1) for line in front_matter[1].splitlines() if ": " in line)
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    assert "chatpose_hf[app]" in (SPACE / "requirements.txt").read_text()


def test_the_chat_is_text():
    turns = [Turn("<b>", [("a.png", None)], {"text": "<POSE> & <POSE>", "poses": []}), Turn("x", [], EMPTY)]
    assert show_chat(turns) == [
        {"role": "user", "content": [{"path": "a.png"}, "&lt;b&gt;"]},
        {"role": "assistant", "content": "[pose 1] &amp; [pose 2]"},
        {"role": "user", "content": ["x"]},
        {"role": "assistant", "content": "..."},
    ]


def ask(pipe, prompt, stop=None, max_new_tokens=MAX_NEW_TOKENS):
    return stream_reply(pipe, [Turn(prompt, [], EMPTY)], stop or threading.Event(), max_new_tokens, force_pose=True)


def test_stream_grows_into_the_reply(pipe):
    *pieces, last = ask(pipe, "a question")
    assert [piece["text"] for piece in pieces] == sorted((piece["text"] for piece in pieces), key=len)
    assert last["text"] == pieces[-1]["text"].strip()
    assert len(last["poses"]) == 1


@pytest.mark.parametrize("close", [True, False], ids=["left", "stopped"])
def test_stream_ends_early(pipe, close):
    stop = threading.Event()
    stream = ask(pipe, "a question", stop, max_new_tokens=300)
    next(stream)
    start = time.monotonic()
    if close:
        stream.close()
    else:
        stop.set()
        assert len(list(stream)[-1]["text"]) < 200
    # The next one had to wait for the first to end.
    assert len(list(ask(pipe, "another"))[-1]["poses"]) == 1
    assert time.monotonic() - start < 10


def test_stream_hands_on_errors(pipe, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.model, "generate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            list(ask(pipe, "a question"))
    for prompt, message in [
        ("", "write a question"),
        ("<image>", "leave out <image>"),
        ("a " * 600, "begin a new chat"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(ask(pipe, prompt))
    assert list(ask(pipe, "a question"))[-1]["poses"]


def test_a_missing_gradio_is_named(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"chatpose_hf\[app\]"):
        launch_app(pipe, None)
