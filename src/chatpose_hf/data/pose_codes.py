"""Codes of poses: joint positions in, what can be said about the pose out, as facts that need no words yet.

A pose is measured (angles, distances, heights, directions), what is measured falls into bins, and a bin that means something
is a code ("left knee", "right angle"). Left and right are the person's own, above and below are heights. Whatever would
mislead a reader about a pose (front and behind of somebody lying, left and right of a twisted chest) is not measured at all:
a value of NaN has no code.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..body import JOINT_NAMES
from ..pose_files import remove_yaw, turn_frame
from ..rotations import rotvec_to_rotmat


class PoseCode(NamedTuple):
    """
    One fact about a pose.

    Attributes:
        part1 (`str`): what it is about: `"left knee"`, `"body"`, `"head"`.
        relation (`str`): a category of the measurement, `"right angle"`, `"higher than"`, or a posture, `"kneeling on"`.
        part2 (`str`): what it is related to, a part, a side or a direction; `""` for none.
        kind (`str`): the measurement, see [`Geometry`]; `"super"` where several make the code.
        priority (`int`): how telling it is, 1 to 9; from 6 on it is rare, and never left out by chance.
    """

    part1: str
    relation: str
    part2: str
    kind: str
    priority: int


RARE = 6
_UPRIGHT, _STEADY, _LEGS_BELOW = 45, 30, 60  # degrees between the torso and the vertical
_HAND = 0.068  # metres from the wrist to the hand's middle: half way to the middle finger's second joint
_HEAD = 0.10  # metres from the head joint, at the skull's base, to the head's middle
_TIPS = {22: None, 24: (22, 23), 52: (26, 41)}  # joints that say where the left and the right hand point
SIDES = ("left", "right")
_LIMBS = {
    "thigh": ("hip", "knee"),
    "shin": ("knee", "ankle"),
    "upper arm": ("shoulder", "elbow"),
    "forearm": ("elbow", "wrist"),
}
# Where a straight arm can point: outwards, up, to the front.
DIRECTIONS = {
    "overhead": (0, 1, 0),
    "to the side": (1, 0, 0),
    "forward": (0, 0, 1),
    "backward": (0, 0, -1),
    "down": (0, -1, 0),
    "along the body": (0, -1, 0),
    "up and to the side": (1, 1, 0),
    "down and to the side": (1, -1, 0),
    "up and forward": (0, 1, 1),
    "down and forward": (0, -1, 1),
    "down and backward": (0, -1, -1),
    "forward and to the side": (1, 0, 1),
    "backward and to the side": (1, 0, -1),
}
_LYING_DIRECTIONS = ("overhead", "to the side", "along the body")  # what a body-relative word says of anybody
_ORDER = ((-0.15, -0.05, 0.05, 0.15), 0.05)
# kind -> thresholds (a value on one falls into the lower bin), jitter, and categories from low to high; "" is no category.
_BINS: dict[str, tuple[tuple[float, ...], float, tuple[str, ...]]] = {
    "angle": (
        (45, 75, 105, 135, 160),
        5,
        ("fully bent", "sharply bent", "right angle", "half bent", "slightly bent", "straight"),
    ),
    "distance": ((0.2, 0.4, 0.8), 0.05, ("close to", "shoulder width from", "", "far from")),
    "x": (*_ORDER, ("right of", "", "aligned", "", "left of")),
    "y": (*_ORDER, ("below", "", "level with", "", "above")),
    "z": (*_ORDER, ("behind", "", "aligned", "", "in front of")),
    "body x": ((-0.1,), 0.05, ("across", "")),
    "body z": ((-0.15, 0.15), 0.05, ("behind", "", "in front of")),
    "slope": ((10, 80), 5, ("vertical", "", "horizontal")),
    "height": ((0.1, 0.2), 0.05, ("on ground", "", "off ground")),
    "incline": (
        (-50, -20, 20, 50),
        5,
        ("leaning far back", "leaning back", "", "leaning forward", "bent far forward"),
    ),
    "twist": ((-50, -20, 20, 50), 5, ("far left", "left", "", "right", "far right")),
    "lean": ((-30, -15, 15, 30), 5, ("far right", "slightly right", "", "slightly left", "far left")),
    "head x": ((-45, 30), 5, ("tilted back", "", "tilted forward")),
    "head y": ((-30, -15, 15, 30), 5, ("right", "slightly right", "", "slightly left", "left")),
    "head z": ((-30, 30), 5, ("left", "", "right")),
    "arm reach": ((22.5,), 5, ("stretched", "")),
    "leg reach": ((30,), 5, ("stretched", "")),
    "tilt": ((), 5, ("",)),
    "facing": ((), 5, ("",)),
    "left side": ((), 5, ("",)),
    "offset": ((), 0.05, ("",)),
}
# kind, part, other part, priority of each category that is told. S is either side and O the side opposite to it. What has no
# category told is measured for the super-codes alone.
# fmt: off
_ROWS: tuple[tuple[str, str, str, dict[str, int]], ...] = (
    ("angle", "S knee", "", {"fully bent": 6, "sharply bent": 5, "right angle": 5, "half bent": 4, "slightly bent": 2,
                             "straight": 1}),
    ("angle", "S elbow", "", {"fully bent": 6, "sharply bent": 4, "right angle": 4, "half bent": 3, "slightly bent": 1,
                              "straight": 1}),
    ("distance", "left hand", "right hand", {"close to": 6, "far from": 2}),
    ("distance", "left elbow", "right elbow", {"close to": 6}),
    ("distance", "left knee", "right knee", {"close to": 2, "far from": 6}),
    ("distance", "left foot", "right foot", {"close to": 2, "far from": 3}),
    ("distance", "S hand", "head", {"close to": 7}),
    ("distance", "S hand", "S shoulder", {"close to": 5}),
    ("distance", "S hand", "O shoulder", {"close to": 7}),
    ("distance", "S hand", "O elbow", {"close to": 7}),
    ("distance", "S hand", "S hip", {"close to": 2}),
    ("distance", "S hand", "O hip", {"close to": 6}),
    ("distance", "S hand", "S knee", {"close to": 6}),
    ("distance", "S hand", "O knee", {"close to": 7}),
    ("distance", "S hand", "S foot", {"close to": 7}),
    ("distance", "S hand", "O foot", {"close to": 7}),
    ("x", "left hand", "right hand", {"right of": 7}),
    ("x", "left foot", "right foot", {"right of": 7}),
    ("y", "left hand", "right hand", {"below": 4, "above": 4}),
    ("y", "left elbow", "right elbow", {"below": 2, "above": 2}),
    ("y", "left knee", "right knee", {"below": 4, "above": 4}),
    ("y", "left foot", "right foot", {"below": 4, "above": 4}),
    ("y", "S hand", "head", {"level with": 5, "above": 7}),
    ("y", "S hand", "S shoulder", {"level with": 4, "above": 4}),
    ("y", "S hand", "S hip", {"below": 1, "level with": 3}),
    ("y", "S hand", "S knee", {"below": 5, "level with": 5}),
    ("y", "S knee", "S hip", {"level with": 5, "above": 6}),
    ("y", "S foot", "S hip", {"level with": 7, "above": 7}),
    ("y", "S foot", "O knee", {"level with": 5, "above": 5}),
    ("z", "left hand", "right hand", {"behind": 3, "in front of": 3}),
    ("z", "left elbow", "right elbow", {"behind": 2, "in front of": 2}),
    ("z", "left knee", "right knee", {"behind": 3, "in front of": 3}),
    ("z", "left foot", "right foot", {"behind": 4, "in front of": 4}),
    ("body x", "S hand", "torso", {"across": 6}),
    ("body z", "S hand", "torso", {"behind": 7, "in front of": 3}),
    ("slope", "S thigh", "", {"vertical": 1, "horizontal": 5}),
    ("slope", "S shin", "", {"vertical": 1, "horizontal": 6}),
    ("slope", "S upper arm", "", {"vertical": 1, "horizontal": 3}),
    ("slope", "S forearm", "", {"vertical": 4, "horizontal": 3}),
    ("slope", "torso", "", {"vertical": 2}),
    ("height", "S hand", "", {"on ground": 7}),
    ("height", "S foot", "", {"off ground": 5}),
    ("incline", "body", "", {"leaning far back": 7, "leaning back": 5, "leaning forward": 5, "bent far forward": 7}),
    ("twist", "torso", "", {"far left": 6, "left": 4, "right": 4, "far right": 6}),
    ("lean", "body", "", {"far left": 6, "slightly left": 4, "slightly right": 4, "far right": 6}),
    ("head x", "head", "", {"tilted back": 5, "tilted forward": 4}),
    ("head y", "head", "", {"left": 5, "slightly left": 3, "slightly right": 3, "right": 5}),
    ("head z", "head", "", {"left": 5, "right": 5}),
    *(("arm reach", "S arm", to, {"stretched": 3 if to.startswith("down") else 6}) for to in DIRECTIONS),
    *(("leg reach", "S leg", to, {"stretched": 7}) for to in ("forward", "backward", "to the side")),
    *((kind, "body", "", {}) for kind in ("tilt", "facing", "left side")),
    *(("height", part, "", {}) for part in ("pelvis", "neck", "S knee", "S ankle")),
    ("y", "pelvis", "S ankle", {}),
    ("y", "S ankle", "S knee", {}),
    ("y", "S ankle", "S foot", {}),
    ("z", "S ankle", "S knee", {}),
    ("z", "torso", "S ankle", {}),
    ("offset", "pelvis", "S foot", {}),
)
# fmt: on
# Where the category alone is no wording: (kind, category) -> relation and side.
_SIDED = {
    ("twist", "far left"): ("twisted far to", "left"),
    ("twist", "left"): ("twisted to", "left"),
    ("twist", "right"): ("twisted to", "right"),
    ("twist", "far right"): ("twisted far to", "right"),
    ("lean", "far left"): ("leaning far to", "left"),
    ("lean", "slightly left"): ("leaning slightly to", "left"),
    ("lean", "slightly right"): ("leaning slightly to", "right"),
    ("lean", "far right"): ("leaning far to", "right"),
    ("head y", "left"): ("turned to", "left"),
    ("head y", "slightly left"): ("turned slightly to", "left"),
    ("head y", "slightly right"): ("turned slightly to", "right"),
    ("head y", "right"): ("turned to", "right"),
    ("head z", "left"): ("tilted to", "left"),
    ("head z", "right"): ("tilted to", "right"),
}
# Of the same part on both sides "above" would say straight above.
_PAIRED = {"above": "higher than", "below": "lower than"}
INVERSE = {"higher than": "lower than", "in front of": "behind", "right of": "left of"}
INVERSE |= {inverse: relation for relation, inverse in INVERSE.items()}


def without_side(part: str) -> str:
    return part.removeprefix("left ").removeprefix("right ")


def plural(part: str) -> str:
    return "feet" if part == "foot" else f"{part}s"


def is_pair(part1: str, part2: str) -> bool:
    return part1 != part2 and without_side(part1) == without_side(part2)


def _for_side(pattern: str, side: str) -> str:
    return re.sub(r"\b[SO]\b", lambda match: side if match[0] == "S" else SIDES[side == "left"], pattern)


def both_sides(*patterns: str) -> list[tuple[str, ...]]:
    """The patterns with S left and O right, and the other way round; once where there is neither."""
    return list(dict.fromkeys(tuple(_for_side(pattern, side) for pattern in patterns) for side in SIDES))


_ALIGNED_PARTS = ("shoulder", "upper arm", "elbow", "forearm", "hip", "thigh", "knee", "shin")
# An extremity against every limb part that it is not itself the end of.
_ALIGNED = [
    (f"{side} {end}", f"{other} {part}")
    for side in SIDES
    for end, own in (("hand", _ALIGNED_PARTS[:4]), ("foot", _ALIGNED_PARTS[4:]))
    for other in SIDES
    for part in _ALIGNED_PARTS
    if side != other or part not in own
]
ALIGNED_RELATIONS = {
    "x": ("directly to the right of", "directly to the left of"),
    "y": ("directly below", "directly above"),
    "z": ("directly behind", "directly in front of"),
}
_Key = tuple[str, str, str]
_TOLD: dict[_Key, dict[str, int]] = {
    (kind, *parts): told for kind, part1, part2, told in _ROWS for parts in both_sides(part1, part2)
}
for _parts in _ALIGNED:
    for _kind in ("x", "y", "z", "distance"):
        _TOLD.setdefault((_kind, *_parts), {})
_KEYS = list(_TOLD)


def _make_code(key: _Key, category: str) -> PoseCode | None:
    kind, part1, part2 = key
    if category not in _TOLD[key]:
        return None
    relation, side = _SIDED.get((kind, category), (category, part2))
    if is_pair(part1, part2):
        relation = _PAIRED.get(relation, relation)
    if relation == "across":
        side = ""
    return PoseCode(part1, relation, side, kind, _TOLD[key][category])


# The code of every bin of every measurement.
_CODES = [[_make_code(key, category) for category in _BINS[key[0]][2]] for key in _KEYS]
_JITTER = np.array([_BINS[key[0]][1] for key in _KEYS])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between vectors."""
    return np.degrees(np.arccos(np.clip((_unit(a) * _unit(b)).sum(-1), -1, 1)))


class Geometry:
    """
    What can be measured on poses, all poses at once.

    Kinds of [`value`]: `angle` at a knee or an elbow (degrees, 180 is straight); `distance` (metres); `x`, `y`, `z`, the
    first part's coordinate less the second's (metres); `body x`, `body z`, a hand from the torso's middle, in the torso's
    own axes, outwards and to the front; `slope` of a limb part to the vertical (0 to 90); `height` over the lowest joint;
    `incline`, `lean`, `twist` of the torso; `head x`, `head y`, `head z`, its tilt, turn and sideways tilt; `arm reach`,
    `leg reach`, the angle between a straight limb and a direction; `tilt`, `facing`, `left side`, the angles of the torso's
    own axes, up, front and left, to the vertical; `offset`, a distance along the ground.

    Args:
        joints (array of shape `(N, J, 3)`):
            metres, y up, the body facing +z, its left at +x. `J` is 22, 24 (SMPL) or 52 (SMPL-H); of 22 the hands are
            taken to go on as the forearms do.
        poses (array of shape `(N, 22 or more, 3)`, *optional*):
            axis-angle in radians, for what the head does; the global orientation is not used.
    """

    def __init__(self, joints: np.ndarray, poses: np.ndarray | None = None):
        joints = np.asarray(joints, dtype=np.float64)
        if joints.ndim != 3 or joints.shape[1] not in _TIPS or joints.shape[2] != 3:
            raise ValueError(
                f"expected `joints` of shape (N, J, 3) with J of {', '.join(map(str, _TIPS))}, got {joints.shape}"
            )
        if not np.isfinite(joints).all():
            raise ValueError("expected finite `joints`, got NaN or infinity; check the poses")
        self.num_poses = len(joints)
        self.points = {
            name.replace("l_", "left ").replace("r_", "right "): joints[:, number]
            for number, name in enumerate(JOINT_NAMES[:22])
        }
        p = self.points
        for side, number in zip(SIDES, (0, 1), strict=True):
            wrist, tips = p[f"{side} wrist"], _TIPS[joints.shape[1]]
            tip = joints[:, tips[number]] if tips else 2 * wrist - p[f"{side} elbow"]
            p[f"{side} hand"] = wrist + _HAND * _unit(tip - wrist)
            for part, (start, end) in _LIMBS.items():
                p[f"{side} {part}"] = (p[f"{side} {start}"] + p[f"{side} {end}"]) / 2
        p["torso"] = (p["pelvis"] + p["neck"] + p["spine3"]) / 3
        p["shoulders"] = (p["left shoulder"] + p["right shoulder"]) / 2
        fingers = [2 * p[f"{side} hand"] - p[f"{side} wrist"] for side in SIDES]
        self._lowest = np.concatenate([joints[:, :22, 1], *(tip[:, 1:2] for tip in fingers)], axis=1).min(1)
        p["head"] = p["head"] + _HEAD * _unit(p["head"] - p["neck"])

        # The torso's own axes. Its left is between the hips' and the shoulders', so a twist counts half.
        up = _unit(p["neck"] - p["pelvis"])
        left = _unit(p["left hip"] - p["right hip"]) + _unit(p["left shoulder"] - p["right shoulder"])
        left = _unit(left - (left * up).sum(-1, keepdims=True) * up)
        self._torso_axes = np.stack([left, up, np.cross(left, up)], axis=1)  # (N, 3, 3), axes in rows
        # The same upright: turned about the vertical as the torso is.
        front = self._torso_axes[:, 2] * (1, 0, 1)
        front = np.where(np.linalg.norm(front, axis=-1, keepdims=True) > 1e-6, _unit(front), [0.0, 0.0, 1.0])
        world_up = np.broadcast_to([0.0, 1.0, 0.0], front.shape)
        self._upright_axes = np.stack([np.cross(world_up, front), world_up, front], axis=1)

        self._tilt = _angle(up, world_up)
        shoulder_line = p["left shoulder"] - p["right shoulder"]
        twist = np.degrees(np.arctan2(shoulder_line[:, 2], shoulder_line[:, 0]))
        self._twist = np.where(self._tilt < _UPRIGHT, twist, np.nan)
        # Somebody lying on the side has no heading, and what is in front of a bent or twisted chest is arguable.
        hips_level = np.abs(_unit(p["left hip"] - p["right hip"])[:, 1]) < 0.7
        self._legs_have_front = hips_level & (self._tilt < _LEGS_BELOW)
        self._arms_have_front = hips_level & (self._tilt < _STEADY) & (np.abs(twist) < 30)
        # One leg may be up in the air; the other carries the hips.
        lowest_ankle = np.minimum(p["left ankle"][:, 1], p["right ankle"][:, 1])
        shoulders, hips = p["shoulders"][:, 1] - lowest_ankle, p["pelvis"][:, 1] - lowest_ankle
        self._stands = (shoulders >= 0.2) & (hips > 0.4)
        self._head_angles = None if poses is None else _head_angles(np.asarray(poses, dtype=np.float64))

    def value(self, kind: str, part1: str, part2: str = "") -> np.ndarray:
        """
        Args:
            kind (`str`): see the class.
            part1, part2 (`str`): parts such as `"left knee"`, or a direction as `part2`.

        Returns:
            `numpy.ndarray` of shape `(N,)`: degrees or metres; NaN where a word about it would mislead.
        """
        p = self.points
        side, bare = part1.split(" ")[0], without_side(part1)
        if kind == "angle":
            ends = {"knee": ("hip", "ankle"), "elbow": ("shoulder", "wrist")}[bare]
            return _angle(*(p[f"{side} {end}"] - p[part1] for end in ends))
        if kind == "slope":
            start, end = ("pelvis", "neck") if bare == "torso" else (f"{side} {joint}" for joint in _LIMBS[bare])
            slope = _angle(p[end] - p[start], np.array([0.0, 1.0, 0.0]))
            return np.minimum(slope, 180 - slope)
        if kind == "height":
            height = p[part1][:, 1] - self._lowest
            if bare != "foot":
                return height
            # A foot in the air says nothing of somebody whose other foot is in the air, too.
            other = p[f"{SIDES[side == 'left']} foot"][:, 1] - self._lowest
            return np.where(np.minimum(height, other) <= 0.1, height, np.nan)
        if kind in ("arm reach", "leg reach"):
            return self._reach(kind, side, part2)
        if kind in ("incline", "lean", "twist", "head x", "head y", "head z"):
            return self._turn(kind)
        if kind in ("tilt", "facing", "left side"):
            axis = self._torso_axes[:, ("left side", "tilt", "facing").index(kind)]
            return _angle(axis, np.array([0.0, 1.0, 0.0]))

        difference = p[part1] - p[part2]
        if kind == "distance":
            return np.linalg.norm(difference, axis=-1)
        if kind == "offset":
            return np.linalg.norm(difference[:, [0, 2]], axis=-1)
        if kind in ("body x", "body z"):
            x, y, z = ((self._torso_axes @ difference[..., None]).squeeze(-1) * (1 if side == "left" else -1, 1, 1)).T
            if kind == "body x":  # only in front: behind the back it is another gesture
                return np.where((z > 0.05) & (np.abs(y) < 0.35), x, np.nan)
            return np.where((np.abs(x) < 0.18) & (y > -0.35) & (y < 0.3), z, np.nan)
        value = difference[:, "xyz".index(kind)]
        has_arm = bool({bare, without_side(part2)} & {"hand", "elbow", "shoulder", "upper arm", "forearm"})
        if kind in ("x", "z"):
            return np.where(self._arms_have_front if has_arm else self._legs_have_front, value, np.nan)
        return np.where(self._has_height(part1, part2), value, np.nan)

    def _has_height(self, part1: str, part2: str) -> np.ndarray:
        """Where a reader would take a difference in height for what it is."""
        p = self.points
        side, bare, other = part1.split(" ")[0], without_side(part1), without_side(part2)
        if bare not in ("hand", "foot", "knee") or is_pair(part1, part2):
            return np.full(self.num_poses, True)
        # Of somebody lying, "above the head" goes along the body.
        is_told = self._tilt < _LEGS_BELOW
        if other == "knee":  # a yardstick where it usually is, and to a foot the one of the leg that stands
            hangs = (p[f"{side} hip"] - p[part2])[:, 1] > 0.15
            stands = (p["pelvis"] - p[f"{SIDES[side == 'left']} ankle"])[:, 1] > 0.6
            is_told &= hangs if bare == "hand" else stands
        return is_told

    def _turn(self, kind: str) -> np.ndarray:
        p = self.points
        if kind.startswith("head"):
            if self._head_angles is None:
                return np.full(self.num_poses, np.nan)
            angles = self._head_angles[:, "xyz".index(kind[-1])]
            # Of a head turned far, the tilts as angles are no longer those that one sees.
            is_seen = (self._tilt < _UPRIGHT) & (np.abs(self._head_angles[:, 1]) <= 30)
            return angles if kind == "head y" else np.where(is_seen, angles, np.nan)
        if kind == "twist":
            return self._twist
        spine = _unit(p["shoulders"] - p["pelvis"])
        # The angle in a plane says little about a spine that is nearly normal to it.
        incline = np.degrees(np.arctan2(spine[:, 2], spine[:, 1]))
        if kind == "incline":
            return np.where(self._stands & (np.hypot(spine[:, 1], spine[:, 2]) > 0.7), incline, 0.0)
        lean = 90 - _angle(spine, np.array([1.0, 0.0, 0.0]))
        # From the front, who also leans forward leans far more than a little.
        is_clear = self._stands & (spine[:, 1] > 0.2) & ((np.abs(incline) < 30) | (np.abs(lean) > 30))
        return np.where(is_clear, lean, 0.0)

    def _reach(self, kind: str, side: str, direction: str) -> np.ndarray:
        """Degrees between a limb and a direction, in the torso's axes and in upright ones: the larger of the two."""
        p = self.points
        start, middle, end = ("shoulder", "elbow", "wrist") if kind == "arm reach" else ("hip", "knee", "ankle")
        limb = p[f"{side} {end}"] - p[f"{side} {start}"]
        vector = np.array(DIRECTIONS[direction]) * (1 if side == "left" else -1, 1, 1)
        is_straight = self.value("angle", f"{side} {middle}") > 145
        if kind == "leg reach":
            other = p[f"{SIDES[side == 'left']} ankle"]
            standing = (p["pelvis"] - other)[:, 1] > 0.6
            return np.where(is_straight & standing & self._legs_have_front, _angle(limb, vector), np.nan)
        in_torso, upright = (
            _angle((axes @ limb[..., None]).squeeze(-1), vector) for axes in (self._torso_axes, self._upright_axes)
        )
        is_upright = (self._tilt < _UPRIGHT) & (np.abs(self._twist) < 40)
        angle = np.where(is_upright, np.maximum(in_torso, upright), in_torso)
        is_flat = (self._tilt >= _LEGS_BELOW) & (self._tilt < 180 - _LEGS_BELOW)
        is_told = is_flat & (direction in _LYING_DIRECTIONS) | is_upright & (direction != "along the body")
        return np.where(is_straight & is_told, angle, np.nan)


def _head_angles(poses: np.ndarray) -> np.ndarray:
    """Degrees `(N, 3)`: tilt, turn and sideways tilt of the head, as Rz Ry Rx; the pelvis' own rotation is left out."""
    rotmats = rotvec_to_rotmat(torch.from_numpy(poses))
    neck = rotmats[:, JOINT_NAMES.index("neck")] @ rotmats[:, JOINT_NAMES.index("head")]
    spine = [rotmats[:, JOINT_NAMES.index(f"spine{number}")] for number in (1, 2, 3)]
    whole = spine[0] @ spine[1] @ spine[2] @ neck

    def euler(rotmat: Tensor) -> np.ndarray:
        x = torch.atan2(rotmat[:, 2, 1], rotmat[:, 2, 2])
        y = torch.atan2(-rotmat[:, 2, 0], torch.hypot(rotmat[:, 2, 1], rotmat[:, 2, 2]))
        z = torch.atan2(rotmat[:, 1, 0], rotmat[:, 0, 0])
        return np.degrees(torch.stack([x, y, z], dim=-1).numpy())

    angles, (by_neck, by_all) = euler(neck), (euler(neck)[:, 1], euler(whole)[:, 1])
    # Turned against the hips and against the chest, or it is not the head that is turned.
    smaller = np.where(np.abs(by_neck) < np.abs(by_all), by_neck, by_all)
    angles[:, 1] = np.where(by_neck * by_all > 0, smaller, 0.0)
    return angles


def pose_codes(
    geometry: Geometry, jitter: float = 0.0, generator: np.random.Generator | None = None
) -> list[list[PoseCode]]:
    """
    Everything that can be told about each pose.

    Args:
        geometry ([`Geometry`]): `N` poses.
        jitter (`float`, *optional*, defaults to 0.0):
            how far thresholds are blurred, as annotators blur them; 1 is 5 degrees and 5 centimetres at most.
        generator (`numpy.random.Generator`, *optional*): of the jitter; needed with one.

    Returns:
        `list[list[PoseCode]]`: of each pose, the most general first.
    """
    values = np.stack([geometry.value(*key) for key in _KEYS], axis=1)
    if jitter:
        if generator is None:
            raise ValueError(f"expected a `generator` for a jitter of {jitter}, got none; pass a seeded one")
        values = values + generator.uniform(-jitter, jitter, values.shape) * _JITTER
    columns = {key: values[:, number] for number, key in enumerate(_KEYS)}

    codes: list[list[PoseCode]] = [[] for _ in range(geometry.num_poses)]
    with np.errstate(invalid="ignore"):  # NaN is on no side of any threshold
        found = [*_posture_codes(columns), *_super_codes(columns)]
    for code, holds in found:
        for number in np.flatnonzero(holds):
            codes[number].append(code)
    for number, key in enumerate(_KEYS):
        if not _TOLD[key]:
            continue
        bins = np.searchsorted(_BINS[key[0]][0], values[:, number])
        for pose in np.flatnonzero(~np.isnan(values[:, number])):
            code = _CODES[number][bins[pose]]
            if code:
                codes[pose].append(code)
    return codes


def _posture_codes(columns: dict[_Key, np.ndarray]) -> list[tuple[PoseCode, np.ndarray]]:
    """What the whole body does, where nothing else could be meant; at most one of each pose."""

    def v(kind: str, part1: str, part2: str = "") -> np.ndarray:
        return columns[kind, part1, part2]

    def both(holds: Callable[[str], np.ndarray]) -> np.ndarray:
        return holds("left") & holds("right")

    def is_low(side: str, part: str) -> np.ndarray:
        return v("height", f"{side} {part}") <= 0.1

    tilt, facing, left_side = (v(kind, "body") for kind in ("tilt", "facing", "left side"))
    pelvis = v("height", "pelvis")
    is_flat = (tilt > 60) & (tilt < 120) & (pelvis < 0.25) & (v("height", "neck") < 0.35)
    is_flat &= both(lambda s: v("height", f"{s} ankle") < 0.6)

    def kneels(side: str) -> np.ndarray:
        hip_over_knee = v("y", f"{side} knee", f"{side} hip") < -0.12
        folded = (v("angle", f"{side} knee") < 135) & (v("z", f"{side} ankle", f"{side} knee") < -0.1)
        return is_low(side, "knee") & hip_over_knee & folded & (tilt < 60)

    def kneels_on_one(side: str) -> np.ndarray:
        other = SIDES[side == "left"]
        planted = (v("height", f"{other} knee") > 0.3) & (v("y", f"{other} ankle", f"{other} knee") < -0.25)
        return kneels(side) & planted & (v("angle", f"{other} knee") < 120)

    # A foot that points down carries nobody: such a body hangs or jumps.
    def is_planted(side: str) -> np.ndarray:
        return is_low(side, "foot") & (v("y", f"{side} ankle", f"{side} foot") < 0.09)

    def stands_on_one(side: str) -> np.ndarray:
        carries = (
            is_planted(side) & (v("angle", f"{side} knee") > 135) & (v("offset", "pelvis", f"{side} foot") < 0.25)
        )
        lifted = v("height", f"{SIDES[side == 'left']} foot") > 0.2
        return carries & lifted & (v("y", "pelvis", f"{side} ankle") > 0.6) & (tilt < 100)

    stands = both(lambda s: is_planted(s) & (v("angle", f"{s} knee") > 135) & (v("y", "pelvis", f"{s} ankle") > 0.6))
    # Nobody stands upright and leans.
    is_upright = (tilt < 15) & (np.abs(v("incline", "body")) <= 20) & (np.abs(v("lean", "body")) <= 15)
    stands &= is_upright & (v("distance", "left foot", "right foot") < 0.5)
    squats = both(lambda s: is_planted(s) & (v("angle", f"{s} knee") < 100) & (v("height", f"{s} knee") > 0.2))
    squats &= (tilt < 60) & (pelvis < 0.65) & both(lambda s: np.abs(v("z", "torso", f"{s} ankle")) < 0.25)
    sits = both(
        lambda s: (
            (np.abs(v("angle", f"{s} knee") - 85) < 40)
            & (v("slope", f"{s} thigh") > 50)
            & (v("y", f"{s} ankle", f"{s} knee") < -0.25)
            & (v("z", "torso", f"{s} ankle") < -0.2)
        )
    )
    sits &= (tilt < _UPRIGHT) & (pelvis > 0.3)
    sits_low = (pelvis < 0.2) & (tilt < 50) & (v("height", "neck") > 0.4)
    crawls = both(lambda s: (v("height", f"{s} knee") < 0.15) & is_low(s, "hand") & (v("slope", f"{s} shin") > 60))
    on_all_fours = crawls & (tilt > 45) & (facing > 110) & (pelvis > 0.3)
    is_inverted = (tilt > 120) & both(lambda s: v("y", "pelvis", f"{s} ankle") < -0.15)

    candidates = [
        ("upside down", "", 9, is_inverted),
        ("lying on", "back", 9, is_flat & (facing < 45)),
        ("lying on", "front", 9, is_flat & (facing > 135)),
        ("lying on", "left side", 9, is_flat & (left_side > 135)),
        ("lying on", "right side", 9, is_flat & (left_side < 45)),
        ("on all fours", "", 9, on_all_fours),
        ("kneeling", "", 9, both(kneels)),
        ("kneeling on", "left", 9, kneels_on_one("left")),
        ("kneeling on", "right", 9, kneels_on_one("right")),
        ("squatting", "", 9, squats),
        ("sitting on the ground", "", 9, sits_low),
        ("sitting", "", 8, sits),
        ("standing", "", 5, stands),
        ("standing on", "left", 8, stands_on_one("left")),
        ("standing on", "right", 8, stands_on_one("right")),
    ]
    taken = np.zeros_like(is_flat)
    postures = []
    for relation, part2, priority, holds in candidates:
        postures.append((PoseCode("body", relation, part2, "super", priority), holds & ~taken))
        taken |= holds
    return postures


def _super_codes(columns: dict[_Key, np.ndarray]) -> list[tuple[PoseCode, np.ndarray]]:
    def v(kind: str, part1: str, part2: str = "") -> np.ndarray:
        return columns[kind, part1, part2]

    codes = []
    tilt = v("tilt", "body")
    is_horizontal = (tilt > 80) & (tilt < 100)
    codes.append((PoseCode("torso", "horizontal", "", "super", 6), is_horizontal))
    for part in ("hand", "foot"):
        pair = f"left {part}", f"right {part}"
        near = v("distance", *pair) < 0.4
        codes.append((PoseCode(plural(part), "crossed", "", "super", 7), near & (v("x", *pair) <= -0.15)))
        # Next to one another: at one height, and neither before the other.
        beside = near & (v("distance", *pair) > 0.2) & (np.abs(v("y", *pair)) < 0.07) & (np.abs(v("z", *pair)) < 0.07)
        codes.append((PoseCode(plural(part), "shoulder width apart", "", "super", 6 - 3 * (part == "foot")), beside))
    is_wide = (np.abs(v("x", "left foot", "right foot")) > 0.5) & (np.abs(v("z", "left foot", "right foot")) < 0.3)
    is_wide &= (v("height", "left foot") <= 0.1) & (v("height", "right foot") <= 0.1)
    codes.append((PoseCode("feet", "spread", "", "super", 5), is_wide))
    for parts in _ALIGNED:
        # Of a left and a right part that are farther apart, one is always to the left: it tells nothing.
        near = v("distance", *parts) <= (0.8 if parts[0].split()[0] == parts[1].split()[0] else 0.4)
        aligned = {axis: near & (np.abs(v(axis, *parts)) <= 0.05) for axis in "xyz"}
        for axis, relations in ALIGNED_RELATIONS.items():
            first, second = (aligned[other] for other in "xyz" if other != axis)
            for sign, relation in zip((-1, 1), relations, strict=True):
                holds = first & second & (v(axis, *parts) * sign > 0.15)
                codes.append((PoseCode(parts[0], relation, parts[1], "super", 1), holds))
    return codes


def to_caption_frame(poses: Tensor) -> Tensor:
    """
    Poses as captions see them: upright ones face +z, whatever their heading was.

    Args:
        poses (`torch.Tensor` of shape `(N, J, 3)`): axis-angle in radians, camera frame.

    Returns:
        `torch.Tensor` of shape `(N, J, 3)`: float64, y up, without the rotation about the vertical.
    """
    facing = turn_frame(remove_yaw(turn_frame(poses.double(), "z-up", inverse=True)), "z-up")
    return turn_frame(facing, "y-up", inverse=True)


def all_codes() -> list[PoseCode]:
    anything = dict.fromkeys(_KEYS, np.zeros(1))
    told = [code for codes in _CODES for code in codes if code]
    return [code for code, _ in (*_posture_codes(anything), *_super_codes(anything))] + told
