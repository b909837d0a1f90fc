"""Reasoning-based pose estimation: a model describes who of a photo is meant, people review it."""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, tee
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..array_files import read_limited
from ..atomic_write import write_atomically
from ..body import BodyModel
from ..image_files import open_image
from ..render import render_bodies
from .endpoint import Endpoint
from .prompts import draw_messages
from .rows import NUM_JOINTS, POSE_TOKEN, load_rows, validate_row
from .source import Source, inside, load_jsonl


ATTRIBUTES = ("behavior", "outfits", "pose", "shape", "summary")
REVIEW_TEMPLATE = Path(__file__).parent.parent / "assets" / "review.html"
_SPLITS = ("train", "val", "test")
_PEOPLE = 50  # in a part, or a few more: those of one photo stay together
_LONGEST = 600  # letters of a description
_SIDE = 1024  # pixels of the picture that the model sees
_REVIEW_SIDE = 512  # pixels of the pictures on the page
_MARK = "#ff0000"
_MARK_WORDS = ("rectangle", "bounding box", "red box", "red frame", "marked", "outlined")
_PROMPT = """A red rectangle marks one person in this picture. Describe this person in five ways, each of which lets \
somebody who sees the picture without the rectangle find the person. Do not mention the rectangle or any mark.

"behavior": what the person is doing.
"outfits": what the person is wearing.
"pose": how the body is posed.
"shape": how the body is built.
"summary": all of this in one sentence.

Each is a phrase that begins with "The person who", without a full stop, of at most 40 words. Use "" where the \
picture does not show it.

Answer with JSON alone: {"behavior": "...", "outfits": "...", "pose": "...", "shape": "...", "summary": "..."}"""


class Rpe(Source):
    """
    `people.jsonl`, on each line a person: `id`, `image` (a file in the folder), `box` (left, top, right, bottom in
    pixels of the upright picture), `pose` (72 numbers, axis-angle, camera frame) and optionally `split`, train if left
    out. A model sees the photo with the box drawn in and describes the person in five ways.

    A row of task `"rpe"` for each description, of kind `"phrase"`, with the whole photo as it is on disk, without the
    box. Its id is that of the person and the attribute.

    Args:
        folder (`str` or `Path`): of `people.jsonl`.
        seed (`int`, *optional*, defaults to 0): of the questions' wording.
        endpoint ([`Endpoint`]): the model, one that takes pictures.
    """

    name = "rpe"
    licence = "that of the photos"

    def __init__(self, folder: str | Path, seed: int = 0, endpoint: Endpoint | None = None):
        super().__init__(folder, seed)
        if endpoint is None:
            raise ValueError("expected an endpoint: the descriptions are a model's, and none was named")
        self.endpoint = endpoint

    def settings(self) -> dict:
        return {**super().settings(), **self.endpoint.settings()}

    def parts(self) -> list[str]:
        return list(self._people_of_parts())

    def _people_of_parts(self) -> dict[str, list[dict]]:
        """People by part, in the file's order but for those of one photo, which are together."""
        photos: dict[tuple[str, str], list[dict]] = {}
        for person in load_people(self.folder):
            photos.setdefault((person.get("split", "train"), str(person.get("image"))), []).append(person)
        parts: dict[str, list[dict]] = {}
        last: dict[str, list[dict]] = {}
        for (split, _), people in photos.items():
            if split not in last or len(last[split]) >= _PEOPLE:
                number = sum(part.startswith(f"{split}/") for part in parts)
                last[split] = parts[f"{split}/{number:05}"] = []
            last[split].extend(people)
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        people, same = tee(self._marked_people(part))
        answers = self.endpoint.ask_all((_PROMPT, [marked]) for *_, marked in same)
        for (id, pose, content, _), answer in zip(people, answers, strict=True):
            if answer is None:
                # Begins with "missing": the runner asks again next time.
                self.skip("missing answer: the model gave no JSON object", id)
                continue
            for attribute in ATTRIBUTES:
                phrase = as_phrase(answer.get(attribute))
                if phrase is None:
                    self.skip(f"no usable {attribute} in the model's answer", id)
                else:
                    yield self.make_row(f"{id}/{attribute}", "rpe", [pose], [("phrase", phrase)], [content])

    def _marked_people(self, part: str) -> Iterator[tuple[str, np.ndarray, bytes, bytes]]:
        """Of each person the id, the pose, the photo as it is on disk, and as the model sees it."""
        for _, people in groupby(self._people_of_parts()[part], key=lambda person: str(person.get("image"))):
            usable = list(filter(None, map(self._as_usable, people)))
            opened = self._open_photo(usable) if usable else None
            if opened is None:
                continue
            photo, content = opened
            for id, _, box, pose in usable:
                try:
                    marked = mark_person(photo, box, _SIDE)
                except ValueError:
                    self.skip("a box outside the photo", id)
                else:
                    yield id, pose, content, encode_jpeg(marked)

    def _as_usable(self, person: dict) -> tuple[str, object, tuple, np.ndarray] | None:
        """Id, photo, box and pose."""
        try:
            with np.errstate(over="ignore"):
                pose = np.array(person["pose"], np.float32).reshape(NUM_JOINTS, 3)
            if np.isfinite(pose).all():  # before the model is asked, who may want money
                return person["id"], person["image"], as_box(person["box"]), pose
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        self.skip("a person without an image, a box or a pose of 72 numbers", person["id"])
        return None

    def _open_photo(self, people: list[tuple]) -> tuple[Image.Image, bytes] | None:
        """The photo that these people are all in, decoded and as it is on disk."""
        name = people[0][1]
        try:
            path = inside(self.folder, name)
        except ValueError:
            self.skip("refused name of a photo", str(name)[:200], len(people))
            return None
        try:
            return open_image(path), read_limited(path)
        except FileNotFoundError:
            self.skip("missing image", str(name)[:200], len(people))
        except (ValueError, OSError):
            self.skip("damaged image", str(name)[:200], len(people))
        return None


def load_people(folder: str | Path) -> list[dict]:
    """
    The lines of a folder's `people.jsonl`.

    Raises:
        FileNotFoundError, ValueError: for no such file, no people, ids that are none or come twice, and other splits
            than train, val and test.
    """
    path = Path(folder) / "people.jsonl"
    people = load_jsonl(path)
    if not people:
        raise ValueError(f"expected people in {path}, got an empty file")
    ids: set[str] = set()
    for number, person in enumerate(people, start=1):
        id = person.get("id")
        if not isinstance(id, str) or not id or id in ids:
            raise ValueError(
                f"expected a text as `id` that no other has, got {id!r:.100} as number {number} of {path}"
            )
        if person.get("split", "train") not in _SPLITS:
            raise ValueError(
                f"expected the `split` {', '.join(_SPLITS)} or none, got {person['split']!r:.100} for {id!r} in {path}"
            )
        ids.add(id)
    return people


def as_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """
    Raises:
        ValueError, TypeError: for what is no box with an inside.
    """
    left, top, right, bottom = (float(value) for value in box)
    if not (left < right and top < bottom and all(map(math.isfinite, (left, top, right, bottom)))):
        raise ValueError(f"expected (left, top, right, bottom), got {box}")
    return left, top, right, bottom


def mark_person(photo: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    """
    The photo, at most `side` pixels a side, with a red rectangle around a person.

    Raises:
        ValueError: where the box lies outside the photo.
    """
    left, top, right, bottom = box
    if right <= 0 or bottom <= 0 or left >= photo.width or top >= photo.height:
        raise ValueError(f"expected a box that meets the photo of {photo.width} x {photo.height} pixels, got {box}")
    marked = photo.copy()
    marked.thumbnail((side, side))
    scale = marked.width / photo.width
    corners = [
        max(left, 0) * scale,
        max(top, 0) * scale,
        min(right * scale, marked.width - 1),
        min(bottom * scale, marked.height - 1),
    ]
    # A box of less than a pixel at the edge may end before it begins.
    corners[:2] = min(corners[0], corners[2]), min(corners[1], corners[3])
    ImageDraw.Draw(marked).rectangle(corners, outline=_MARK, width=max(2, round(max(marked.size) / 200)))
    return marked


def encode_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def as_phrase(text: object) -> str | None:
    """A description as a phrase; `None` for none, for one that is too long and for one that gives the mark away."""
    if not isinstance(text, str):
        return None
    phrase = " ".join(text.split()).rstrip(". ")
    if not phrase or len(phrase) > _LONGEST or any(word in phrase.casefold() for word in _MARK_WORDS):
        return None
    return phrase


def write_review_page(
    rows: Sequence[dict], path: str | Path, boxes: Mapping[str, Sequence[float]] | None = None
) -> None:
    """
    A page to accept, reject and edit descriptions with, beside the photo and the pose as the camera sees it: one HTML
    file that loads nothing and sends nothing. Its button saves `review.json` for [`apply_review`]:
    `{id: {"verdict": "accept" or "reject", "text": the edited text or null}}`.

    Args:
        rows (`Sequence[dict]`): of [`Rpe`].
        path (`str` or `Path`): the file; its folder exists.
        boxes (`Mapping[str, Sequence[float]]`, *optional*):
            By a person's id the box to draw into the photo; rows have none. From [`load_people`].
    """
    body = BodyModel.load("default")
    people: list[dict[str, str]] = []
    numbers: dict[str, int] = {}
    items = []
    for row in rows:
        person, _, attribute = row["id"].rpartition("/")
        if person not in numbers:
            numbers[person] = len(people)
            vertices = body.vertices(torch.tensor(np.asarray(row["poses"][0], dtype=np.float32)))
            drawn = render_bodies(vertices, body.faces, size=_REVIEW_SIDE // 2, background="white")
            photo = _small_photo(row["images"][0], (boxes or {}).get(person))
            people.append({"photo": _as_data_url(photo), "pose": _as_data_url(drawn)})
        question, answer = (
            "".join(part["text"] or (POSE_TOKEN if part["type"] == "pose" else "") for part in message["content"])
            for message in row["messages"][-2:]
        )
        items.append(
            {
                "id": row["id"],
                "attribute": attribute,
                "person": numbers[person],
                "question": question,
                "answer": answer,
                "text": _phrase(row),
            }
        )
    # "<" could end the script element; this is the same string in JSON.
    data = json.dumps({"people": people, "items": items}).replace("<", "\\u003c")
    page = REVIEW_TEMPLATE.read_text(encoding="utf-8").replace("DATA_AS_JSON", data)
    write_atomically(path, page.encode())


def write_review_folder(output: str | Path, folder: str | Path) -> Path:
    """
    `review.html` beside the rows that `chatpose data rpe` wrote, with the boxes of the people's file.

    Args:
        output (`str` or `Path`): the folder of rows.
        folder (`str` or `Path`): of `people.jsonl`.
    """
    boxes = {person["id"]: person["box"] for person in load_people(folder) if "box" in person}
    files = sorted(str(file) for file in Path(output).glob("*/*.parquet"))
    rows = [row for file in files for row in load_rows(file)]
    path = Path(output) / "review.html"
    write_review_page(rows, path, boxes)
    return path


def _small_photo(image: object, box: Sequence[float] | None) -> Image.Image:
    """Of a row's picture, a `PIL.Image` or a dictionary of its bytes or its path."""
    if isinstance(image, dict):
        file = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
        photo = open_image(file, "the picture of a row")
    else:
        photo = image.convert("RGB")
    if box is not None:
        return mark_person(photo, box, _REVIEW_SIDE)
    photo.thumbnail((_REVIEW_SIDE, _REVIEW_SIDE))
    return photo


def _as_data_url(picture: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(picture)).decode()}"


def _phrase(row: dict) -> str:
    return next(caption["text"] for caption in row["captions"] if caption["kind"] == "phrase")


def apply_review(rows: Sequence[dict], review: object, seed: int = 0) -> list[dict]:
    """
    The rows that were not rejected, with the descriptions that a reviewer wrote; rows without a verdict stay.

    Args:
        rows (`Sequence[dict]`): of [`Rpe`].
        review (`dict`): as `review.json` has it; see [`write_review_page`].
        seed (`int`, *optional*, defaults to 0): of the wording of questions that are made anew.

    Raises:
        ValueError: for ids that no row has, and verdicts and texts that are none.
    """
    if not isinstance(review, dict):
        raise ValueError(f"expected a review as an object of ids, got {type(review).__name__}")
    if unknown := sorted(review.keys() - {row["id"] for row in rows}):
        raise ValueError(
            f"expected a review of these rows, got {len(unknown)} ids that none of them has, such as {unknown[0]!r}"
        )
    kept = []
    for row in rows:
        entry = review.get(row["id"], {"verdict": "accept", "text": None})
        verdict, text = (entry.get("verdict"), entry.get("text")) if isinstance(entry, dict) else (None, None)
        if verdict not in ("accept", "reject") or not (text is None or (isinstance(text, str) and text.strip())):
            raise ValueError(
                f'expected {{"verdict": "accept" or "reject", "text": a text or null}} for {row["id"]!r}, '
                f"got {entry!r:.200}"
            )
        if verdict == "reject":
            continue
        if text is not None and text != _phrase(row):
            captions = [
                {**caption, "text": text} if caption["kind"] == "phrase" else caption for caption in row["captions"]
            ]
            counts = len(row["images"]), len(row["poses"])
            messages = draw_messages("rpe", captions, *counts, seed=seed, id=row["id"])
            row = {**row, "captions": captions, "messages": messages}
            validate_row(row)
        kept.append(row)
    return kept
