"""LLaVA-1.5's instruction tuning data: chats about pictures and about anything, which keep the model able to chat."""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from PIL import Image

from ..array_files import read_limited, value_errors_only
from ..image_files import MAX_ASPECT
from .rows import IMAGE_TOKEN
from .source import Source, inside


_FILE = "llava_v1_5_mix665k.json"
_ENTRIES_PER_PART = 5000
_BLOCK = 2**22  # bytes read at a time when looking for entries
_MAX_ENTRY = 2**24  # the longest chats have a hundred thousand; what is longer is no entry, and is not kept in memory
_MAX_PART = 2**26
_SPACE = re.compile(r"[ \t\n\r]*")
_ROLES = {"human": "user", "gpt": "assistant"}
# By the first folder of a picture's name
_PICTURES = {
    "coco": "COCO 2017 (Flickr's terms)",
    "gqa": "GQA",
    "ocr_vqa": "OCR-VQA",
    "textvqa": "TextVQA",
    "vg": "Visual Genome (CC BY 4.0)",
}


class LlavaInstruct(Source):
    """
    `llava_v1_5_mix665k.json`, in the folder or in `llava_dataset/`: an array of `{"id", "image"?, "conversations":
    [{"from": "human" or "gpt", "value"}]}`. Pictures lie where `image` says, seen from the folder: `coco/train2017/...`,
    `gqa/images/...`, `ocr_vqa/images/...`, `textvqa/train_images/...`, `vg/VG_100K/...`, `vg/VG_100K_2/...`.

    A row of task `"vqa"` for each entry, without poses: the whole conversation, `<image>` of the first question moved to
    its front, as LLaVA's training has it. Entries without a picture are text alone. What was said before the first
    question and a last question without an answer are left out. The original took pictures of `coco`, `gqa` and `vg`
    only.

    Pictures keep their bytes; each is decoded once, JPEG at an eighth of its size: that reads all of the file for half
    the time, while Pillow's `verify` does not notice a JPEG that is cut off.
    """

    name = "llava"
    licence = "LLaVA-v1.5-mix665k: the terms of its parts and of OpenAI"

    def __init__(self, folder: str | Path, seed: int = 0):
        super().__init__(folder, seed)
        places = [self.folder / _FILE, self.folder / "llava_dataset" / _FILE]
        found = [path for path in places if path.is_file()]
        if not found:
            raise FileNotFoundError(f"expected {places[0]} or {places[1]}, found neither")
        self._path = found[0]
        # Start and end in bytes and the first entry's number, of each part. Travels with the object to other processes,
        # so that the file of a gigabyte is looked through once.
        self._spans: list[tuple[int, int, int]] = []

    def parts(self) -> list[str]:
        return [f"train/{number:04d}" for number in range(len(self._find_spans()))]

    def read_part(self, part: str) -> Iterator[dict]:
        start, end, first = self._find_spans()[int(part.split("/")[1])]
        with open(self._path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            entries = json.loads(f"[{content.decode('utf-8')}]")
        except UnicodeDecodeError as error:
            raise ValueError(f"expected UTF-8 in {self._path}, got others at byte {start + error.start}") from error
        except ValueError as error:
            raise ValueError(f"expected JSON in {self._path} from byte {start} to {end}: {error}") from error
        for index, entry in enumerate(entries, first):
            id = f"{index:06d}/{entry.get('id')!s:.100}"  # the file has some ids more than once
            try:
                yield self._read_entry(id, entry)
            except _Unusable as error:
                self.skip(*error.args)

    def _find_spans(self) -> list[tuple[int, int, int]]:
        if not self._spans:
            spans: list[tuple[int, int, int]] = []
            for index, (start, end) in enumerate(_find_entries(self._path)):
                if not spans or index - spans[-1][2] == _ENTRIES_PER_PART or end - spans[-1][0] > _MAX_PART:
                    spans.append((start, end, index))
                else:
                    spans[-1] = (spans[-1][0], end, spans[-1][2])
            self._spans = spans
        return self._spans

    def _read_entry(self, id: str, entry: dict) -> dict:
        turns = _read_turns(id, entry.get("conversations"))
        images: list[bytes] = []
        pictures = "no picture"
        if entry.get("image") is not None:
            question = turns[0][1]
            if IMAGE_TOKEN not in question:
                raise _Unusable(f"a picture, but no {IMAGE_TOKEN} in the first question", id)
            turns[0] = ("user", question.replace(IMAGE_TOKEN, "", 1).strip())
            images = [self._read_picture(entry["image"])]
            pictures = f"pictures: {_PICTURES.get(_first_folder(entry['image']), 'of their own terms')}"
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        if images:
            words = messages[0]["content"] if turns[0][1] else []  # a question may be the picture alone
            messages[0]["content"] = [{"type": "image", "text": None}, *words]
        row = self.make_row(id, "vqa", images=images, messages=messages)
        return {**row, "licence": f"{self.licence}; {pictures}"}

    def _read_picture(self, name: object) -> bytes:
        try:
            path = inside(self.folder, name)
        except ValueError as error:
            raise _Unusable("refused name of a picture", str(name)[:200]) from error
        group = _first_folder(name)
        if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
            raise _Unusable(f"missing image of {group}", str(name))
        try:
            content = read_limited(path)
            width, height = _decode_picture(content)
        except (ValueError, OSError) as error:
            raise _Unusable(f"damaged image of {group}", str(name)) from error
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _Unusable(f"a picture narrower than {MAX_ASPECT} to 1", str(name))
        return content


class _Unusable(Exception):
    """Why an entry gives no row, and its name or its picture's."""


def _read_turns(id: str, conversation: object) -> list[tuple[str, str]]:
    """Role and words of each turn, the user first, the assistant last."""
    try:
        turns = [(_ROLES[turn["from"]], turn["value"]) for turn in conversation]  # type: ignore[attr-defined]
    except (KeyError, TypeError) as error:
        raise _Unusable("no conversation of human and gpt", id) from error
    while turns and turns[0][0] != "user":
        turns.pop(0)
    if any(before == after for (before, _), (after, _) in pairwise(turns)):
        raise _Unusable("two turns of one speaker in a row", id)
    if turns and turns[-1][0] == "user":
        turns.pop()
    if not turns or not isinstance(turns[0][1], str):
        raise _Unusable("no question with an answer", id)
    return turns


def _first_folder(name: object) -> str:
    """What pictures are counted by; names come from a file of anybody's."""
    first = str(name).replace("\\", "/").split("/")[0]
    return first if first in _PICTURES else "other folders"


def _find_entries(path: Path) -> Iterator[tuple[int, int]]:
    """
    Start and end, in bytes, of each object in the file's array; a block of the file is in memory at a time.

    As latin-1 a byte is a character, so that the decoder's positions are the file's; JSON's own characters are ASCII,
    and what the strings say does not matter here.
    """
    decode = json.JSONDecoder().raw_decode
    with open(path, "rb") as file:
        offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        text, done = "", 0  # the block that begins at `offset`, and how much of it is behind us
        mark, count = "[", 0
        while True:
            start = done
            try:
                start = _SPACE.match(text, start).end()  # type: ignore[union-attr]
                if mark == "," and text[start] == "]":
                    break
                if text[start] != mark:
                    raise ValueError(f"expected {mark!r}, got {text[start]!r}")
                start = _SPACE.match(text, start + 1).end()  # type: ignore[union-attr]
                if mark == "[" and text[start] == "]":
                    break
                entry, end = decode(text, start)
            except (IndexError, ValueError, RecursionError) as error:
                more = file.read(_BLOCK)
                if more and len(text) - done < _MAX_ENTRY:  # an entry that goes on in the next block looks damaged too
                    text, offset, done = text[done:] + more.decode("latin-1"), offset + done, 0
                    continue
                place = offset + max(start, getattr(error, "pos", 0))
                raise ValueError(
                    f"expected a JSON array of chats in {path}; after {count} entries, at byte {place}, it is damaged, cut "
                    f"off or of another layout ({getattr(error, 'msg', error)}); get the file again"
                ) from error
            if not isinstance(entry, dict):
                raise ValueError(f"expected JSON objects in {path}, got another value at byte {offset + start}")
            yield offset + start, offset + end
            mark, count, done = ",", count + 1, end
        if text[start + 1 :].strip() or file.read(_BLOCK).strip():
            raise ValueError(f"expected nothing after the JSON array in {path}, got more at byte {offset + start + 1}")


def _decode_picture(content: bytes) -> tuple[int, int]:
    """Width and height of a picture; a `ValueError` for what does not decode to its end."""
    with value_errors_only("the picture"), Image.open(io.BytesIO(content)) as image:
        size = image.size
        image.draft("RGB", (1, 1))
        image.load()
        return size
