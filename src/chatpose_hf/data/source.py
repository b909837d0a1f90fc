"""What a reader is: a data set as the user downloaded it, read part by part into rows."""

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from ..image_files import open_image
from .prompts import draw_messages
from .rows import NUM_JOINTS, RowError, validate_row


_MAX_EXAMPLES = 5  # names kept for each reason to skip
_NUM_BETAS = 10
_VAL_EVERY = 20  # one part in so many of what is drawn is of the split val
_GENDERS = {name[:length]: name for name in ("male", "female", "neutral") for length in (1, len(name))}
# The fingers of SMPL-H and the marker sets of motion capture say nothing about SMPL's two hand joints.
BODY_ONLY_MASK = [joint < 22 for joint in range(NUM_JOINTS)]


class Truth(NamedTuple):
    """
    What a data set says of a person beside the row's pose; `None` where it says nothing.

    Attributes:
        betas (`np.ndarray` of shape `(10,)`): SMPL's shape, of the body of that gender; float32.
        gender (`str`): `"male"`, `"female"` or `"neutral"`.
        joints (`np.ndarray` of shape `(K, 3)`):
            Metres, along the camera's axes (x right, y down, z away from the viewer); where the origin is depends on the
            data set. Which joints they are does too: see its reader. Zero where not known; float32.
        known (`np.ndarray` of shape `(K,)`): bool, the joints that are there.
    """

    betas: np.ndarray | None
    gender: str | None
    joints: np.ndarray | None
    known: np.ndarray | None


class Source(ABC):
    """
    A data set in a folder. Iterating over it gives its rows, every one of them valid.

    Subclasses say which parts there are and how one is read. Parts are read in any order and by any process: a part's
    rows depend on the files, the seed and the part's name alone.

    Args:
        folder (`str` or `Path`): what was downloaded.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.

    Attributes:
        name (`str`): the source, as rows have it.
        licence (`str`): its terms, as rows have them.
        skipped (`dict[str, int]`): what was left out so far, counted by reason.
        skipped_examples (`dict[str, list[str]]`): the first few of each reason, by name.
    """

    name: ClassVar[str]
    licence: ClassVar[str]

    def __init__(self, folder: str | Path, seed: int = 0):
        self.folder = Path(folder)
        self.seed = seed
        self.skipped: dict[str, int] = {}
        self.skipped_examples: dict[str, list[str]] = {}
        if not self.folder.is_dir():
            raise FileNotFoundError(f"expected the folder of {self.name}, got {self.folder}, which is none")

    @abstractmethod
    def parts(self) -> list[str]:
        """`"split/name"` of each piece of work, in an order that stays; some hundreds to thousands of rows each."""

    @abstractmethod
    def read_part(self, part: str) -> Iterator[dict]:
        """
        The rows of a part as the files have them; what is left out is reported by `skip`.

        Raises:
            ValueError or OSError: where the part's own file is absent, damaged or of another layout; names the file.
        """

    def truths(self, ids: Sequence[str]) -> list[Truth]:
        """
        What the files say of the people in rows of this source beside their poses: what evaluation measures by.

        Args:
            ids (`Sequence[str]`): of rows that were made from this folder, in any order; they may repeat.

        Returns:
            `list[Truth]`: one for each id, in order.

        Raises:
            ValueError or OSError: where the source has nothing to say, or where the files have no such person, are absent,
                damaged or of another layout; names the file, and the row where the fault is about one.
        """
        raise ValueError(
            f"{self.name} says nothing beside the poses of its rows; measure those, or evaluate on hmr2-evaluation, 3dpw "
            "or rpe-refined"
        )

    def settings(self) -> dict[str, str | int | float | None]:
        """What the rows depend on beside the files; rows made with other settings are not mixed with them."""
        return {"source": self.name, "input": str(self.folder.resolve()), "seed": self.seed}

    def rows(self, part: str) -> Iterator[dict]:
        """The valid rows of a part; others, such as those with NaN in a pose, are counted in `skipped`."""
        ids: set[str] = set()
        for row in self.read_part(part):
            try:
                validate_row(row)
            except RowError as error:
                self.skip(error.reason, str(row.get("id")))
            else:
                if row["id"] in ids:
                    self.skip("`id`: came before", row["id"])
                else:
                    ids.add(row["id"])
                    yield row

    def __iter__(self) -> Iterator[dict]:
        for part in self.parts():
            yield from self.rows(part)

    def skip(self, reason: str, name: str, count: int = 1) -> None:
        """Counts what is left out. A reason that begins with "missing" or "damaged" is the files' fault, not the data's."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count
        examples = self.skipped_examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(name)

    def make_row(
        self,
        id: str,
        task: str,
        poses: Sequence = (),
        captions: Sequence[tuple[str, str]] = (),
        images: Sequence[bytes | Image.Image] = (),
        pose_mask: Sequence[bool] | None = None,
        messages: list[dict] | None = None,
    ) -> dict:
        """
        A row of this source.

        Args:
            id (`str`): unique in the source.
            task (`str`): one of `rows.TASKS`.
            poses (`Sequence` of shape `(24, 3)`, *optional*): axis-angle, camera frame.
            captions (`Sequence[tuple[str, str]]`, *optional*): kind and text of each; see `prompts.draw_messages`.
            images (`Sequence[bytes | PIL.Image.Image]`, *optional*): as the file has them, or drawn and cropped ones.
            pose_mask (`Sequence[bool]`, *optional*):
                Of all poses alike; every joint by default, none where nobody knows the pose.
            messages (`list[dict]`, *optional*): drawn from the task and the captions by default.
        """
        texts = [{"kind": kind, "text": text} for kind, text in captions]
        if messages is None:
            messages = draw_messages(task, texts, len(images), len(poses), seed=self.seed, id=id)
        mask = list(pose_mask) if pose_mask is not None else [True] * NUM_JOINTS
        return {
            "id": id,
            "source": self.name,
            "task": task,
            "messages": messages,
            "images": [
                {"bytes": image if isinstance(image, bytes) else _encode(image), "path": None} for image in images
            ],
            "poses": [np.asarray(pose) for pose in poses],
            "pose_mask": [list(mask) for _ in poses],
            "captions": texts,
            "licence": self.licence,
        }


class DrawnSource(Source):
    """
    Rows that are drawn from something, as many as are wanted.

    Args:
        folder (`str` or `Path`): what they are drawn from.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        count (`int`, *optional*, defaults to the source's `default_count`): how many.
    """

    default_count: ClassVar[int]
    rows_per_part: ClassVar[int] = 2000

    def __init__(self, folder: str | Path, seed: int = 0, count: int | None = None):
        super().__init__(folder, seed)
        self.count = self.default_count if count is None else count
        if self.count < 1:
            raise ValueError(f"expected at least 1 row, got {count}")

    def parts(self) -> list[str]:
        """`SPLIT/NUMBER`: every twentieth is of the split val, where what they are drawn from has one."""
        has_val = self.has_val()
        numbers = range(-(-self.count // self.rows_per_part))
        return [f"{'val' if has_val and n % _VAL_EVERY == _VAL_EVERY - 1 else 'train'}/{n:05}" for n in numbers]

    def has_val(self) -> bool:
        return True

    def indices(self, part: str) -> range:
        """The numbers of a part's rows among all."""
        first = int(part.split("/")[1]) * self.rows_per_part
        return range(first, min(first + self.rows_per_part, self.count))

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "count": self.count}


class DrawnFromRows(DrawnSource):
    """
    Rows that are drawn from rows that `chatpose data` wrote, `SPLIT/PART.parquet`; as [`DrawnSource`].

    Raises:
        FileNotFoundError: from `parts`, where there are none to train on.
    """

    def has_val(self) -> bool:
        if not any(self.folder.glob("train/*.parquet")):
            raise FileNotFoundError(
                f"expected rows, {self.folder}/train/*.parquet, found none; make some with `chatpose data`"
            )
        return any(self.folder.glob("val/*.parquet"))


class PhotoSource(Source):
    """
    A data set of photos, of which each person is cut out by [`crop_person`].

    Args:
        folder (`str` or `Path`): what was downloaded.
        seed (`int`, *optional*, defaults to 0): of the questions.
        image_size (`int`, *optional*, defaults to 336): pixels of a crop's side, the vision tower's.
    """

    def __init__(self, folder: str | Path, seed: int = 0, image_size: int = 336):
        super().__init__(folder, seed)
        if image_size < 1:
            raise ValueError(f"expected crops of at least 1 pixel, got {image_size}")
        self.image_size = image_size

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "image_size": self.image_size}

    def open_photo(self, path: Path | None, group: str, name: str, num_people: int) -> Image.Image | None:
        """The photo, or `None`, with its people counted as skipped, where it is missing (`None`, or no file) or damaged."""
        if path is None or not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
            self.skip(f"missing image of {group}", name, num_people)
            return None
        try:
            return open_image(path)
        except (ValueError, OSError):
            self.skip(f"damaged image of {group}", name, num_people)
            return None


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def other_files(id: str, expected: str) -> ValueError:
    """The error about an id that the files do not have."""
    return ValueError(
        f"row {id!r:.300}: expected {expected}; the row was made from other files, give the folder that it was made from"
    )


def read_numbers(name: str, values: object, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of a file as float32; a `ValueError` where they are none, not finite, or of another shape."""
    try:
        with np.errstate(over="ignore"):  # what float32 has no room for becomes infinity, which is refused below
            array = np.asarray(values, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected numbers of shape {shape} as `{name}`, got {values!r:.100}") from error
    if array.shape != shape:
        raise ValueError(f"expected `{name}` of shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers in `{name}`, got NaN or infinity")
    return array


def read_betas(name: str, values: object) -> np.ndarray:
    """SMPL's shape `(10,)`, as [`read_numbers`]."""
    return read_numbers(name, values, (_NUM_BETAS,))


def read_gender(name: str, value: object) -> str:
    """`"male"`, `"female"` or `"neutral"`, of the word or its first letter, in capitals or not, text or bytes."""
    text = value.decode("latin1") if isinstance(value, bytes) else value
    gender = _GENDERS.get(text.lower()) if isinstance(text, str) else None
    if gender is None:
        raise ValueError(f"expected one of {', '.join(_GENDERS)} as `{name}`, got {value!r:.100}")
    return gender


def load_json(path: str | Path) -> object:
    """
    A JSON file.

    Raises:
        FileNotFoundError, ValueError: name the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}, found none")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"expected UTF-8 JSON in {path}: {error!r}") from error


def load_jsonl(path: str | Path) -> list[dict]:
    """A file of JSON objects, one on each line; as [`load_json`]."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}, found none")
    try:
        # Lines end at \n alone: `splitlines` would cut at characters that JSON has inside strings.
        records = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a UTF-8 JSON object on each line of {path}: {error!r}") from error
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"expected a JSON object on each line of {path}, got other values")
    return records


def inside(folder: Path, name: object) -> Path:
    """
    A file that a data set names, under the folder: names come from strangers.

    Raises:
        ValueError: for an absolute path or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected a file name, got {name!r:.200}")
    relative = Path(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or relative.drive:
        raise ValueError(f"refused the path {name!r}, which leads out of {folder}")
    return folder / relative
