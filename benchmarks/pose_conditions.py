"""
What words say of a body, as conditions on where its joints are: bench_understanding.py's judge. In plain NumPy and apart
from data/pose_codes.py, which writes captions that models are trained on.

Tolerances are generous, yet neither a body that stands with hanging arms nor, where a side is named, the mirrored body
fulfils a condition (tests/test_bench_understanding.py).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from chatpose_hf.body import JOINT_NAMES, BodyModel
from chatpose_hf.pose_files import remove_yaw, turn_frame
from chatpose_hf.rotations import rotvec_to_rotmat


POINTS = [*JOINT_NAMES, "nose", "crown"]
_SPINE = ("pelvis", "spine1", "spine2", "spine3", "neck", "head")
_MIRRORED = [POINTS.index({"l_": "r_", "r_": "l_"}.get(name[:2], name[:2]) + name[2:]) for name in POINTS]
# Not the arms: hanging beside a body that sits on the floor they reach below it.
_FLOOR = [number for number, name in enumerate(JOINT_NAMES) if name[2:] not in ("elbow", "wrist", "hand")]
_UP, _FRONT = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])


def make_points(poses: torch.Tensor) -> np.ndarray:
    """
    The default body's joints, the tip of its nose and the crown of its head.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle in radians, camera frame.

    Returns:
        `np.ndarray` of shape `(N, 26, 3)`: metres, y up; the pelvis at the origin, the hips' left towards +x.
    """
    upright = remove_yaw(turn_frame(poses.double(), "z-up", inverse=True))
    joints = BodyModel.load("default").joints(upright)[:, :24].double()
    rotmats = rotvec_to_rotmat(upright[:, [JOINT_NAMES.index(name) for name in _SPINE]])
    head = rotmats[:, 0]
    for level in range(1, len(_SPINE)):
        head = head @ rotmats[:, level]
    ends = [joints[:, 15] + 0.12 * head[..., 2], joints[:, 15] + 0.16 * head[..., 1]]
    x, y, z = torch.cat([joints, torch.stack(ends, dim=1)], dim=1).unbind(-1)
    return torch.stack([x, z, -y], dim=-1).numpy()


def mirror(points: np.ndarray) -> np.ndarray:
    """The points of the mirrored body."""
    return points[..., _MIRRORED, :] * [-1, 1, 1]


def _degrees(first: np.ndarray, second: np.ndarray) -> float:
    cosine = first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-9)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


class Figure:
    """
    A body as seen from one of its sides: `"knee"` is that side's, `"other_knee"` the other's.

    Args:
        points (`np.ndarray` of shape `(26, 3)`): as from [`make_points`].
        side (`str`): `"left"` or `"right"`.

    Attributes:
        up, front, out (`np.ndarray` of shape `(3,)`): the trunk's own directions; `out` is towards the side.
        elbow, knee, other_knee, trunk (`float`): degrees; 180 is straight, of the trunk 0 is upright.
    """

    def __init__(self, points: np.ndarray, side: str):
        names = {"l_": "", "r_": "other_"} if side == "left" else {"r_": "", "l_": "other_"}
        self._at = {
            names.get(name[:2], name[:2]) + name[2:]: point for name, point in zip(POINTS, points, strict=True)
        }
        self.up = self.way("pelvis", "neck")
        self.out = self.way("other_shoulder", "shoulder")
        self.front = np.cross(self.out, self.up) * (1 if side == "left" else -1)
        self.elbow, self.knee = self.bend("shoulder", "elbow", "wrist"), self.bend("hip", "knee", "ankle")
        self.other_knee = self.bend("other_hip", "other_knee", "other_ankle")
        self.trunk = _degrees(self.up, _UP)
        self.sideways = np.array([1.0 if side == "left" else -1.0, 0.0, 0.0])
        self.floor = points[_FLOOR, 1].min()

    def way(self, start: str, end: str) -> np.ndarray:
        """The direction from one point to another."""
        way = self._at[end] - self._at[start]
        return way / max(float(np.linalg.norm(way)), 1e-9)

    def along(self, direction: np.ndarray, start: str, end: str) -> float:
        """How far the second point is from the first in a direction, in metres."""
        return float((self._at[end] - self._at[start]) @ direction)

    def angle(self, start: str, end: str, direction: np.ndarray) -> float:
        return _degrees(self.way(start, end), direction)

    def bend(self, first: str, middle: str, last: str) -> float:
        return _degrees(self.way(middle, first), self.way(middle, last))

    def gap(self, first: str, second: str) -> float:
        return float(np.linalg.norm(self._at[first] - self._at[second]))

    def height(self, name: str) -> float:
        """Above the lowest joint that is not of an arm."""
        return float(self._at[name][1] - self.floor)

    def twist(self) -> float:
        """By how many degrees the shoulders are turned against the hips, towards the side."""
        out = self.way("other_hip", "hip")
        front = np.cross(out, self.up) * self.sideways[0]
        return float(np.degrees(np.arctan2(-(self.out @ front), self.out @ out)))

    def balance(self) -> float:
        """How far the middle of the trunk is before the ankle; far behind it, something else carries the body."""
        return (self.along(_FRONT, "ankle", "pelvis") + self.along(_FRONT, "ankle", "neck")) / 2

    def stands_on_other(self) -> bool:
        """The other leg carries the body."""
        return self.other_knee > 130 and self.angle("other_hip", "other_ankle", -_UP) < 30 and self.trunk < 60


# What must hold on the side that is named, or on both where none is.
CONDITIONS: dict[str, Callable[[Figure], bool]] = {
    "arm_up": lambda f: f.along(_UP, "head", "wrist") > 0.05 and f.elbow > 120,
    "arm_side": lambda f: f.angle("shoulder", "wrist", f.sideways) < 35 and f.elbow > 130,
    "arm_front": lambda f: f.angle("shoulder", "wrist", _FRONT) < 35 and f.elbow > 130,
    "hand_hip": lambda f: (
        f.gap("wrist", "hip") < 0.25
        and f.elbow < 140
        and f.along(f.out, "pelvis", "wrist") > 0.15
        and f.along(f.out, "wrist", "elbow") > 0.05
        and abs(f.along(f.front, "hip", "wrist")) < 0.12
    ),
    "hand_head": lambda f: f.gap("wrist", "crown") < 0.24 and f.along(f.way("head", "crown"), "head", "wrist") > 0.03,
    "hand_other_shoulder": lambda f: f.gap("wrist", "other_shoulder") < 0.22,
    "hand_back": lambda f: (
        f.along(f.front, "spine1", "wrist") < -0.07
        and abs(f.along(f.out, "spine1", "wrist")) < 0.22
        and -0.2 < f.along(f.up, "pelvis", "wrist") < 0.45
    ),
    "elbow_90": lambda f: 65 < f.elbow < 115,
    "hand_knee": lambda f: f.gap("wrist", "knee") < 0.22,
    "hands_chest": lambda f: (
        f.gap("wrist", "other_wrist") < 0.2
        and f.along(f.out, "other_wrist", "wrist") > -0.03
        and f.along(f.front, "spine3", "wrist") > 0.1
        and f.along(f.up, "pelvis", "wrist") > 0.15
        and f.along(f.up, "neck", "wrist") < 0.1
    ),
    "arms_crossed": lambda f: (
        f.along(f.out, "other_wrist", "wrist") < -0.05
        and f.along(f.front, "spine3", "wrist") > 0.05
        and f.along(f.up, "pelvis", "wrist") > 0.1
        and f.along(f.up, "neck", "wrist") < 0.05
    ),
    "touch_toes": lambda f: min(f.gap("wrist", "foot"), f.gap("wrist", "ankle")) < 0.3,
    "knee_up": lambda f: f.along(_UP, "hip", "knee") > -0.2 and f.stands_on_other(),
    "knee_90": lambda f: 65 < f.knee < 115 and f.other_knee > 130,
    "leg_front": lambda f: f.along(_FRONT, "hip", "ankle") > 0.35 and f.knee > 135 and f.stands_on_other(),
    "leg_back": lambda f: f.along(_FRONT, "hip", "ankle") < -0.3 and f.knee > 125 and f.stands_on_other(),
    "leg_side": lambda f: f.way("hip", "ankle") @ f.sideways > 0.4 and f.knee > 135 and f.stands_on_other(),
    "heel_up": lambda f: f.knee < 80 and f.angle("hip", "knee", -_UP) < 40 and f.stands_on_other(),
    "one_leg": lambda f: (
        f.along(_UP, "ankle", "other_ankle") > 0.12 and f.knee > 140 and f.angle("hip", "ankle", -_UP) < 25
    ),
    "lunge": lambda f: (
        f.along(_FRONT, "other_ankle", "ankle") > 0.45
        and f.knee < 145
        and f.height("knee") > 0.2
        and f.height("ankle") < 0.25
        and f.angle("knee", "ankle", -_UP) < 45
        and f.along(_FRONT, "pelvis", "other_ankle") < -0.1
    ),
    "step": lambda f: (
        f.along(_FRONT, "other_ankle", "ankle") > 0.2
        and abs(f.along(_UP, "other_ankle", "ankle")) < 0.25
        and f.height("pelvis") > 0.6
    ),
    "legs_apart": lambda f: (
        f.along(f.sideways, "other_ankle", "ankle") > 0.55 and f.knee > 135 and f.height("pelvis") > 0.5
    ),
    "sit": lambda f: (
        abs(f.angle("hip", "knee", _UP) - 90) < 35
        and f.angle("knee", "ankle", -_UP) < 45
        and f.trunk < 40
        and f.balance() < -0.1
    ),
    "sit_floor": lambda f: f.height("pelvis") < 0.18 and f.trunk < 50 and f.along(_FRONT, "pelvis", "ankle") > 0.1,
    "sit_floor_straight": lambda f: CONDITIONS["sit_floor"](f) and f.knee > 145,
    "sit_cross_legged": lambda f: (
        f.height("pelvis") < 0.18
        and f.trunk < 50
        and f.knee < 110
        and f.gap("knee", "other_knee") > 0.4
        and f.gap("ankle", "other_ankle") < 0.45
    ),
    "kneel": lambda f: (
        abs(f.along(_UP, "knee", "ankle")) < 0.22
        and f.height("knee") < 0.25
        and f.along(_FRONT, "ankle", "knee") > 0.2
        and f.along(_FRONT, "hip", "knee") > -0.25
        and f.trunk < 45
    ),
    "kneel_one": lambda f: (
        abs(f.along(_UP, "knee", "ankle")) < 0.27
        and f.height("knee") < 0.2
        and f.along(_FRONT, "ankle", "knee") > 0.15
        and f.along(_UP, "knee", "other_knee") > 0.2
        and f.angle("other_knee", "other_ankle", -_UP) < 40
        and f.trunk < 50
    ),
    "squat": lambda f: (
        f.knee < 115
        and f.along(_UP, "ankle", "pelvis") < 0.6
        and f.along(_UP, "ankle", "knee") > 0.2
        and f.trunk < 70
        and f.balance() > -0.15
        and f.height("ankle") < 0.2
    ),
    "lie_back": lambda f: abs(f.trunk - 90) < 30 and f.front @ _UP > 0.7 and f.height("pelvis") < 0.35,
    "lie_front": lambda f: abs(f.trunk - 90) < 30 and f.front @ _UP < -0.7 and f.height("pelvis") < 0.3,
    "lie_side": lambda f: abs(f.trunk - 90) < 30 and f.out @ _UP < -0.7,
    "all_fours": lambda f: (
        abs(f.trunk - 90) < 40
        and f.front @ _UP < -0.5
        and max(f.height("knee"), abs(f.height("wrist"))) < 0.22
        and f.height("pelvis") > 0.25
    ),
    "bend_front": lambda f: (
        f.trunk > 40 and f.up @ _FRONT > 0.5 and f.along(_UP, "ankle", "pelvis") > 0.55 and f.knee > 110
    ),
    "lean_front": lambda f: f.up @ _FRONT > 0.22 and f.trunk < 80,
    "lean_back": lambda f: f.up @ _FRONT < -0.2 and f.trunk < 70,
    "lean_side": lambda f: f.up @ f.sideways > 0.2 and f.trunk < 80,
    "twist": lambda f: f.twist() > 15,
    "head_turn": lambda f: f.way("head", "nose") @ f.out > 0.34,
    "head_tilt": lambda f: f.way("head", "crown") @ f.out > 0.2,
    "look_up": lambda f: f.way("head", "nose")[1] > 0.3,
    "look_down": lambda f: f.way("head", "nose")[1] < -0.3,
}


def find_held(points: np.ndarray | None, parts: Sequence[tuple[str, str]]) -> list[bool]:
    """
    Which conditions a body fulfils; none where there is no body.

    Args:
        points (`np.ndarray` of shape `(26, 3)`, *optional*): as from [`make_points`].
        parts (`Sequence[tuple[str, str]]`): of each condition its name and a side, `"left"`, `"right"` or, for both, `""`.
    """
    if points is None:
        return [False] * len(parts)
    figures = {side: Figure(points, side) for side in ("left", "right")}
    return [
        all(bool(CONDITIONS[name](figures[each])) for each in ([side] if side else figures)) for name, side in parts
    ]
