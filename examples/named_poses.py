"""
Sixteen poses written down joint by joint, and one picture of them all: what the numbers mean.

    python examples/named_poses.py docs/poses.png

Hardware: any CPU. Time: 3 seconds.
"""

import sys

import torch

from chatpose_hf.body import BodyModel
from chatpose_hf.data.key_poses import make_pose
from chatpose_hf.export import save_poses


def both(**turns: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
    """The left joints named, and the right ones as in a mirror."""
    left = {f"l_{name}": turn for name, turn in turns.items()}
    return left | {f"r_{name}": (x, -y, -z) for name, (x, y, z) in turns.items()}


# Degrees about x, y, z of each joint that is not at rest (the rest pose is a T: y up, facing +z, the left at +x). Plus z
# lifts the left arm, minus y takes it forward; minus x lifts a thigh, plus x bends a knee.
ARMS_DOWN = both(shoulder=(0, 0, -75))
POSES = {
    "T-pose": {},
    "standing, arms down": ARMS_DOWN,
    "arms up": both(collar=(0, 0, 20), shoulder=(0, 0, 65)),
    "left arm raised": {**ARMS_DOWN, "l_collar": (0, 0, 20), "l_shoulder": (0, 0, 65)},
    "right arm forward": {**ARMS_DOWN, "r_shoulder": (0, 85, 0)},
    "hands on hips": both(shoulder=(30, 8, -53), elbow=(25, -83, -27), wrist=(0, -15, 6)),
    "sitting": ARMS_DOWN | both(hip=(-90, -8, 0), knee=(90, 0, 0)),
    "sitting cross-legged": both(shoulder=(5, -20, -62), elbow=(0, -37, 4), ankle=(55, 0, 0))
    | {"l_hip": (-99, 77, -16), "l_knee": (140, 30, -19), "r_hip": (-100, -81, 16), "r_knee": (122, -31, 20)},
    "kneeling on the right knee": ARMS_DOWN
    | {"l_hip": (-110, 0, 0), "l_knee": (110, 0, 0), "r_knee": (90, 0, 0), "r_ankle": (45, 0, 0)},
    "kneeling on both knees": ARMS_DOWN | both(knee=(90, 0, 0), ankle=(60, 0, 0)),
    "squatting, arms forward": {"pelvis": (25, 0, 0)}
    | both(hip=(-110, -15, 0), knee=(120, 0, 0), ankle=(-30, 0, 0), shoulder=(0, -85, 15)),
    "bowing": ARMS_DOWN | {"spine1": (35, 0, 0), "spine2": (25, 0, 0), "spine3": (15, 0, 0), "neck": (15, 0, 0)},
    "standing on the left leg": {**ARMS_DOWN, "r_hip": (-80, 0, 0), "r_knee": (100, 0, 0)},
    "running": both(elbow=(0, -85, 0))
    | {"pelvis": (12, 0, 0), "l_shoulder": (0, 45, -70), "r_shoulder": (0, 45, 70)}
    | {"l_hip": (-65, 0, 0), "l_knee": (80, 0, 0), "r_hip": (25, 0, 0), "r_knee": (70, 0, 0)},
    "head turned to the left": {**ARMS_DOWN, "neck": (0, 30, 0), "head": (0, 35, 0)},
    "lying on the back": {**ARMS_DOWN, "pelvis": (-90, 0, 0)},
}


if __name__ == "__main__":
    poses = torch.stack([make_pose(turns) for turns in POSES.values()])
    save_poses(sys.argv[1], poses, list(POSES), BodyModel.load("default"))
