"""Other pose losses than the original's, to put into `model.pose_loss_function`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .body import JOINT_NAMES, BodyModel
from .modeling_chatpose import compute_pose_loss, rotmat_l1
from .rotations import geodesic_distance, rotmat_to_rot6d


def _rot6d_l1(pose_rotmats: Tensor, pose_labels: Tensor) -> Tensor:
    return (rotmat_to_rot6d(pose_rotmats) - rotmat_to_rot6d(pose_labels)).abs().mean(-1)


def _rotmat_mse(pose_rotmats: Tensor, pose_labels: Tensor) -> Tensor:
    return (pose_rotmats - pose_labels).square().mean((-2, -1))


# What a joint's error is, `(P, J, 3, 3)` twice to `(P, J)`:
# - "rotmat_l1": mean absolute difference of the matrices (ChatPose, model/chatpose.py);
# - "rotmat_mse": their mean squared difference (SPIN, Kolotouros et al., ICCV 2019);
# - "rot6d_l1": of their first two columns (the representation of Zhou et al., CVPR 2019);
# - "geodesic": the angle between the rotations, radians (Huynh 2009; as a loss, Mahendran et al. 2017).
JOINT_ERRORS = {
    "rotmat_l1": rotmat_l1,
    "rotmat_mse": _rotmat_mse,
    "rot6d_l1": _rot6d_l1,
    "geodesic": geodesic_distance,
}


class PoseLoss:
    """
    The error of each joint's rotation as the original weighs it, the body's mean plus the global orientation's, and, if
    asked for, the distance between the joints of two bodies in these poses.

    Args:
        joint_error (`str`, *optional*, defaults to `"rotmat_l1"`): one of `JOINT_ERRORS`.
        joint_weights (`Mapping[str, float]`, *optional*):
            Weights of single joints by SMPL's names ("pelvis" is the global orientation); 1 for the others.
        joint_position_weight (`float`, *optional*, defaults to 0):
            Weight of the mean absolute difference of the joints' positions, in metres and relative to the pelvis (the
            3D joint term of HMR, Kanazawa et al. 2018, as an L1 as 4D-Humans has it). Joints below an unsupervised one
            stand where the predicted rotation of that one puts them, in both bodies.
        body ([`BodyModel`], *optional*): for the positions; the default body if not given.

    Raises:
        ValueError: for an error, a joint or a weight that does not exist.
    """

    def __init__(
        self,
        joint_error: str = "rotmat_l1",
        joint_weights: Mapping[str, float] | None = None,
        joint_position_weight: float = 0.0,
        body: BodyModel | None = None,
    ):
        if joint_error not in JOINT_ERRORS:
            raise ValueError(f"expected a joint error of {', '.join(JOINT_ERRORS)}, got {joint_error!r}")
        if not 0 <= joint_position_weight < float("inf"):
            raise ValueError(f"expected a finite `joint_position_weight`, not negative, got {joint_position_weight}")
        self._joint_error = JOINT_ERRORS[joint_error]
        self._joint_weights = torch.ones(len(JOINT_NAMES))
        for name, weight in (joint_weights or {}).items():
            if name not in JOINT_NAMES:
                raise ValueError(f"expected joints of {', '.join(JOINT_NAMES)} in `joint_weights`, got {name!r}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"expected finite weights, not negative, in `joint_weights`, got {weight} for {name}")
            self._joint_weights[JOINT_NAMES.index(name)] = weight
        self._joint_position_weight = joint_position_weight
        self._body = (body or BodyModel.load("default")) if joint_position_weight else None

    def __call__(self, pose_rotmats: Tensor, pose_labels: Tensor, pose_mask: Tensor | None = None) -> Tensor:
        """`(P, J, 3, 3)` twice and a mask `(P, J)` to each pose's loss, `(P,)`; zero where no joint is supervised."""
        weights = self._joint_weights.to(pose_rotmats)
        losses = compute_pose_loss(pose_rotmats, pose_labels, pose_mask, self._joint_error, weights)
        if self._body is None:
            return losses
        mask = torch.ones_like(pose_rotmats[..., 0, 0]) if pose_mask is None else (pose_mask > 0).to(pose_rotmats)
        is_supervised = mask[..., None, None] > 0
        fixed = pose_rotmats.detach()
        body = self._body.to(pose_rotmats.device)
        joints = body.joints(torch.where(is_supervised, pose_rotmats, fixed))
        targets = body.joints(torch.where(is_supervised, pose_labels.to(fixed), fixed))
        return losses + self._joint_position_weight * (joints - targets).abs().mean((-2, -1))
