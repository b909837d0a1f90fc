"""HMR2's evaluation data (4D-Humans): its labels for 3DPW's test set, and for Human3.6M, which have no poses."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..array_files import NpzFields, read_limited, value_errors_only
from ..person_crop import crop_person
from .rows import NUM_JOINTS
from .source import PhotoSource, inside


_IMAGES_PER_PART = 1000
_FILES = ("3dpw_test", "h36m_val_p2")


class Hmr2Evaluation(PhotoSource):
    """
    The files `3dpw_test.npz` and `h36m_val_p2.npz` of `hmr2_evaluation_data`, in the folder or in a folder of that
    name there, and 3DPW's pictures, `imageFiles/<sequence>/image_00000.jpg` in the folder or in `3DPW` there.

    Read of a file: `imgname` (N,); `center` (N, 2) and `scale` (N,), centre and side of a square box, both in pixels
    (the training data's `scale` is over 200); `body_pose` (N, 72), axis-angle, camera frame; `has_body_pose` (N,).

    A row of task `"pose_estimation"` and split test for each person, cropped as everywhere. `h36m_val_p2.npz` has 3D
    joints instead of poses, so its people are counted as skipped and no row is made of them.
    """

    name = "hmr2-evaluation"
    licence = "3DPW: non-commercial scientific research only; arranged by 4D-Humans, whose terms for it are not stated"

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
        if "body_pose" not in fields.names:
            for image_name, people in images:
                self.skip("no body pose", f"{name}/{image_name}", len(people))
            return
        centers, scales, poses, has_poses = _read_labels(path, fields, count)
        for image_name, people in images:
            usable = [person for person in people if has_poses[person] > 0]
            if len(usable) < len(people):
                self.skip("no body pose", f"{name}/{image_name}", len(people) - len(usable))
            image = self._open_image(name, image_name, len(usable)) if usable else None
            if image is None:
                continue
            for person in usable:
                id = f"{name}/{image_name}/{person}"
                (x, y), half = centers[person], scales[person] / 2
                try:
                    crop = crop_person(image, (x - half, y - half, x + half, y + half), self.image_size)
                except ValueError:
                    self.skip("a box that is none of the picture", id)
                    continue
                pose = poses[person].reshape(NUM_JOINTS, 3).astype(np.float32)
                yield self.make_row(id, "pose_estimation", [pose], images=[crop])

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
            places = [inside(self.folder, name), inside(self.folder / "3DPW", name)]
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


def _read_labels(path: Path, fields: NpzFields, count: int) -> list[np.ndarray]:
    shapes = {
        "center": (count, 2),
        "scale": (count,),
        "body_pose": (count, 3 * NUM_JOINTS),
        "has_body_pose": (count,),
    }
    with value_errors_only(f"`{path}`"):
        absent = [name for name in shapes if name not in fields.names]
        if absent:
            raise ValueError(f"expected {', '.join(shapes)}, found no {', '.join(absent)}")
        arrays = [fields.read(name).astype(np.float64) for name in shapes]
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"expected `{name}` of shape {shape}, got {array.shape}")
    return arrays
