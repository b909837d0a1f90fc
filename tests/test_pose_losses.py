"""Pose losses: each against the definition written out joint by joint, and what must not reach the weights."""

import math

import pytest
import torch
from make_tiny_checkpoint import make_model
from test_modeling_chatpose import training_batch

from chatpose_hf.body import JOINT_NAMES, PARENTS, BodyModel
from chatpose_hf.modeling_chatpose import compute_pose_loss
from chatpose_hf.pose_losses import JOINT_ERRORS, PoseLoss
from chatpose_hf.rotations import rotvec_to_rotmat


SETTINGS = {
    "default": {},
    "rotmat_mse": {"joint_error": "rotmat_mse"},
    "rot6d_l1": {"joint_error": "rot6d_l1"},
    "geodesic": {"joint_error": "geodesic"},
    "weights": {"joint_weights": {"pelvis": 0.5, "l_knee": 3.0, "head": 0}},
    "positions": {"joint_position_weight": 2.0},
    "all": {"joint_error": "geodesic", "joint_weights": {"neck": 2.0}, "joint_position_weight": 0.7},
}


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


def random_rotmats(*shape, seed, scale=0.6):
    generator = torch.Generator().manual_seed(seed)
    return rotvec_to_rotmat(scale * torch.randn(*shape, 3, generator=generator))


@pytest.fixture
def prediction():
    return random_rotmats(3, 24, seed=1)


@pytest.fixture
def target():
    return random_rotmats(3, 24, seed=2)


@pytest.fixture
def mask():
    """The first pose in part, without its global orientation; the second not at all; the third whole."""
    mask = torch.ones(3, 24, dtype=torch.int)
    mask[0] = (torch.rand(24, generator=torch.Generator().manual_seed(3)) > 0.5).int()
    mask[0, 0] = 0
    mask[1] = 0
    return mask


def angle(a, b):
    """By the trace: Huynh's formula, in float64."""
    cosine = (torch.trace(a.double().T @ b.double()).item() - 1) / 2
    return math.acos(max(-1.0, min(1.0, cosine)))


NAIVE_ERRORS = {
    "rotmat_l1": lambda a, b: sum(abs(a[i, j] - b[i, j]).item() for i in range(3) for j in range(3)) / 9,
    "rotmat_mse": lambda a, b: sum((a[i, j] - b[i, j]).item() ** 2 for i in range(3) for j in range(3)) / 9,
    "rot6d_l1": lambda a, b: sum(abs(a[i, j] - b[i, j]).item() for i in range(3) for j in range(2)) / 6,
    "geodesic": angle,
}


def naive_loss(prediction, target, mask, error="rotmat_l1", weights=None):
    losses = []
    for pose in range(len(prediction)):
        numbers = [
            (joint, NAIVE_ERRORS[error](prediction[pose, joint], target[pose, joint]))
            for joint in range(24)
            if mask is None or mask[pose, joint]
        ]
        weigh = [(weights or {}).get(name, 1.0) for name in JOINT_NAMES]
        body = [(weigh[joint], number) for joint, number in numbers if joint > 0]
        loss = sum(weigh[0] * number for joint, number in numbers if joint == 0)
        if sum(weight for weight, _ in body) > 0:
            loss += sum(weight * number for weight, number in body) / sum(weight for weight, _ in body)
        losses.append(loss)
    return torch.tensor(losses)


def naive_position_error(body, prediction, target, mask):
    """Joint by joint down the tree: an unsupervised joint turns as predicted, in both bodies."""

    def place(rotmats):
        turns, places = [rotmats[0]], [body.rest_joints[0]]
        for joint in range(1, 24):
            parent = PARENTS[joint]
            bone = body.rest_joints[joint] - body.rest_joints[parent]
            places.append(places[parent] + turns[parent] @ bone)
            turns.append(turns[parent] @ rotmats[joint])
        return places

    errors = []
    for pose in range(len(prediction)):
        mixed = [
            target[pose, joint] if mask is None or mask[pose, joint] else prediction[pose, joint]
            for joint in range(24)
        ]
        pairs = zip(place(prediction[pose]), place(mixed), strict=True)
        errors.append(sum(abs(a[i] - b[i]).item() for a, b in pairs for i in range(3)) / 72)
    return torch.tensor(errors)


# -- the error of a joint --


@pytest.mark.parametrize("is_masked", [False, True])
def test_pose_loss_when_nothing_is_asked_for_then_equals_the_originals(prediction, target, mask, is_masked):
    mask = mask if is_masked else None
    got = PoseLoss()(prediction, target, mask)
    torch.testing.assert_close(got, compute_pose_loss(prediction, target, mask), atol=0, rtol=0)
    torch.testing.assert_close(got, naive_loss(prediction, target, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("error", JOINT_ERRORS)
def test_pose_loss_of_each_joint_error_then_equals_the_definition(prediction, target, mask, error, is_masked):
    mask = mask if is_masked else None
    got = PoseLoss(error)(prediction, target, mask)
    assert got.shape == (3,)
    # float32 against sums in float64
    torch.testing.assert_close(got, naive_loss(prediction, target, mask, error), atol=2e-6, rtol=2e-5)


def test_pose_loss_of_known_turns_then_is_as_computed_by_hand():
    """The pelvis by a quarter turn about y, the left knee (one of 23) by 60 degrees about z."""
    target = torch.eye(3).repeat(1, 24, 1, 1)
    prediction = target.clone()
    prediction[0, 0] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    half, root = 0.5, math.sqrt(3) / 2
    prediction[0, 4] = torch.tensor([[half, -root, 0], [root, half, 0], [0, 0, 1]])
    expected = {
        "rotmat_l1": 4 / 9 + (2 * half + 2 * root) / 9 / 23,
        "rot6d_l1": 2 / 6 + (2 * half + 2 * root) / 6 / 23,
        "geodesic": math.pi / 2 + math.pi / 3 / 23,
    }
    for error, value in expected.items():
        assert PoseLoss(error)(prediction, target).item() == pytest.approx(value, abs=1e-6)
    weights = {"pelvis": 0.25, "l_knee": 3}  # of 22 + 3
    got = PoseLoss("geodesic", weights)(prediction, target).item()
    assert got == pytest.approx(0.25 * math.pi / 2 + 3 * math.pi / 3 / 25, abs=1e-6)


def test_geodesic_loss_when_all_is_turned_alike_then_stays(prediction, target):
    turn = random_rotmats(1, 24, seed=9, scale=2.0)
    loss = PoseLoss("geodesic")
    torch.testing.assert_close(loss(turn @ prediction, turn @ target), loss(prediction, target), atol=1e-5, rtol=1e-5)
    # The matrices' L1 does not: were the first line trivial, this one would fail.
    l1 = PoseLoss()
    assert not torch.allclose(l1(turn @ prediction, turn @ target), l1(prediction, target), atol=1e-3)


# -- weights --


def test_joint_weights_then_equal_the_definition(prediction, target, mask):
    weights = {"pelvis": 0.5, "l_knee": 3.0, "head": 0.0}
    for error in JOINT_ERRORS:
        got = PoseLoss(error, weights)(prediction, target, mask)
        expected = naive_loss(prediction, target, mask, error, weights)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5)


def test_a_joint_of_weight_zero_then_counts_as_if_it_were_masked(prediction, target):
    without = torch.ones(3, 24)
    without[:, JOINT_NAMES.index("r_wrist")] = 0
    got = PoseLoss(joint_weights={"r_wrist": 0})(prediction, target)
    torch.testing.assert_close(got, compute_pose_loss(prediction, target, without), atol=1e-7, rtol=1e-6)


def test_the_pelvis_weight_then_scales_the_global_orientation_alone(prediction, target):
    only_root = torch.zeros(3, 24)
    only_root[:, 0] = 1
    root = compute_pose_loss(prediction, target, only_root)
    got = PoseLoss(joint_weights={"pelvis": 5})(prediction, target)
    torch.testing.assert_close(got, compute_pose_loss(prediction, target) + 4 * root, atol=1e-6, rtol=1e-6)


def test_joint_weights_when_all_are_zero_then_the_loss_is_zero(prediction, target):
    loss = PoseLoss(joint_weights=dict.fromkeys(JOINT_NAMES, 0))(prediction.requires_grad_(), target)
    assert loss.tolist() == [0, 0, 0]
    loss.sum().backward()
    assert (prediction.grad == 0).all()


# -- masks --


@pytest.mark.parametrize("settings", SETTINGS)
def test_masked_joints_of_any_loss_then_reach_nothing(prediction, target, mask, settings):
    """Not the value, not the gradient, whatever stands there."""
    loss = PoseLoss(**SETTINGS[settings])
    unsupervised = mask[..., None, None] == 0
    results = []
    for garbage in (target, torch.full_like(target, torch.nan), torch.full_like(target, torch.inf), 1e6 * target):
        leaf = prediction.clone().requires_grad_()
        value = loss(leaf, torch.where(unsupervised, garbage, target), mask)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    value, gradient = results[0]
    assert value[1] == 0
    assert (value[[0, 2]] > 0).all()
    assert gradient.isfinite().all()
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[2] != 0).any()
    for other_value, other_gradient in results[1:]:
        torch.testing.assert_close(other_value, value, atol=0, rtol=0)
        torch.testing.assert_close(other_gradient, gradient, atol=0, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_any_loss_when_the_prediction_is_right_then_is_zero_with_a_finite_gradient(prediction, settings):
    leaf = prediction.clone().requires_grad_()
    loss = PoseLoss(**SETTINGS[settings])(leaf, prediction)
    loss.sum().backward()
    # the geodesic's root of a square of float32 differences
    torch.testing.assert_close(loss.detach(), torch.zeros(3), atol=2e-6, rtol=0)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int, torch.float32])
def test_masks_of_any_type_then_give_the_same(prediction, target, mask, dtype):
    loss = PoseLoss(**SETTINGS["all"])
    expected = loss(prediction, target, mask)
    torch.testing.assert_close(loss(prediction, target, mask.to(dtype)), expected, atol=0, rtol=0)


# -- positions --


@pytest.mark.parametrize("is_masked", [False, True])
def test_joint_positions_then_equal_the_definition(body, prediction, target, mask, is_masked):
    mask = mask if is_masked else None
    got = PoseLoss(joint_position_weight=2.0, body=body)(prediction, target, mask)
    expected = naive_loss(prediction, target, mask) + 2.0 * naive_position_error(body, prediction, target, mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_joint_positions_when_all_joints_are_supervised_then_are_the_bodys(body, prediction, target):
    errors = (body.joints(prediction) - body.joints(target)).abs().mean((1, 2))
    got = PoseLoss(joint_position_weight=10.0)(prediction, target) - PoseLoss()(prediction, target)
    torch.testing.assert_close(got, 10 * errors, atol=1e-5, rtol=1e-5)


def test_joint_positions_when_one_joint_turns_then_only_those_below_it_move(body):
    """The left elbow, by hand: wrist and hand move, by what a quarter turn about y does to their bones."""
    target = torch.eye(3).repeat(1, 24, 1, 1)
    prediction = target.clone()
    elbow, wrist, hand = (JOINT_NAMES.index(name) for name in ("l_elbow", "l_wrist", "l_hand"))
    turn = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    prediction[0, elbow] = turn
    bones = body.rest_joints[[wrist, hand]] - body.rest_joints[elbow]
    moved = (bones @ turn.T - bones).abs().sum().item() / 72
    assert moved > 0.01
    loss = PoseLoss(joint_weights=dict.fromkeys(JOINT_NAMES, 0), joint_position_weight=1.0)
    assert loss(prediction, target).item() == pytest.approx(moved, abs=1e-6)
    only_wrist = torch.zeros(1, 24)
    only_wrist[0, wrist] = 1  # the elbow is unsupervised: both arms bend as predicted
    assert loss(prediction, target, only_wrist).item() == 0


def test_joint_positions_of_a_supervised_child_then_give_its_unsupervised_ancestors_no_gradient(body):
    prediction = random_rotmats(1, 24, seed=4).requires_grad_()
    target = random_rotmats(1, 24, seed=5)
    mask = torch.zeros(1, 24)
    mask[0, JOINT_NAMES.index("l_elbow")] = 1
    weights = dict.fromkeys(JOINT_NAMES, 0)  # positions alone
    loss = PoseLoss(joint_weights=weights, joint_position_weight=1.0, body=body)(prediction, target, mask)
    assert loss.item() > 0
    loss.sum().backward()
    has_gradient = (prediction.grad != 0).flatten(2).any(-1)
    assert has_gradient.nonzero().tolist() == [[0, JOINT_NAMES.index("l_elbow")]]


def test_another_body_then_gives_its_own_distances(body, prediction, target):
    large = BodyModel(
        "twice",
        2 * body.rest_vertices,
        2 * body.rest_joints,
        body.weights,
        body.faces,
        body.parents,
        body.joint_names,
    )
    one, two = (
        PoseLoss(joint_position_weight=1.0, body=b)(prediction, target) - PoseLoss()(prediction, target)
        for b in (body, large)
    )
    torch.testing.assert_close(two, 2 * one, atol=1e-6, rtol=1e-5)


# -- gradients --


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradient_of_any_loss_then_is_its_difference_quotient(settings):
    body = BodyModel.load("default").double()
    loss = PoseLoss(**SETTINGS[settings], body=body)
    target = random_rotmats(1, 24, seed=7).double()
    mask = torch.ones(1, 24)
    mask[0, [0, 4, 9, 18]] = 0
    rotvecs = 0.6 * torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    supervised = mask[0].bool()

    def of_supervised(rotvecs_of_supervised, mask):
        full = rotvecs.clone()
        full[0, supervised] = rotvecs_of_supervised
        return loss(rotvec_to_rotmat(full), target, mask)

    leaf = rotvecs[0, supervised].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: of_supervised(value, mask), (leaf,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda value: of_supervised(value, None), (leaf,), fast_mode=True)


# -- faults --


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"joint_error": "l2"}, "expected a joint error of rotmat_l1, rotmat_mse, rot6d_l1, geodesic, got 'l2'"),
        ({"joint_weights": {"elbow": 1.0}}, "expected joints of pelvis, l_hip, .* in `joint_weights`, got 'elbow'"),
        ({"joint_weights": {"neck": -1}}, "expected finite weights, not negative, .* got -1 for neck"),
        ({"joint_weights": {"neck": float("nan")}}, "got nan for neck"),
        ({"joint_weights": {"neck": float("inf")}}, "got inf for neck"),
        ({"joint_position_weight": -0.1}, "expected a finite `joint_position_weight`, not negative, got -0.1"),
        ({"joint_position_weight": float("nan")}, "got nan"),
        ({"joint_position_weight": float("inf")}, "got inf"),
    ],
)
def test_pose_loss_when_a_setting_is_wrong_then_says_which(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoseLoss(**arguments)


def test_pose_loss_when_no_positions_are_asked_for_then_no_body_is_read(monkeypatch, prediction, target):
    monkeypatch.setattr(BodyModel, "load", lambda *args: pytest.fail("a body was read"))
    assert PoseLoss("geodesic")(prediction, target).shape == (3,)


# -- in the model --


def test_model_when_it_gets_another_pose_loss_then_forward_uses_it(processor):
    model = make_model(processor)
    batch, targets = training_batch(processor)
    mask = torch.ones(3, 24, dtype=torch.int)
    mask[2, :5] = 0
    before = model(**batch, pose_labels=targets, pose_mask=mask)
    model.pose_loss_function = PoseLoss(**SETTINGS["all"])
    after = model(**batch, pose_labels=targets, pose_mask=mask)
    expected = PoseLoss(**SETTINGS["all"])(before.pose_rotmats, targets, mask).mean()
    torch.testing.assert_close(after.pose_loss, expected.detach())
    torch.testing.assert_close(after.ce_loss, before.ce_loss, atol=0, rtol=0)
    assert after.pose_loss > before.pose_loss + 0.1
    after.loss.backward()
    assert model.pose_head.linear_2.weight.grad.abs().sum() > 0
    assert "pose_loss_function" not in "".join(model.state_dict())
