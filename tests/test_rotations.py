import math

import pytest
import torch

from chatpose_hf.rotations import (
    geodesic_distance,
    rot6d_to_rotmat,
    rotmat_to_rot6d,
    rotmat_to_rotvec,
    rotvec_to_rotmat,
)


def random_rotvecs(count, low=0.0, high=math.pi, seed=0):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1)
    angles = low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return axes * angles


def naive_rotmat(rotvec):
    """The definition: the exponential series of the cross-product matrix (torch's own is good to 1e-11 only)."""
    x, y, z = rotvec.tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64) / 16
    term, total = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for n in range(1, 25):
        term = term @ skew / n
        total = total + term
    return torch.linalg.matrix_power(total, 16)


def test_rotvec_to_rotmat_by_hand():
    quarter_about_z = rotvec_to_rotmat(torch.tensor([0.0, 0.0, math.pi / 2]))
    expected = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(quarter_about_z, expected, atol=1e-6, rtol=0)
    half_about_x = rotvec_to_rotmat(torch.tensor([math.pi, 0.0, 0.0]))
    torch.testing.assert_close(half_about_x, torch.diag(torch.tensor([1.0, -1.0, -1.0])), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("low", "high"), [(0, math.pi), (0, 1e-8), (1e-5, 1e-2), (5e-3, 2e-2), (math.pi, 4 * math.pi)]
)
def test_rotvec_to_rotmat_equals_the_exponential_series(low, high):
    rotvecs = random_rotvecs(200, low, high)
    expected = torch.stack([naive_rotmat(rotvec) for rotvec in rotvecs])
    torch.testing.assert_close(rotvec_to_rotmat(rotvecs), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotvec_to_rotmat(rotvecs.float()), expected.float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(0, math.pi), (0, 1e-7), (1e-4, 1e-1), (math.pi - 1e-4, math.pi - 1e-9)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-8), (torch.float32, 3e-6)])
def test_rotvec_survives_the_round_trip(low, high, dtype, tolerance):
    rotvecs = random_rotvecs(500, low, high).to(dtype)
    back = rotmat_to_rotvec(rotvec_to_rotmat(rotvecs))
    error = (back - rotvecs).norm(dim=-1)
    # In float32 a vector near a half turn may come back as the same turn about the opposite axis.
    error = torch.minimum(
        error, (back + rotvecs * (2 * math.pi / rotvecs.norm(dim=-1, keepdim=True) - 1)).norm(dim=-1)
    )
    assert error.max() < tolerance


def test_half_turns_come_back_exactly():
    for axis in torch.eye(3):
        rotvec = rotmat_to_rotvec(2 * torch.outer(axis, axis) - torch.eye(3))
        torch.testing.assert_close(rotvec.abs(), axis * math.pi)


def test_rot6d_is_the_two_first_columns():
    rotmat = torch.arange(9.0).reshape(3, 3)
    assert rotmat_to_rot6d(rotmat).tolist() == [0, 3, 6, 1, 4, 7]
    rotmats = rotvec_to_rotmat(random_rotvecs(100))
    torch.testing.assert_close(rot6d_to_rotmat(rotmat_to_rot6d(rotmats)), rotmats, atol=1e-14, rtol=0)


def test_rot6d_to_rotmat_gives_proper_rotations_from_any_six_numbers():
    rot6d = torch.randn(300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotmats = rot6d_to_rotmat(rot6d)
    identity = torch.eye(3, dtype=torch.float64).expand(300, 3, 3)
    torch.testing.assert_close(rotmats @ rotmats.transpose(-1, -2), identity)
    torch.testing.assert_close(torch.linalg.det(rotmats), torch.ones(300, dtype=torch.float64))
    # Scaling either column, or adding the first to the second, changes nothing.
    moved = torch.cat([3 * rot6d[:, :3], 0.5 * rot6d[:, 3:] + 2 * rot6d[:, :3]], dim=-1)
    torch.testing.assert_close(rot6d_to_rotmat(moved), rotmats)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 1.0, 3.0, math.pi - 1e-4, math.pi])
def test_geodesic_distance_is_the_angle_between(angle):
    start = rotvec_to_rotmat(random_rotvecs(50))
    turn = rotvec_to_rotmat(torch.nn.functional.normalize(random_rotvecs(50, 1, 2, seed=3), dim=-1) * angle)
    distance = geodesic_distance(start, start @ turn)
    torch.testing.assert_close(distance, torch.full_like(distance, angle), atol=1e-8, rtol=0)
    torch.testing.assert_close(geodesic_distance(start @ turn, start), distance, atol=1e-8, rtol=0)


def test_leading_shapes_and_types():
    rotvec = random_rotvecs(6).reshape(2, 1, 3, 3)
    assert rotvec_to_rotmat(rotvec).shape == (2, 1, 3, 3, 3)
    assert rotmat_to_rotvec(rotvec_to_rotmat(rotvec)).shape == rotvec.shape
    assert rotvec_to_rotmat(torch.zeros(0, 24, 3)).shape == (0, 24, 3, 3)
    assert rotmat_to_rotvec(torch.zeros(0, 3, 3)).shape == (0, 3)
    assert geodesic_distance(torch.eye(3), torch.eye(3).expand(4, 3, 3)).shape == (4,)
    for dtype in (torch.float16, torch.bfloat16):
        assert rotvec_to_rotmat(rotvec.to(dtype)).dtype == torch.float32
        assert rot6d_to_rotmat(torch.ones(6, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (rotvec_to_rotmat, random_rotvecs(5)),
        (rotvec_to_rotmat, random_rotvecs(5, 0, 1e-6)),
        (rotvec_to_rotmat, torch.zeros(2, 3, dtype=torch.float64)),
        (lambda v: rotmat_to_rotvec(rotvec_to_rotmat(v)), random_rotvecs(5)),
        (lambda v: rotmat_to_rotvec(rotvec_to_rotmat(v)), torch.zeros(2, 3, dtype=torch.float64)),
        (lambda v: rotmat_to_rotvec(rotvec_to_rotmat(v)), random_rotvecs(5, math.pi - 1e-3, math.pi - 1e-4)),
        (lambda v: geodesic_distance(rotvec_to_rotmat(v[:1]), rotvec_to_rotmat(v[1:])), random_rotvecs(5, 0.1, 3)),
        (rot6d_to_rotmat, torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)),
    ],
)
def test_gradients(function, inputs):
    torch.autograd.gradcheck(function, inputs.clone().requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_the_identity_and_at_half_turns(dtype):
    rotvec = torch.tensor([[0.0, 0, 0], [math.pi, 0, 0], [0, math.pi, 0]], dtype=dtype, requires_grad=True)
    rotmat = rotvec_to_rotmat(rotvec)
    (rotmat_to_rotvec(rotmat).sum() + geodesic_distance(rotmat, rotmat.detach()).sum()).backward()
    assert rotvec.grad.isfinite().all()


@pytest.mark.parametrize(
    ("function", "shape"), [(rotvec_to_rotmat, (4,)), (rotmat_to_rotvec, (3, 4)), (rot6d_to_rotmat, (3, 2))]
)
def test_wrong_shapes_say_what_was_expected(function, shape):
    with pytest.raises(ValueError, match=r"expected `rot\w+` of shape \(\.\.\., .*got \("):
        function(torch.zeros(shape))
