"""Poses put together from parts of others, told by their geometry: as many pairs of words and poses as are wanted."""

from collections.abc import Iterator

import numpy as np
import torch

from ..pose_files import remove_yaw, turn_frame
from .near_duplicates import NEARLY_VAL
from .source import DrawnFromRows
from .synthetic import PoseSampler, find_near_val, load_captioner, load_sampler


# Collar, shoulder, elbow and wrist, of each side.
_ARMS = ((13, 16, 18, 20), (14, 17, 19, 21))
_OTHER_ARM_SHARE = 0.5


class Compositions(DrawnFromRows):
    """
    Poses as [`PoseSampler`] makes them of rows that `chatpose data` wrote, `SPLIT/PART.parquet` (the upper body of one, the
    legs of another, noise inside the joints' limits), where every second arm is that of one more pose; without heading, as
    texts have none; none of train is nearly a pose of the rows' val. A row of task `"text_to_pose"` for each, with captions of
    kind `"geometry"`.

    Args:
        folder (`str` or `Path`): the rows.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        count (`int`, *optional*, defaults to 100000): how many; one in twenty of the poses of the split `val`.
    """

    name = "compositions"
    licence = "Put together by chatpose_hf; the poses keep the terms of the rows that they were made from"
    default_count = 100_000

    def read_part(self, part: str) -> Iterator[dict]:
        split, indices = part.split("/")[0], self.indices(part)
        sampler = load_sampler(self.folder, split)
        poses, masks = map(
            np.stack,
            zip(*(compose(sampler, np.random.default_rng([self.seed, index])) for index in indices), strict=True),
        )
        upright = remove_yaw(turn_frame(torch.from_numpy(poses), "z-up", inverse=True))
        turned = turn_frame(upright, "z-up").float()
        near = find_near_val(turned, self.folder, split).tolist()
        captions = load_captioner().captions(turned, [f"{self.seed}/{index}" for index in indices])
        for index, pose, mask, said, nearly in zip(indices, turned.numpy(), masks, captions, near, strict=True):
            if nearly:
                self.skip(NEARLY_VAL, f"{index:08}")
                continue
            texts = [("geometry", text) for text in said]
            yield self.make_row(f"{index:08}", "text_to_pose", [pose], texts, pose_mask=mask.tolist())


def compose(sampler: PoseSampler, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A pose `(24, 3)`, axis-angle in radians, camera frame, of any heading, and its mask `(24,)`."""
    pose, mask = sampler.sample(rng)
    for arm in map(list, _ARMS):
        if rng.random() < _OTHER_ARM_SHARE:
            other, other_mask = sampler.sample(rng)
            pose[arm], mask[arm] = other[arm], other_mask[arm]
    return pose, mask
