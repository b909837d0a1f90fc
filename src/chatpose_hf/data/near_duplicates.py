"""Poses that are nearly ones of another split: what a model was shown of them it would be examined in."""

from functools import lru_cache

import torch
from torch import Tensor

from ..body import BodyModel
from ..pose_files import remove_yaw, turn_frame


NEAR = 0.03  # metres
NEARLY_VAL = "nearly a pose of val"  # why a row of train is left out
_ROWS_AT_A_TIME = 500


def is_near(poses: Tensor, others: Tensor, limit: float = NEAR) -> Tensor:
    """
    Which poses are nearly one of others: the joints' mean distance, pelvis on pelvis and both without heading, is under
    the limit.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`), others (`torch.Tensor` of shape `(M, 24, 3)`):
            Axis-angle in radians, camera frame.
        limit (`float`, *optional*, defaults to 0.03): metres, of the default body.

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.
    """
    places, other_places = _place(poses), _place(others)
    near = torch.zeros(len(places), dtype=torch.bool)
    if not len(other_places):
        return near
    for start in range(0, len(places), _ROWS_AT_A_TIME):
        chunk = places[start : start + _ROWS_AT_A_TIME]
        # Joint by joint: all at once would take gigabytes.
        total = sum(torch.cdist(chunk[:, joint], other_places[:, joint]) for joint in range(24))
        near[start : start + _ROWS_AT_A_TIME] = (total / 24).min(1).values < limit
    return near


def _place(poses: Tensor) -> Tensor:
    """Joints `(N, 24, 3)` in metres from the pelvis, in AMASS's world, facing -y."""
    upright = remove_yaw(turn_frame(torch.as_tensor(poses), "z-up", inverse=True)).float()
    joints = _load_body().joints(upright)[:, :24]
    return joints - joints[:, :1]


@lru_cache(maxsize=1)
def _load_body() -> BodyModel:
    return BodyModel.load("default")
