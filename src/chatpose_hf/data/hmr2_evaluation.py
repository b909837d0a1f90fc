"""HMR2's evaluation data (4D-Humans): its labels for 3DPW's test set, and for Human3.6M's, which have no poses."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..array_files import NpzFields, read_limited, value_errors_only
from ..person_crop import crop_person
from .rows import NUM_JOINTS
from .source import PhotoSource, Truth, inside, other_files, read_betas, read_gender, read_numbers


_IMAGES_PER_PART = 1000
_FILES = ("3dpw_test", "h36m_val_p2")
_PICTURE_FOLDERS = ("3DPW", "Human3.6M", "h36m")
_NUM_JOINTS_3D = 19


class Hmr2Evaluation(PhotoSource):
    """
    The files `3dpw_test.npz` and `h36m_val_p2.npz` of `hmr2_evaluation_data`, in the folder or in a folder of that
    name there; 3DPW's pictures, `imageFiles/<sequence>/image_00000.jpg` in the folder or in `3DPW` there; and Human3.6M's,
    `images/S9_<Action>.<camera>_000001.jpg` in the folder or in `Human3.6M` or `h36m` there.

    Read of a file: `imgname` (N,); `center` (N, 2) and `scale` (N,), centre and side of a square box, both in pixels
    (the training data's `scale` is over 200); `body_pose` (N, 72), axis-angle, camera frame; `has_body_pose` (N,).

    A row of task `"pose_estimation"` and split test for each person, cropped as everywhere. `h36m_val_p2.npz` has 3D
    joints instead of poses: its rows have the rest pose, of which no joint is supervised.

    [`truths`] reads `extra_keypoints_3d` (N, 19, 4), metres along the camera's axes and confidence: the first 14 of LSP,
    then pelvis and thorax of MPII, spine, jaw and head of Human3.6M. 3DPW's are regressed from the gendered body;
    Human3.6M's are from motion capture, about the pelvis, without 13 (top of the head) and 15 (thorax). And where they are
    there, `betas` (N, 10) of those whose `has_betas` (N,) is not 0, and `gender` (N,), `m` or `f`.

    Rows are named by file, picture and the person's place in the file.
    """

    name = "hmr2-evaluation"
    licence = (
        "3DPW: non-commercial scientific research only; Human3.6M: academic use only; arranged by 4D-Humans, whose terms "
        "for it are not stated"
    )

    def parts(self) -> list[str]:
        parts = []
        for name, path in self._find_files().items():
            try:
                num_images = len(_group_people(path, _open_fields(path))[0])
            except (ValueError, OSError):
                num_images = 1  # reading the part says what is wrong; the other file is as good as before
            parts += [
                f"test/{name}-{start // _IMAGES_PER_PART:04d}" for start in range(0, num_images, _IMAGES_PER_PART)
            ]
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        name, number = part.split("/", 1)[1].rsplit("-", 1)
        path = self._find_files()[name]
        fields = _open_fields(path)
        images, count = _group_people(path, fields)
        start = int(number) * _IMAGES_PER_PART
        images = images[start : start + _IMAGES_PER_PART]
        if not fields.names & {"body_pose", "extra_keypoints_3d"}:
            for image_name, people in images:
                self.skip("no body pose", f"{name}/{image_name}", len(people))
            return
        labels = _read_labels(path, fields, count)
        absence = "no 3D joints" if labels.poses is None else "no body pose"
        for image_name, people in images:
            usable = [person for person in people if labels.is_usable[person]]
            if len(usable) < len(people):
                self.skip(absence, f"{name}/{image_name}", len(people) - len(usable))
            image = self._open_image(name, image_name, len(usable)) if usable else None
            if image is None:
                continue
            for person in usable:
                id = f"{name}/{image_name}/{person}"
                (x, y), half = labels.centers[person], labels.scales[person] / 2
                try:
                    crop = crop_person(image, (x - half, y - half, x + half, y + half), self.image_size)
                except ValueError:
                    self.skip("a box that is none of the picture", id)
                    continue
                if labels.poses is None:
                    pose, mask = np.zeros((NUM_JOINTS, 3), np.float32), [False] * NUM_JOINTS
                else:
                    pose, mask = labels.poses[person].reshape(NUM_JOINTS, 3).astype(np.float32), None
                yield self.make_row(id, "pose_estimation", [pose], images=[crop], pose_mask=mask)

    def truths(self, ids: Sequence[str]) -> list[Truth]:
        """As [`Source.truths`]; 19 joints, see the class."""
        paths = self._find_files()
        by_file: dict[str, dict[str, None]] = {}
        for id in ids:
            name = id.split("/", 1)[0]
            if name not in paths:
                raise other_files(id, f"an id that begins with one of {', '.join(paths)}, the files in {self.folder}")
            by_file.setdefault(name, {})[id] = None
        found: dict[str, Truth] = {}
        for name, its_ids in by_file.items():
            found |= _read_truths(paths[name], list(its_ids))
        return [found[id] for id in ids]

    def _find_files(self) -> dict[str, Path]:
        folders = (self.folder, self.folder / "hmr2_evaluation_data")
        places = {name: [folder / f"{name}.npz" for folder in folders] for name in _FILES}
        paths = {name: path for name, among in places.items() for path in among[::-1] if path.is_file()}
        if not paths:
            raise FileNotFoundError(
                f"expected {' or '.join(f'{name}.npz' for name in _FILES)} in {self.folder}, found neither; get "
                "hmr2_evaluation_data.tar.gz, which 4D-Humans' README names, and unpack it there"
            )
        return paths

    def _open_image(self, file: str, name: str, num_people: int) -> Image.Image | None:
        try:
            places = [inside(self.folder / inner, name) for inner in ("", *_PICTURE_FOLDERS)]
        except ValueError:
            self.skip("refused name of an image", name[:200], num_people)
            return None
        return self.open_photo(next(filter(os.path.isfile, places), None), file, name, num_people)


def _open_fields(path: Path) -> NpzFields:
    with value_errors_only(f"`{path}`"):
        return NpzFields(read_limited(path))


def _group_people(path: Path, fields: NpzFields) -> tuple[list[tuple[str, list[int]]], int]:
    """The people of each picture, in the file's order of pictures, and how many there are."""
    with value_errors_only(f"`{path}`"):
        if "imgname" not in fields.names:
            raise ValueError(f"expected an array `imgname`, got {', '.join(sorted(fields.names)) or 'none'}")
        names = fields.read_texts("imgname")
    # 3DPW's two people are thousands of rows apart: one after the other through each video.
    people: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        people.setdefault(name, []).append(index)
    return list(people.items()), len(names)


class _Labels(NamedTuple):
    centers: np.ndarray  # (N, 2), pixels
    scales: np.ndarray  # (N,), pixels
    poses: np.ndarray | None  # (N, 72), where the file has any
    is_usable: np.ndarray  # (N,) bool


def _read_labels(path: Path, fields: NpzFields, count: int) -> _Labels:
    shapes = {"center": (count, 2), "scale": (count,)}
    if "body_pose" in fields.names:
        shapes |= {"body_pose": (count, 3 * NUM_JOINTS), "has_body_pose": (count,)}
    else:
        shapes |= {"extra_keypoints_3d": (count, _NUM_JOINTS_3D, 4)}
    with value_errors_only(f"`{path}`"):
        absent = [name for name in shapes if name not in fields.names]
        if absent:
            raise ValueError(f"expected {', '.join(shapes)}, found no {', '.join(absent)}")
        centers, scales, *others = (_read_array(fields, name, shape) for name, shape in shapes.items())
    if "body_pose" in fields.names:
        poses, has_poses = others
        return _Labels(centers, scales, poses, has_poses > 0)
    (joints,) = others
    # A person of whom nothing is known measures nothing.
    return _Labels(centers, scales, None, np.isfinite(joints).all((1, 2)) & (joints[..., 3] > 0).any(1))


def _read_array(fields: NpzFields, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = fields.read(name).astype(np.float64)
    if array.shape != shape:
        raise ValueError(f"expected `{name}` of shape {shape}, got {array.shape}")
    return array


def _read_truths(path: Path, ids: list[str]) -> dict[str, Truth]:
    """Of ids that begin with the file's name."""
    fields = _open_fields(path)
    with value_errors_only(f"`{path}`"):
        absent = [name for name in ("imgname", "extra_keypoints_3d") if name not in fields.names]
        if absent:
            raise ValueError(f"expected 3D joints of people, found no {', '.join(absent)}")
        names = fields.read_texts("imgname")
        count = len(names)
        all_joints = _read_array(fields, "extra_keypoints_3d", (count, _NUM_JOINTS_3D, 4))
        all_betas = has_betas = genders = None
        if "betas" in fields.names:
            all_betas = _read_array(fields, "betas", (count, 10))
            has_betas = _read_array(fields, "has_betas", (count,)) if "has_betas" in fields.names else np.ones(count)
        if "gender" in fields.names:
            genders = fields.read_texts("gender")
            if len(genders) != count:
                raise ValueError(f"expected {count} texts in `gender`, got {len(genders)}")
    truths = {}
    for id in ids:
        number = id.rpartition("/")[2]
        person = int(number) if re.fullmatch("[0-9]{1,9}", number) else count
        if person >= count:
            raise other_files(id, f"the place of one of the {count} people in `{path}` at its end")
        if id != f"{path.stem}/{names[person]}/{person}":
            raise other_files(id, f"the picture {names[person]!r:.200}, which is that of person {person} in `{path}`")
        with value_errors_only(f"row {id!r:.300} in `{path}`"):
            joints = read_numbers("extra_keypoints_3d", all_joints[person], (_NUM_JOINTS_3D, 4))
            known = joints[:, 3] > 0
            betas = None
            if all_betas is not None and has_betas[person] > 0:
                betas = read_betas("betas", all_betas[person])
            gender = None if genders is None else read_gender("gender", genders[person])
        truths[id] = Truth(betas, gender, np.where(known[:, None], joints[:, :3], np.float32(0)), known)
    return truths
