"""BEDLAM: rendered people in motion-captured poses, several to a picture, with labels that are exact."""

import glob
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..array_files import MAX_BYTES, NpzFields, value_errors_only
from ..person_crop import crop_person
from .rows import NUM_JOINTS
from .source import BODY_ONLY_MASK, PhotoSource, inside


_IMAGES_PER_PART = 300  # of 1 to 10 people
_FIELDS = ("imgname", "center", "scale", "pose_cam")
# Values of a pose, and the joints that are SMPL's: SMPL-X has the jaw and an eye where SMPL has its hands.
_JOINTS_OF = {72: NUM_JOINTS, 165: 22}


class Bedlam(PhotoSource):
    """
    BEDLAM's labels, an npz file for each scene (`2022*.npz` in the folder or up to two folders down, for instance
    `training_labels/all_npz_12_training/20221010_3_1000_batch01hand_6fps.npz`), and its pictures,
    `<scene>/png/seq_000000/seq_000000_0000.png` in the folder or one folder down (`training_images/<scene>/png/...`).

    Read of a file: `imgname` (N,), `center` (N, 2) in pixels, `scale` (N,), the side of a square box over 200, and
    `pose_cam`, axis-angle in the camera frame, (N, 165) for SMPL-X or (N, 72) for the labels converted to SMPL. Of SMPL-X,
    joints 0 to 21 are taken and the hands masked. Labels of both kinds for a scene would give each person twice, so they
    are refused. The split is val in a folder named `...validation...`, else train. AGORA's files among BEDLAM's
    (`agora-*.npz`) have terms of their own and are not read, nor is BEDLAM2, which marks its rotated scenes otherwise.

    A row of task `"pose_estimation"` for each person, cropped as everywhere. Scenes with `closeup` in their name have
    pictures that lie on their left side: they are turned clockwise first, unless they are upright already, as frames of the
    videos are.
    """

    name = "bedlam"
    licence = "BEDLAM: non-commercial scientific research only (bedlam.is.tue.mpg.de)"

    def parts(self) -> list[str]:
        parts = []
        for scene, path in self._find_labels().items():
            try:
                num_images = len(_group_people(path, _open_labels(path, _FIELDS[:1])))
            except (ValueError, OSError):
                num_images = 1  # reading the part says what is wrong; the other files are as good as before
            split = "val" if "validation" in path.parent.name else "train"
            parts += [
                f"{split}/{scene}-{start // _IMAGES_PER_PART:04d}" for start in range(0, num_images, _IMAGES_PER_PART)
            ]
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        scene, number = part.split("/")[1].rsplit("-", 1)
        path = self._find_labels()[scene]
        fields = _open_labels(path, _FIELDS)
        start = int(number) * _IMAGES_PER_PART
        images = list(_group_people(path, fields).items())
        with value_errors_only(f"`{path}`"):
            centers, scales, poses = (fields.read(name) for name in _FIELDS[1:])
        count = sum(len(people) for _, people in images)
        shapes = [centers.shape, scales.shape, poses.shape]
        if shapes[:2] != [(count, 2), (count,)] or shapes[2] not in [(count, size) for size in _JOINTS_OF]:
            raise ValueError(
                f"expected `center` ({count}, 2), `scale` ({count},) and `pose_cam` ({count}, 165) or ({count}, 72) in {path}, "
                f"got {shapes}"
            )
        folder = self._find_images(scene)
        for name, people in images[start : start + _IMAGES_PER_PART]:
            image = self._open_image(folder, scene, name, len(people))
            if image is None:
                continue
            for person in people:
                id = f"{scene}/{name}/{person}"
                (x, y), half = centers[person], 100 * scales[person]
                try:
                    crop = crop_person(image, (x - half, y - half, x + half, y + half), self.image_size)
                except ValueError:
                    self.skip("a box that is none of the picture", id)
                    continue
                yield self._make_person(id, crop, poses[person])

    def _make_person(self, id: str, crop: Image.Image, pose_cam: np.ndarray) -> dict:
        num_joints = _JOINTS_OF[len(pose_cam)]
        pose = np.zeros((NUM_JOINTS, 3), np.float32)
        pose[:num_joints] = pose_cam[: 3 * num_joints].reshape(num_joints, 3)
        mask = BODY_ONLY_MASK if num_joints < NUM_JOINTS else None
        return self.make_row(id, "pose_estimation", [pose], images=[crop], pose_mask=mask)

    def _find_labels(self) -> dict[str, Path]:
        """The file of each scene."""
        paths: dict[str, Path] = {}
        for path in sorted(path for depth in ("", "*/", "*/*/") for path in self.folder.glob(f"{depth}2022*.npz")):
            if path.stem in paths:
                raise ValueError(
                    f"expected one file of labels for {path.stem}, got {paths[path.stem]} and {path}; keep those of one "
                    "kind, SMPL-X or SMPL, in the folder"
                )
            paths[path.stem] = path
        if not paths:
            raise FileNotFoundError(
                f"expected BEDLAM's labels, training_labels/all_npz_12_training/2022*.npz, in {self.folder}, found none; get "
                "all_npz_12_training.zip from https://bedlam.is.tue.mpg.de (registration) and unpack it there"
            )
        return paths

    def _find_images(self, scene: str) -> Path:
        places = [self.folder / scene / "png", *sorted(self.folder.glob(f"*/{glob.escape(scene)}/png"))]
        return next((place for place in places if place.is_dir()), places[0])

    def _open_image(self, folder: Path, scene: str, name: str, num_people: int) -> Image.Image | None:
        try:
            path = inside(folder, name)
        except ValueError:
            self.skip("refused name of an image", name[:200], num_people)
            return None
        image = self.open_photo(path, scene, name, num_people)
        if image is None:
            return None
        is_lying = "closeup" in scene and image.width > image.height
        return image.transpose(Image.Transpose.ROTATE_270) if is_lying else image  # Pillow counts counter-clockwise


def _open_labels(path: Path, names: tuple[str, ...]) -> NpzFields:
    """Some arrays of a file; the others are most of it, up to a gigabyte of projected vertices."""
    small = io.BytesIO()
    with value_errors_only(f"`{path}`"), zipfile.ZipFile(path) as whole, zipfile.ZipFile(small, "w") as part:
        absent = [name for name in names if f"{name}.npy" not in whole.namelist()]
        if absent:
            raise ValueError(f"expected {', '.join(names)}, found no {', '.join(absent)}")
        members = [whole.getinfo(f"{name}.npy") for name in names]
        if sum(member.file_size for member in members) > MAX_BYTES:
            raise ValueError(f"expected arrays of at most {MAX_BYTES} bytes, got more")
        for member in members:
            part.writestr(member.filename, whole.read(member))
    return NpzFields(small.getvalue())


def _group_people(path: Path, fields: NpzFields) -> dict[str, list[int]]:
    """The people of each picture, in the file's order of pictures."""
    try:
        with value_errors_only(f"`{path}`"):
            names = fields.read_texts("imgname")
    except ValueError as error:
        raise ValueError(
            f"{error}; where you trust the file and `imgname` holds Python objects, load it with `numpy.load(FILE, "
            "allow_pickle=True)` and save it anew with `imgname.astype(str)`"
        ) from error
    people: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        people.setdefault(name, []).append(index)
    return people
