"""Chats about poses of one to four turns: poses asked for plainly, told back in words, between thanks and other talk."""

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from .prompts import (
    DESCRIBING_KINDS,
    draw_messages,
    fill_template,
    make_messages,
)
from .source import DrawnFromRows


# fmt: off
NEXT_QUESTIONS = (
    "And this one: {sent}", "And now this: {sent}", "Now another one. {sent}", "Next pose: {sent}",
    "Next: {phrase}", "Another pose, please. {sent}", "What about this one? {sent}", "How about this? {sent}",
    "Can you do this too? {sent}", "Then show me this: {sent}", "One more: {phrase}",
    "Now the body should be like this: {sent}",
)
DESCRIBE_QUESTIONS = (
    "Describe this pose in words.", "Describe the pose.", "Can you describe it in words?",
    "What is the person doing?", "Tell me about this pose.", "Put that pose into words.", "How is the body held?",
    "What does the pose look like in words?", "Say in words what I see.", "How would you describe this body?",
    "Explain the pose to me without showing it.", "Where are the arms and the legs?",
)
LIMBS = {"arms": r"\b(arm|elbow|hand|wrist|forearm|fist)s?\b", "legs": r"\b(leg|knee|foot|feet|ankle|thigh|shin|heel)s?\b"}
LIMB_QUESTIONS = (
    "What is the person doing with the {limbs}?", "Where are the {limbs}?", "And the {limbs}?",
    "How are the {limbs} held?", "Tell me about the {limbs}.",
)
OPENINGS = (
    ("Hello!", "Hello! Describe a pose and I show it."), ("Hi there.", "Hi! Which pose would you like to see?"),
    ("Good morning.", "Good morning! Tell me how a person stands, sits or moves."),
    ("Hey, are you there?", "Yes, I am here. What pose shall it be?"),
    ("Good evening!", "Good evening! Which pose may I make?"),
    ("How are you?", "I am fine, thank you. Shall we make a pose?"),
    ("Can I ask you for a pose?", "Of course. Say in words what the body does."),
    ("What can you do?", "I turn words into 3D human poses, and poses into words."),
    ("Who are you?", "I am a small model for 3D human poses."),
    ("I need help with a drawing.", "Gladly. Describe the pose that you want to draw."),
    ("Do you have a minute?", "I do. Describe a pose and I make it."),
    ("Let's start.", "I am ready. What does the person do?"),
)
THANKS = (
    ("Thanks!", "You are welcome!"), ("Thank you.", "My pleasure."),
    ("Great, thank you very much.", "Gladly! Tell me if you want another pose."),
    ("Perfect.", "I am glad that it fits."), ("Nice, that helps.", "Good to hear."),
    ("Wonderful!", "Thank you! I can make another."), ("ok", "Good. Tell me when you want another pose."),
    ("That is what I wanted.", "I am glad to hear it."), ("Thanks, that will do.", "You are welcome, any time."),
    ("Looks good.", "Thank you, I am glad."),
)
_REFUSALS = (
    "I am a small model for human poses and do not know that.",
    "That is beyond me: I only know human poses.",
    "I can not help with that, but I can show you a pose.",
    "Sorry, I do not know. Poses of people are all that I learned.",
)
UNRELATED = (
    "What is the capital of Norway?", "Who wrote the novel about the whale?", "What is 17 times 23?",
    "Will it rain tomorrow?", "How do I bake bread?", "What time is it?", "Tell me a joke.", "What is gold worth?",
    "How do I reset my password?", "Who is the president of France?", "Write a poem about the sea.", "What is a comet?",
    "Translate 'good night' into Spanish.", "Is this exercise healthy?", "What film should I see?", "Is it Monday?",
    "How far away is the moon?", "How many muscles are in there?", "Who won the match yesterday?", "What is she called?",
    "What is the person's name?", "Why is the sky blue?", "Write a program that sorts numbers.", "Is that her brother?",
    "What should I eat after training?", "How old is this person?", "Which shoes are best for running?",
    "Does this hurt the back?", "When was the first Olympic race?", "How many people live in Chile?", "What is DNA?",
    "How do I cook rice?", "Can I do this with a bad knee?", "Which muscles does this train?", "Who invented this pose?",
    "How many calories does that burn?", "What is the pose good for?", "How long should one hold it?", "Who was Plato?",
    "Is this person ill?", "Where does the person live?", "How much does a ticket to Rome cost?", "Sing a song.",
    "What is the best diet?", "Tell me a story about a dragon.", "Who is the best dancer in the world?", "Call my mother.",
    "Should I see a doctor?", "What is the square root of 81?", "Where is the nearest gym?", "How do magnets work?",
    "What does the word lumbar mean?", "How tall is the tower in Pisa?", "Set a timer.", "Why do cats purr?",
)
# fmt: on
_HELD_OUT = 4  # every fourth of the talk beside poses is val's alone
_SINGLE_SHARE, _OPENING_SHARE, _HASTY_SHARE = 0.3, 0.2, 0.1
_FOLLOWING = {"pose": 0.3, "describe": 0.25, "limbs": 0.15, "unrelated": 0.18, "thanks": 0.12}


class _Described(NamedTuple):
    """Poses `(N, 24, 3)` and masks `(N, 24)` of rows; of each row, the captions that say what the body does."""

    poses: np.ndarray
    masks: np.ndarray
    captions: list[list[dict]]


class PoseChats(DrawnFromRows):
    """
    Chats about poses of rows that `chatpose data` wrote, `SPLIT/PART.parquet`: a pose is asked for by one of its captions,
    in half of the cases without the word SMPL; then others are, or the pose is told by another of its captions, or the talk
    is of something else, which is answered without a pose. Three rows in ten are a single question. A row of task
    `"text_to_pose"` for each, without captions, so that no epoch draws it anew.

    Args:
        folder (`str` or `Path`): the rows, of one pose each, those of task `"spg"` left out.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        count (`int`, *optional*, defaults to 20000): how many; one in twenty of the poses of the split `val`.
    """

    name = "pose-chats"
    licence = "Put together by chatpose_hf; poses and captions keep the terms of the rows that they were made from"
    default_count = 20_000
    rows_per_part = 500  # so that one part in twenty, which is val, is there by default

    def read_part(self, part: str) -> Iterator[dict]:
        split = part.split("/")[0]
        described = _load_described(self.folder, split)
        for index in self.indices(part):
            id = f"{index:08}"
            messages, chosen = _draw_chat(described.captions, split, self.seed, id)
            row = self.make_row(id, "text_to_pose", described.poses[chosen], messages=messages)
            yield {**row, "pose_mask": described.masks[chosen].tolist()}


def _draw_chat(captions: Sequence[list[dict]], split: str, seed: int, id: str) -> tuple[list[dict], list[int]]:
    """The messages, and the numbers of the poses in them, in order."""
    rng = random.Random(f"{seed}/{split}/{id}")
    messages: list[dict] = []
    chosen: list[int] = []
    told: list[str] = []  # of the last pose; first the caption that it was asked by

    def say(question: str, answer: str) -> None:
        messages.extend(make_messages(question, answer))

    def ask_pose() -> None:
        chosen.append(rng.randrange(len(captions)))
        kinds = sorted({caption["kind"] for caption in captions[chosen[-1]]})
        kind = rng.choice(kinds)
        caption = rng.choice([caption for caption in captions[chosen[-1]] if caption["kind"] == kind])
        told[:] = [caption["text"]]
        question, answer = draw_messages("text_to_pose", [caption], 0, 1, seed=seed, id=f"{split}/{id}/{len(chosen)}")
        if len(chosen) > 1:
            text = fill_template(rng.choice(NEXT_QUESTIONS), caption["text"])
            question["content"][0]["text"] = text.lower() if rng.random() < _HASTY_SHARE else text
        messages.extend([question, answer])

    def describe(limbs: str | None = None) -> None:
        texts = [caption["text"] for caption in captions[chosen[-1]]]
        texts = [text for text in texts if text not in told] or [text for text in texts if text != told[0]] or texts
        rng.shuffle(texts)
        parts = [part for text in texts if limbs and (part := tell_limbs(text, limbs))]
        if parts:
            say(rng.choice(LIMB_QUESTIONS).format(limbs=limbs), parts[0])
        else:
            told.append(texts[0])
            say(rng.choice(DESCRIBE_QUESTIONS), fill_template("{sent}", texts[0]))

    turns = 1 if rng.random() < _SINGLE_SHARE else rng.randint(2, 4)
    if turns > 1 and rng.random() < _OPENING_SHARE:
        say(*rng.choice(share(OPENINGS, split)))
    ask_pose()
    while len(messages) < 2 * turns:
        (following,) = rng.choices(list(_FOLLOWING), list(_FOLLOWING.values()))
        if following == "pose":
            ask_pose()
        elif following == "unrelated":
            say(rng.choice(share(UNRELATED, split)), rng.choice(_REFUSALS))
        elif following == "thanks":
            say(*rng.choice(share(THANKS, split)))
        else:
            describe(rng.choice(list(LIMBS)) if following == "limbs" else None)
    return messages, chosen


def share(table: Sequence, split: str) -> list:
    """What a split has of a table of talk beside poses."""
    return [entry for number, entry in enumerate(table) if (number % _HELD_OUT == 1) == (split == "val")]


def tell_limbs(text: str, limbs: str) -> str:
    """The sentences of a caption that are about arms or legs and not about the others; empty where there are none."""
    (others,) = LIMBS.keys() - {limbs}
    kept = [
        sentence
        for sentence in re.split(r"(?<=[.!?])\s+", fill_template("{sent}", text))
        if re.search(LIMBS[limbs], sentence, re.IGNORECASE) and not re.search(LIMBS[others], sentence, re.IGNORECASE)
    ]
    told = re.sub(r"^(Also|In addition), ", "", " ".join(kept))
    return told[:1].upper() + told[1:]


# Kept for the parts to come.
@lru_cache(maxsize=2)
def _load_described(folder: Path, split: str) -> _Described:
    """
    Known poses with captions, of the rows with one pose.

    Raises:
        ValueError: where there are none.
    """
    poses, masks, captions = [], [], []
    for path in sorted(folder.glob(f"{split}/*.parquet")):
        try:
            table = pq.read_table(path, columns=["poses", "pose_mask", "captions"], filters=[("task", "!=", "spg")])
        except (OSError, ValueError) as error:  # Arrow's errors are these
            raise ValueError(f"expected rows in {path}, as `chatpose data` writes them: {error}") from error
        for batch in table.to_batches(
            max_chunksize=PoseChats.rows_per_part
        ):  # Python's lists of all rows would take gigabytes
            for row in batch.to_pylist():
                describing = [caption for caption in row["captions"] if caption["kind"] in DESCRIBING_KINDS]
                if describing and len(row["poses"]) == 1 and any(row["pose_mask"][0]):
                    poses.append(np.array(row["poses"][0], np.float32))
                    masks.append(np.array(row["pose_mask"][0], bool))
                    captions.append(describing)
    if not captions:
        raise ValueError(f"expected rows of one known pose with captions in {folder / split}, found none")
    return _Described(np.stack(poses), np.stack(masks), captions)
