"""Conversions between the three rotation representations of ChatPose, and the angle between rotations.

Every function takes any leading shape, computes in float32 at least (float16 and bfloat16 are widened: a bfloat16
Gram-Schmidt is off by degrees), keeps float64, and is differentiable, also at the identity and at half turns.

- `rotvec`, shape `(..., 3)`: axis times angle, radians (SMPL's axis-angle).
- `rotmat`, shape `(..., 3, 3)`: rotation matrix acting on column vectors.
- `rot6d`, shape `(..., 6)`: the matrix's first column, then its second column (the layout of the original ChatPose
  and of HMR2; SPIN interleaves the columns, other libraries stack rows).
"""

import torch
from torch import Tensor


def _check_shape(name: str, value: Tensor, trailing: tuple[int, ...]) -> Tensor:
    if value.shape[-len(trailing) :] != trailing:
        wanted = ", ".join(["...", *map(str, trailing)])
        raise ValueError(f"expected `{name}` of shape ({wanted}), got {tuple(value.shape)}")
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _safe_norm(vector: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, kept, with gradient zero (not NaN) at the zero vector."""
    square = (vector * vector).sum(-1, keepdim=True)
    is_zero = square == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).sqrt())


def rotvec_to_rotmat(rotvec: Tensor) -> Tensor:
    """Rotation vectors to matrices by Rodrigues' formula.

    Args:
        rotvec (`torch.Tensor` of shape `(..., 3)`): radians; any angle.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`.
    """
    rotvec = _check_shape("rotvec", rotvec, (3,))
    square = (rotvec * rotvec).sum(-1)[..., None, None]
    # Below this angle the series' next term is under the type's precision, and sin(x) / x would divide by zero.
    is_small = square < (1e-4 if rotvec.dtype == torch.float32 else 1e-6)
    angle = torch.where(is_small, 1.0, square).sqrt()
    sine_term = torch.where(is_small, 1 - square / 6 + square**2 / 120, angle.sin() / angle)
    # (1 - cos x) / x^2 written with the half angle: the difference would cancel for small angles.
    half = 0.5 * angle
    cosine_term = torch.where(is_small, 0.5 - square / 24 + square**2 / 720, 0.5 * (half.sin() / half) ** 2)

    x, y, z = rotvec.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return identity + sine_term * skew + cosine_term * (skew @ skew)


def rotmat_to_rotvec(rotmat: Tensor) -> Tensor:
    """Rotation matrices to rotation vectors of angle 0 to pi, through the unit quaternion.

    The matrix holds, linearly, the ten products of quaternion entries; the row of the largest entry, normalised, is
    the quaternion. Nothing is divided by a small number, so angles near 0 and near pi keep full precision. At exactly
    pi either of the two opposite axes may come back: both are the same rotation.

    Args:
        rotmat (`torch.Tensor` of shape `(..., 3, 3)`): proper rotations.

    Returns:
        `torch.Tensor` of shape `(..., 3)`, radians.
    """
    rotmat = _check_shape("rotmat", rotmat, (3, 3))
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotmat.flatten(-2).unbind(-1)
    wx, wy, wz = r21 - r12, r02 - r20, r10 - r01
    xy, xz, yz = r01 + r10, r02 + r20, r12 + r21
    ww, xx = 1 + r00 + r11 + r22, 1 + r00 - r11 - r22
    yy, zz = 1 - r00 + r11 - r22, 1 - r00 - r11 + r22
    products = torch.stack([ww, wx, wy, wz, wx, xx, xy, xz, wy, xy, yy, yz, wz, xz, yz, zz], dim=-1).unflatten(
        -1, (4, 4)
    )
    largest = torch.stack([ww, xx, yy, zz], dim=-1).argmax(-1)
    quat_wxyz = products.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    quat_wxyz = torch.nn.functional.normalize(quat_wxyz, dim=-1)
    quat_wxyz = torch.where(quat_wxyz[..., :1] < 0, -quat_wxyz, quat_wxyz)

    cosine, axis = quat_wxyz[..., :1], quat_wxyz[..., 1:]
    sine = _safe_norm(axis)
    is_small = sine < (1e-2 if rotmat.dtype == torch.float32 else 1e-4)
    ratio = torch.where(is_small, axis.new_ones(()), sine)
    # atan(t) / t for small t = sine / cosine, by its series
    tangent = sine / torch.where(is_small, cosine, 1.0)
    series = 2 * (1 - tangent**2 / 3 + tangent**4 / 5) / torch.where(is_small, cosine, 1.0)
    return axis * torch.where(is_small, series, 2 * torch.atan2(ratio, cosine) / ratio)


def rot6d_to_rotmat(rot6d: Tensor) -> Tensor:
    """Six numbers to a rotation matrix by Gram-Schmidt (Zhou et al. 2019; the original's `rot6d_to_rotmat`).

    The first three numbers, normalised, are the first column; the next three, made orthogonal to it and normalised,
    the second; their cross product the third. Parallel or zero triples have no rotation and give a singular matrix.

    Args:
        rot6d (`torch.Tensor` of shape `(..., 6)`): any scale.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`.
    """
    rot6d = _check_shape("rot6d", rot6d, (6,))
    first = torch.nn.functional.normalize(rot6d[..., :3], dim=-1)
    second = rot6d[..., 3:] - (first * rot6d[..., 3:]).sum(-1, keepdim=True) * first
    second = torch.nn.functional.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second, dim=-1)], dim=-1)


def rotmat_to_rot6d(rotmat: Tensor) -> Tensor:
    """The first two columns of each matrix, one after the other.

    Args:
        rotmat (`torch.Tensor` of shape `(..., 3, 3)`).

    Returns:
        `torch.Tensor` of shape `(..., 6)`.
    """
    rotmat = _check_shape("rotmat", rotmat, (3, 3))
    return torch.cat([rotmat[..., 0], rotmat[..., 1]], dim=-1)


def geodesic_distance(rotmat_a: Tensor, rotmat_b: Tensor) -> Tensor:
    """The angle of the rotation that takes `rotmat_a` to `rotmat_b`, exact near 0 and near pi.

    Args:
        rotmat_a, rotmat_b (`torch.Tensor` of shape `(..., 3, 3)`): broadcast against each other.

    Returns:
        `torch.Tensor` of shape `(...)`, radians, 0 to pi.
    """
    rotmat_a = _check_shape("rotmat_a", rotmat_a, (3, 3))
    rotmat_b = _check_shape("rotmat_b", rotmat_b, (3, 3))
    return _safe_norm(rotmat_to_rotvec(rotmat_a.transpose(-1, -2) @ rotmat_b)).squeeze(-1)
