"""PoseScript: what people and a program wrote about 100,000 (version 2) or 20,000 (version 1) poses of AMASS."""

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from ..array_files import NpzFields, read_limited, value_errors_only
from .amass import SUBSETS, face_camera, find_motion, subset_names
from .source import BODY_ONLY_MASK, Source, load_json


class _Layout(NamedTuple):
    """The files of a version: where each pose is, (split, file) of the ids, (kind, file) of the captions."""

    places: str
    splits: tuple[tuple[str, str], ...]
    captions: tuple[tuple[str, str], ...]


class _Release(NamedTuple):
    folder: Path
    layout: _Layout
    stamps: tuple[tuple[int, int], ...]  # time and size of each file: what is kept of one is not used for another


_VERSION_2 = _Layout(
    "ids_2_dataset_sequence_and_frame_index_100k.json",
    tuple((split, f"{split}_ids_100k.json") for split in ("train", "val", "test")),
    (("human", "posescript_human_6293.json"), ("automatic", "posescript_auto_100k.json")),
)
# What the original ChatPose was trained on.
_VERSION_1 = _Layout(
    "ids_2_dataset_sequence_and_frame_index.json",
    tuple((split, f"{split}_ids.json") for split in ("train", "val")),
    (("human", "human6293.json"), *(("automatic", f"automatic_{letter}.json") for letter in "ABCDEF")),
)
_RELEASE_FOLDERS = ("posescript_release", "posescript_dataset_release", "")
_AMASS_FOLDERS = ("AMASS", "AMASS/smplh", "amass")  # the second as in PoseScript's own code
_DOWNLOAD = (
    "get and unpack https://download.europe.naverlabs.com/ComputerVision/PoseScript/posescript_release_v2.zip (or "
    "posescript_dataset_release.zip, version 1)"
)
_PART_SIZE = 2000
_NUM_SMPLH_VALUES = 156


class _Pose(NamedTuple):
    sequence: str  # "sub-dataset/subject/sequence_poses.npz"; empty where the release does not say it
    frame: int
    id: int


class PoseScript(Source):
    """
    `posescript_release/` (version 2, or 1 under this name or `posescript_dataset_release/`) and `AMASS/` beside it, with the
    "SMPL+H G" motions, each sub-dataset under its old name or its new one. The release itself will do as the folder too.

    A row for each pose of a split that has a caption, with all its captions, of the kinds `"human"` and `"automatic"`. Poses
    are without yaw, as PoseScript and the original have them. AMASS knows no hand joints of SMPL's: 22 and 23 are the
    identity, and masked (the original took two joints of the left index finger for them).
    """

    name = "posescript"
    licence = (
        "PoseScript (Naver Labs Europe): CC BY-NC-SA 4.0. Poses of AMASS: non-commercial scientific research only "
        "(amass.is.tue.mpg.de)"
    )

    def parts(self) -> list[str]:
        release = self._find_release()
        self._find_amass(release)
        return list(_load_parts(release))

    def read_part(self, part: str) -> Iterator[dict]:
        release = self._find_release()
        amass = self._find_amass(release)
        captions = _load_captions(release)
        for sequence, group in groupby(_load_parts(release)[part], lambda pose: pose.sequence):
            poses = [pose for pose in group if self._is_known(pose, captions)]
            stored = self._read_sequence(amass, sequence, len(poses)) if poses else None
            if stored is None:
                continue
            for pose in poses:
                if not 0 <= pose.frame < len(stored):
                    self.skip("frame outside of the AMASS sequence", f"{pose.id}: frame {pose.frame} of {sequence}")
            poses = [pose for pose in poses if 0 <= pose.frame < len(stored)]
            targets = face_camera(stored[[pose.frame for pose in poses]])
            for pose, target in zip(poses, targets, strict=True):
                id = f"{pose.id}:{sequence}:{pose.frame}"
                texts = [(kind, text) for kind, text in captions[str(pose.id)] if _is_text(text)]
                yield self.make_row(id, "text_to_pose", [target], texts, pose_mask=BODY_ONLY_MASK)

    def _is_known(self, pose: _Pose, captions: dict[str, list[tuple[str, object]]]) -> bool:
        """Whether the release says where the pose is, and something about it."""
        texts = captions.get(str(pose.id), [])
        num_bad = sum(not _is_text(text) for _, text in texts)
        if num_bad:
            self.skip("caption that is no text", str(pose.id), num_bad)
        if not pose.sequence:
            self.skip("no AMASS sequence and frame named for the pose", str(pose.id))
        elif num_bad == len(texts):
            self.skip("no caption", str(pose.id))
        else:
            return True
        return False

    def _read_sequence(self, amass: Path, sequence: str, count: int) -> np.ndarray | None:
        """`poses` (T, 156); where there are none, that many poses are skipped."""
        try:
            path = find_motion(amass, sequence)
        except ValueError as error:
            self.skip("refused the name of an AMASS sequence", str(error), count)
            return None
        if path is None:
            names = subset_names(sequence)
            is_there = any(os.path.isdir(amass / name) for name in names)
            self.skip(
                "missing AMASS sequence" if is_there else f"missing AMASS sub-dataset {names[0]:.50}", sequence, count
            )
            return None
        try:
            with value_errors_only(f"`{path}`"):
                poses = NpzFields(read_limited(path)).read("poses")
        except ValueError as error:
            self.skip("damaged AMASS sequence", str(error), count)
            return None
        if poses.shape[1:] != (_NUM_SMPLH_VALUES,):
            self.skip(
                f'missing AMASS "SMPL+H G" file with `poses` of shape (T, {_NUM_SMPLH_VALUES}), got another ("SMPL-X G"?)',
                f"{path}: {poses.shape}",
                count,
            )
            return None
        return poses

    def _find_release(self) -> _Release:
        for layout in (_VERSION_2, _VERSION_1):
            for folder in [self.folder / name for name in _RELEASE_FOLDERS]:
                if (folder / layout.places).is_file():
                    files = [
                        folder / name
                        for name in (layout.places, *(file for _, file in layout.splits + layout.captions))
                    ]
                    absent = [file.name for file in files if not file.is_file()]
                    if absent:
                        raise FileNotFoundError(f"expected {', '.join(absent)} in {folder}, found none; {_DOWNLOAD}")
                    stats = [file.stat() for file in files]
                    return _Release(folder, layout, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))
        raise FileNotFoundError(
            f"expected `posescript_release/{_VERSION_2.places}` in {self.folder}, found neither it nor version 1's; "
            f"{_DOWNLOAD}"
        )

    def _find_amass(self, release: _Release) -> Path:
        bases = [self.folder] if release.folder != self.folder else [self.folder, self.folder.absolute().parent]
        for folder in [base / name for base in bases for name in _AMASS_FOLDERS]:
            if any((folder / name).is_dir() for names in SUBSETS for name in names):
                return folder
        raise FileNotFoundError(
            f'expected the "SMPL+H G" motions of AMASS in {self.folder / "AMASS"}, in folders such as ACCAD or CMU, found '
            f"none; get {', '.join(names[0] for names in SUBSETS)} from https://amass.is.tue.mpg.de (registration) and unpack "
            "them there"
        )


# Kept for the parts to come: parsing takes as long as the rows of a part do.
@lru_cache(maxsize=1)
def _load_parts(release: _Release) -> dict[str, list[_Pose]]:
    """The poses of each part, those of a sequence together."""
    places = _load_object(release.folder / release.layout.places)
    known = {names[0] for names in SUBSETS}
    parts: dict[str, list[_Pose]] = {}
    for split, name in release.layout.splits:
        ids = load_json(release.folder / name)
        if not isinstance(ids, list) or not all(type(id) is int for id in ids):
            raise ValueError(f"expected a JSON list of integers, the ids of poses, in {release.folder / name}")
        groups: dict[str, list[_Pose]] = {}
        for id in ids:
            match places.get(str(id)):
                case ["AMASS", str() as sequence, int() as frame]:
                    pose = _Pose(sequence, frame, id)
                case _:
                    pose = _Pose("", 0, id)
            subset = subset_names(pose.sequence)[0]
            # A part's name becomes a file's: no name from the release gets into it.
            groups.setdefault(subset if subset in known else "other", []).append(pose)
        for subset, poses in sorted(groups.items()):
            poses.sort()
            for start in range(0, len(poses), _PART_SIZE):
                parts[f"{split}/{subset}-{start // _PART_SIZE}"] = poses[start : start + _PART_SIZE]
    return parts


@lru_cache(maxsize=1)
def _load_captions(release: _Release) -> dict[str, list[tuple[str, object]]]:
    """Kind and text of what is said of each pose; a file has a text or a list of them for an id."""
    captions: dict[str, list[tuple[str, object]]] = {}
    for kind, name in release.layout.captions:
        for id, texts in _load_object(release.folder / name).items():
            texts = texts if isinstance(texts, list) else [texts]
            captions.setdefault(id, []).extend((kind, text) for text in texts)
    return captions


def _load_object(path: Path) -> dict:
    value = load_json(path)
    if not isinstance(value, dict):
        raise ValueError(
            f"expected a JSON object with the ids of poses as keys in {path}, got a {type(value).__name__}"
        )
    return value


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())
