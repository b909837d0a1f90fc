"""Poses from AMASS's motions, or from any folder of such files, as text-to-pose targets: in the camera frame, facing it."""

import csv
import io
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from ..array_files import NpzFields, read_limited, value_errors_only
from ..pose_files import FRAMES, turn_frame
from ..rotations import rotmat_to_rotvec, rotvec_to_rotmat
from .captions import Captioner
from .source import BODY_ONLY_MASK, Source, inside, load_jsonl


# The names of each sub-dataset's folder, those of today's downloads first; BABEL and PoseScript have the others too.
SUBSETS = (
    ("ACCAD",),
    ("BMLhandball",),
    ("BMLmovi",),
    ("BMLrub", "BioMotionLab_NTroje"),
    ("CMU",),
    ("DFaust", "DFaust_67"),
    ("DanceDB",),
    ("EKUT",),
    ("EyesJapanDataset", "Eyes_Japan_Dataset"),
    ("HDM05", "MPI_HDM05"),
    ("HumanEva",),
    ("KIT",),
    ("MoSh", "MPI_mosh"),
    ("PosePrior", "MPI_Limits", "MPI_Limits_PosePrior"),
    ("SFU",),
    ("SSM", "SSM_synced"),
    ("TCDHands", "TCD_handMocap"),
    ("TotalCapture",),
    ("Transitions", "Transitions_mocap"),
)
_SPLITS = ("train", "val", "test")
# How many joints there are, by the shape of an array `poses` less its length.
_LAYOUTS = {(156,): 52, (165,): 55, (72,): 24, (24, 3): 24}
_FRAME_RATES = ("mocap_framerate", "mocap_frame_rate")  # SMPL-H's files, SMPL-X's files
# The sine of the angle between the hips' axis and the vertical under which the axis has no heading but rounding noise.
_UPENDED = 1e-6
_FILES_PER_PART = 50
_BATCH = 500  # poses that are captioned at a time


def remove_yaw(poses: Tensor) -> Tensor:
    """
    Poses turned about the vertical, so that an upright person faces -y: PoseScript's and the original's normalisation.

    Of the global orientation R_z(c) R_y(b) R_x(a) this leaves R_y(b) R_x(a): the hips' left points to +x, or up or down
    from there. Where it points straight up or down (b = 90 degrees, lying on the side), c and a are not told apart: there
    the head points to +y, as at b = 90 degrees and a = 0.

    Args:
        poses (`torch.Tensor` of shape `(..., J, 3)`): axis-angle in radians, AMASS's world (z up).

    Returns:
        `torch.Tensor` of shape `(..., J, 3)`: float64, z up.
    """
    poses = poses.double()
    rotmat = rotvec_to_rotmat(poses[..., 0, :])
    (left_x, left_y), (up_x, up_y) = rotmat[..., :2, 0].unbind(-1), rotmat[..., :2, 1].unbind(-1)
    is_upended = torch.hypot(left_x, left_y) < _UPENDED
    yaw = torch.where(is_upended, torch.atan2(-up_x, up_y), torch.atan2(left_y, left_x))
    turn = rotvec_to_rotmat(torch.stack([torch.zeros_like(yaw), torch.zeros_like(yaw), -yaw], dim=-1))
    return torch.cat([rotmat_to_rotvec(turn @ rotmat)[..., None, :], poses[..., 1:, :]], dim=-2)


def face_camera(poses: np.ndarray, frame: str = "z-up") -> np.ndarray:
    """
    Poses as text-to-pose targets: without yaw, then in the camera frame, where the upright face the viewer.

    Args:
        poses (`np.ndarray` of shape `(N, J, 3)` or `(N, J * 3)`):
            Axis-angle in radians. SMPL's 24 joints, or those of SMPL-H (52) or SMPL-X (55), whose first 22 are the same.
        frame (`str`, *optional*, defaults to `"z-up"`): see [`pose_files.turn_frame`].

    Returns:
        `np.ndarray` of shape `(N, 24, 3)`: float32; identity for the hands (22, 23) if there were no 24 joints.
    """
    # Not by -1, which no pose at all leaves open.
    joints = torch.from_numpy(poses.astype(np.float64).reshape(len(poses), math.prod(poses.shape[1:]) // 3, 3))
    if joints.shape[1] != 24:
        joints = torch.cat([joints[:, :22], torch.zeros_like(joints[:, :2])], dim=1)
    if frame != "z-up":
        joints = turn_frame(turn_frame(joints, frame), "z-up", inverse=True)
    return turn_frame(remove_yaw(joints), "z-up").float().numpy()


def subset_names(motion: str) -> tuple[str, ...]:
    """All names of the sub-dataset that a motion, `"sub-dataset/subject/sequence"`, is of, today's first."""
    first = motion.split("/")[0]
    return next((names for names in SUBSETS if first in names), (first,))


def find_motion(folder: Path, motion: str) -> Path | None:
    """
    A motion's file under AMASS's folder, whichever of its names the sub-dataset has there; `None` where there is none.

    Raises:
        ValueError: for a name that leads out of the folder.
    """
    parts = inside(folder, motion).relative_to(folder).parts
    first = "".join(parts[:1])
    paths = [Path(folder, name, *parts[1:]) for name in (first, *subset_names(first))]
    # `Path.is_file` would raise for a name that is too long.
    return next((path for path in paths if os.path.isfile(path)), None)


class _Text(NamedTuple):
    """What is said of a motion: of a frame, of the seconds from start to end, or of all of it."""

    text: str
    frame: int | None
    start: float | None
    end: float | None


class AmassMotions(Source):
    """
    A folder tree of `.npz` motions, with `poses` (T, 156) as in AMASS's SMPL+H files, (T, 165) as in its SMPL-X files (both
    z up), or (T, 72) or (T, 24, 3) of SMPL; and `mocap_framerate` (or `mocap_frame_rate`), Hz. Splits are the folders
    `train`, `val` and `test` at the top; all else is train. Hidden files and links to folders are passed over.

    Without texts, a row for each pose at every so many seconds, described by its geometry.

    With `texts.csv` or `texts.jsonl` in the folder, a row for each pose that a text describes, and the texts are all that is
    said. Columns or keys: `file`, relative to the folder (AMASS's sub-datasets under any of their names); `text`; and either
    `frame`, or `start` and `end` in seconds, or none of them. A text of a frame describes that pose. One of a span or of a
    whole motion describes the poses there at every so many seconds, at least the one in the middle. A file may have many
    lines.

    Args:
        folder (`str` or `Path`): the tree.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        seconds (`float`, *optional*, defaults to 0.5): between the poses taken from a motion.
        frame (`str`, *optional*):
            `"camera"`, `"y-up"` or `"z-up"`, the frame of all poses; files of SMPL's 24 joints do not say it themselves.
    """

    name = "amass"
    licence = (
        "AMASS: non-commercial scientific research only (amass.is.tue.mpg.de); other motions: their owners' terms"
    )

    def __init__(self, folder: str | Path, seed: int = 0, seconds: float = 0.5, frame: str | None = None):
        super().__init__(folder, seed)
        if not 0 < seconds < math.inf:
            raise ValueError(f"expected `seconds` between poses above 0, got {seconds}")
        if frame is not None and frame not in FRAMES:
            raise ValueError(f"expected `frame` to be one of {', '.join(FRAMES)}, got {frame!r}")
        self.seconds = seconds
        self.frame = frame

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "seconds": self.seconds, "frame": self.frame}

    def parts(self) -> list[str]:
        parts = []
        for folder, count in sorted(self._count_motions().items()):
            levels = folder.split("/") if folder else []
            split = levels[0] if levels and levels[0] in _SPLITS else "train"
            for piece in range(math.ceil(count / _FILES_PER_PART)):
                # The folder can be told from the name, and the name is a file's: "0+ACCAD+Female1General_c3d".
                parts.append(f"{split}/{'+'.join([str(piece), *(quote(level, safe='') for level in levels)])}")
        if not parts:
            raise FileNotFoundError(f"expected motions (.npz) under {self.folder}, found none")
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
            if count := sum(map(_is_motion, names)):
                relative = Path(root).relative_to(self.folder)
                counts["/".join(relative.parts)] = count
        return counts

    def read_part(self, part: str) -> Iterator[dict]:
        piece, *levels = part.partition("/")[2].split("+")
        folder = "/".join(map(unquote, levels))
        texts = self._load_texts()
        if texts is None:
            prefix = f"{folder}/" if folder else ""
            motions = [prefix + name for name in os.listdir(self.folder / folder) if _is_motion(name)]
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
        self, motion: str, texts: list[_Text] | None
    ) -> Iterator[tuple[str, np.ndarray, list[bool] | None, list[str]]]:
        """Id, pose, mask and texts of each pose that is taken."""
        path = find_motion(self.folder, motion)
        if path is None:
            self.skip("missing motion", motion)
            return
        try:
            with value_errors_only(f"`{path}`"):
                fields = NpzFields(read_limited(path))
                stored = fields.read("poses") if "poses" in fields.names else None
                rate = next((fields.read(name).item() for name in _FRAME_RATES if name in fields.names), 0.0)
        except ValueError as error:
            self.skip("damaged motion", str(error))
            return
        if stored is None:
            self.skip("no `poses` in the file", motion)
            return
        num_joints = _LAYOUTS.get(stored.shape[1:])
        if num_joints is None:
            self.skip("`poses` not of shape (T, 156), (T, 165), (T, 72) or (T, 24, 3)", f"{motion}: {stored.shape}")
            return
        frame = self.frame or ("z-up" if num_joints != 24 else None)
        if frame is None:
            self.skip("SMPL poses of no stated frame: `AmassMotions(folder, frame=...)` states it", motion)
            return
        said = self._choose_frames(motion, len(stored), rate, texts)
        numbers = sorted(said)
        mask = None if num_joints == 24 else BODY_ONLY_MASK
        for number, pose in zip(numbers, face_camera(stored[numbers], frame), strict=True):
            if np.isfinite(pose).all():  # else no caption could be written
                yield f"{motion}:{number}", pose, mask, said[number]
            else:
                self.skip("`poses`: expected finite numbers", f"{motion}:{number}")

    def _choose_frames(
        self, motion: str, num_frames: int, rate: float, texts: list[_Text] | None
    ) -> dict[int, list[str]]:
        """The frames to take, and what is said of each."""
        has_rate = 0 < rate < math.inf
        sampled = np.zeros(0, dtype=int)
        if has_rate:
            sampled = np.rint(np.arange(0, num_frames, max(1.0, rate * self.seconds))).astype(int)
            sampled = sampled[sampled < num_frames]
        if texts is None:
            if not has_rate:
                self.skip("no frame rate in the file", motion)
            return {number: [] for number in sampled.tolist()}
        said: dict[int, list[str]] = {}
        for text in texts:
            if text.frame is None and not has_rate:
                self.skip("no frame rate in the file", motion)
                continue
            first = text.frame if text.frame is not None else (text.start or 0.0) * rate
            if first > num_frames - 1:
                self.skip("text of a time after the motion's end", f"{motion}: {text.text:.50}")
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
                        f"expected `file`, `text` and at most `frame`, or `start` and `end` in seconds, in record {number} "
                        f"of {path}: {error}"
                    ) from error
        return texts


def _is_motion(name: str) -> bool:
    return name.endswith(".npz") and not name.startswith(".")


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
