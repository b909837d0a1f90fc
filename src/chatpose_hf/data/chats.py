"""Small talk, and questions that ask for no pose: what a model for poses answers in words alone."""

import random
import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from .prompts import make_messages
from .source import Source, load_json


_REQUIRED = {"questions", "answers"}
_LEAST = 2  # wordings of a question, fillings of a gap: one to learn from, one to be asked by
_MAX_FILLINGS = {"train": 60, "val": 6}  # of an item with gaps, so that no item drowns the others
_VAL_EVERY = 5
_LONG_SHARE = 0.2  # of the rows of train: chats of two or three turns
_HASTY_SHARE = 0.15  # of the questions of train: as people type them
_GAP = re.compile(r"\{(\w+)\}")


class Asked(NamedTuple):
    """A question, the answers that fit it, and the item that it is of."""

    item: str
    question: str
    answers: list[str]


class Chats(Source):
    """
    `THEME.json` files: arrays of `questions`, wordings of one question, and `answers`, each of which fits all of them. Where
    these have gaps, `{name}`, `fill` has what goes into each: `{"name": [...]}`.

    Every item is in both splits. Val asks by the last wording, which train does not have, with fillings that train does not
    have either. A row of task `"vqa"` for each question, without pose; in train one in five goes on with questions of other
    items, and some are written hastily, in small letters and without a full stop.
    """

    name = "chats"
    licence = "Apache-2.0, as the code"

    def parts(self) -> list[str]:
        return [f"{split}/{theme}" for split in ("train", "val") for theme in self._themes()]

    def read_part(self, part: str) -> Iterator[dict]:
        split, theme = part.split("/", 1)
        asked = self._load(split)
        pool = [turn for turns in asked.values() for turn in turns]
        for number, turn in enumerate(asked[theme]):
            rng = random.Random(f"{self.seed}/{part}/{number}")
            turns = [turn]
            if split == "train" and rng.random() < _LONG_SHARE:
                others = [other for other in rng.sample(pool, min(8, len(pool))) if other.item != turn.item]
                turns += others[: rng.randint(1, 2)]
            messages = []
            for said in turns:
                question = said.question
                if split == "train" and rng.random() < _HASTY_SHARE:
                    question = _write_hastily(question, rng)
                messages += make_messages(question, rng.choice(said.answers))
            yield self.make_row(f"{part}/{number:05}", "vqa", messages=messages)

    def _themes(self) -> list[str]:
        themes = sorted(path.stem for path in self.folder.glob("*.json"))
        if not themes:
            raise FileNotFoundError(f"expected files of chats, THEME.json, in {self.folder}, found none")
        return themes

    def _load(self, split: str) -> dict[str, list[Asked]]:
        """What a split asks, by theme: of all themes, since chats of several turns mix them."""
        asked: dict[str, list[Asked]] = {}
        first: dict[str, str] = {}  # where each wording came first
        for theme in self._themes():
            path = self.folder / f"{theme}.json"
            items = load_json(path)
            if not isinstance(items, list):
                raise ValueError(f"expected an array of questions and answers in {path}, got {type(items).__name__}")
            asked[theme] = []
            for number, item in enumerate(items):
                if fault := _find_fault(item):
                    raise ValueError(f"item {number} of {path}: {fault}")
                for question in item["questions"]:
                    before = first.setdefault(simplify(question), f"item {number} of {path}")
                    if before != f"item {number} of {path}":
                        raise ValueError(f"item {number} of {path}: {question!r:.100} is a question of {before} too")
                rng = random.Random(f"{self.seed}/{split}/{theme}/{number}")
                asked[theme] += _ask(f"{theme}/{number}", item, split, rng)
        return asked


def simplify(question: str) -> str:
    """A question without what makes no difference to who reads it: capitals, punctuation, spaces."""
    return " ".join(re.findall(r"[\w{}+*/<>=]+", question.casefold())) or question


def _ask(name: str, item: dict, split: str, rng: random.Random) -> list[Asked]:
    wordings = item["questions"][-1:] if split == "val" else item["questions"][:-1]
    if "fill" not in item:
        return [Asked(name, question, item["answers"]) for question in wordings]
    fillings = [
        [value for number, value in enumerate(values) if (number % _VAL_EVERY == 0) == (split == "val")]
        for values in item["fill"].values()
    ]
    choices = list(product(wordings, *fillings))
    asked = []
    for question, *values in rng.sample(choices, min(_MAX_FILLINGS[split], len(choices))):
        given = dict(zip(item["fill"], values, strict=True))
        asked.append(Asked(name, _fill(question, given), [_fill(answer, given) for answer in item["answers"]]))
    return asked


def _fill(text: str, given: dict[str, str]) -> str:
    filled = _GAP.sub(lambda match: given[match[1]], text)
    return filled[:1].upper() + filled[1:]


def _write_hastily(question: str, rng: random.Random) -> str:
    """In small letters, without the last full stop or question mark, one time in three with two letters swapped."""
    hasty = question.casefold().rstrip(".?! ") or question
    if len(hasty) > 12 and rng.random() < 1 / 3:
        place = rng.randrange(1, len(hasty) - 2)
        hasty = hasty[:place] + hasty[place + 1] + hasty[place] + hasty[place + 2 :]
    return hasty


def _find_fault(item: object) -> str | None:
    if not isinstance(item, dict) or not _REQUIRED <= item.keys() <= {*_REQUIRED, "fill"}:
        return f"expected questions, answers and perhaps fill, got {item!r:.200}"
    for field, least in (("questions", _LEAST), ("answers", 1)):
        if not _are_texts(item[field], least):
            return f"expected at least {least} different texts as `{field}`, got {item[field]!r:.200}"
    fill = item.get("fill", {})
    if not isinstance(fill, dict) or not all(_are_texts(values, _LEAST) for values in fill.values()):
        return f"expected at least {_LEAST} different texts for each gap in `fill`, got {fill!r:.200}"
    for question in item["questions"]:
        if set(_GAP.findall(question)) != fill.keys():
            return f"expected the gaps of `fill` ({', '.join(fill) or 'none'}) in each question, got {question!r:.200}"
    for answer in item["answers"]:
        if not set(_GAP.findall(answer)) <= fill.keys():
            return (
                f"expected no gaps but those of `fill` ({', '.join(fill) or 'none'}) in answers, got {answer!r:.200}"
            )
    return None


def _are_texts(texts: object, least: int) -> bool:
    is_list = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    return is_list and len({simplify(text) for text in texts}) == len(texts) >= least  # type: ignore[arg-type, misc]
