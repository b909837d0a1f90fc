"""Poses in files, and the frames that other files have their poses in. Inside the library poses are in the camera frame."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .array_files import NpzFields, read_limited, value_errors_only
from .rotations import geodesic_distance, rotmat_to_rotvec, rotvec_to_rotmat


# What turns a global orientation of the frame into the camera's: an angle about x, in degrees (docs/conventions.md).
FRAMES = {"camera": 0.0, "y-up": 180.0, "z-up": 90.0}
FRAME_RATE = 30.0  # of files that want one; the poses of a reply are no motion
_NUM_AMASS_JOINTS = 52  # SMPL-H's: SMPL's first 22, then fingers
# The sine of the angle between the hips' axis and the vertical under which the axis has no heading but rounding noise.
_UPENDED = 1e-6


def turn_frame(poses: Tensor, frame: str, inverse: bool = False) -> Tensor:
    """
    Poses of another frame in the camera frame, or back.

    Args:
        poses (`torch.Tensor` of shape `(..., J, 3)`): axis-angle in radians.
        frame (`str`):
            `"camera"`; `"y-up"`, the world of SMPL's rest pose; `"z-up"`, AMASS's world.
        inverse (`bool`, *optional*, defaults to `False`): from the camera frame to `frame`.

    Returns:
        `torch.Tensor` of shape `(..., J, 3)`.
    """
    if frame not in FRAMES:
        raise ValueError(f"expected a frame of {', '.join(FRAMES)}, got {frame!r}")
    if frame == "camera":
        return poses
    angle = np.radians(FRAMES[frame])
    turn = rotvec_to_rotmat(torch.tensor([-angle if inverse else angle, 0.0, 0.0], dtype=poses.dtype))
    return torch.cat([rotmat_to_rotvec(turn @ rotvec_to_rotmat(poses[..., :1, :])), poses[..., 1:, :]], dim=-2)


def remove_yaw(poses: Tensor) -> Tensor:
    """
    Poses turned about the vertical, so that an upright person faces -y: PoseScript's and the original's normalisation.

    Of the global orientation R_z(c) R_y(b) R_x(a) this leaves R_y(b) R_x(a): the hips' left points to +x, or up or down
    from there. Where it points straight up or down (b = 90 degrees, lying on the side), c and a are not told apart: there
    the head points to +y, as at b = 90 degrees and a = 0.

    Args:
        poses (`torch.Tensor` of shape `(..., J, 3)`): axis-angle in radians, AMASS's world (z up).

    Returns:
        `torch.Tensor` of shape `(..., J, 3)`: float64, z up.
    """
    poses = poses.double()
    rotmat = rotvec_to_rotmat(poses[..., 0, :])
    (left_x, left_y), (up_x, up_y) = rotmat[..., :2, 0].unbind(-1), rotmat[..., :2, 1].unbind(-1)
    is_upended = torch.hypot(left_x, left_y) < _UPENDED
    yaw = torch.where(is_upended, torch.atan2(-up_x, up_y), torch.atan2(left_y, left_x))
    turn = rotvec_to_rotmat(torch.stack([torch.zeros_like(yaw), torch.zeros_like(yaw), -yaw], dim=-1))
    return torch.cat([rotmat_to_rotvec(turn @ rotmat)[..., None, :], poses[..., 1:, :]], dim=-2)


def poses_to_amass(poses: Tensor) -> dict[str, np.ndarray]:
    """
    The arrays of an AMASS file, and one more.

    Args:
        poses (`torch.Tensor` of shape `(T, 24, 3)`): axis-angle in radians, camera frame.

    Returns:
        `dict`: `poses` (T, 156), SMPL-H's 52 joints, global orientation z up, fingers straight; `trans` (T, 3) and
        `betas` (16,), zeros; `gender`; `mocap_framerate`; and `theta` (T, 72), the poses as given: AMASS has no place
        for SMPL's two hand joints.
    """
    full = torch.zeros(len(poses), _NUM_AMASS_JOINTS, 3, dtype=torch.float64)
    full[:, :22] = turn_frame(poses.double(), "z-up", inverse=True)[:, :22]
    return {
        "poses": full.flatten(1).numpy(),
        "trans": np.zeros((len(poses), 3)),
        "betas": np.zeros(16),
        "gender": np.array("neutral"),
        "mocap_framerate": np.array(FRAME_RATE),
        "theta": poses.float().flatten(1).numpy(),
    }


def load_poses(path: str | Path, frame: str | None = None) -> tuple[Tensor, list[str]]:
    """
    Reads poses: our `pose.npz`, `reply.json` and `replies.jsonl`; AMASS files (SMPL-H or SMPL-X; fingers and face are
    left out); any npz with an array `poses` of shape (T, 24, 3) or (T, 72).

    Args:
        path (`str` or `Path`): an `.npz`, `.json` or `.jsonl` file.
        frame (`str`, *optional*):
            The frame of the file's poses, `"camera"`, `"y-up"` or `"z-up"`, where the file's layout does not tell.

    Returns:
        `(torch.Tensor, list[str])`: poses `(T, 24, 3)`, float32 axis-angle, camera frame; and a name for each, its
        prompt or its number.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        poses = _load_npz(path, frame)
        names = [str(index) for index in range(len(poses))]
    elif suffix in (".json", ".jsonl"):
        poses, names = _load_json(path, frame)
    else:
        raise ValueError(f"expected a file of poses (.npz, .json, .jsonl), got {path}")
    # As matrices: numbers whose squares are beyond float32 are no angles either.
    if not torch.isfinite(rotvec_to_rotmat(poses)).all():
        raise ValueError(
            f"expected finite numbers, got NaN, infinity or no angle in radians among the poses of {path}"
        )
    return poses, names


def _load_npz(path: Path, frame: str | None) -> Tensor:
    content = read_limited(path)
    with value_errors_only(f"`{path}`"):
        file = NpzFields(content)
        arrays = {
            name: torch.from_numpy(file.read(name).astype(np.float64))
            for name in ("theta", "poses")
            if name in file.names
        }
    if "poses" not in arrays:
        raise ValueError(f"expected an array `poses` in {path}, got {', '.join(sorted(file.names)) or 'none'}")
    poses = arrays["poses"]
    if poses.ndim == 2 and poses.shape[1] in (156, 165):
        poses = poses.unflatten(1, (-1, 3))
        hands = torch.zeros(len(poses), 2, 3, dtype=poses.dtype)
        poses = turn_frame(torch.cat([poses[:, :22], hands], dim=1), frame or "z-up")
        if "theta" in arrays:
            _refuse_frame(frame, path)
            theta = _as_poses(arrays["theta"], path)
            # An edited file: taking either would throw away the other.
            if len(theta) != len(poses) or _largest_angle(theta[:, :22], poses[:, :22]) > 1e-3:
                raise ValueError(
                    f"`poses` and `theta` of {path} are different poses; remove the array that is out of date"
                )
            poses = theta
    elif frame is None:
        raise ValueError(
            f"{path} does not say which frame its poses of shape {tuple(poses.shape)} are in; state it: "
            f"{', '.join(FRAMES)} (docs/conventions.md)"
        )
    else:
        poses = turn_frame(_as_poses(poses, path), frame)
    return poses.float()


def _load_json(path: Path, frame: str | None) -> tuple[Tensor, list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Lines end at \n alone: `splitlines` would cut at characters that JSON has inside strings.
        lines = text.split("\n") if path.suffix.lower() == ".jsonl" else [text]
        records = [json.loads(line) for line in lines if line.strip()]
        thetas = [
            (theta["theta"], str(record.get("id", record.get("prompt", ""))))
            for record in records
            for theta in record["poses"]
        ]
        poses = torch.tensor([theta for theta, _ in thetas], dtype=torch.float64)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'expected replies, {{"prompt": ..., "poses": [{{"theta": [72 numbers]}}]}}, in {path}: {error!r}'
        ) from error
    if not thetas:
        raise ValueError(f"{path} holds no pose, only words")
    _refuse_frame(frame, path)
    return _as_poses(poses, path).float(), [name for _, name in thetas]


def _refuse_frame(frame: str | None, path: Path) -> None:
    if frame is not None:
        raise ValueError(f"expected no frame for {path}, whose layout tells it, got {frame!r}")


def _as_poses(array: Tensor, path: Path) -> Tensor:
    if array.shape[1:] not in ((72,), (24, 3)):
        raise ValueError(
            f"expected poses of shape (T, 72), (T, 24, 3) or AMASS's (T, 156), got {tuple(array.shape)} in {path}"
        )
    return array.reshape(len(array), 24, 3)


def _largest_angle(poses: Tensor, others: Tensor) -> float:
    return geodesic_distance(rotvec_to_rotmat(poses), rotvec_to_rotmat(others)).max().item() if len(poses) else 0.0
