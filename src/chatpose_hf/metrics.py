"""Measures of poses, of retrieval and of sets of features; each is checked against a naive twin in the tests.

Everything is computed in float64, on the device of the inputs. Functions of one pose each return `(N,)`, one number
per person, so that the caller can average them (mean over joints per person, then over people) and give `bootstrap`'s
interval. Positions come in metres; names carry the unit of the result. `N` people, `J` joints, `V` vertices, `D`
features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rotations import geodesic_distance


BODY_JOINTS = tuple(range(1, 22))
"""The joints of `mpjre_deg`: SMPL's without the pelvis (global orientation) and the two hands."""

MPJAE_JOINTS = (0, 1, 2, 4, 5, 16, 17, 18, 19)
"""The nine joints whose orientation 3DPW's official evaluation compares."""

PCK_JOINTS = (1, 2, 4, 5, 7, 8, 16, 17, 18, 19, 20, 21)
"""The twelve joints of 3DPW's official PCK and AUC."""

# No joint of a person is that far from another one: larger numbers are millimetres, or a broken prediction.
_MAX_METRES = 20.0
# Above the rounding of positions some hundred metres from the origin, below anything that a body measures.
_COINCIDENT_METRES = 1e-12
# Copies of a caption get features, hence scores, that differ by float32 rounding.
_TIE_TOLERANCE = 1e-6
# Numbers held at once by the functions that go through large products piece by piece (32 MiB of float64).
_CHUNK_NUMBERS = 2**22


class Estimate(NamedTuple):
    """A mean and its 95% interval, in the unit of the values."""

    value: float
    low: float
    high: float


class Ranks(NamedTuple):
    """Where each query's true partner stands: how many others score higher, and how many others score the same."""

    better: Tensor
    ties: Tensor


def bootstrap(
    values: Tensor, draws: int = 1000, seed: int = 0, weights: Tensor | None = None, groups: Tensor | None = None
) -> Estimate:
    """The mean of `values` and its 95% percentile bootstrap interval, by resampling with replacement.

    Args:
        values (`torch.Tensor` of shape `(N,)`): one number per item.
        draws (`int`, *optional*, defaults to 1000): resampled means.
        seed (`int`, *optional*, defaults to 0): of the resampling; the global generator is left alone.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            For a weighted mean: a draw's weights are those of the items drawn, so a ratio of sums keeps its own interval.
        groups (`torch.Tensor` of shape `(N,)`, *optional*):
            What is resampled where items are not independent: items with the same number are drawn together.
    """
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected `values` of shape (N,) with at least one item, got {tuple(values.shape)}")
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError(f"expected finite `values`, got {int((~values.isfinite()).sum())} that are not")
    weights = torch.ones_like(values) if weights is None else weights.detach().double().cpu()
    if weights.shape != values.shape or not (weights > 0).all():
        raise ValueError(
            f"expected positive `weights`, one for each of {len(values)} values, got {tuple(weights.shape)}"
        )
    sums, sizes = weights * values, weights
    if groups is not None:
        if groups.shape != values.shape:
            raise ValueError(f"expected a group for each of {len(values)} values, got {tuple(groups.shape)}")
        _, group = groups.cpu().unique(return_inverse=True)
        zeros = torch.zeros(int(group.max()) + 1, dtype=values.dtype)
        sums, sizes = (zeros.index_add(0, group, of_items) for of_items in (sums, sizes))
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK_NUMBERS // len(sums))
    means = []
    for start in range(0, draws, rows):
        drawn = torch.randint(len(sums), (min(rows, draws - start), len(sums)), generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.cat(means).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return Estimate((sums.sum() / sizes.sum()).item(), low, high)


def _check_joints(joints: Tensor, target_joints: Tensor) -> tuple[Tensor, Tensor]:
    if joints.ndim != 3 or joints.shape[-1] != 3 or joints.shape != target_joints.shape:
        raise ValueError(
            f"expected positions and targets of one shape (N, J, 3), got {tuple(joints.shape)} and "
            f"{tuple(target_joints.shape)}"
        )
    return joints.double(), target_joints.double()


def _check_rotmats(rotmats: Tensor, target_rotmats: Tensor) -> tuple[Tensor, Tensor]:
    if rotmats.ndim != 4 or rotmats.shape[-2:] != (3, 3) or rotmats.shape != target_rotmats.shape:
        raise ValueError(
            f"expected `rotmats` and `target_rotmats` of one shape (N, J, 3, 3), got {tuple(rotmats.shape)} and "
            f"{tuple(target_rotmats.shape)}"
        )
    return rotmats.double(), target_rotmats.double()


def _check_joint_set(name: str, joint_set: Sequence[int], num_joints: int) -> list[int]:
    # A negative index would silently count from the end.
    if len(joint_set) == 0 or not all(0 <= joint < num_joints for joint in joint_set):
        raise ValueError(f"expected `{name}` to name joints 0 to {num_joints - 1}, got {tuple(joint_set)}")
    return list(joint_set)


def _check_mask(mask: Tensor | None, values: Tensor) -> Tensor:
    """The joints that are known, of shape `(N, J)`: all of them without a mask."""
    if mask is None:
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if mask.dtype != torch.bool or mask.shape != values.shape[:2]:
        raise ValueError(
            f"expected `mask` of shape {tuple(values.shape[:2])} and dtype torch.bool, got {tuple(mask.shape)} and "
            f"{mask.dtype}"
        )
    return mask


def _check_some_known(known: Tensor) -> None:
    empty = int((~known.any(1)).sum())
    if empty:
        raise ValueError(
            f"expected at least one known joint of the joint set per item, got none in {empty} of {len(known)} "
            "items; leave these items out, and say how many they are"
        )


def _check_metres(name: str, offsets: Tensor) -> None:
    # Written so that NaN fails too.
    if not (offsets.abs() <= _MAX_METRES).all():
        raise ValueError(
            f"expected {name} in metres: finite and within {_MAX_METRES:g} m of the root, got {offsets.abs().max():g}; "
            "divide millimetres by 1000"
        )


def _mean_over_known(values: Tensor, known: Tensor) -> Tensor:
    _check_some_known(known)
    return values.masked_fill(~known, 0).sum(1) / known.sum(1)


def _joint_errors_mm(
    joints: Tensor,
    target_joints: Tensor,
    joint_set: Sequence[int] | None,
    root: int | Sequence[int] | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Distances of root-relative joints and which of them are known, each of shape `(N, len(joint_set))`."""
    joints, target_joints = _check_joints(joints, target_joints)
    known = _check_mask(mask, joints)
    num_joints = joints.shape[1]
    if root is not None:
        roots = _check_joint_set("root", [root] if isinstance(root, int) else root, num_joints)
        rootless = int((~known[:, roots].all(1)).sum())
        if rootless:
            raise ValueError(f"expected `mask` to know the root {root} of every item, got {rootless} items without")
        joints = joints - joints[:, roots].mean(1, keepdim=True)
        target_joints = target_joints - target_joints[:, roots].mean(1, keepdim=True)
    if joint_set is not None:
        chosen = _check_joint_set("joint_set", joint_set, num_joints)
        joints, target_joints, known = joints[:, chosen], target_joints[:, chosen], known[:, chosen]
    _check_metres("`joints`", joints[known])
    _check_metres("`target_joints`", target_joints[known])
    return torch.linalg.vector_norm(joints - target_joints, dim=-1) * 1000, known


def mpjpe_mm(
    joints: Tensor,
    target_joints: Tensor,
    joint_set: Sequence[int] | None = None,
    root: int | Sequence[int] | None = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean per-joint position error: the distance of joints relative to the root, without scale or rotation.

    Args:
        joints, target_joints (`torch.Tensor` of shape `(N, J, 3)`): metres.
        joint_set (`Sequence[int]`, *optional*): joints that count; all by default.
        root (`int` or `Sequence[int]`, *optional*, defaults to 0):
            Joint of all `J` that is put at the origin, or several whose mean is (EMDB's hips), or None where the
            positions are relative to a root already.
        mask (`torch.Tensor` of shape `(N, J)`, bool, *optional*):
            Joints whose target is known; the root's must be. The mean is over the known ones.

    Returns:
        `torch.Tensor` of shape `(N,)`, millimetres.
    """
    return _mean_over_known(*_joint_errors_mm(joints, target_joints, joint_set, root, mask))


def align_by_similarity(points: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The scale, rotation and translation that bring `points` nearest to `targets` (Umeyama 1991, no reflection).

    `scale * rotmat @ point + translation` has the least sum of squared distances. Where all points coincide, nothing
    can be said about scale and rotation: they are 1 and the identity; where only the targets coincide, the scale is 0
    and the rotation the identity. Where the points are on one line the rotation about it is free: one of them.

    Args:
        points, targets (`torch.Tensor` of shape `(N, J, 3)`): metres.
        mask (`torch.Tensor` of shape `(N, J)`, bool, *optional*): joints that count.

    Returns:
        `scale` of shape `(N,)`, `rotmat` of shape `(N, 3, 3)`, `translation` of shape `(N, 3)` in metres.
    """
    points, targets = _check_joints(points, targets)
    known = _check_mask(mask, points)
    _check_some_known(known)
    unknown = ~known[..., None]
    count = known.sum(1)[:, None, None]

    def centre(name: str, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = positions.masked_fill(unknown, 0).sum(1, keepdim=True) / count
        centred = (positions - mean).masked_fill(unknown, 0)
        _check_metres(name, centred)
        return mean, centred, (centred.abs() <= _COINCIDENT_METRES).all(-1).all(-1)

    mean, centred, is_point = centre("`points`", points)
    target_mean, centred_targets, is_target_point = centre("`targets`", targets)

    covariance = centred.mT @ centred_targets
    left, singular_values, right_transposed = torch.linalg.svd(covariance)
    signs = torch.ones_like(singular_values)
    # Without this sign the best orthogonal matrix may be a reflection, which would forgive a mirrored pose.
    signs[:, -1] = torch.linalg.det(left @ right_transposed).sign()
    rotmat = right_transposed.mT @ (left * signs[:, None]).mT
    scale = (singular_values * signs).sum(-1) / torch.where(is_point, 1.0, centred.square().sum((1, 2)))

    identity = torch.eye(3, dtype=rotmat.dtype, device=rotmat.device)
    rotmat = torch.where((is_point | is_target_point)[:, None, None], identity, rotmat)
    scale = torch.where(is_point, 1.0, torch.where(is_target_point, 0.0, scale))
    translation = target_mean.squeeze(1) - scale[:, None] * (rotmat @ mean.mT).squeeze(-1)
    return scale, rotmat, translation


def pa_mpjpe_mm(
    joints: Tensor, target_joints: Tensor, joint_set: Sequence[int] | None = None, mask: Tensor | None = None
) -> Tensor:
    """MPJPE after `align_by_similarity`, with scale: the error of the pose apart from its size and orientation.

    Args:
        joints, target_joints (`torch.Tensor` of shape `(N, J, 3)`): metres; no root is needed.
        joint_set (`Sequence[int]`, *optional*): joints that are aligned and count; all by default.
        mask (`torch.Tensor` of shape `(N, J)`, bool, *optional*): joints whose target is known.

    Returns:
        `torch.Tensor` of shape `(N,)`, millimetres.
    """
    joints, target_joints = _check_joints(joints, target_joints)
    known = _check_mask(mask, joints)
    if joint_set is not None:
        chosen = _check_joint_set("joint_set", joint_set, joints.shape[1])
        joints, target_joints, known = joints[:, chosen], target_joints[:, chosen], known[:, chosen]
    scale, rotmat, translation = align_by_similarity(joints, target_joints, known)
    aligned = scale[:, None, None] * joints @ rotmat.mT + translation[:, None]
    return _mean_over_known(torch.linalg.vector_norm(aligned - target_joints, dim=-1) * 1000, known)


def pve_mm(vertices: Tensor, target_vertices: Tensor, root_position: Tensor, target_root_position: Tensor) -> Tensor:
    """Per-vertex error: the mean distance of vertices relative to the root.

    Args:
        vertices, target_vertices (`torch.Tensor` of shape `(N, V, 3)`): metres.
        root_position, target_root_position (`torch.Tensor` of shape `(N, 3)`): metres, in the vertices' frame.

    Returns:
        `torch.Tensor` of shape `(N,)`, millimetres.
    """
    vertices, target_vertices = _check_joints(vertices, target_vertices)
    for name, position in (("root_position", root_position), ("target_root_position", target_root_position)):
        if position.shape != (len(vertices), 3):
            raise ValueError(f"expected `{name}` of shape ({len(vertices)}, 3), got {tuple(position.shape)}")
    vertices = vertices - root_position.double()[:, None]
    target_vertices = target_vertices - target_root_position.double()[:, None]
    _check_metres("`vertices`", vertices)
    _check_metres("`target_vertices`", target_vertices)
    distances: Tensor = torch.linalg.vector_norm(vertices - target_vertices, dim=-1)
    return distances.mean(1) * 1000


def _mean_angle(rotmats: Tensor, target_rotmats: Tensor, joint_set: Sequence[int], mask: Tensor | None) -> Tensor:
    """Mean geodesic angle over the known joints of the set, radians, of shape `(N,)`."""
    chosen = _check_joint_set("rotmats", joint_set, rotmats.shape[1])
    known = _check_mask(mask, rotmats)[:, chosen]
    angles = _mean_over_known(geodesic_distance(rotmats[:, chosen], target_rotmats[:, chosen]), known)
    if not angles.isfinite().all():
        raise ValueError(f"expected finite rotations, got {int((~angles.isfinite()).sum())} items with others")
    return angles


def mpjre_deg(rotmats: Tensor, target_rotmats: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean per-joint rotation error: the angle between local rotations, over `BODY_JOINTS`.

    This definition is ours: ChatPose prints an MPJRE (times 100) that it does not define; see `mpjre_rad_x100`.

    Args:
        rotmats, target_rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): relative to the parent joint.
        mask (`torch.Tensor` of shape `(N, 24)`, bool, *optional*): joints whose target is known.

    Returns:
        `torch.Tensor` of shape `(N,)`, degrees.
    """
    rotmats, target_rotmats = _check_rotmats(rotmats, target_rotmats)
    return _mean_angle(rotmats, target_rotmats, BODY_JOINTS, mask).rad2deg()


def mpjre_rad_x100(rotmats: Tensor, target_rotmats: Tensor, mask: Tensor | None = None) -> Tensor:
    """`mpjre_deg` in radians times 100, the scale of ChatPose's tables."""
    return mpjre_deg(rotmats, target_rotmats, mask).deg2rad() * 100


def global_orient_deg(rotmats: Tensor, target_rotmats: Tensor) -> Tensor:
    """The angle between the rotations of joint 0, which `mpjre_deg` leaves out.

    Args:
        rotmats, target_rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`).

    Returns:
        `torch.Tensor` of shape `(N,)`, degrees.
    """
    rotmats, target_rotmats = _check_rotmats(rotmats, target_rotmats)
    return _mean_angle(rotmats, target_rotmats, (0,), None).rad2deg()


def mpjae_deg(rotmats: Tensor, target_rotmats: Tensor, parents: Sequence[int], align: Tensor | None = None) -> Tensor:
    """Mean per-joint angular error of 3DPW's official evaluation: the angle between orientations of `MPJAE_JOINTS`.

    Args:
        rotmats, target_rotmats (`torch.Tensor` of shape `(N, J, 3, 3)`): local; accumulated here from the root on.
        parents (`Sequence[int]`): of the `J` joints, each before its children; the root's, the first, is not read.
        align (`torch.Tensor` of shape `(N, 3, 3)`, *optional*):
            Multiplies the predictions from the left: `align_by_similarity`'s rotation gives MPJAE_PA.

    Returns:
        `torch.Tensor` of shape `(N,)`, degrees.
    """
    rotmats, target_rotmats = _check_rotmats(rotmats, target_rotmats)
    if len(parents) != rotmats.shape[1] or not all(0 <= parents[j] < j for j in range(1, len(parents))):
        raise ValueError(
            f"expected `parents` of {rotmats.shape[1]} joints, each after its parent, got {tuple(parents)}"
        )

    def accumulate(local: Tensor) -> Tensor:
        orientations = [local[:, 0]]
        for joint in range(1, len(parents)):
            orientations.append(orientations[parents[joint]] @ local[:, joint])
        return torch.stack(orientations, dim=1)

    orientations = accumulate(rotmats)
    if align is not None:
        if align.shape != (len(rotmats), 3, 3):
            raise ValueError(f"expected `align` of shape ({len(rotmats)}, 3, 3), got {tuple(align.shape)}")
        orientations = align.double()[:, None] @ orientations
    return _mean_angle(orientations, accumulate(target_rotmats), MPJAE_JOINTS, None).rad2deg()


def pck_percent(
    joints: Tensor,
    target_joints: Tensor,
    threshold_mm: float = 50.0,
    joint_set: Sequence[int] = PCK_JOINTS,
    root: int | Sequence[int] | None = 0,
) -> Tensor:
    """Percentage of correct keypoints: joints at most `threshold_mm` away, relative to the root.

    Args:
        joints, target_joints (`torch.Tensor` of shape `(N, J, 3)`): metres.
        threshold_mm (`float`, *optional*, defaults to 50): millimetres; a joint at this distance is correct.
        joint_set, root: see `mpjpe_mm`.

    Returns:
        `torch.Tensor` of shape `(N,)`, 0 to 100.
    """
    errors, _ = _joint_errors_mm(joints, target_joints, joint_set, root, None)
    return (errors <= threshold_mm).double().mean(1) * 100


def auc_percent(
    joints: Tensor,
    target_joints: Tensor,
    joint_set: Sequence[int] = PCK_JOINTS,
    root: int | Sequence[int] | None = 0,
) -> Tensor:
    """Area under `pck_percent` for thresholds from 0 to 200 mm, sampled as in 3DPW's official evaluation.

    That one takes the 200 thresholds 0, 1, ..., 199 mm, joins the values by lines and scales the width to 1.

    Args:
        joints, target_joints (`torch.Tensor` of shape `(N, J, 3)`): metres.
        joint_set, root: see `mpjpe_mm`.

    Returns:
        `torch.Tensor` of shape `(N,)`, 0 to 100.
    """
    errors, _ = _joint_errors_mm(joints, target_joints, joint_set, root, None)
    # A joint is correct from the threshold `first` on: half an interval rises to it, whole ones follow up to 199.
    first = errors.ceil()
    area = torch.where(first == 0, 199.0, (199.5 - first).clamp(min=0))
    return area.mean(1) / 199 * 100


def _check_features(name: str, features: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or other.ndim != 2 or features.shape[1] != other.shape[1]:
        raise ValueError(
            f"expected `{name}` of shape (N, D) and `{other_name}` of shape (M, D), got {tuple(features.shape)} and "
            f"{tuple(other.shape)}"
        )
    # NaN would compare as neither better nor tied, which is the best rank.
    for one_name, one in ((name, features), (other_name, other)):
        if not one.isfinite().all():
            raise ValueError(
                f"expected finite `{one_name}`, got {int((~one.isfinite().all(1)).sum())} rows that are not"
            )
    return features.double(), other.double()


def _count_ranks(scores: Tensor, partner_scores: Tensor) -> Ranks:
    """Ranks of partners among the scores, their own included, of shape `(N, M)`."""
    difference = scores - partner_scores
    # The partner ties with itself.
    return Ranks((difference > _TIE_TOLERANCE).sum(1), (difference.abs() <= _TIE_TOLERANCE).sum(1) - 1)


def retrieval_ranks(queries: Tensor, gallery: Tensor, partner: Tensor | None = None) -> Ranks:
    """The rank of each query's true partner in the whole gallery, by dot product.

    Scores that differ by at most 1e-6 are ties (captions repeat); `recall_percent` says how they count.

    Args:
        queries (`torch.Tensor` of shape `(N, D)`), gallery (`torch.Tensor` of shape `(M, D)`): unit rows.
        partner (`torch.Tensor` of shape `(N,)`, int64, *optional*):
            Each query's row in the gallery; by default the row of the same number, for `N` equal to `M`.

    Returns:
        `Ranks` of int64 tensors of shape `(N,)`.
    """
    queries, gallery = _check_features("queries", queries, "gallery", gallery)
    if partner is None:
        if len(queries) != len(gallery):
            raise ValueError(
                f"expected as many `queries` as `gallery` rows where `partner` is not given, got {len(queries)} and "
                f"{len(gallery)}"
            )
        partner = torch.arange(len(queries), device=queries.device)
    if partner.shape != (len(queries),):
        raise ValueError(f"expected `partner` of shape ({len(queries)},), got {tuple(partner.shape)}")
    if ((partner < 0) | (partner >= len(gallery))).any():
        raise ValueError(
            f"expected `partner` to hold rows 0 to {len(gallery) - 1}, got {partner.min()} to {partner.max()}"
        )
    better, ties = torch.zeros_like(partner), torch.zeros_like(partner)
    rows = max(1, _CHUNK_NUMBERS // max(1, len(gallery)))
    for start in range(0, len(queries), rows):
        piece = slice(start, start + rows)
        scores = queries[piece] @ gallery.T
        better[piece], ties[piece] = _count_ranks(scores, scores.gather(1, partner[piece, None]))
    return Ranks(better, ties)


def recall_percent(ranks: Ranks, k: int) -> Tensor:
    """The chance, in percent, that the partner is among the first `k` when ties are put in random order.

    Equal scores carry no information, so constant features get exactly `100 k / N`, whatever the order of the rows.

    Returns:
        `torch.Tensor` of the ranks' shape, 0 to 100.
    """
    places_left: Tensor = k - ranks.better
    return (places_left.double() / (ranks.ties + 1)).clamp(0, 1) * 100


def _draw_subsets(count: int, size: int, total: int, generator: torch.Generator) -> Tensor:
    """`count` uniform subsets of `range(total)`, of shape `(count, size)`, by Floyd's algorithm (Bentley 1987)."""
    chosen = torch.empty(count, size, dtype=torch.int64)
    for column, last in enumerate(range(total - size, total)):
        pick = torch.randint(last + 1, (count,), generator=generator)
        is_taken = (chosen[:, :column] == pick[:, None]).any(1)
        chosen[:, column] = torch.where(is_taken, last, pick)
    return chosen


def pool_ranks(queries: Tensor, gallery: Tensor, pool_size: int, draws: int, seed: int = 0) -> Ranks:
    """The rank of each query's partner, the row of the same number, in random pools of the gallery.

    Each pool holds the partner and `pool_size - 1` other rows, drawn without replacement anew for every query and
    draw. R-precision (PoseScript) is `recall_percent` of these ranks for pools of 32, 10 draws, and `k` = 1, 2, 3.

    Args:
        queries, gallery (`torch.Tensor` of shape `(N, D)`): unit rows.
        pool_size (`int`): rows per pool, the partner included.
        draws (`int`): pools per query.
        seed (`int`, *optional*, defaults to 0): of the pools.

    Returns:
        `Ranks` of int64 tensors of shape `(draws, N)`.
    """
    queries, gallery = _check_features("queries", queries, "gallery", gallery)
    if len(queries) != len(gallery):
        raise ValueError(f"expected as many `queries` as `gallery` rows, got {len(queries)} and {len(gallery)}")
    if not 1 <= pool_size <= len(gallery):
        raise ValueError(f"expected `pool_size` from 1 to the gallery's {len(gallery)} rows, got {pool_size}")
    generator = torch.Generator().manual_seed(seed)
    partner = torch.arange(len(queries))[:, None]
    better = torch.empty(draws, len(queries), dtype=torch.int64, device=queries.device)
    ties = torch.empty_like(better)
    rows = max(1, _CHUNK_NUMBERS // (pool_size * max(1, queries.shape[1])))
    for draw in range(draws):
        others = _draw_subsets(len(queries), pool_size - 1, len(gallery) - 1, generator)
        pools = torch.cat([partner, others + (others >= partner)], dim=1).to(queries.device)
        for start in range(0, len(queries), rows):
            piece = slice(start, start + rows)
            scores = (gallery[pools[piece]] @ queries[piece, :, None]).squeeze(-1)
            better[draw, piece], ties[draw, piece] = _count_ranks(scores, scores[:, :1])
    return Ranks(better, ties)


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix; eigenvalues that rounding made negative are 0."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    root: Tensor = eigenvectors * eigenvalues.clamp(min=0).sqrt() @ eigenvectors.T
    return root


def frechet_distance(features: Tensor, target_features: Tensor) -> float:
    """The (squared) Frechet distance between Gaussians fitted to two sets of features: the FID of any feature model.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` with unbiased covariances. Fewer rows than dimensions will do, but
    bias the estimate upwards; distances in the features of different models cannot be compared.

    Args:
        features (`torch.Tensor` of shape `(N, D)`), target_features (`torch.Tensor` of shape `(M, D)`): two or more
            rows each.
    """
    features, target_features = _check_features("features", features, "target_features", target_features)
    if min(len(features), len(target_features)) < 2:
        raise ValueError(f"expected two rows or more for a covariance, got {len(features)} and {len(target_features)}")

    def covariance(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(0)
        return centred.T @ centred / (len(rows) - 1)

    first, second = covariance(features), covariance(target_features)
    # tr (C1^(1/2) C2 C1^(1/2))^(1/2) is the sum of the singular values of C2^(1/2) C1^(1/2). Taking the roots of the
    # product's eigenvalues instead turns a rounding error of 1e-16 into 1e-8, in every direction that has no variance.
    cross = torch.linalg.svdvals(_square_root(second) @ _square_root(first)).sum()
    mean_term = (features.mean(0) - target_features.mean(0)).square().sum()
    return max(0.0, float(mean_term + first.trace() + second.trace() - 2 * cross))


def diversity(features: Tensor, pairs: int = 1000, seed: int = 0) -> float:
    """The mean Euclidean distance of random pairs of different rows.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): two or more rows.
        pairs (`int`, *optional*, defaults to 1000): pairs drawn, with replacement.
        seed (`int`, *optional*, defaults to 0): of the pairs.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected `features` of shape (N, D) with two rows or more, got {tuple(features.shape)}")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(features), (pairs,), generator=generator)
    second = torch.randint(len(features) - 1, (pairs,), generator=generator)
    second = second + (second >= first)
    features = features.double()
    first, second = first.to(features.device), second.to(features.device)
    return float(torch.linalg.vector_norm(features[first] - features[second], dim=1).mean())


def failure_percent(answered: Tensor) -> Tensor:
    """100 for each answer without a pose, else 0.

    Args:
        answered (`torch.Tensor` of shape `(N,)`, bool): whether the answer holds a pose.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    if answered.dtype != torch.bool:
        raise ValueError(f"expected `answered` of dtype torch.bool, got {answered.dtype}")
    return (~answered).double() * 100
