"""Strangers at the app and at the handler, for as long as one likes: `python tests/soak.py --minutes 30`.

Clients ask both at once about poses, each the questions of chats whose answers are known beforehand, and check that what comes
is theirs. The servers' memory is read every half minute. Prints figures; status 1 where an answer was another's, or memory grew.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from chatpose_hf import CHATPOSE_TINY, ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.app import MAX_SESSIONS
from chatpose_hf.export import poses_to_amass
from chatpose_hf.hub import make_release
from chatpose_hf.pipeline_chatpose import ChatPosePipeline


ROOT = Path(__file__).parent.parent
NEW_TOKENS = 48
TOLERANCE = 1e-3  # radians, between a batch of one turn and keys and values that are kept
ABOUT = "There is a person: {}. Please output this person's SMPL pose."
PICTURE = "What is the human pose in this image? Please respond with SMPL pose."
DOINGS = [
    "she sits on the floor",
    "he kneels on one knee",
    "she does a deep squat",
    "he lies on the back",
    "she raises the left arm",
    "he stands on one leg",
    "she touches the toes",
    "he sits cross-legged",
]


def make_chats(folder):
    """Chats of two questions, half of them about a picture: `(question, file or None)` each, and the poses that are right."""
    sheet = Image.open(ROOT / "docs" / "synthetic.png").convert("RGB")
    pipe = ChatPosePipeline(
        model=ChatPoseForConditionalGeneration.from_pretrained(CHATPOSE_TINY),
        processor=ChatPoseProcessor.from_pretrained(CHATPOSE_TINY),
    )
    chats = []
    for number, doing in enumerate(DOINGS):
        questions = [(ABOUT.format(doing), None), ("Now the right arm is raised. Give the SMPL pose.", None)]
        if number % 2:
            file = folder / f"{number}.png"
            sheet.crop((100 * number, 0, 100 * number + 200, 200)).save(file)
            questions[0] = (f"{PICTURE} ({number})", file)
        messages, known = [], []
        for text, file in questions:
            images = [{"type": "image", "image": Image.open(file)}] if file else []
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
            reply = pipe(messages, max_new_tokens=NEW_TOKENS, force_pose=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply["text"]}]})
            known.append(torch.stack([pose["theta"] for pose in reply["poses"]]))
        chats.append((questions, known))
    firsts = [known[0][0] for _, known in chats]
    apart = min((a - b).abs().max() for i, a in enumerate(firsts) for b in firsts[:i])
    assert apart > 20 * TOLERANCE, "answers so alike would not tell one visitor from another"
    return chats


def post(url, body, content_type="application/json"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


class Visitor:
    """Somebody at the app: what the page in a browser asks for, without the browser."""

    def __init__(self, url):
        self.url, self.session = url, uuid.uuid4().hex
        with urllib.request.urlopen(f"{url}/config", timeout=60) as response:
            config = json.load(response)
        self.functions = {each["api_name"]: each["id"] for each in config["dependencies"]}
        # As long as this is open, somebody is there.
        self.heartbeat = HTTPConnection(url.removeprefix("http://"), timeout=600)
        self.heartbeat.request("GET", f"/gradio_api/heartbeat/{self.session}")
        self.response = self.heartbeat.getresponse()

    def leave(self):
        self.response.close()
        self.heartbeat.close()

    def call(self, name, *data):
        """What a function says last."""
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        post(f"{self.url}/gradio_api/queue/join", body)
        stream = f"{self.url}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(stream, timeout=600) as response:
            for line in response:
                if line.startswith(b"data:"):
                    message = json.loads(line[5:])
                    if message["msg"] == "process_completed":
                        assert message["success"], message
                        return message["output"]["data"]
        raise AssertionError("the answer never came")

    def upload(self, file):
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
        body = (
            f"{head}Content-Type: image/png\r\n\r\n".encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        )
        (path,) = post(f"{self.url}/gradio_api/upload", body, f"multipart/form-data; boundary={boundary}")
        return {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, question, file):
        """The poses of `pose.npz`, `(P, 156)`."""
        files = [self.upload(file)] if file else []
        self.call("answer", {"text": question, "files": files}, True, None)
        shown = self.call("show_files", None)
        (address,) = [
            each["value"]["url"]
            for each in shown
            if isinstance(each, dict) and str((each.get("value") or {}).get("path", "")).endswith("pose.npz")
        ]
        with urllib.request.urlopen(address, timeout=60) as response:
            return np.load(io.BytesIO(response.read()), allow_pickle=False)["poses"]


def visit_app(url, chat, tally):
    questions, known = chat
    visitor = Visitor(url)
    try:
        for (question, file), right in zip(questions, known, strict=True):
            poses = visitor.ask(question, file)
            expected = poses_to_amass(right.unflatten(1, (24, 3)))["poses"]
            tally["app answers"] += 1
            tally["app answers of somebody else"] += not is_same(poses, expected)
    finally:
        visitor.leave()


def ask_handler(url, chat, tally):
    (question, file), right = chat[0][0], chat[1][0]
    inputs = {"text": question}
    if file:
        inputs["image"] = base64.b64encode(file.read_bytes()).decode()
    answer = post(url, {"inputs": inputs, "parameters": {"force_pose": True, "max_new_tokens": NEW_TOKENS}})
    tally["handler answers"] += 1
    tally["handler answers of somebody else"] += not is_same(
        np.array([pose["theta"] for pose in answer["poses"]]), right.numpy()
    )
    for bad in ({}, {"inputs": "<image>"}, {"inputs": {"text": "a", "image": "AAAA"}}):
        try:
            post(url, bad)
        except urllib.error.HTTPError as error:
            tally["handler refusals"] += error.code == 400


def is_same(poses, expected):
    return poses.shape == expected.shape and np.abs(poses - expected).max() < TOLERANCE


def memory(pid):
    """Resident MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def files_under(folder):
    return sum(path.is_file() for path in Path(folder).rglob("*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--app-clients", type=int, default=6)
    parser.add_argument("--handler-clients", type=int, default=4)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        chats = make_chats(folder)
        make_release(CHATPOSE_TINY, folder / "release")
        own = {name: folder / name for name in ("TMPDIR", "GRADIO_TEMP_DIR")}
        for place in own.values():
            place.mkdir()
        environment = {**os.environ, **{name: str(place) for name, place in own.items()}}
        port = "7899"
        limits = ["--max-new-tokens", str(NEW_TOKENS)]
        app_command = [sys.executable, "-m", "chatpose_hf.cli", "app", "--port", port, *limits]
        app = subprocess.Popen(app_command, env=environment, stdout=subprocess.DEVNULL)
        stack.callback(app.kill)
        server_command = [sys.executable, str(Path(__file__).with_name("handler_server.py")), str(folder / "release")]
        handler = subprocess.Popen(server_command, stdout=subprocess.PIPE, text=True)
        stack.callback(handler.kill)
        handler_url, app_url = handler.stdout.readline().strip(), f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{app_url}/config", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)

        tally, faults, stop = Counter(), [], threading.Event()
        seconds = []

        def client(job, url, seed):
            draw = random.Random(seed)
            while not stop.is_set():
                start = time.monotonic()
                try:
                    job(url, draw.choice(chats), tally)
                except Exception as error:
                    faults.append(f"{job.__name__}: {type(error).__name__}: {error}"[:500])
                    stop.wait(1)
                seconds.append(time.monotonic() - start)

        jobs = [(visit_app, app_url)] * options.app_clients + [(ask_handler, handler_url)] * options.handler_clients
        threads = [threading.Thread(target=client, args=(*job, seed), daemon=True) for seed, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        samples = []
        for _ in tqdm(range(max(4, round(options.minutes * 2))), desc="Asking", unit="half minute"):
            time.sleep(30 if options.minutes >= 2 else options.minutes * 15)
            samples.append({"app": memory(app.pid), "handler": memory(handler.pid)})
        stop.set()
        for thread in threads:
            thread.join(120)
        figures = {"minutes": options.minutes, **tally, "faults": len(faults), "first faults": faults[:3]}
        half = len(samples) // 2
        for name in ("app", "handler"):
            # The first quarter fills caches and pools.
            middle = statistics.median(sample[name] for sample in samples[half // 2 : half])
            end = statistics.median(sample[name] for sample in samples[-(half // 2 or 1) :])
            figures[f"{name} MiB"] = {
                "start": round(samples[0][name]),
                "second quarter": round(middle),
                "last": round(end),
            }
        # Those of the visitors who were there last may still be about.
        figures["files in the temporary folder"] = files_under(own["TMPDIR"])
        figures["files in Gradio's cache"] = files_under(own["GRADIO_TEMP_DIR"])
        figures["median seconds"] = round(statistics.median(seconds), 2)
        figures["samples"] = [{name: round(value) for name, value in sample.items()} for sample in samples]
    sys.stdout.write(
        json.dumps({name: value for name, value in figures.items() if name != "samples"}, indent=1) + "\n"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    kept = figures["files in the temporary folder"] > 5 * (MAX_SESSIONS + options.app_clients)
    grown = kept or any(
        figures[f"{name} MiB"]["last"] > 1.05 * figures[f"{name} MiB"]["second quarter"] for name in ("app", "handler")
    )
    wrong = tally["app answers of somebody else"] + tally["handler answers of somebody else"]
    return 1 if faults or wrong or grown or not tally["app answers"] or not tally["handler answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
