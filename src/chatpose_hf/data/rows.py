"""Rows: the one form in which every data set of ChatPose is trained on, evaluated, stored and shared."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset

from ..atomic_write import atomic_file


NUM_JOINTS = 24
IMAGE_TOKEN = "<image>"
POSE_TOKEN = "<POSE>"
TASKS = ("text_to_pose", "pose_estimation", "spg", "rpe", "vqa")
PART_TYPES = ("text", "image", "pose")
FEATURES = Features(
    {
        "id": Value("string"),
        "source": Value("string"),
        "task": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "poses": List(List(List(Value("float32"), length=3), length=NUM_JOINTS)),
        "pose_mask": List(List(Value("bool"), length=NUM_JOINTS)),
        "captions": List({"kind": Value("string"), "text": Value("string")}),
        "licence": Value("string"),
    }
)
MAX_ANGLE = 1e4  # beyond, float32 has no thousandth of a radian; far beyond, no rotation
# Small, so that a row of pictures is at hand without reading hundreds of megabytes, as dataset viewers do.
_ROWS_PER_GROUP = 100


class RowError(ValueError):
    """
    A row that is none.

    Attributes:
        reason (`str`): the field and the fault without the row's own numbers, to count rows by.
    """

    def __init__(self, row_id: object, field: str, reason: str, detail: str = ""):
        super().__init__(f"row {row_id!r}: `{field}`: {reason}{f', got {detail}' if detail else ''}")
        self.reason = f"`{field}`: {reason}"


def validate_row(row: dict) -> None:
    """
    Checks a row against the schema and what the schema cannot say.

    Args:
        row (`dict`):
            - `id`, `source`, `licence` (`str`): unique name of the row in its source; the source; its terms of use.
            - `task` (`str`): one of `TASKS`.
            - `messages` (`list[dict]`): `role` (`"system"` first if at all, then `"user"` and `"assistant"` in turn,
              the assistant last) and `content`, a list of `{"type": "text", "text": ...}`, `{"type": "image"}`,
              `{"type": "pose"}`; images in questions, poses in answers.
            - `images` (`list`): for each image part, in order, a `PIL.Image` or `{"bytes": ..., "path": ...}`.
            - `poses` (`list` of shape `(24, 3)`): for each pose part, axis-angle in radians, camera frame.
            - `pose_mask` (`list` of 24 `bool`): for each pose, the joints that are supervised; none where nobody knows
              the pose, so that the words of the answer alone are (`poses` then has the rest pose).
            - `captions` (`list[dict]`): `kind` and `text` of each description that the messages may be drawn from.

    Raises:
        RowError: names the row, the field and the fault.
    """
    row_id = row.get("id") if isinstance(row, dict) else None

    def expect(condition: bool, field: str, reason: str, detail: object = "") -> None:
        if not condition:
            raise RowError(row_id, field, reason, str(detail)[:200])

    expect(
        isinstance(row, dict) and row.keys() == FEATURES.keys(), "row", f"expected the fields {', '.join(FEATURES)}"
    )
    for field in ("id", "source", "task", "licence"):
        expect(isinstance(row[field], str) and row[field] != "", field, "expected a text", repr(row[field]))
        expect(_is_unicode(row[field]), field, "expected text that UTF-8 can write")
    expect(row["task"] in TASKS, "task", f"expected one of {', '.join(TASKS)}", row["task"])
    for field in ("messages", "images", "poses", "pose_mask", "captions"):
        expect(isinstance(row[field], list), field, "expected a list", type(row[field]).__name__)

    num_images, num_poses = _count_parts(row["messages"], expect)
    for field, parts, wanted in (("images", "image", num_images), ("poses", "pose", num_poses)):
        expect(
            len(row[field]) == wanted,
            field,
            f"expected one for each {parts} part of `messages`",
            f"{len(row[field])} for {wanted}",
        )
    for image in row["images"]:
        is_encoded = isinstance(image, dict) and bool(image.get("bytes") or image.get("path"))
        is_encoded = is_encoded and isinstance(image.get("bytes"), bytes | None)
        expect(is_encoded or hasattr(image, "getpixel"), "images", "expected a picture, or its bytes or path")
    for pose in row["poses"]:
        array = _as_numbers(pose)
        shape = "no numbers" if array is None else array.shape
        expect(shape == (NUM_JOINTS, 3), "poses", f"expected shape ({NUM_JOINTS}, 3)", shape)
        expect(bool(np.isfinite(array).all()), "poses", "expected finite numbers")
        expect(bool((np.abs(array) < MAX_ANGLE).all()), "poses", f"expected radians, under {MAX_ANGLE:g}")
    expect(len(row["pose_mask"]) == len(row["poses"]), "pose_mask", "expected one for each pose")
    for mask in row["pose_mask"]:
        is_mask = isinstance(mask, list | tuple | np.ndarray) and len(mask) == NUM_JOINTS
        is_mask = is_mask and all(isinstance(value, bool | np.bool_) for value in mask)
        expect(is_mask, "pose_mask", f"expected {NUM_JOINTS} booleans", mask)
    for caption in row["captions"]:
        is_caption = isinstance(caption, dict) and caption.keys() == {"kind", "text"}
        expect(is_caption, "captions", "expected `kind` and `text`", caption)
        for value in caption.values():
            expect(isinstance(value, str) and value.strip() != "", "captions", "expected a text", repr(value))
            expect(_is_unicode(value), "captions", "expected text that UTF-8 can write")
            # A later epoch may put it into a question.
            is_plain = IMAGE_TOKEN not in value and POSE_TOKEN not in value
            expect(is_plain, "captions", f"expected no `{IMAGE_TOKEN}` or `{POSE_TOKEN}`", value)


def _count_parts(messages: list, expect) -> tuple[int, int]:
    """How many images and poses the messages have; checks all else about them."""
    counts = dict.fromkeys(PART_TYPES, 0)
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expect(
        len(turns) > 0 and turns == ["user", "assistant"] * math.ceil(len(turns) / 2),
        "messages",
        "expected user and assistant in turn, the assistant last",
        roles,
    )
    for message in messages:
        content = message.get("content")
        expect(
            isinstance(content, list) and bool(content), "messages", "expected a list of parts as `content`", content
        )
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            expect(kind in PART_TYPES, "messages", f"expected parts of type {', '.join(PART_TYPES)}", kind)
            counts[kind] += 1
            text = part.get("text")
            if kind == "text":
                expect(isinstance(text, str) and text != "", "messages", "expected a text in a text part", repr(text))
                expect(_is_unicode(text), "messages", "expected text that UTF-8 can write")
                # The processor would take the word for a picture or a pose, and find none for it.
                is_plain = IMAGE_TOKEN not in text and POSE_TOKEN not in text
                expect(is_plain, "messages", f"expected no `{IMAGE_TOKEN}` or `{POSE_TOKEN}` in a text part", text)
            else:
                expect(text is None, "messages", f"expected no text in a part of type {kind}", repr(text))
                role = {"image": "user", "pose": "assistant"}[kind]
                expect(message["role"] == role, "messages", f"expected a part of type {kind} of the {role}")
    return counts["image"], counts["pose"]


def _is_unicode(text: str) -> bool:
    """Half a surrogate pair is a Python string, but no UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _as_numbers(pose: object) -> np.ndarray | None:
    try:
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and told so
            return np.asarray(pose, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return None


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """
    Writes rows to a Parquet file that `datasets`, its viewer and the Hub open with the schema: all or nothing.

    Args:
        path (`str` or `Path`): the file; its folder exists.
        rows (`Iterable[dict]`): valid rows, taken one by one.

    Returns:
        `int`: how many.
    """
    count = 0
    group: list[dict] = []
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, FEATURES.arrow_schema, compression="zstd") as writer,
    ):
        for row in rows:
            group.append(_encode(row))
            count += 1
            if len(group) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
                group.clear()
        writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
    return count


def _encode(row: dict) -> dict:
    """Plain Python values: `Features.encode_example` takes ten times as long over poses."""
    return {
        **row,
        "images": [image if isinstance(image, dict) else Image().encode_example(image) for image in row["images"]],
        "poses": [np.asarray(pose, dtype=np.float32).tolist() for pose in row["poses"]],
        "pose_mask": [[bool(value) for value in mask] for mask in row["pose_mask"]],
    }


def load_rows(
    name: str | Path, split: str = "train", streaming: bool = False, decode: bool = True, revision: str | None = None
) -> Dataset | IterableDataset:
    """
    Rows from a folder that `chatpose data` wrote, a Parquet file, or the Hub.

    Args:
        name (`str` or `Path`): the folder, the file, or the Hub's id.
        split (`str`, *optional*, defaults to `"train"`): which split; a single file is taken whatever it says.
        streaming (`bool`, *optional*, defaults to `False`): read while iterating, without a copy in the cache.
        decode (`bool`, *optional*, defaults to `True`): give pictures, not their bytes.
        revision (`str`, *optional*): on the Hub.

    Raises:
        ValueError: where the columns are not those of a row.
    """
    if Path(name).exists():
        # By its files: for a folder, `datasets` would take the cache of any other of the same name, or of its former self.
        files = [name] if Path(name).is_file() else sorted(Path(name).glob(f"{split}/*.parquet"))
        if not files:
            raise FileNotFoundError(f"expected Parquet files of rows in {Path(name) / split}, found none")
        where = {"path": "parquet", "data_files": [str(file) for file in files], "split": "train"}
    else:
        where = {"path": str(name), "split": split, "revision": revision}
    # A stream knows its columns before anything is copied.
    stream = load_dataset(**where, streaming=True)
    if stream.features != FEATURES:
        raise ValueError(
            f"expected rows with the columns {', '.join(FEATURES)} in {name}, got {', '.join(stream.features or ['none'])} "
            "or other types; make rows with `chatpose data`"
        )
    if streaming:
        return stream if decode else stream.decode(False)
    # Not by `cast_column`, which would copy the data set once more.
    undecoded = {} if decode else {"features": Features({**FEATURES, "images": List(Image(decode=False))})}
    return load_dataset(**where, **undecoded)


def caption_texts(row: dict, kinds: Sequence[str] | None = None) -> list[str]:
    """The texts of a row's captions, of some kinds or of all."""
    return [caption["text"] for caption in row["captions"] if kinds is None or caption["kind"] in kinds]
