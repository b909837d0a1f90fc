"""Motion capture, BVH files and Acclaim's ASF/AMC pairs, as text-to-pose targets: known skeletons drive SMPL's."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..body import JOINT_NAMES, PARENTS, BodyModel
from ..rotations import rotmat_to_rotvec, rotvec_to_rotmat
from .amass import face_camera
from .mocap_files import Capture, load_amc, load_bvh
from .motion_folder import Motion, MotionFolder
from .source import inside


# SMPL's joints, and the names that drive them in CMU's ASF, in CMU's BVH (as cgspeed made them) and in Mixamo's and
# MotionBuilder's BVH; * is the side. A joint without a name is half-way between its neighbours, one with two names
# half-way between those: CMU's forearm turns at a joint of its own. CMU's lowest spine joint is at the pelvis, where
# SMPL has none, and its toes are noise.
_NAMES: dict[str, tuple[str | None, ...]] = {
    "pelvis": ("root", "hips", "hips"),
    "spine1": ("upperback", "spine", "spine"),
    "spine2": ("", "", "spine1"),
    "spine3": ("thorax", "spine1", "spine2"),
    "neck": ("", "", "neck"),
    "head": ("head", "head", "head"),
    "*_hip": ("*femur", "*upleg", "*upleg"),
    "*_knee": ("*tibia", "*leg", "*leg"),
    "*_ankle": ("*foot", "*foot", "*foot"),
    "*_foot": (None, None, "*toebase"),
    "*_collar": ("*clavicle", "*shoulder", "*shoulder"),
    "*_shoulder": ("*humerus", "*arm", "*arm"),
    "*_elbow": ("*radius *wrist", "*forearm *hand", "*forearm"),
    "*_wrist": ("*hand", "*fingerbase", "*hand"),
}
_OPTIONAL = {"l_foot", "r_foot", "l_hand", "r_hand"}
# Joint and child of each bone whose direction is kept, and the cosine of the largest angle to SMPL's in the rest pose:
# legs stand; arms may hang or reach out, but where they cross the body no turn about them is the natural one.
_LIMBS = [
    (JOINT_NAMES.index(f"{side}_{joint}"), JOINT_NAMES.index(f"{side}_{child}"), cosine)
    for side in "lr"
    for joint, child, cosine in (
        ("hip", "knee", 0.5),
        ("knee", "ankle", 0.5),
        ("shoulder", "elbow", -0.5),
        ("elbow", "wrist", -0.5),
    )
]
_CMU_ELBOW = np.radians(-30)  # about the arm, towards the left: from SMPL's elbow hinge, vertical at rest, to CMU's


class _Naming(NamedTuple):
    label: str
    joints: dict[str, str]
    is_cmu: bool = False
    is_smpl: bool = False
    first: int = 0  # the frame in which the motion begins


def _make_namings() -> list[_Naming]:
    def column(number: int, sides: Sequence[str]) -> dict[str, str]:
        return {
            joint.replace("*", letter): name.replace("*", side)
            for letter, side in zip("lr", sides, strict=True)
            for joint, names in _NAMES.items()
            if (name := names[number]) is not None
        }

    mixamo = column(2, ("left", "right"))
    return [
        _Naming("SMPL", {name: name.replace("_", "") for name in JOINT_NAMES}, is_smpl=True),
        _Naming("CMU's ASF", column(0, ("l", "r")), is_cmu=True),
        # Its first frame is a T-pose that was put in.
        _Naming("CMU's BVH", column(1, ("left", "right")), is_cmu=True, first=1),
        _Naming("Mixamo or MotionBuilder", mixamo),
        _Naming("MotionBuilder with two spine joints", {**mixamo, "spine2": "", "spine3": "spine1"}),
    ]


_NAMINGS = _make_namings()


class Rig:
    """
    A captured skeleton that drives SMPL's.

    Each joint of SMPL turns in space as its source does, after a constant rotation from SMPL's rest pose to the
    source's. For thighs, shins, upper arms and forearms that is the smallest one that lays the default body's bone on
    the source's, so that they point on that body as in the source; twists are the source's own, from its rest pose.
    Everything else is taken to rest alike: a torso upright and facing forward by the line of the hips, hands in line
    with the forearms, feet flat.

    Skeletons with SMPL's names are SMPL's: their rotations are taken as they are, y up.

    Args:
        capture ([`Capture`]):
            The skeleton in a rest pose that stands, arms apart or hanging; the axis nearest to the spine is up, in the
            motion too.

    Attributes:
        mask (`list[bool]`): the joints that the skeleton has.
        first (`int`): the frame in which the motion begins.

    Raises:
        ValueError: for joints of unknown names, which are listed, and a rest pose that does not stand.
    """

    def __init__(self, capture: Capture):
        index = {_plain(name): number for number, name in enumerate(capture.names)}
        naming = _find_naming(index, capture.names)
        self._capture = capture
        self._sources = {
            joint: [index[name] for name in naming.joints.get(joint_name, "").split() if name in index]
            for joint, joint_name in enumerate(JOINT_NAMES)
        }
        self.mask = [
            bool(self._sources[joint]) or naming.joints.get(name) == "" for joint, name in enumerate(JOINT_NAMES)
        ]
        self.first = naming.first
        self._upright = np.eye(3)
        self._rest = np.broadcast_to(np.eye(3), (24, 3, 3)).copy()
        if not naming.is_smpl:
            self._align(naming.is_cmu)

    def _align(self, is_cmu: bool) -> None:
        """Finds what turns the source's axes upright, and SMPL's rest pose to the source's."""
        places = {joint: self._capture.rest_joints[sources[0]] for joint, sources in self._sources.items() if sources}
        pelvis, left_hip, right_hip, head = (JOINT_NAMES.index(name) for name in ("pelvis", "l_hip", "r_hip", "head"))
        spine, hips = places[head] - places[pelvis], places[left_hip] - places[right_hip]
        up = np.eye(3)[abs(spine).argmax()] * np.sign(spine[abs(spine).argmax()])
        left = hips - up * (hips @ up)
        if np.linalg.norm(left) < 0.5 * np.linalg.norm(hips) or not left.any() or not up.any():
            raise ValueError(
                f"expected a rest pose that stands, got the spine {spine} and the line of the hips {hips}"
            )
        left /= np.linalg.norm(left)
        axes = np.stack([left, up, np.cross(left, up)], axis=1)  # columns: SMPL's x, y and z in the source's rest pose
        self._upright = axes.T
        for joint, child, least_cosine in _LIMBS:
            ours, theirs = _rest_joints()[child] - _rest_joints()[joint], axes.T @ (places[child] - places[joint])
            length = np.linalg.norm(theirs)
            ours, theirs = ours / np.linalg.norm(ours), theirs / (length or 1.0)
            if not (length and ours @ theirs > least_cosine):
                raise ValueError(
                    "expected a rest pose that stands, arms apart or hanging, got the bone at "
                    f"{JOINT_NAMES[joint]} towards {theirs.round(2)} (x left, y up)"
                )
            turn = _smallest_turn(ours, theirs)
            name = JOINT_NAMES[joint][2:]
            if name == "elbow":
                self._rest[child] = turn
            elif name == "knee" and is_cmu:  # its soles are at right angles to the shins, which are spread
                self._rest[child] = _smallest_turn(np.array([0.0, -1.0, 0.0]), theirs)
            if name in ("shoulder", "elbow") and is_cmu:
                turn = _twist(theirs * np.sign(theirs[0])) @ turn
            self._rest[joint] = turn
        self._rest = axes @ self._rest

    def poses(self, numbers: Sequence[int]) -> np.ndarray:
        """
        Args:
            numbers (`Sequence[int]`): which frames, from 0.

        Returns:
            `np.ndarray` of shape `(N, 24, 3)`: float32 axis-angle, camera frame, without yaw.
        """
        captured = self._upright @ self._capture.rotmats(numbers)
        turned = np.empty((len(captured), 24, 3, 3))
        in_between = []
        for joint, parent in enumerate(PARENTS):
            sources = self._sources[joint]
            if sources:
                turned[:, joint] = captured[:, sources[0]] @ self._rest[joint]
            elif self.mask[joint]:
                in_between.append(joint)
            else:
                turned[:, joint] = turned[:, parent]
            if len(sources) == 2:
                end = captured[:, sources[1]] @ self._rest[PARENTS.index(joint)]
                turned[:, joint] = _halfway(turned[:, joint], end)
        for joint in in_between:
            child = {"spine2": "spine3", "neck": "head"}[JOINT_NAMES[joint]]
            turned[:, joint] = _halfway(turned[:, PARENTS[joint]], turned[:, JOINT_NAMES.index(child)])
        local = turned.copy()
        local[:, 1:] = turned[:, PARENTS[1:]].swapaxes(-1, -2) @ turned[:, 1:]
        return face_camera(rotmat_to_rotvec(torch.from_numpy(local)).numpy(), "y-up")


def _plain(name: str) -> str:
    """`mixamorig:LeftUpLeg`, `Left_Up_Leg` and `leftupleg` are one name."""
    return re.sub(r"^mixamorig\d*|[^a-z0-9]", "", name.rpartition(":")[2].lower())


def _find_naming(index: dict[str, int], names: list[str]) -> _Naming:
    if len(index) < len(names):
        raise ValueError(f"expected joints of different names, got {', '.join(names):.500}")

    def missing(naming: _Naming) -> list[str]:
        return [
            f"{joint} ({name})"
            for joint, name in naming.joints.items()
            if joint not in _OPTIONAL and not all(word in index for word in name.split())
        ]

    nearest = min(_NAMINGS, key=lambda naming: len(missing(naming)))
    if missing(nearest):
        known = "; ".join(f"{naming.label}: {', '.join(filter(None, naming.joints.values()))}" for naming in _NAMINGS)
        raise ValueError(
            f"no joint of the skeleton matches {', '.join(missing(nearest))}; it has {', '.join(names):.500}; "
            f"known names: {known}"
        )
    return nearest


@functools.cache
def _rest_joints() -> np.ndarray:
    return BodyModel.load("default").rest_joints.double().numpy()


def _smallest_turn(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The rotation by the smallest angle, under a half turn, between unit vectors."""
    x, y, z = np.cross(start, end)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + skew + skew @ skew / (1 + start @ end)


def _twist(towards_left: np.ndarray) -> np.ndarray:
    return rotvec_to_rotmat(torch.from_numpy(towards_left * _CMU_ELBOW)).numpy()


def _halfway(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    between = rotmat_to_rotvec(torch.from_numpy(start.swapaxes(-1, -2) @ end))
    return start @ rotvec_to_rotmat(between / 2).numpy()


class MotionCapture(MotionFolder):
    """
    A folder tree of `.bvh` files and `.amc` files; the skeleton of an AMC file is the `.asf` file in its folder that
    its name begins with (`05.asf` of `05_10.amc`), or the only one. Joints are named as in CMU's ASF, in CMU's BVH, by
    Mixamo or MotionBuilder, or as SMPL's, as in our own BVH files; see [`Rig`] for what becomes of them. AMC has 120
    frames a second. Splits, texts and arguments are [`MotionFolder`]'s.
    """

    name = "mocap"
    licence = "motion capture: its owners' terms"
    suffixes = (".bvh", ".amc")

    def load_motion(self, motion: str) -> Motion | None:
        path = inside(self.folder, motion)
        if not os.path.isfile(path):  # `Path.is_file` would raise for a name that is too long
            self.skip("missing motion", motion)
            return None
        if path.suffix.lower() not in self.suffixes:
            self.skip("no BVH or AMC file", motion)
            return None
        if path.suffix.lower() == ".bvh":
            capture = load_bvh(path)
        else:
            skeleton = _find_skeleton(path)
            if skeleton is None:
                self.skip("missing skeleton", motion)
                return None
            capture = load_amc(path, skeleton)
        try:
            rig = Rig(capture)
        except ValueError as error:
            self.skip("unknown skeleton", f"{motion}: {error}")
            return None
        return Motion(capture.num_frames, capture.frame_rate, rig.poses, rig.mask, rig.first)


def _find_skeleton(path: Path) -> Path | None:
    skeletons = sorted(other for other in path.parent.iterdir() if other.suffix.lower() == ".asf")
    # "05_10" is of "05" and "HDM_bd_01" of "HDM_bd", but "10_01" is not of "1".
    named = [other for other in skeletons if re.match(rf"{re.escape(other.stem)}(?![0-9A-Za-z])", path.stem)]
    if len(skeletons) == 1:
        return skeletons[0]
    return max(named, key=lambda other: len(other.stem), default=None)
