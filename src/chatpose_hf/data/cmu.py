"""Poses from CMU's motion capture as this project keeps them: npz and jsonl, with some sentences written by hand."""

from collections.abc import Iterator
from itertools import compress
from pathlib import Path

import numpy as np
import torch

from ..array_files import NpzFields, read_limited, value_errors_only
from ..pose_files import turn_frame
from .captions import Captioner
from .near_duplicates import NEARLY_VAL, is_near
from .source import Source, load_jsonl


_SPLITS = {"train": "train", "extra_acrobatics_train": "train", "val": "val"}
# Neither toes nor hands were captured: the files have zeros there.
_CAPTURED = [joint not in (10, 11, 22, 23) for joint in range(24)]


def _read_upright(path: Path) -> np.ndarray:
    with value_errors_only(f"`{path}`"):
        return NpzFields(read_limited(path)).read("poses_yaw0")


class CmuPoses(Source):
    """
    `NAME.npz` (`poses_yaw0` (N, 24, 3), y up, facing +z), `NAME.jsonl` (a line for each pose) and `captions.jsonl`.

    A row for each pose, to be asked for by what people wrote about it or by its geometry; and one more, of task `"spg"`,
    for each pose that somebody described by a situation. Poses of train that are nearly ones of val are left out.
    """

    name = "cmu"
    licence = (
        "CMU Graphics Lab Motion Capture Database, free to use. The data used in this project was obtained from "
        "mocap.cs.cmu.edu. The database was created with funding from NSF EIA-0196217."
    )

    def parts(self) -> list[str]:
        parts = [f"{split}/{name}" for name, split in _SPLITS.items() if (self.folder / f"{name}.npz").is_file()]
        if not parts:
            wanted = ", ".join(f"{name}.npz" for name in _SPLITS)
            raise FileNotFoundError(f"expected some of {wanted} in {self.folder}, found none")
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        split, name = part.split("/")
        path = self.folder / f"{name}.npz"
        upright = _read_upright(path)
        records = load_jsonl(self.folder / f"{name}.jsonl")
        if upright.shape != (len(records), 24, 3):
            raise ValueError(
                f"expected `poses_yaw0` of shape ({len(records)}, 24, 3) in {path}, a pose for each line of {name}.jsonl, "
                f"got {upright.shape}"
            )
        poses = turn_frame(torch.from_numpy(upright.astype(np.float64)), "y-up").float()
        written = self._written_captions()
        ids = [str(record.get("id")) for record in records]
        is_finite = torch.isfinite(poses).flatten(1).all(1).tolist()
        for id, finite in zip(ids, is_finite, strict=True):
            if not finite:
                self.skip("`poses`: expected finite numbers", id)
        ids = list(compress(ids, is_finite))
        poses = poses[is_finite]
        if split == "train":
            near = self._near_val(poses)
            for id in compress(ids, near.tolist()):
                self.skip(NEARLY_VAL, id)
            ids, poses = list(compress(ids, (~near).tolist())), poses[~near]
        geometry = Captioner().captions(poses, [f"{self.seed}/{id}" for id in ids])
        for id, pose, automatic in zip(ids, poses.numpy(), geometry, strict=True):
            texts = [("geometry", text) for text in automatic]
            explicit = [("human", text) for kind, text in written.get(id, ()) if kind == "explicit"]
            implicit = [("implicit", text) for kind, text in written.get(id, ()) if kind == "implicit"]
            yield self.make_row(id, "text_to_pose", [pose], [*explicit, *texts], pose_mask=_CAPTURED)
            if implicit:
                captions = [*implicit, *explicit, *texts]
                yield self.make_row(f"{id}/spg", "spg", [pose], captions, pose_mask=_CAPTURED)

    def _near_val(self, poses: torch.Tensor) -> torch.Tensor:
        names = [name for name, split in _SPLITS.items() if split == "val" and (self.folder / f"{name}.npz").is_file()]
        others = [torch.tensor(_read_upright(self.folder / f"{name}.npz")) for name in names]
        return is_near(poses, turn_frame(torch.cat([torch.zeros(0, 24, 3), *others]), "y-up"))

    def _written_captions(self) -> dict[str, list[tuple[str, str]]]:
        """Kind and text of what people wrote, by pose."""
        path = self.folder / "captions.jsonl"
        if not path.exists():
            return {}
        try:
            return {
                record["id"]: [(caption["kind"], caption["text"]) for caption in record["captions"]]
                for record in load_jsonl(path)
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected `id` and `captions` of `kind` and `text` on each line of {path}: {error!r}"
            ) from error
