"""3DPW: videos of one or two people outdoors, with SMPL poses from inertial sensors."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..array_files import PickleFields, read_limited, value_errors_only
from ..person_crop import crop_person, keypoint_box
from ..rotations import rotmat_to_rotvec, rotvec_to_rotmat
from .rows import NUM_JOINTS
from .source import PhotoSource, Truth, other_files, read_betas, read_gender


_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_MIN_KEYPOINTS = 6  # as the official scorer has it


class _Person(NamedTuple):
    poses: np.ndarray  # (F, 24, 3), camera frame
    keypoints: np.ndarray  # (F, 3, 18)
    is_valid: np.ndarray  # (F,)


class ThreeDPW(PhotoSource):
    """
    3DPW as its site gives it, in the folder or in `3DPW` there: `sequenceFiles/{train,validation,test}/<sequence>.pkl`
    and `imageFiles/<sequence>/image_00000.jpg`.

    Read of a sequence of F frames: `cam_poses` (F, 4, 4), world to camera; and for each person `poses` (F, 72),
    axis-angle in the world; `poses2d` (F, 3, 18), rows x, y in pixels and confidence; `campose_valid` (F,).

    A row of task `"pose_estimation"` for each person in each frame with a valid camera and at least 6 detected 2D
    joints (confidence over 0), cropped as everywhere around the joints that are seen. The global orientation is turned
    into the camera frame by the frame's `cam_poses`. A part is a sequence; `validation` is the split val.

    [`truths`] reads for each person `betas`, at least 10 numbers, and `genders`, `m` or `f`. There are no joints: they are
    those of the body of that gender and shape in the row's pose.
    """

    name = "3dpw"
    licence = "3DPW: non-commercial scientific research only (virtualhumans.mpi-inf.mpg.de/3DPW)"

    def parts(self) -> list[str]:
        root = self._find_root()
        parts = [
            f"{split}/{path.stem}"
            for folder, split in _SPLITS.items()
            for path in sorted((root / "sequenceFiles" / folder).glob("*.pkl"))
        ]
        if not parts:
            raise FileNotFoundError(
                f"expected sequenceFiles/{{train,validation,test}}/*.pkl in {self.folder}, found none; get "
                "sequenceFiles.zip and imageFiles.zip from https://virtualhumans.mpi-inf.mpg.de/3DPW and unpack them there"
            )
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        split, sequence = part.split("/", 1)
        folder = {split: folder for folder, split in _SPLITS.items()}[split]
        root = self._find_root()
        count, people = _load_sequence(root / "sequenceFiles" / folder / f"{sequence}.pkl")
        for frame in range(count):
            # The pickle also has a name of the sequence; the file's own leads nowhere else.
            name = f"{sequence}/image_{frame:05d}"
            present = [
                index for index, person in enumerate(people) if self._is_usable(f"{name}/{index}", person, frame)
            ]
            path = root / "imageFiles" / f"{name}.jpg"
            image = self.open_photo(path, sequence, path.name, len(present)) if present else None
            if image is None:
                continue
            for index in present:
                person = people[index]
                try:
                    crop = crop_person(image, keypoint_box(person.keypoints[frame].T), self.image_size)
                except ValueError:
                    self.skip("joints that span no box of the picture", f"{name}/{index}")
                    continue
                yield self.make_row(f"{name}/{index}", "pose_estimation", [person.poses[frame]], images=[crop])

    def truths(self, ids: Sequence[str]) -> list[Truth]:
        """As [`Source.truths`]; shape and gender alone."""
        paths: dict[str, list[Path]] = {}
        for path in self._find_root().glob("sequenceFiles/*/*.pkl"):
            if path.parent.name in _SPLITS:
                paths.setdefault(path.stem, []).append(path)
        by_sequence: dict[str, dict[str, None]] = {}
        for id in ids:
            sequence = id.split("/", 1)[0]
            num_files = len(paths.get(sequence, ()))
            if num_files != 1:
                folders = f"{self._find_root()}/sequenceFiles/{{{','.join(_SPLITS)}}}"
                raise other_files(id, f"one file {sequence:.200}.pkl in {folders}, found {num_files}")
            by_sequence.setdefault(sequence, {})[id] = None
        found: dict[str, Truth] = {}
        for sequence, its_ids in by_sequence.items():
            found |= _read_truths(paths[sequence][0], list(its_ids))
        return [found[id] for id in ids]

    def _find_root(self) -> Path:
        inner = self.folder / "3DPW"
        return inner if (inner / "sequenceFiles").is_dir() else self.folder

    def _is_usable(self, id: str, person: _Person, frame: int) -> bool:
        if not person.is_valid[frame] > 0:
            self.skip("no valid camera", id)
        elif (person.keypoints[frame, 2] > 0).sum() < _MIN_KEYPOINTS:
            self.skip(f"fewer than {_MIN_KEYPOINTS} detected joints", id)
        else:
            return True
        return False


def _load_sequence(path: Path) -> tuple[int, list[_Person]]:
    """The number of frames, and the people."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}, found none")
    with value_errors_only(f"`{path}`"):
        fields = PickleFields(read_limited(path))
        wanted = ("cam_poses", "poses", "poses2d", "campose_valid")
        absent = [name for name in wanted if name not in fields.names]
        if absent:
            raise ValueError(f"expected a sequence of 3DPW with {', '.join(wanted)}, found no {', '.join(absent)}")
        cameras, *lists = (fields.read(name) for name in wanted)
        cameras = np.array(cameras, np.float64)
        count = len(cameras)
        _expect_shape("cam_poses", cameras, (count, 4, 4))
        turns = torch.from_numpy(cameras[:, :3, :3])
        people = []
        for arrays in zip(*lists, strict=True):
            poses, keypoints, is_valid = (np.array(array, np.float64) for array in arrays)
            _expect_shape("poses", poses, (count, 3 * NUM_JOINTS))
            _expect_shape("poses2d", keypoints, (count, 3, 18))
            _expect_shape("campose_valid", is_valid, (count,))
            poses = poses.reshape(count, NUM_JOINTS, 3)
            poses[:, 0] = rotmat_to_rotvec(turns @ rotvec_to_rotmat(torch.from_numpy(poses[:, 0]))).numpy()
            people.append(_Person(poses.astype(np.float32), keypoints, is_valid))
    return count, people


def _read_truths(path: Path, ids: list[str]) -> dict[str, Truth]:
    """Of ids that begin with the sequence's name."""
    with value_errors_only(f"`{path}`"):
        fields = PickleFields(read_limited(path))
        wanted = ("cam_poses", "betas", "genders")
        absent = [name for name in wanted if name not in fields.names]
        if absent:
            raise ValueError(f"expected a sequence of 3DPW with {', '.join(wanted)}, found no {', '.join(absent)}")
        cameras, betas, genders = (fields.read(name) for name in wanted)
        num_frames = len(cameras)
        if len(betas) != len(genders):
            raise ValueError(f"expected `betas` and `genders` of each person, got {len(betas)} and {len(genders)}")
        people = [
            Truth(read_betas("betas", of_person[:10]), read_gender("genders", gender), None, None)
            for of_person, gender in zip(betas, genders, strict=True)
        ]
    truths = {}
    for id in ids:
        match = re.fullmatch(r"[^/]+/image_([0-9]{5,9})/([0-9]{1,9})", id)
        if match is None or int(match[1]) >= num_frames or int(match[2]) >= len(people):
            wanted = (
                f"`{path.stem}/image_FRAME/PERSON` of the {num_frames} frames and {len(people)} people in `{path}`"
            )
            raise other_files(id, wanted)
        truths[id] = people[int(match[2])]
    return truths


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"expected `{name}` of shape {shape}, got {array.shape}")
