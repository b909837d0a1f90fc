"""HMR2's training data (4D-Humans): photos and video frames with SMPL fits, in webdataset shards."""

import io
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..array_files import load_array_pickle, value_errors_only
from ..image_files import open_image
from ..person_crop import crop_person
from .rows import NUM_JOINTS
from .source import PhotoSource, inside


_FITS = "SMPL fits of 4D-Humans, their licence not stated"
# Each set's terms, by its folder. A name has no underscore: the first one in a part's name ends it.
_LICENCES = {
    "h36m-train": f"Human3.6M: academic use only; {_FITS}",
    "mpii-train": f"MPII Human Pose: its own terms, images not to be passed on; {_FITS}",
    "coco-train-2014-pruned": f"COCO 2014: its own terms, images not to be passed on; {_FITS}",
    "coco-train-2014-vitpose-pruned": f"COCO 2014: its own terms, images not to be passed on; {_FITS}",
    "mpi-inf-train-pruned": f"MPI-INF-3DHP: its own terms, images not to be passed on; {_FITS}",
    "ava-train-midframes-1fps-vitpose": f"AVA: unclear, images from the web; {_FITS}",
    "aic-train-vitpose": f"AI Challenger: unclear, images from the web; {_FITS}",
    "insta-train-vitpose-replicate": f"InstaVariety: unclear, images from the web; {_FITS}",
    "coco-val": f"COCO 2014: its own terms, images not to be passed on; {_FITS}",
}
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
_LABEL_SUFFIX = "data.pyd"
_MAX_MEMBER_BYTES = 2**26
# Pictures of AI Challenger that upstream's loader (hmr2/datasets/image_dataset.py) leaves out as corrupt.
_CORRUPT_KEYS = {
    "0394e6dc4df78042929b891dbc24f0fd7ffb6b6d",
    "0a047f0124ae48f8eee15a9506ce1449ee1ba669",
    "1a703aa174450c02fbc9cfbf578a5435ef403689",
    "39596a45cbd21bed4a5f9c2342505532f8ec5cbb",
    "3d33283b40610d87db660b62982f797d50a7366b",
    "4a77adb695bef75a5d34c04d589baf646fe2ba35",
    "5c032b9626e410441544c7669123ecc4ae077058",
    "a0689017b1065c664daef4ae2d14ea03d543217e",
    "ca018a7b4c5f53494006ebeeff9b4c0917a55f07",
}
# Upstream's filters as its training had them (`low1`).
_MIN_CONFIDENCE = 0.3
_MIN_KEYPOINTS = 5
_MAX_BETA = 3
_MAX_LOSS = 31000
_HISTOGRAM = "amass_poses_hist100_SMPL+H_G.npy"
_BINS = 100  # for each of the three numbers of an axis-angle, from -pi to pi
# Joints 1 to 21: the density of AMASS's poses (upstream's smplh_prob_filter.py) above which a rotation is a likely one.
# fmt: off
_LEAST_DENSITIES = np.array([
    5e-5, 5e-5, 2e-3, 5e-6, 5e-6, 0.01, 5e-6, 5e-6, 0.025, 0, 0,
    2e-4, 4.5e-4, 4.5e-4, 5e-4, 2e-4, 2e-4, 4e-5, 4e-5, 1e-3, 1e-3,
])
# fmt: on


class Hmr2Training(PhotoSource):
    """
    The shards `dataset_tars/<set>/000000.tar` of `hmr2_training_data`; the folder may also be `dataset_tars` itself or that
    of one set. Sets of other names are not read. `coco-val` is the split val, all others are train.

    Read of a shard, for each key (a member's name up to the first dot): `<key>.jpg` (`.jpeg`, `.png`), the whole picture,
    and `<key>.data.pyd`, a pickled list with a dictionary for each person: `body_pose` (72,), axis-angle, camera frame;
    `betas` (10,); `has_body_pose` and `has_betas`; `keypoints_2d` (44, 3), confidence last; `center` (2,) in pixels and
    `scale` (2,), width and height of a box over 200; `extra_info`, whose `fitting_loss` may have a `reprojection_loss`.

    A row of task `"pose_estimation"` for each person, cropped as everywhere, whose pose is valid by the flags and passes
    upstream's filters: flags of pose and shape both on, no |beta| over 3, more than 4 keypoints of confidence 0.3, a
    reprojection loss under 31000 (none is well) and, where `amass_poses_hist100_SMPL+H_G.npy` (21, 100, 100, 100) lies in
    `hmr2_training_data`, every joint's rotation a likely one in AMASS.
    """

    name = "hmr2"
    licence = (
        "HMR2 training data: images under each data set's own terms, non-commercial research only, not to be passed on; "
        f"{_FITS}"
    )

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "histogram": self._find_histogram() is not None}

    def parts(self) -> list[str]:
        parts = [
            f"{'val' if name == 'coco-val' else 'train'}/{name}_{path.stem}"
            for name, folder in self._find_sets().items()
            for path in sorted(folder.glob("*.tar"))
        ]
        if not parts:
            raise FileNotFoundError(
                f"expected dataset_tars/<set>/000000.tar, the sets {', '.join(_LICENCES)}, in {self.folder}, found none; "
                "get hmr2_training_data by 4D-Humans' fetch_training_data.sh"
            )
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        name, _, shard = part.split("/", 1)[1].partition("_")
        path = self._find_sets()[name] / f"{shard}.tar"
        histogram = self._find_histogram()
        densities = None if histogram is None else _load_densities(histogram)
        is_empty = True
        for key, members in self._read_samples(path):
            is_empty = False
            if key.rpartition("/")[2] in _CORRUPT_KEYS:
                self.skip("corrupt by upstream's list", key)
                continue
            for row in self._read_sample(f"{name}/{shard}/{key}", members, densities):
                yield {**row, "licence": _LICENCES[name]}
        if is_empty:
            raise ValueError(f"expected members <key>.jpg and <key>.{_LABEL_SUFFIX} in {path}, found none")

    def _find_sets(self) -> dict[str, Path]:
        itself = self.folder.absolute()
        if itself.name in _LICENCES:
            return {itself.name: itself}
        tars = self.folder / "dataset_tars"
        return {name: (tars if tars.is_dir() else self.folder) / name for name in _LICENCES}

    def _find_histogram(self) -> Path | None:
        """Beside `dataset_tars`, whichever of the three folders was named."""
        itself = self.folder.absolute()
        paths = [place / _HISTOGRAM for place in (itself, *itself.parents[:2])]
        return next((path for path in paths if path.is_file()), None)

    def _read_samples(self, path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members, by suffix, of each sample; webdataset keeps the members of one together."""
        key, members = "", {}
        with (
            open(path, "rb") as file,
            value_errors_only(f"`{path}`"),
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as archive,
        ):
            for member in archive:
                if member.size < 0:  # would lead back to an earlier member
                    raise ValueError(f"{member.name!r:.200} announces {member.size} bytes")
                content = self._read_member(archive, member)
                if content is None:
                    continue
                place, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if place + slash + stem != key:
                    if members:
                        yield key, members
                    key, members = place + slash + stem, {}
                members[suffix.lower()] = content
            # Where a header is torn or garbled, tarfile takes the archive for ended.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"truncated or damaged at byte {archive.offset}; get the shard again")
        if members:
            yield key, members

    def _read_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
        """A picture's or label's bytes; nothing is ever extracted to the disk."""
        suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
        if member.isdir() or suffix not in (*_IMAGE_SUFFIXES, _LABEL_SUFFIX):
            return None
        try:
            inside(self.folder, member.name)
        except ValueError:
            self.skip("refused name of a member", member.name[:200])
            return None
        if not member.isreg():
            self.skip("refused member that is a link or a device", member.name)
        elif member.size > _MAX_MEMBER_BYTES:
            self.skip(f"refused member of more than {_MAX_MEMBER_BYTES} bytes", member.name)
        else:
            return archive.extractfile(member).read()
        return None

    def _read_sample(self, id: str, members: dict[str, bytes], densities: np.ndarray | None) -> Iterator[dict]:
        encoded = next((members[suffix] for suffix in _IMAGE_SUFFIXES if suffix in members), None)
        if _LABEL_SUFFIX not in members:
            self.skip("missing labels", id)
            return
        try:
            records = load_array_pickle(members[_LABEL_SUFFIX])
            if not isinstance(records, list):
                raise ValueError(f"expected a list of people, got `{type(records).__name__}`")
        except ValueError as error:
            self.skip("damaged labels", f"{id}: {error!s:.300}")
            return
        people = list(self._find_usable(id, records, densities))
        if not people:
            return  # no use in decoding the picture
        if encoded is None:
            self.skip("missing image", id, len(people))
            return
        try:
            image = open_image(io.BytesIO(encoded), id, formats=("JPEG", "PNG"))
        except (ValueError, OSError):
            self.skip("damaged image", id, len(people))
            return
        for person_id, pose, box in people:
            try:
                crop = crop_person(image, box, self.image_size)
            except ValueError:
                self.skip("a box that is none of the picture", person_id)
            else:
                yield self.make_row(person_id, "pose_estimation", [pose], images=[crop])

    def _find_usable(
        self, id: str, records: list, densities: np.ndarray | None
    ) -> Iterator[tuple[str, np.ndarray, tuple[float, ...]]]:
        """Id, pose (24, 3) and box of each person with a valid pose."""
        for index, record in enumerate(records):
            person_id = f"{id}/{index}"
            try:
                with value_errors_only("a person"):
                    fault = _find_fault(record, densities)
                    if fault is None:
                        pose = _numbers(record, "body_pose", (3 * NUM_JOINTS,)).reshape(NUM_JOINTS, 3)
                        center, half = _numbers(record, "center", (2,)), 100 * _numbers(record, "scale", (2,))
            except ValueError as error:
                self.skip("damaged labels of a person", f"{person_id}: {error!s:.300}")
                continue
            if fault is None:
                yield person_id, pose, (*(center - half), *(center + half))
            else:
                self.skip(fault, person_id)


def _find_fault(record: dict, densities: np.ndarray | None) -> str | None:
    """Upstream's filters in its order, but for samples without a pose, which it keeps for their keypoints."""
    if not _is_on(record["has_body_pose"]):
        return "no body pose"
    if not _is_on(record["has_betas"]):
        return "no shape fitted with the pose"
    if (np.abs(_numbers(record, "betas", (10,))) > _MAX_BETA).any():
        return f"|beta| over {_MAX_BETA}"
    if densities is not None and not _is_likely(_numbers(record, "body_pose", (3 * NUM_JOINTS,)), densities):
        return "a joint's rotation unlikely in AMASS"
    if (_numbers(record, "keypoints_2d", (44, 3))[:, 2] >= _MIN_CONFIDENCE).sum() < _MIN_KEYPOINTS:
        return f"fewer than {_MIN_KEYPOINTS} keypoints"
    extra = _unwrap(record.get("extra_info")) or {}
    fitting = _unwrap(extra.get("fitting_loss")) or {}
    loss = _unwrap(fitting.get("reprojection_loss"))
    return None if loss is None or float(loss) < _MAX_LOSS else f"reprojection loss of {_MAX_LOSS} or more"


def _numbers(record: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(record[name], np.float64)
    if array.shape != shape:
        raise ValueError(f"expected `{name}` of shape {shape}, got {array.shape}")
    return array


def _is_on(flag: object) -> bool:
    """Flags are bool, int or float, scalars or arrays of one."""
    return np.asarray(flag, np.float64).item() > 0


def _unwrap(value: object):
    """What an array of one element holds."""
    return value.item() if isinstance(value, np.ndarray) else value


@lru_cache(maxsize=1)
def _load_densities(path: Path) -> np.ndarray:
    """
    How often AMASS has each rotation of joints 1 to 21, per cubic radian, shape (21, 100, 100, 100). As upstream has it:
    divided by the sum over all joints and smoothed by a Gaussian of 2 bins, cut off at 8, along all four axes, that of the
    joints too. The thresholds were chosen for that.
    """
    with value_errors_only(f"`{path}`"):
        counts = np.lib.format.open_memmap(path, mode="r")  # reads no objects, and no more than the file has
        if counts.shape != (NUM_JOINTS - 3, _BINS, _BINS, _BINS):
            raise ValueError(f"expected shape ({NUM_JOINTS - 3}, {_BINS}, {_BINS}, {_BINS}), got {counts.shape}")
        densities = counts.astype(np.float32) / np.float32(counts.sum(dtype=np.float64) * (2 * np.pi / _BINS) ** 3)
    for axis, size in enumerate(densities.shape):
        offsets = np.arange(size)[:, None] - np.arange(size)
        weights = np.where(abs(offsets) <= 8, np.exp(-0.5 * (offsets / 2) ** 2), 0)
        weights /= np.exp(-0.5 * (np.arange(-8, 9) / 2) ** 2).sum()
        densities = np.moveaxis(np.tensordot(weights.astype(np.float32), densities, (1, axis)), 0, axis)
    return densities


def _is_likely(pose: np.ndarray, densities: np.ndarray) -> bool:
    """Whether all of joints 1 to 21 of a pose (72,) are; of NaN the row's own check tells."""
    if not np.isfinite(pose).all():
        return True
    joints = pose.reshape(NUM_JOINTS, 3)[1 : 1 + len(densities)]
    angles = np.linalg.norm(joints, axis=1, keepdims=True)
    # The same rotation by an angle of at most pi, as the histogram has it.
    joints = joints * (1 - 2 * np.pi * np.round(angles / (2 * np.pi)) / np.maximum(angles, 1e-8))
    bins = np.clip((joints + np.pi) / (2 * np.pi) * _BINS, 0, _BINS - 1).astype(np.int64)
    return bool((densities[np.arange(len(joints)), *bins.T] > _LEAST_DENSITIES).all())
