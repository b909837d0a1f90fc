"""A ChatPose on Hugging Face Inference Endpoints: words and pictures in, words and SMPL poses out, as JSON.

The endpoint's server makes an `EndpointHandler` of the repository and calls it with the JSON of each request. Whoever asks is
a stranger: what they send is checked and limited, and what is wrong with it is raised as a `ValueError`, which the server
sends back as `{"error": ...}`.
"""

import base64
import binascii
import io
import ipaddress
import reprlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from string import punctuation
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import torch
from PIL import Image, ImageOps
from transformers import pipeline


MAX_CHARACTERS = 20_000  # of all texts of a request
MAX_IMAGES = 8
MAX_IMAGE_BYTES = 16 * 2**20
MAX_SIDE = 10_000
MAX_PIXELS = 40_000_000  # known before the picture is decoded
MAX_ASPECT = 20  # a line of 10,000 x 1, its short side brought to the model's hundreds of pixels, fills gigabytes
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_NEW_TOKENS = 1024
MAX_REDIRECTS = 3
FETCH_SECONDS = 10  # redirects too


class EndpointHandler:
    """
    Answers requests, one at a time.

    Args:
        path (`str`, *optional*, defaults to the working directory): the repository's folder.

    Example:

    ```python
    handler = EndpointHandler("chatpose-13b")
    handler({"inputs": {"text": "What is the human pose in this image?", "image": "https://example.org/photo.jpg"}})
    # {"text": "The SMPL pose of this person is <POSE>.", "poses": [{"theta": [3.1, 0.02, ...]}]}
    ```
    """

    def __init__(self, path: str = "."):
        self.pipe = pipeline(
            "image-text-to-pose",
            model=path,
            dtype="auto",
            device_map="auto" if torch.cuda.is_available() else None,
            trust_remote_code=True,
        )
        self._lock = threading.Lock()  # two at once would share one processor's time and memory

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            data (`dict`):
                `inputs`: a question as text; `{"text": ..., "image": ...}`, or `"images"`, a list; or a chat, a list of
                messages with `role` and `content`, alone or as `{"messages": ...}`. A content is a text or a list of
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and, as OpenAI's clients write it,
                `{"type": "image_url", "image_url": {"url": ...}}`. A picture is an http(s) address, a `data:` URL, or
                base64.
                `parameters`, optional: `max_new_tokens` (512), `force_pose`, `do_sample`, `temperature`, `top_p`, and
                `glb`, which needs the package `chatpose_hf` beside the model's own code.

        Returns:
            `dict`: `text`, the answer, with `<POSE>` where a pose was given; `poses`, in that order, each with `theta`, 72
            numbers: SMPL's 24 joint rotations, axis-angle in radians, joint 0 first, camera frame; and, where asked for
            and there are poses, `glb`: bodies side by side, upright, a binary glTF in base64.

        Raises:
            ValueError: for a request that is not as above, or too large; says what was expected.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('expected an object with "inputs" and, optionally, "parameters"')
        if unknown := sorted(map(str, data.keys() - {"inputs", "parameters"})):
            raise ValueError(f'expected "inputs" and "parameters", got {_shorten(", ".join(unknown))} too')
        parameters = _read_parameters(data.get("parameters"))
        wants_glb = parameters.pop("glb", False)
        make_glb = _glb_maker() if wants_glb else None
        messages = _read_messages(data["inputs"], self.pipe.processor.image_token)
        with self._lock:
            reply = self.pipe(messages, **parameters)
        answer = {"text": reply["text"], "poses": [{"theta": pose["theta"].tolist()} for pose in reply["poses"]]}
        if make_glb and reply["poses"]:
            glb = make_glb(torch.stack([pose["theta"] for pose in reply["poses"]]).view(-1, 24, 3))
            answer["glb"] = base64.b64encode(glb).decode()
        return answer


def _glb_maker():
    try:
        from chatpose_hf.body import BodyModel
        from chatpose_hf.export import mesh_bytes
    except ImportError as error:
        raise ValueError(
            'expected no "glb": it needs the package chatpose_hf, which this endpoint does not have; its operator can add '
            "it to requirements.txt"
        ) from error
    return lambda poses: mesh_bytes(poses, BodyModel.load(), ".glb")


def _read_parameters(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f'expected an object as "parameters", got {_shorten(given)}')
    for name, value in given.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("force_pose", "do_sample", "glb"):
            expected, is_right = "true or false", isinstance(value, bool)
        elif name == "max_new_tokens":
            expected = f"a whole number from 1 to {MAX_NEW_TOKENS}"
            is_right = is_number and isinstance(value, int) and 1 <= value <= MAX_NEW_TOKENS
        elif name == "temperature":
            expected, is_right = "a number from 0.01 to 10", is_number and 0.01 <= value <= 10
        elif name == "top_p":
            expected, is_right = "a number from 0.01 to 1", is_number and 0.01 <= value <= 1
        else:
            raise ValueError(
                "expected the parameters max_new_tokens, force_pose, do_sample, temperature, top_p, glb, got "
                f"{_shorten(name)}"
            )
        if not is_right:
            raise ValueError(f'expected {expected} as "{name}", got {_shorten(value)}')
    if not given.get("do_sample") and given.keys() & {"temperature", "top_p"}:
        raise ValueError('expected "do_sample": true beside "temperature" and "top_p"')
    return dict(given)


def _read_messages(inputs: Any, image_token: str) -> list[dict]:
    """A request's chat for the pipeline, its pictures opened; texts are counted before any picture is fetched."""
    if isinstance(inputs, str):
        inputs = {"text": inputs}
    if isinstance(inputs, dict) and inputs.keys() == {"messages"}:
        inputs = inputs["messages"]
    if isinstance(inputs, dict):
        if "text" not in inputs or inputs.keys() - {"text", "image", "images"} or {"image", "images"} <= inputs.keys():
            raise ValueError(
                'expected "text" and, optionally, "image" or "images", or "messages" alone, got an object with '
                f"{_shorten(', '.join(map(str, inputs)))}"
            )
        images = inputs.get("images", [inputs["image"]] if inputs.get("image") is not None else [])
        if not isinstance(images, list):
            raise ValueError(f'expected a list as "images", got {_shorten(images)}')
        parts = [{"type": "image", "image": image} for image in images]
        inputs = [{"role": "user", "content": [*parts, {"type": "text", "text": inputs["text"]}]}]
    if not isinstance(inputs, list):
        raise ValueError(f'expected a text, an object or a list of messages as "inputs", got {_shorten(inputs)}')
    messages = [_read_message(message, number) for number, message in enumerate(inputs)]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user" if place % 2 == 0 else "assistant" for place in range(len(spoken))]:
        raise ValueError(
            f"expected the roles user, assistant, user, ... in turn, after an optional system, got {_shorten(roles)}"
        )
    if len(spoken) % 2 == 0:
        raise ValueError("expected a chat that ends with the user's question, got one that ends with an answer")
    parts = [part for message in messages for part in message["content"]]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise ValueError(f"expected at most {MAX_CHARACTERS} characters, got {sum(map(len, texts))}")
    if any(image_token in text for text in texts):
        raise ValueError(f"expected texts without {image_token}, the model's own sign for a picture")
    if not any(part["type"] == "text" and part["text"].strip() for part in messages[-1]["content"]):
        raise ValueError("expected a question, got none")
    pictures = [part for part in parts if part["type"] == "image"]
    if len(pictures) > MAX_IMAGES:
        raise ValueError(f"expected at most {MAX_IMAGES} pictures, got {len(pictures)}")
    for part in pictures:
        part["image"] = _open_image(part["image"])
    return messages


def _read_message(message: Any, number: int) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ValueError(f"expected a role of system, user or assistant, and a content, in message {number}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"expected a text or a list of parts as the content of message {number}")
    parts = []
    for part in content:
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        names = {"text": ["text"], "image": ["image", "url", "base64"], "image_url": ["image_url"]}.get(kind, [])
        source = next((part[name] for name in names if name in part), None)
        if kind == "image_url" and isinstance(source, dict):
            source = source.get("url")
        if not isinstance(source, str):
            raise ValueError(
                f'expected parts {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}} in message {number}, '
                f"got {_shorten(part)}"
            )
        if kind != "text" and message["role"] != "user":
            raise ValueError(f"expected pictures in a user's messages only, got one in message {number}")
        parts.append({"type": "text", "text": source} if kind == "text" else {"type": "image", "image": source})
    return {"role": message["role"], "content": parts}


def _open_image(source: str) -> Image.Image:
    """An address's or base64's picture, upright, RGB."""
    if source[:8].lower().startswith(("http://", "https://")):
        content = _fetch(source)
    else:
        encoded = "".join((source.partition(",")[2] if source.startswith("data:") else source).split())
        if len(encoded) > MAX_IMAGE_BYTES * 4 / 3 + 4:
            raise ValueError(f"expected a picture of at most {MAX_IMAGE_BYTES:,} bytes")
        try:
            content = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"expected a picture as an http(s) address or as base64, got {_shorten(source)}"
            ) from error
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if max(width, height) > min(MAX_SIDE, MAX_ASPECT * min(width, height)) or width * height > MAX_PIXELS:
                raise ValueError(
                    f"expected a picture of at most {MAX_SIDE} pixels a side, {MAX_PIXELS:,} together, {MAX_ASPECT} to 1, "
                    f"got {width} x {height}"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"expected a picture in one of {', '.join(IMAGE_FORMATS)}, got what is none") from error


def _fetch(address: str) -> bytes:
    """What lies at a public address: an endpoint's own network is none of a stranger's business."""
    end = time.monotonic() + FETCH_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        fault = None
        try:
            with _connect(address, end) as connection:
                response = connection.getresponse()
                content = response.read(MAX_IMAGE_BYTES + 1) if response.status == 200 else b""
        except (OSError, HTTPException, UnicodeError) as error:
            fault = error
        # First, for what is cut off looks like many things, also like a whole answer.
        if time.monotonic() >= end:
            raise ValueError(f"expected a picture at {_shorten(address)} within {FETCH_SECONDS} seconds") from fault
        if fault:
            raise ValueError(f"expected a picture at {_shorten(address)}, which cannot be reached") from fault
        if len(content) > MAX_IMAGE_BYTES:
            raise ValueError(f"expected a picture of at most {MAX_IMAGE_BYTES:,} bytes")
        if response.status == 200:
            return content
        if response.status not in (301, 302, 303, 307, 308):
            raise ValueError(f"expected a picture at {_shorten(address)}, got status {response.status}")
        address = urljoin(address, response.headers.get("Location", ""))
    raise ValueError(f"expected at most {MAX_REDIRECTS} redirects, got more, the last to {_shorten(address)}")


@contextmanager
def _connect(address: str, end: float) -> Iterator[HTTPConnection]:
    """A connection that has asked for what lies at an address; cut off at `end` of `time.monotonic`, however slow it is."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError(f"expected an http(s) address without a user's name, got {_shorten(address)}")
    make_connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = make_connection(parts.hostname, parts.port, timeout=max(end - time.monotonic(), 0.001))
    connection.connect()
    cut = threading.Timer(end - time.monotonic(), _shut, [connection.sock])
    cut.daemon = True
    cut.start()
    try:
        # Of the connection itself: a name may stand for another address whenever it is asked.
        if not _is_public(connection.sock.getpeername()[0]):
            raise OSError("not a public address")
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=punctuation)
        connection.request("GET", target, headers={"User-Agent": "chatpose_hf", "Accept": "image/*"})
        yield connection
    finally:
        cut.cancel()
        connection.close()


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile
        connected.shutdown(socket.SHUT_RDWR)


def _is_public(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_global


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
