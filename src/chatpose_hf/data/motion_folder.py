"""What readers of motions share: a folder tree of files, the frames that are taken, and what is said of them."""

import csv
import io
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import torch

from .captions import Captioner
from .source import Source, inside, load_jsonl


_SPLITS = ("train", "val", "test")
_FILES_PER_PART = 50
_BATCH = 500  # poses that are captioned at a time


class Motion(NamedTuple):
    """
    A motion whose frames can be read.

    Attributes:
        num_frames (`int`): how many there are.
        frame_rate (`float`): Hz; 0 where the file does not say.
        read (`Callable`):
            From the numbers of N frames to their poses `(N, 24, 3)`, float32 axis-angle, camera frame, without yaw;
            raises a `ValueError` where the file is damaged.
        pose_mask (`Sequence[bool]`, *optional*): the joints that were captured; every joint by default.
        first (`int`, *optional*, defaults to 0): where the motion begins; a pose for calibration may come before.
    """

    num_frames: int
    frame_rate: float
    read: Callable[[Sequence[int]], np.ndarray]
    pose_mask: Sequence[bool] | None = None
    first: int = 0


class _Text(NamedTuple):
    """What is said of a motion: of a frame, of the seconds from start to end, or of all of it."""

    text: str
    frame: int | None
    start: float | None
    end: float | None


class MotionFolder(Source):
    """
    A folder tree of motions. Splits are the folders `train`, `val` and `test` at the top; all else is train. Hidden
    files and links to folders are passed over.

    Without texts, a row for each pose at every so many seconds, described by its geometry.

    With `texts.csv` or `texts.jsonl` in the folder, a row for each pose that a text describes, and the texts are all
    that is said. Columns or keys: `file`, relative to the folder; `text`; and either `frame`, or `start` and `end` in
    seconds, or none of them. A text of a frame describes that pose. One of a span or of a whole motion describes the
    poses there at every so many seconds, at least the one in the middle. A file may have many lines.

    Args:
        folder (`str` or `Path`): the tree.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        seconds (`float`, *optional*, defaults to 0.5): between the poses taken from a motion.

    Attributes:
        suffixes (`tuple[str, ...]`): how the names of motions end, in lower case.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, folder: str | Path, seed: int = 0, seconds: float = 0.5):
        super().__init__(folder, seed)
        if not 0 < seconds < math.inf:
            raise ValueError(f"expected `seconds` between poses above 0, got {seconds}")
        self.seconds = seconds

    @abstractmethod
    def load_motion(self, motion: str) -> Motion | None:
        """
        Opens a motion, given by its path below the folder; `None`, and a word to `skip`, for one that is not usable.

        Raises:
            ValueError: where the file is damaged.
        """

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "seconds": self.seconds}

    def parts(self) -> list[str]:
        parts = []
        for folder, count in sorted(self._count_motions().items()):
            levels = folder.split("/") if folder else []
            split = levels[0] if levels and levels[0] in _SPLITS else "train"
            for piece in range(math.ceil(count / _FILES_PER_PART)):
                # The folder can be told from the name, and the name is a file's: "0+ACCAD+Female1General_c3d".
                parts.append(f"{split}/{'+'.join([str(piece), *(quote(level, safe='') for level in levels)])}")
        if not parts:
            raise FileNotFoundError(f"expected motions ({', '.join(self.suffixes)}) under {self.folder}, found none")
        return parts

    def _count_motions(self) -> dict[str, int]:
        """How many motions each folder has directly, by its path below the input's."""
        texts = self._load_texts()
        counts: dict[str, int] = {}
        if texts is not None:
            for motion in texts:
                folder = motion.rpartition("/")[0]
                counts[folder] = counts.get(folder, 0) + 1
            return counts
        for root, folders, names in os.walk(self.folder):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            if count := sum(map(self._is_motion, names)):
                relative = Path(root).relative_to(self.folder)
                counts["/".join(relative.parts)] = count
        return counts

    def _is_motion(self, name: str) -> bool:
        return name.lower().endswith(self.suffixes) and not name.startswith(".")

    def read_part(self, part: str) -> Iterator[dict]:
        piece, *levels = part.partition("/")[2].split("+")
        folder = "/".join(map(unquote, levels))
        texts = self._load_texts()
        if texts is None:
            prefix = f"{folder}/" if folder else ""
            motions = [prefix + name for name in os.listdir(self.folder / folder) if self._is_motion(name)]
        else:
            motions = [motion for motion in texts if motion.rpartition("/")[0] == folder]
        start = int(piece) * _FILES_PER_PART
        poses = (
            pose
            for motion in sorted(motions)[start : start + _FILES_PER_PART]
            for pose in self._read_motion(motion, None if texts is None else texts[motion])
        )
        if texts is not None:
            for id, pose, mask, said in poses:
                yield self.make_row(id, "text_to_pose", [pose], [("human", text) for text in said], pose_mask=mask)
            return
        captioner = Captioner()
        while batch := list(islice(poses, _BATCH)):
            keys = [f"{self.seed}/{id}" for id, *_ in batch]
            captions = captioner.captions(torch.from_numpy(np.stack([pose for _, pose, *_ in batch])), keys)
            for (id, pose, mask, _), said in zip(batch, captions, strict=True):
                yield self.make_row(id, "text_to_pose", [pose], [("geometry", text) for text in said], pose_mask=mask)

    def _read_motion(
        self, name: str, texts: list[_Text] | None
    ) -> Iterator[tuple[str, np.ndarray, Sequence[bool] | None, list[str]]]:
        """Id, pose, mask and texts of each pose that is taken."""
        try:
            motion = self.load_motion(name)
            if motion is None:
                return
            said = self._choose_frames(name, motion, texts)
            numbers = sorted(said)
            poses = motion.read(numbers)
        except ValueError as error:
            self.skip("damaged motion", str(error))
            return
        for number, pose in zip(numbers, poses, strict=True):
            if np.isfinite(pose).all():  # else no caption could be written
                yield f"{name}:{number}", pose, motion.pose_mask, said[number]
            else:
                self.skip("`poses`: expected finite numbers", f"{name}:{number}")

    def _choose_frames(self, name: str, motion: Motion, texts: list[_Text] | None) -> dict[int, list[str]]:
        """The frames to take, and what is said of each."""
        rate, num_frames = motion.frame_rate, motion.num_frames
        has_rate = 0 < rate < math.inf
        sampled = np.zeros(0, dtype=int)
        if has_rate:
            sampled = np.rint(np.arange(motion.first, num_frames, max(1.0, rate * self.seconds))).astype(int)
            sampled = sampled[sampled < num_frames]
        if texts is None:
            if not has_rate:
                self.skip("no frame rate in the file", name)
            return {number: [] for number in sampled.tolist()}
        said: dict[int, list[str]] = {}
        for text in texts:
            if text.frame is None and not has_rate:
                self.skip("no frame rate in the file", name)
                continue
            first = text.frame if text.frame is not None else (text.start or 0.0) * rate
            if first > num_frames - 1:
                self.skip("text of a time after the motion's end", f"{name}: {text.text:.50}")
                continue
            if text.frame is not None:
                numbers = [text.frame]
            else:
                last = min(num_frames - 1, math.inf if text.end is None else text.end * rate)
                numbers = sampled[(sampled >= first) & (sampled <= last)].tolist() or [round((first + last) / 2)]
            for number in numbers:
                said.setdefault(number, []).append(text.text)
        return said

    def _load_texts(self) -> dict[str, list[_Text]] | None:
        """What is said of each motion; `None` where there is no file of texts."""
        paths = [path for path in (self.folder / "texts.csv", self.folder / "texts.jsonl") if path.exists()]
        if not paths:
            return None
        texts: dict[str, list[_Text]] = {}
        for path in paths:
            for number, record in enumerate(_load_csv(path) if path.suffix == ".csv" else load_jsonl(path), 1):
                try:
                    motion = inside(self.folder, record.get("file")).relative_to(self.folder)
                    texts.setdefault(motion.as_posix(), []).append(_as_text(record))
                except (ValueError, TypeError, OverflowError) as error:
                    raise ValueError(
                        f"expected `file`, `text` and at most `frame`, or `start` and `end` in seconds, in record "
                        f"{number} of {path}: {error}"
                    ) from error
        return texts


def _load_csv(path: Path) -> list[dict]:
    try:
        # Not by `read_text`, which would change line ends inside quotes.
        return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"expected UTF-8 CSV with a line of column names in {path}: {error!r}") from error


def _as_text(record: dict) -> _Text:
    """A line of texts; CSV has texts for numbers, and empty ones for none."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"got {text!r:.100} as `text`")
    frame, start, end = (
        float(record[key]) if record.get(key) not in (None, "") else None for key in ("frame", "start", "end")
    )
    if frame is not None and (start is not None or end is not None):
        raise ValueError("got `frame` as well as `start` or `end`")
    if frame is not None and not (frame >= 0 and frame.is_integer()):
        raise ValueError(f"got {frame} as `frame`")
    if not 0 <= (start or 0.0) <= (math.inf if end is None else end):
        raise ValueError(f"got {start} as `start` and {end} as `end`")
    return _Text(text, None if frame is None else int(frame), start, end)
