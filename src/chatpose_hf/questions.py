"""What an evaluation asks: its tasks, and rows as the questions of one."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .batch_log import make_batches
from .collator import open_picture
from .data.prompts import DESCRIBING_KINDS, IMAGE_QUESTIONS, PHRASE_QUESTION, TEXT_QUESTIONS, fill_template
from .data.rows import caption_texts


class Task(NamedTuple):
    """
    What is asked.

    Args:
        row_tasks (`tuple[str, ...]`): of the rows it takes.
        kinds (`tuple[str, ...]`): of the captions it asks by, the first that a row has; none where it asks by none.
        question (`str`, *optional*): `{sent}` or `{phrase}` is that caption; without one every turn of a chat is asked.
        shows_pictures (`bool`): whether every question is about one.
    """

    row_tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    question: str | None
    shows_pictures: bool


TASKS = {
    "text-to-pose": Task(("text_to_pose",), DESCRIBING_KINDS, TEXT_QUESTIONS[2], False),
    "pose-estimation": Task(("pose_estimation",), (), IMAGE_QUESTIONS[0], True),
    "spg": Task(("spg",), ("implicit",), PHRASE_QUESTION, False),
    "rpe": Task(("rpe",), ("phrase",), PHRASE_QUESTION, True),
    "chat": Task(("vqa",), (), None, False),
    # Not the rows of spg, whose captions and poses are there already.
    "captions": Task(
        ("text_to_pose", "pose_estimation", "rpe"), (), "Describe the pose of the person in this image.", False
    ),
}


_COLUMNS = ["id", "task", "messages", "poses", "pose_mask", "captions"]


class Item(NamedTuple):
    """
    One question.

    Args:
        id (`str`): the row's; of a chat, with the number of the turn.
        row (`int`): which.
        turn (`int`): of the user's messages, the one that is asked.
        question (`str`), caption (`str`): what is asked, and the description in it, empty if there is none.
        num_images (`int`): of the row up to there.
    """

    id: str
    row: int
    turn: int
    question: str
    caption: str
    num_images: int


class Questions:
    """
    The questions of a task about rows.

    Args:
        rows (`Dataset`): as from [`load_rows`], with `decode=False`.
        task (`str`): one of `TASKS`.
        caption_kind (`str`, *optional*): ask by captions of this kind alone.
        template (`str`, *optional*):
            Another question; where the task asks by captions, `{sent}` or, at its start, `{phrase}` is the caption.
        id_prefix (`str`, *optional*, defaults to `""`): take only rows whose id begins with it.
        limit (`int`, *optional*): rows to take, evenly chosen.

    Attributes:
        items (`list[Item]`): in the rows' order.
        counts (`dict[str, int]`): items and rows, and rows that were left out, by reason.

    Raises:
        ValueError: where no row has a question of the task, one has no picture for a task about pictures, or the task does
            not ask by captions or by other questions.
    """

    def __init__(
        self,
        rows: Dataset,
        task: str,
        caption_kind: str | None = None,
        template: str | None = None,
        id_prefix: str = "",
        limit: int | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"expected a task of {', '.join(TASKS)}, got {task!r}")
        self._rows = rows
        self.task = task
        spec = TASKS[task]
        kinds = spec.kinds if caption_kind is None else (caption_kind,)
        if caption_kind is not None and not spec.kinds:
            raise ValueError(f"expected no caption kind for {task}, which asks by no caption, got {caption_kind!r}")
        if template is not None:
            _check_template(template, task)
        self.template = template or spec.question
        self.items: list[Item] = []
        left_out: dict[str, int] = {}
        for number, row in enumerate(rows.select_columns(_COLUMNS)):
            texts = [text for kind in kinds for text in caption_texts(row, [kind]) if text.strip()]
            if not row["id"].startswith(id_prefix):
                reason = "rows of other ids"
            elif row["task"] not in spec.row_tasks:
                reason = "rows of other tasks"
            elif self.template is None and row["poses"]:
                reason = "rows with poses"
            elif self.template is not None and len(row["poses"]) != 1:
                reason = "rows without or with several poses"
            elif task == "captions" and not row["pose_mask"][0][0]:
                reason = "rows whose pose nobody knows"
            elif kinds and not texts:
                reason = f"rows without a caption of kind {', '.join(kinds)}"
            elif task == "captions" and not row["captions"]:
                reason = "rows without captions"
            else:
                self.items += self._make_items(number, row, texts[0] if texts else "")
                continue
            left_out[reason] = left_out.get(reason, 0) + 1
        if not self.items:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are no rows"
            raise ValueError(f"expected rows for {task}, found none ({reasons})")
        if limit is not None:
            left_out["rows left out by the limit, evenly"] = self._limit(limit)
        if spec.shows_pictures and not self.have_pictures:
            raise ValueError(f"expected a picture in every row for {task}")
        self.counts = {"items": len(self.items), "rows": len({item.row for item in self.items}), **left_out}

    def _make_items(self, number: int, row: dict, caption: str) -> list[Item]:
        messages, id = row["messages"], row["id"]
        places = _user_turns(messages)
        if self.template is not None:
            question = fill_template(self.template, caption) if caption else self.template
            return [Item(id, number, 0, question, caption, _count_images(messages[: places[0] + 1]))]
        return [
            Item(f"{id}#{turn}", number, turn, _text_of(messages[place]), "", _count_images(messages[: place + 1]))
            for turn, place in enumerate(places)
        ]

    def _limit(self, limit: int) -> int:
        rows = list(dict.fromkeys(item.row for item in self.items))
        count = min(limit, len(rows))
        kept = {rows[index * len(rows) // count] for index in range(count)}
        self.items = [item for item in self.items if item.row in kept]
        return len(rows) - count

    @property
    def have_pictures(self) -> bool:
        """Whether all of them do."""
        return all(item.num_images for item in self.items)

    def select_rows(self, columns: Sequence[str]) -> Dataset:
        """The items' rows, one for each item, without what is not asked for."""
        return self._rows.select_columns(list(columns)).select([item.row for item in self.items])

    def make_batches(self, size: int) -> list[list[int]]:
        """Items by number, as from [`batch_log.make_batches`]."""
        return make_batches([(item.num_images, len(item.question)) for item in self.items], size)

    def load_rows(self, indices: Sequence[int]) -> list[dict]:
        """The whole rows of some items."""
        return list(self._rows.select([self.items[index].row for index in indices]))

    def make_chats(self, indices: Sequence[int]) -> list[list[dict]]:
        """
        What the model is given, as messages: the row's pictures and the question; of a chat, the true conversation up to
        it.
        """
        chats = []
        for index, row in zip(indices, self.load_rows(indices), strict=True):
            try:
                chats.append(self._make_chat(self.items[index], row))
            except (ValueError, OSError) as error:
                raise ValueError(f"cannot ask about row {row['id']!r}: {error}") from error
        return chats

    def _make_chat(self, item: Item, row: dict) -> list[dict]:
        messages = row["messages"]
        images = iter(row["images"])
        is_chat = self.template is None
        chat = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": open_picture(next(images))} if part["type"] == "image" else part
                    for part in message["content"]
                    if is_chat or part["type"] == "image"
                ],
            }
            for message in messages[: _user_turns(messages)[item.turn] + 1]
        ]
        if is_chat:
            return chat
        return [{"role": "user", "content": [*chat[-1]["content"], {"type": "text", "text": item.question}]}]

    def find_units(self) -> tuple[str, Tensor]:
        """
        What items must be drawn together for an interval: the turns of a conversation, what is asked about one picture.

        Returns:
            Their name, and of each item the number of its own, `(N,)`.
        """
        if self.task == "chat":
            return "conversations", torch.tensor([item.row for item in self.items])
        if self.task == "rpe":
            pictures = [_read_picture(row["images"][0]) for row in self.select_rows(["images"])]
            numbers: dict[bytes, int] = {}
            digests = [hashlib.sha256(picture).digest() for picture in pictures]
            return "pictures", torch.tensor([numbers.setdefault(digest, len(numbers)) for digest in digests])
        return "items", torch.arange(len(self.items))

    def true_answers(self) -> list[str]:
        """Of a chat, what follows each question."""
        return [
            _text_of(row["messages"][_user_turns(row["messages"])[item.turn] + 1])
            for item, row in zip(self.items, self.select_rows(["messages"]), strict=True)
        ]

    def open_picture(self, index: int) -> Image.Image | None:
        """The first picture that a question shows."""
        if not self.items[index].num_images:
            return None
        return open_picture(self._rows[self.items[index].row]["images"][0])

    @cached_property
    def digest(self) -> str:
        """Of all that the model is shown."""
        digest = hashlib.sha256()
        for item, row in zip(self.items, self.select_rows(["messages", "images"]), strict=True):
            said = row["messages"] if self.template is None else None
            digest.update(json.dumps([item.id, item.question, said]).encode())
            for image in row["images"] if item.turn == 0 else ():
                digest.update(_read_picture(image))
        return digest.hexdigest()[:16]


def _read_picture(image: dict) -> bytes:
    return image["bytes"] or Path(image["path"]).read_bytes()


def _check_template(template: str, task: str) -> None:
    """Whether the words in braces are those that will be filled in."""
    spec = TASKS[task]
    if spec.question is None:
        raise ValueError(f"expected no question for {task}, which asks those of the rows, got {template!r}")
    places = re.findall(r"\{.*?\}", template)
    is_at_start = template.startswith("{phrase}")
    if spec.kinds and places != ["{phrase}" if is_at_start else "{sent}"]:
        raise ValueError(
            f"expected a question with the caption as {{sent}}, or at its start as {{phrase}}, for {task}, got {template!r}"
        )
    if not spec.kinds and places:
        raise ValueError(
            f"expected a question without {places[0]} for {task}, which asks by no caption, got {template!r}"
        )


def _count_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _user_turns(messages: list[dict]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "user"]


def _text_of(message: dict) -> str:
    return "".join(part["text"] or "" for part in message["content"])
