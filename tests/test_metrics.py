import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from scipy.spatial.transform import Rotation

from chatpose_hf import metrics
from chatpose_hf.body import PARENTS
from chatpose_hf.metrics import (
    Ranks,
    align_by_similarity,
    auc_percent,
    bootstrap,
    diversity,
    failure_percent,
    frechet_distance,
    global_orient_deg,
    mpjae_deg,
    mpjpe_mm,
    mpjre_deg,
    mpjre_rad_x100,
    pa_mpjpe_mm,
    pck_percent,
    pool_ranks,
    pve_mm,
    recall_percent,
    retrieval_ranks,
)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.tensor(np.asarray(expected), dtype=torch.float64), atol=atol, rtol=0)


def make_positions(count=1, joints=24, seed=0, spread=0.3):
    """A person two to five metres in front of the camera, and a prediction some ten centimetres off."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, joints, 3, generator=generator, dtype=torch.float64) * spread
    predictions = targets + 0.1 * torch.randn(count, joints, 3, generator=generator, dtype=torch.float64)
    place = 2 + 3 * torch.rand(count, 1, 3, generator=generator, dtype=torch.float64)
    return predictions + 0.5, targets + place


def make_rotmats(count, joints=24, seed=0):
    rotations = Rotation.random(count * joints, rng=np.random.default_rng(seed))
    return torch.from_numpy(rotations.as_matrix()).reshape(count, joints, 3, 3)


def make_mask(count, joints, seed=0):
    mask = torch.rand(count, joints, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, :2] = True
    return mask


def unit_rows(count, size, seed=0):
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


# The thousand pose pairs: similar, unrelated, turned by any rotation, and mirrored ones.
def thousand_pairs():
    predictions, targets = make_positions(1000)
    turns = torch.from_numpy(Rotation.random(500, rng=np.random.default_rng(1)).as_matrix())
    predictions[250:750] = predictions[250:750] @ turns.mT * 1.3
    predictions[500:600] = make_positions(100, seed=5)[0]
    predictions[600:700, :, 0] *= -1
    return predictions, targets


# Sets whose best rotation is not unique, or whose scale is not defined.
def degenerate_pairs():
    generator = torch.Generator().manual_seed(3)
    predictions, targets = make_positions(4, joints=6, seed=4)
    line = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)[:, None]
    axis = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    flat = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    turn = torch.from_numpy(Rotation.from_rotvec([0.3, math.pi - 0.5, 0.2]).as_matrix())
    half_turn = torch.from_numpy(Rotation.from_rotvec([0, math.pi, 0]).as_matrix())
    return {
        "one joint": (predictions[:, :1], targets[:, :1]),
        "two joints": (predictions[:, :2], targets[:, :2]),
        "one person": (predictions[:1], targets[:1]),
        "identical": (targets, targets),
        "points coincide": (predictions[:, :1].expand(-1, 6, -1), targets),
        "points coincide off the origin by thirds": (torch.full((4, 6, 3), 100 / 3, dtype=torch.float64), targets),
        "targets coincide": (predictions, targets[:, :1].expand(-1, 6, -1)),
        "both coincide": (predictions[:, :1].expand(-1, 6, -1), targets[:, :1].expand(-1, 6, -1)),
        "points on a line": ((line * axis[0])[None], targets[:1]),
        "both on a line": ((line * axis[0])[None], (line**3 * axis[1])[None]),
        "opposite on a line": ((line * axis[0])[None], (-line * axis[0])[None]),
        "points in a plane": (predictions * flat, targets),
        "both in a plane": (predictions * flat, targets * flat @ turn.mT),
        "mirrored in a plane": (targets * flat, targets * flat * torch.tensor([-1.0, 1.0, 1.0])),
        "half turn": (targets @ half_turn.mT, targets),
        "small": (predictions * 1e-6, targets),
        "float32": (predictions.float(), targets.float()),
    }


def naive_umeyama(points, targets):
    """Umeyama 1991, equations 34 to 43, for one pair in numpy; the scale is 1 for points without variance."""
    count = len(points)
    mean, target_mean = points.mean(0), targets.mean(0)
    variance = ((points - mean) ** 2).sum() / count
    if variance < 1e-24:
        return 1.0, np.eye(3), target_mean - mean
    covariance = sum(np.outer(y - target_mean, x - mean) for x, y in zip(points, targets, strict=True)) / count
    u, d, vt = np.linalg.svd(covariance)
    s = np.diag([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotmat = u @ s @ vt
    scale = np.trace(np.diag(d) @ s) / variance
    return scale, rotmat, target_mean - scale * rotmat @ mean


def naive_mean_distance_mm(points, targets):
    return np.mean([1000 * math.dist(x, y) for x, y in zip(points.tolist(), targets.tolist(), strict=True)])


def naive_pa_mpjpe_mm(joints, target_joints):
    errors = []
    for points, targets in zip(joints.double().numpy(), target_joints.double().numpy(), strict=True):
        scale, rotmat, translation = naive_umeyama(points, targets)
        aligned = np.stack([scale * rotmat @ point + translation for point in points])
        errors.append(naive_mean_distance_mm(aligned, targets))
    return errors


def naive_mpjpe_mm(joints, target_joints, joint_set, roots, mask):
    errors = []
    for n in range(len(joints)):
        root = np.mean([joints[n, r].numpy() for r in roots], axis=0)
        target_root = np.mean([target_joints[n, r].numpy() for r in roots], axis=0)
        distances = [
            math.dist(joints[n, j].numpy() - root, target_joints[n, j].numpy() - target_root)
            for j in joint_set
            if mask[n, j]
        ]
        errors.append(1000 * sum(distances) / len(distances))
    return errors


def naive_angle(rotmat, target):
    return np.linalg.norm(Rotation.from_matrix(rotmat @ target.T).as_rotvec())


def test_mpjpe_by_hand():
    joints = torch.zeros(1, 3, 3)
    targets = torch.tensor([[[1.0, 1, 1], [1, 1.1, 1], [1, 1, 0.7]]])
    close(mpjpe_mm(joints, targets), [(0 + 100 + 300) / 3], atol=1e-4)
    close(mpjpe_mm(joints, targets, joint_set=[2]), [300], atol=1e-4)
    # The mean of joints 0 and 1 is the root: errors 50, 50 and the length of (0, 50, 300).
    close(mpjpe_mm(joints, targets, root=(0, 1)), [(100 + math.hypot(50, 300)) / 3], atol=1e-4)
    close(mpjpe_mm(joints, targets - 1, root=None), [400 / 3], atol=1e-4)


def test_mpjpe_on_a_thousand_pairs_equals_the_loop():
    joints, targets = thousand_pairs()
    everywhere = np.ones((1000, 24), dtype=bool)
    close(mpjpe_mm(joints, targets), naive_mpjpe_mm(joints, targets, range(24), [0], everywhere))


@pytest.mark.parametrize("joint_set", [None, [5, 1, 20], [3, 1]])
@pytest.mark.parametrize("root", [0, 1, (0, 1), [1]])
def test_mpjpe_with_roots_sets_and_masks_equals_the_loop(joint_set, root):
    joints, targets = make_positions(20, seed=2)
    mask = make_mask(20, 24)
    targets[~mask] = math.nan
    expected = naive_mpjpe_mm(joints, targets, joint_set or range(24), [root] if root in (0, 1) else root, mask)
    close(mpjpe_mm(joints, targets, joint_set, root, mask), expected)


@pytest.mark.parametrize("name", list(degenerate_pairs()))
def test_mpjpe_on_degenerate_poses_equals_the_loop(name):
    joints, targets = (positions - positions[:, :1] for positions in degenerate_pairs()[name])
    everywhere = np.ones(joints.shape[:2], dtype=bool)
    close(
        mpjpe_mm(joints, targets),
        naive_mpjpe_mm(joints.double(), targets.double(), range(joints.shape[1]), [0], everywhere),
    )


def test_mpjpe_after_a_quarter_turn_is_large_and_pa_mpjpe_unchanged():
    joints, targets = make_positions(50)
    quarter = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    close(pa_mpjpe_mm(joints @ quarter.mT, targets), pa_mpjpe_mm(joints, targets))
    assert mpjpe_mm(targets @ quarter.mT, targets).min() > 150


def test_pa_mpjpe_on_a_thousand_pairs_equals_umeyama():
    joints, targets = thousand_pairs()
    close(pa_mpjpe_mm(joints, targets), naive_pa_mpjpe_mm(joints, targets))


@pytest.mark.parametrize("name", list(degenerate_pairs()))
def test_pa_mpjpe_on_degenerate_poses_equals_umeyama(name):
    joints, targets = degenerate_pairs()[name]
    close(pa_mpjpe_mm(joints, targets), naive_pa_mpjpe_mm(joints, targets))


def test_pa_mpjpe_on_a_thousand_pairs_equals_scipys_rotations():
    joints, targets = thousand_pairs()
    errors = []
    for points, goals in zip(joints.numpy(), targets.numpy(), strict=True):
        points, goals = points - points.mean(0), goals - goals.mean(0)
        rotation, _ = Rotation.align_vectors(goals, points)
        turned = rotation.apply(points)
        scale = (turned * goals).sum() / (points**2).sum()
        errors.append(naive_mean_distance_mm(scale * turned, goals))
    close(pa_mpjpe_mm(joints, targets), errors)


def test_pa_mpjpe_equals_scipys_procrustes_where_no_reflection_is_better():
    joints, targets = thousand_pairs()
    ours, compared, mirrored = pa_mpjpe_mm(joints, targets), 0, 0
    scale, rotation, translation = align_by_similarity(joints, targets)
    squares = (scale[:, None, None] * joints @ rotation.mT + translation[:, None] - targets).square().sum((1, 2))
    for n, (points, goals) in enumerate(zip(joints.numpy(), targets.numpy(), strict=True)):
        # scipy scales the targets to norm 1 and allows reflections.
        standard_goals, standard_points, _ = scipy.spatial.procrustes(goals, points)
        rotmat, _ = scipy.linalg.orthogonal_procrustes(points - points.mean(0), goals - goals.mean(0))
        norm = np.linalg.norm(goals - goals.mean(0))
        error = naive_mean_distance_mm(standard_points, standard_goals) * norm
        if np.linalg.det(rotmat) > 0:
            compared += 1
            assert ours[n].item() == pytest.approx(error, abs=1e-6)
        else:
            mirrored += 1
            # The reflection is the better fit in the sum of squares.
            assert squares[n].item() > ((standard_points - standard_goals) ** 2).sum() * norm**2
    assert compared > 800
    assert mirrored > 80


def test_pa_mpjpe_of_a_similar_copy_is_zero():
    _, targets = make_positions(100, seed=6)
    turns = torch.from_numpy(Rotation.random(100, rng=np.random.default_rng(2)).as_matrix())
    assert pa_mpjpe_mm(0.7 * targets @ turns.mT + 1.5, targets).max() < 1e-9
    assert pa_mpjpe_mm((0.7 * targets @ turns.mT + 1.5).float(), targets.float()).max() < 1e-2


def test_pa_mpjpe_of_a_mirrored_copy_is_not_zero():
    _, targets = make_positions(100, seed=7)
    assert pa_mpjpe_mm(targets * torch.tensor([-1.0, 1, 1]), targets).min() > 10


@pytest.mark.parametrize("joint_set", [None, [0, 1, 3, 7, 8, 12]])
def test_pa_mpjpe_with_a_mask_equals_leaving_the_joints_out(joint_set):
    joints, targets = make_positions(20, seed=8)
    mask = make_mask(20, 24, seed=1)
    kept = torch.zeros(24, dtype=torch.bool)
    kept[joint_set or slice(None)] = True
    expected = [
        naive_pa_mpjpe_mm(joints[n, kept & mask[n]][None], targets[n, kept & mask[n]][None])[0] for n in range(20)
    ]
    targets[~mask] = math.nan
    close(pa_mpjpe_mm(joints, targets, joint_set, mask), expected)


def test_align_by_similarity_equals_umeyama():
    joints, targets = thousand_pairs()
    scale, rotmat, translation = align_by_similarity(joints, targets)
    expected = [naive_umeyama(*pair) for pair in zip(joints.numpy(), targets.numpy(), strict=True)]
    for ours, theirs in zip((scale, rotmat, translation), zip(*expected, strict=True), strict=True):
        close(ours, np.stack(theirs))


@pytest.mark.parametrize("name", list(degenerate_pairs()))
def test_align_by_similarity_on_degenerate_poses_gives_a_proper_rotation(name):
    joints, targets = degenerate_pairs()[name]
    scale, rotmat, translation = align_by_similarity(joints, targets)
    assert scale.isfinite().all()
    assert translation.isfinite().all()
    close(rotmat @ rotmat.mT, np.broadcast_to(np.eye(3), rotmat.shape), atol=1e-12)
    close(torch.linalg.det(rotmat), np.ones(len(rotmat)), atol=1e-12)
    # Stated results: nothing can be said about scale and rotation of a point.
    if "points coincide" in name or name in ("both coincide", "one joint", "targets coincide"):
        close(scale, np.full(len(scale), 0.0 if name == "targets coincide" else 1.0), atol=0)
        close(rotmat, np.broadcast_to(np.eye(3), rotmat.shape), atol=0)


def test_pve_equals_the_loop():
    vertices, targets = make_positions(3, joints=50, seed=9)
    roots, target_roots = vertices.mean(1) + 0.1, targets.mean(1)
    expected = [naive_mean_distance_mm(vertices[n] - roots[n], targets[n] - target_roots[n]) for n in range(3)]
    close(pve_mm(vertices, targets, roots, target_roots), expected)
    close(pve_mm(targets + 3, targets, target_roots + 3, target_roots), np.zeros(3))


def edge_rotmats():
    """Predictions and targets that differ by nothing, by a hair, by half turns, by nearly half turns."""
    targets = make_rotmats(6, seed=4)
    turns = [[0, 0, 0], [1e-9, 0, 0], [math.pi, 0, 0], [0, 0, math.pi], [0, math.pi - 1e-7, 0], [0.1, 0.2, 0.3]]
    turn = torch.from_numpy(Rotation.from_rotvec(turns).as_matrix())
    return targets @ turn[:, None], targets


@pytest.mark.parametrize("pair", [(make_rotmats(40), make_rotmats(40, seed=1)), edge_rotmats()])
@pytest.mark.parametrize("is_masked", [False, True])
def test_rotation_errors_equal_the_loop(pair, is_masked):
    rotmats, targets = pair
    mask = make_mask(len(rotmats), 24, seed=2) if is_masked else torch.ones(len(rotmats), 24, dtype=torch.bool)
    expected = []
    for n in range(len(rotmats)):
        angles = [naive_angle(rotmats[n, j].numpy(), targets[n, j].numpy()) for j in range(1, 22) if mask[n, j]]
        expected.append(sum(angles) / len(angles))
    orient = [math.degrees(naive_angle(rotmats[n, 0].numpy(), targets[n, 0].numpy())) for n in range(len(rotmats))]
    if is_masked:
        targets = targets.masked_fill(~mask[..., None, None], math.nan)
    given = mask if is_masked else None
    close(mpjre_deg(rotmats, targets, given), np.degrees(expected), atol=2e-6)
    close(mpjre_rad_x100(rotmats, targets, given), 100 * np.array(expected), atol=2e-6)
    close(global_orient_deg(rotmats, targets), orient, atol=2e-6)


def test_mpjre_leaves_out_the_pelvis_and_the_hands():
    identity = torch.eye(3).expand(1, 24, 3, 3)
    half_turn = torch.diag(torch.tensor([1.0, -1, -1]))
    for joint in range(24):
        turned = identity.clone()
        turned[0, joint] = half_turn
        close(mpjre_deg(turned, identity), [180 / 21 if joint in range(1, 22) else 0])
        close(global_orient_deg(turned, identity), [180 if joint == 0 else 0])


@pytest.mark.parametrize("pair", [(make_rotmats(20), make_rotmats(20, seed=1)), edge_rotmats()])
def test_mpjae_equals_the_loop(pair):
    rotmats, targets = pair
    align = make_rotmats(len(rotmats), 1, seed=3)[:, 0]
    expected, expected_aligned = [], []
    for n in range(len(rotmats)):
        angles, aligned = [], []
        for joint in (0, 1, 2, 4, 5, 16, 17, 18, 19):
            chain = [joint]
            while chain[-1] != 0:
                chain.append(PARENTS[chain[-1]])
            ours, theirs = np.eye(3), np.eye(3)
            for link in reversed(chain):
                ours, theirs = ours @ rotmats[n, link].numpy(), theirs @ targets[n, link].numpy()
            angles.append(naive_angle(ours, theirs))
            aligned.append(naive_angle(align[n].numpy() @ ours, theirs))
        expected.append(np.degrees(np.mean(angles)))
        expected_aligned.append(np.degrees(np.mean(aligned)))
    close(mpjae_deg(rotmats, targets, PARENTS), expected, atol=2e-6)
    close(mpjae_deg(rotmats, targets, PARENTS, align), expected_aligned, atol=2e-6)


def test_mpjae_after_a_turned_body_is_taken_back_by_the_procrustes_rotation():
    targets = make_rotmats(10)
    turn = make_rotmats(10, 1, seed=5)[:, 0]
    rotmats = targets.clone()
    rotmats[:, 0] = turn @ targets[:, 0]
    positions = make_positions(10)[1]
    _, align, _ = align_by_similarity(positions @ turn.mT, positions)
    close(mpjae_deg(rotmats, targets, PARENTS, align), np.zeros(10), atol=1e-5)
    assert mpjae_deg(rotmats, targets, PARENTS).min() > 1


def joints_with_errors(errors_mm):
    """Two joints per error: the root at the origin and one whose target is that many millimetres away."""
    joints = torch.zeros(len(errors_mm), 2, 3, dtype=torch.float64)
    targets = joints.clone()
    targets[:, 1, 0] = torch.tensor(errors_mm, dtype=torch.float64) / 1000
    return joints, targets


def test_pck_counts_a_joint_at_the_threshold():
    joints, targets = joints_with_errors([0, 49, 50, 50.001, 300])
    close(pck_percent(joints, targets, joint_set=[1]), [100, 100, 100, 0, 0])
    close(pck_percent(joints, targets, threshold_mm=300, joint_set=[0, 1]), [100] * 5)


def test_auc_by_hand():
    joints, targets = joints_with_errors([0, 0.5, 1, 100, 198.5, 199, 199.5, 250])
    whole = [199, 198.5, 198.5, 99.5, 0.5, 0.5, 0, 0]
    close(auc_percent(joints, targets, joint_set=[1]), 100 * np.array(whole) / 199)


def test_pck_and_auc_equal_the_official_sampling():
    joints, targets = make_positions(30, seed=11)
    joints[0], joints[1] = targets[0], targets[1] + 4
    joints[1, 5] += 1
    pck, auc = [], []
    for n in range(30):
        errors = np.array(
            [
                1000 * math.dist(joints[n, j] - joints[n, 0], targets[n, j] - targets[n, 0])
                for j in (1, 2, 4, 5, 7, 8, 16, 17, 18, 19, 20, 21)
            ]
        )
        thresholds = np.arange(0.0, 200.0)
        curve = [np.mean(errors <= threshold) for threshold in thresholds]
        pck.append(100 * np.mean(errors <= 50))
        auc.append(100 * np.trapezoid(curve, thresholds / thresholds.max()))
    close(pck_percent(joints, targets), pck)
    close(auc_percent(joints, targets), auc)


POSITION_METRICS = {
    "mpjpe": mpjpe_mm,
    "pa_mpjpe": pa_mpjpe_mm,
    "align": align_by_similarity,
    "pck": pck_percent,
    "auc": auc_percent,
    "pve": lambda joints, targets: pve_mm(joints, targets, joints[:, 0], targets[:, 0]),
}


@pytest.mark.parametrize("name", list(POSITION_METRICS))
def test_positions_in_millimetres_are_refused(name):
    joints, targets = make_positions(3)
    metric = POSITION_METRICS[name]
    metric(joints + 200, targets - 200)
    for scale in (1000, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`(joints|points|vertices)` in metres"):
            metric(joints * scale, targets)
        with pytest.raises(ValueError, match=r"`target(s|_joints|_vertices)` in metres"):
            metric(joints, targets * scale)
    far = joints.clone()
    far[1, 5, 2] -= 30
    with pytest.raises(ValueError, match="within 20 m"):
        metric(far, targets)


@pytest.mark.parametrize("name", list(POSITION_METRICS))
def test_positions_of_different_shapes_are_refused(name):
    joints, targets = make_positions(3)
    for wrong in (targets[:1], targets[:, :1], targets[..., :2]):
        with pytest.raises(ValueError, match=r"one shape \(N, J, 3\)"):
            POSITION_METRICS[name](joints, wrong)


def test_positions_of_nobody_give_nothing():
    nobody = torch.zeros(0, 24, 3)
    assert mpjpe_mm(nobody, nobody).shape == (0,)
    assert pa_mpjpe_mm(nobody, nobody).shape == (0,)
    assert mpjre_deg(torch.zeros(0, 24, 3, 3), torch.zeros(0, 24, 3, 3)).shape == (0,)


def test_results_are_float64_whatever_the_inputs():
    joints, targets = (positions.half() for positions in make_positions(3))
    rotmats = make_rotmats(3).float()
    for result in (
        *(metric(joints, targets) for name, metric in POSITION_METRICS.items() if name != "align"),
        *align_by_similarity(joints, targets),
        mpjre_deg(rotmats, rotmats),
        mpjae_deg(rotmats, rotmats, PARENTS, rotmats[:, 0]),
        recall_percent(retrieval_ranks(joints[0], joints[0]), 1),
        failure_percent(torch.tensor([True])),
    ):
        assert result.dtype == torch.float64


def test_masks_without_a_known_joint_are_refused():
    joints, targets = make_positions(4)
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[:2, 5:] = False
    rotmats = make_rotmats(4)
    for metric in (
        lambda: mpjpe_mm(joints, targets, joint_set=[7, 8], mask=mask),
        lambda: pa_mpjpe_mm(joints, targets, joint_set=[7, 8], mask=mask),
        lambda: mpjre_deg(rotmats, rotmats, mask & (torch.arange(24) > 4)),
    ):
        with pytest.raises(ValueError, match=r"at least one known joint.* in 2 of 4 items"):
            metric()


def test_masks_without_the_root_are_refused():
    joints, targets = make_positions(4)
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[1:, 2] = False
    with pytest.raises(ValueError, match=r"the root \(1, 2\) of every item, got 3 items without"):
        mpjpe_mm(joints, targets, root=(1, 2), mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(4, 24), torch.ones(4, 23, dtype=torch.bool)])
def test_masks_of_another_kind_are_refused(mask):
    joints, targets = make_positions(4)
    with pytest.raises(ValueError, match=r"`mask` of shape \(4, 24\) and dtype torch.bool"):
        mpjpe_mm(joints, targets, mask=mask)


def test_joints_out_of_range_are_refused():
    joints, targets = make_positions(2)
    rotmats = make_rotmats(2, joints=18)
    for metric in (
        lambda: mpjpe_mm(joints, targets, joint_set=[-1]),
        lambda: mpjpe_mm(joints, targets, joint_set=[]),
        lambda: mpjpe_mm(joints, targets, root=24),
        lambda: pa_mpjpe_mm(joints, targets, joint_set=[24]),
        lambda: mpjre_deg(rotmats, rotmats),
    ):
        with pytest.raises(ValueError, match="to name joints 0 to"):
            metric()


def test_rotations_of_another_kind_are_refused():
    rotmats = make_rotmats(2)
    for metric in (mpjre_deg, mpjre_rad_x100, global_orient_deg, lambda a, b: mpjae_deg(a, b, PARENTS)):
        with pytest.raises(ValueError, match=r"one shape \(N, J, 3, 3\)"):
            metric(rotmats, rotmats[:1])
        with pytest.raises(ValueError, match="finite rotations, got 2 items"):
            metric(rotmats, rotmats * math.nan)
    with pytest.raises(ValueError, match="each after its parent"):
        mpjae_deg(rotmats, rotmats, (-1, 2, 0, *PARENTS[3:]))
    with pytest.raises(ValueError, match="`parents` of 24 joints"):
        mpjae_deg(rotmats, rotmats, PARENTS[:23])
    with pytest.raises(ValueError, match=r"`align` of shape \(2, 3, 3\)"):
        mpjae_deg(rotmats, rotmats, PARENTS, rotmats[:1, 0])
    with pytest.raises(ValueError, match=r"`target_root_position` of shape \(2, 3\)"):
        pve_mm(*make_positions(2), torch.zeros(2, 3), torch.zeros(1, 3))


def naive_ranks(scores, partner):
    better = [sum(s > row[p] + 1e-6 for s in row) for row, p in zip(scores.tolist(), partner, strict=True)]
    ties = [
        sum(abs(s - row[p]) <= 1e-6 for j, s in enumerate(row) if j != p)
        for row, p in zip(scores.tolist(), partner, strict=True)
    ]
    return better, ties


def check_ranks(ranks, expected):
    assert ranks.better.tolist() == expected[0]
    assert ranks.ties.tolist() == expected[1]


@pytest.mark.parametrize("chunk", [None, 100])
def test_retrieval_ranks_equal_the_loop(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(metrics, "_CHUNK_NUMBERS", chunk)
    queries, gallery = unit_rows(30, 8), unit_rows(30, 8, seed=1)
    gallery[10:15] = gallery[3]
    check_ranks(retrieval_ranks(queries, gallery), naive_ranks(queries @ gallery.T, range(30)))
    partner = torch.randint(30, (17,), generator=torch.Generator().manual_seed(2))
    ranks = retrieval_ranks(queries[:17], gallery, partner)
    check_ranks(ranks, naive_ranks(queries[:17] @ gallery.T, partner.tolist()))
    check_ranks(retrieval_ranks(queries[:1], queries[:1]), ([0], [0]))


def test_recall_with_identity_features_is_100():
    features = unit_rows(200, 16)
    for queries in (features, torch.eye(200), features.float()):
        assert (recall_percent(retrieval_ranks(queries, queries), 1) == 100).all()


@pytest.mark.parametrize("k", [10, 50, 200])
def test_recall_with_shuffled_features_is_chance(k):
    features = unit_rows(1000, 16)
    shuffled = features[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    estimate = bootstrap(recall_percent(retrieval_ranks(features, shuffled), k))
    assert 0 < estimate.low <= 100 * k / 1000 <= estimate.high < 100


@pytest.mark.parametrize("k", [1, 3, 7])
def test_recall_with_constant_features_is_exactly_chance(k):
    constant = torch.nn.functional.normalize(torch.ones(7, 5), dim=1)
    close(recall_percent(retrieval_ranks(constant, constant), k), np.full(7, 100 * k / 7), atol=1e-12)


def test_recall_with_duplicates_shares_the_places():
    # Rows 0, 1 and 2 are one caption up to float32 rounding, behind nothing, before row 3.
    gallery = torch.tensor([[1.0, 0], [1 - 1e-7, 1e-7], [1 + 1e-7, 0], [0.6, 0.8]])
    ranks = retrieval_ranks(gallery, gallery)
    check_ranks(ranks, ([0, 0, 0, 0], [2, 2, 2, 0]))
    close(recall_percent(ranks, 1), [100 / 3, 100 / 3, 100 / 3, 100])
    close(recall_percent(ranks, 2), [200 / 3, 200 / 3, 200 / 3, 100])
    close(recall_percent(ranks, 4), [100] * 4)
    # One better and one tied: place 2 or 3.
    close(recall_percent(Ranks(torch.tensor([1]), torch.tensor([1])), 1), [0])
    close(recall_percent(Ranks(torch.tensor([1]), torch.tensor([1])), 2), [50])


def test_recall_equals_the_average_over_random_orders_of_ties():
    rng = np.random.default_rng(0)
    better, ties, k = 2, 4, 4
    found = []
    for _ in range(4000):
        keys = np.concatenate([[1 + rng.random()], np.full(better, 3.0), 1 + rng.random(ties), np.zeros(5)])
        found.append((keys > keys[0]).sum() < k)
    exact = recall_percent(Ranks(torch.tensor(better), torch.tensor(ties)), k).item()
    assert exact == pytest.approx(100 * np.mean(found), abs=3)


@pytest.mark.parametrize("chunk", [None, 100])
def test_pool_ranks_equal_the_loop_on_the_same_pools(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(metrics, "_CHUNK_NUMBERS", chunk)
    drawn, draw_subsets = [], metrics._draw_subsets
    monkeypatch.setattr(metrics, "_draw_subsets", lambda *args: drawn.append(draw_subsets(*args)) or drawn[-1])
    queries, gallery = unit_rows(12, 3), unit_rows(12, 3, seed=1)
    gallery[4:9] = gallery[4]
    ranks = pool_ranks(queries, gallery, pool_size=6, draws=4)
    assert len(drawn) == 4
    assert ranks.better.shape == ranks.ties.shape == (4, 12)
    for draw in range(4):
        for n in range(12):
            others = [row for row in range(12) if row != n]
            pool = [n] + [others[i] for i in drawn[draw][n].tolist()]
            expected = naive_ranks((gallery[pool] @ queries[n])[None], [0])
            check_ranks(Ranks(ranks.better[draw, n, None], ranks.ties[draw, n, None]), expected)


def test_pools_are_uniform_subsets():
    subsets = metrics._draw_subsets(20000, 2, 5, torch.Generator().manual_seed(0)).sort(dim=1).values
    counts = torch.bincount(subsets[:, 0] * 5 + subsets[:, 1], minlength=25).reshape(5, 5)
    expected = torch.ones(5, 5).triu(1) * 2000
    # Five standard deviations of a binomial count.
    assert ((counts - expected).abs() <= 5 * (expected * 0.9).sqrt()).all()


def test_pool_ranks_with_the_whole_gallery_equal_retrieval_ranks():
    queries, gallery = unit_rows(25, 4), unit_rows(25, 4, seed=1)
    pools, whole = pool_ranks(queries, gallery, pool_size=25, draws=2), retrieval_ranks(queries, gallery)
    for field, expected in zip(pools, whole, strict=True):
        assert field.tolist() == [expected.tolist()] * 2
    assert pool_ranks(queries, gallery, pool_size=1, draws=1).better.sum() == 0


def test_pool_ranks_with_unrelated_features_are_chance():
    ranks = pool_ranks(unit_rows(400, 16), unit_rows(400, 16, seed=1), pool_size=32, draws=10)
    for k in (1, 2, 3):
        estimate = bootstrap(recall_percent(ranks, k).mean(0))
        assert estimate.low <= 100 * k / 32 <= estimate.high


def test_pool_ranks_change_with_the_seed_alone():
    queries, gallery = unit_rows(50, 8), unit_rows(50, 8, seed=1)
    first, again, other = (pool_ranks(queries, gallery, 10, 3, seed=seed).better for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_retrieval_of_other_shapes_is_refused():
    rows = unit_rows(6, 4)
    with pytest.raises(ValueError, match="`pool_size` from 1 to the gallery's 6 rows, got 7"):
        pool_ranks(rows, rows, 7, 1)
    with pytest.raises(ValueError, match="as many `queries` as `gallery` rows, got 5 and 6"):
        pool_ranks(rows[:5], rows, 3, 1)
    with pytest.raises(ValueError, match=r"as many `queries` as `gallery` rows where .* got 5 and 6"):
        retrieval_ranks(rows[:5], rows)
    with pytest.raises(ValueError, match=r"`gallery` of shape \(M, D\)"):
        retrieval_ranks(rows, rows[:, :3])
    with pytest.raises(ValueError, match=r"`partner` of shape \(6,\), got \(5,\)"):
        retrieval_ranks(rows, rows, torch.arange(5))
    for wrong in (torch.arange(6) - 1, torch.arange(6) + 1):
        with pytest.raises(ValueError, match="`partner` to hold rows 0 to 5"):
            retrieval_ranks(rows, rows, wrong)


def test_features_that_are_not_finite_are_refused():
    rows = unit_rows(6, 4)
    broken = rows.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="finite `queries`, got 1 rows"):
        retrieval_ranks(broken, rows)
    with pytest.raises(ValueError, match="finite `gallery`, got 1 rows"):
        pool_ranks(rows, broken, 2, 1)
    with pytest.raises(ValueError, match="finite `target_features`"):
        frechet_distance(rows, broken)


def scipy_frechet_distance(features, targets):
    first, second = np.cov(features.numpy(), rowvar=False), np.cov(targets.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    means = features.mean(0) - targets.mean(0)
    return float(means @ means) + np.trace(first + second - 2 * root)


@pytest.mark.parametrize("size", [2, 5, 32])
def test_frechet_distance_equals_scipys_square_root(size):
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    features = torch.randn(100, size, generator=generator, dtype=torch.float64) @ mixing
    targets = torch.randn(90, size, generator=generator, dtype=torch.float64) + 0.5
    assert frechet_distance(features, targets) == pytest.approx(scipy_frechet_distance(features, targets), abs=1e-6)
    assert frechet_distance(targets, features) == pytest.approx(frechet_distance(features, targets), abs=1e-9)


def test_frechet_distance_by_hand():
    # Variances 2 and 18, means 1 and 6: (1 - 6)^2 + (sqrt 2 - sqrt 18)^2.
    assert frechet_distance(torch.tensor([[0.0], [2]]), torch.tensor([[3.0], [9]])) == pytest.approx(25 + 8)


@pytest.mark.parametrize("rows", [2, 10, 300])
def test_frechet_distance_of_a_set_with_itself_is_zero(rows):
    features = unit_rows(rows, 128)
    assert 0 <= frechet_distance(features, features) < 1e-10
    assert frechet_distance(features, features + 0.1) == pytest.approx(128 * 0.01, abs=1e-10)
    assert frechet_distance(features[:1].expand(rows, -1), features[:1].expand(rows, -1)) == pytest.approx(0)


def test_frechet_distance_with_fewer_rows_than_dimensions_equals_the_nuclear_norm():
    features, targets = unit_rows(10, 40), 2 * unit_rows(7, 40, seed=1)
    first = ((features - features.mean(0)) / 3).numpy()
    second = ((targets - targets.mean(0)) / math.sqrt(6)).numpy()
    # tr (C1 C2)^(1/2) is the nuclear norm of A B^T where C1 = A^T A, C2 = B^T B.
    cross = np.linalg.norm(first @ second.T, "nuc")
    means = (features.mean(0) - targets.mean(0)).square().sum().item()
    expected = means + (first**2).sum() + (second**2).sum() - 2 * cross
    assert frechet_distance(features, targets) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_one_row_is_refused():
    with pytest.raises(ValueError, match="two rows or more for a covariance, got 1 and 5"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


def test_diversity_is_the_mean_distance_of_different_rows():
    assert diversity(torch.tensor([[0.0, 0], [3, 4]])) == pytest.approx(5)
    assert diversity(torch.ones(4, 3)) == 0
    features = unit_rows(30, 5)
    exact = torch.nn.functional.pdist(features).mean().item()
    assert diversity(features, pairs=20000) == pytest.approx(exact, abs=0.02)
    assert diversity(features, seed=1) == diversity(features, seed=1) != diversity(features, seed=2)
    with pytest.raises(ValueError, match=r"two rows or more, got \(1, 3\)"):
        diversity(torch.zeros(1, 3))


def test_failure_percent_counts_answers_without_a_pose():
    assert failure_percent(torch.tensor([True, False, True])).tolist() == [0, 100, 0]
    with pytest.raises(ValueError, match=r"dtype torch.bool, got torch.int64"):
        failure_percent(torch.tensor([1, 0]))


def test_bootstrap_of_a_normal_sample_equals_the_closed_form():
    values = 50 + 7 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = bootstrap(values, draws=4000)
    half = 1.96 * values.std().item() / math.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean().item(), abs=1e-12)
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.08 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.08 * half)


def test_bootstrap_of_a_constant_has_no_width():
    assert bootstrap(torch.full((9,), 3.0)) == (3, 3, 3)
    assert bootstrap(torch.tensor([2])) == (2, 2, 2)


def test_bootstrap_of_groups_draws_them_whole():
    """Ten copies of each item say no more than one."""
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(30).repeat_interleave(10) + 7
    once, copied = bootstrap(values), bootstrap(values.repeat_interleave(10), groups=groups)
    assert copied == pytest.approx(once, rel=1e-12)
    alone = bootstrap(values.repeat_interleave(10))
    assert alone.high - alone.low < 0.5 * (once.high - once.low)


def test_bootstrap_with_weights_is_of_the_ratio_of_sums():
    """A naive twin: each draw's numerator over its denominator."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(50, generator=generator, dtype=torch.float64)
    weights = 1 + 99 * torch.rand(50, generator=generator, dtype=torch.float64)
    estimate = bootstrap(values, weights=weights)
    assert estimate.value == pytest.approx((values * weights).sum().item() / weights.sum().item(), rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(50, (1000, 50), generator=generator).tolist()
    ratios = [
        sum((values[i] * weights[i]).item() for i in draw) / sum(weights[i].item() for i in draw) for draw in drawn
    ]
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=1e-9)
    assert bootstrap(torch.full((50,), 2.0), weights=weights) == pytest.approx((2, 2, 2), rel=1e-12)


@pytest.mark.parametrize(
    "options", [{"weights": torch.ones(2)}, {"weights": torch.zeros(3)}, {"groups": torch.ones(2)}]
)
def test_bootstrap_when_weights_or_groups_do_not_fit_then_is_refused(options):
    with pytest.raises(ValueError, match=f"expected .*{next(iter(options))[:-1]}"):
        bootstrap(torch.ones(3), **options)


def test_bootstrap_changes_with_the_seed_alone():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = bootstrap(values), bootstrap(values, seed=0), bootstrap(values, seed=1)
    assert first == again
    assert first.low != other.low
    assert torch.equal(torch.get_rng_state(), state)


def test_bootstrap_piece_by_piece_makes_all_draws(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_NUMBERS", 1000)
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    half = 1.96 * values.std().item() / math.sqrt(300)
    estimate = bootstrap(values, draws=1001)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.15)
    single = bootstrap(values, draws=1)
    assert single.low == single.high != single.value


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(3, 2)])
def test_bootstrap_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match=r"`values` of shape \(N,\) with at least one item"):
        bootstrap(values)


def test_bootstrap_of_values_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite `values`, got 1 that are not"):
        bootstrap(torch.tensor([1.0, math.nan]))
