"""Poses from AMASS's motions, or from any folder of such files, as text-to-pose targets: in the camera frame, facing it."""

import math
import os
from pathlib import Path

import numpy as np
import torch

from ..array_files import NpzFields, read_limited, value_errors_only
from ..pose_files import FRAMES, remove_yaw, turn_frame
from .motion_folder import Motion, MotionFolder
from .source import BODY_ONLY_MASK, inside


# The names of each sub-dataset's folder, those of today's downloads first; BABEL and PoseScript have the others too.
SUBSETS = (
    ("ACCAD",),
    ("BMLhandball",),
    ("BMLmovi",),
    ("BMLrub", "BioMotionLab_NTroje"),
    ("CMU",),
    ("DFaust", "DFaust_67"),
    ("DanceDB",),
    ("EKUT",),
    ("EyesJapanDataset", "Eyes_Japan_Dataset"),
    ("HDM05", "MPI_HDM05"),
    ("HumanEva",),
    ("KIT",),
    ("MoSh", "MPI_mosh"),
    ("PosePrior", "MPI_Limits", "MPI_Limits_PosePrior"),
    ("SFU",),
    ("SSM", "SSM_synced"),
    ("TCDHands", "TCD_handMocap"),
    ("TotalCapture",),
    ("Transitions", "Transitions_mocap"),
)
# How many joints there are, by the shape of an array `poses` less its length.
_LAYOUTS = {(156,): 52, (165,): 55, (72,): 24, (24, 3): 24}
_FRAME_RATES = ("mocap_framerate", "mocap_frame_rate")  # SMPL-H's files, SMPL-X's files


def face_camera(poses: np.ndarray, frame: str = "z-up") -> np.ndarray:
    """
    Poses as text-to-pose targets: without yaw, then in the camera frame, where the upright face the viewer.

    Args:
        poses (`np.ndarray` of shape `(N, J, 3)` or `(N, J * 3)`):
            Axis-angle in radians. SMPL's 24 joints, or those of SMPL-H (52) or SMPL-X (55), whose first 22 are the same.
        frame (`str`, *optional*, defaults to `"z-up"`): see [`pose_files.turn_frame`].

    Returns:
        `np.ndarray` of shape `(N, 24, 3)`: float32; identity for the hands (22, 23) if there were no 24 joints.
    """
    # Not by -1, which no pose at all leaves open.
    joints = torch.from_numpy(poses.astype(np.float64).reshape(len(poses), math.prod(poses.shape[1:]) // 3, 3))
    if joints.shape[1] != 24:
        joints = torch.cat([joints[:, :22], torch.zeros_like(joints[:, :2])], dim=1)
    if frame != "z-up":
        joints = turn_frame(turn_frame(joints, frame), "z-up", inverse=True)
    return turn_frame(remove_yaw(joints), "z-up").float().numpy()


def subset_names(motion: str) -> tuple[str, ...]:
    """All names of the sub-dataset that a motion, `"sub-dataset/subject/sequence"`, is of, today's first."""
    first = motion.split("/")[0]
    return next((names for names in SUBSETS if first in names), (first,))


def find_motion(folder: Path, motion: str) -> Path | None:
    """
    A motion's file under AMASS's folder, whichever of its names the sub-dataset has there; `None` where there is none.

    Raises:
        ValueError: for a name that leads out of the folder.
    """
    parts = inside(folder, motion).relative_to(folder).parts
    first = "".join(parts[:1])
    paths = [Path(folder, name, *parts[1:]) for name in (first, *subset_names(first))]
    # `Path.is_file` would raise for a name that is too long.
    return next((path for path in paths if os.path.isfile(path)), None)


class AmassMotions(MotionFolder):
    """
    A folder tree of `.npz` motions, with `poses` (T, 156) as in AMASS's SMPL+H files, (T, 165) as in its SMPL-X files (both
    z up), or (T, 72) or (T, 24, 3) of SMPL; and `mocap_framerate` (or `mocap_frame_rate`), Hz. Splits and texts are
    [`MotionFolder`]'s; texts may have AMASS's sub-datasets under any of their names.

    Args:
        folder (`str` or `Path`): the tree.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        seconds (`float`, *optional*, defaults to 0.5): between the poses taken from a motion.
        frame (`str`, *optional*):
            `"camera"`, `"y-up"` or `"z-up"`, the frame of all poses; files of SMPL's 24 joints do not say it themselves.
    """

    name = "amass"
    licence = (
        "AMASS: non-commercial scientific research only (amass.is.tue.mpg.de); other motions: their owners' terms"
    )
    suffixes = (".npz",)

    def __init__(self, folder: str | Path, seed: int = 0, seconds: float = 0.5, frame: str | None = None):
        super().__init__(folder, seed, seconds)
        if frame is not None and frame not in FRAMES:
            raise ValueError(f"expected `frame` to be one of {', '.join(FRAMES)}, got {frame!r}")
        self.frame = frame

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "frame": self.frame}

    def load_motion(self, motion: str) -> Motion | None:
        path = find_motion(self.folder, motion)
        if path is None:
            self.skip("missing motion", motion)
            return None
        with value_errors_only(f"`{path}`"):
            fields = NpzFields(read_limited(path))
            stored = fields.read("poses") if "poses" in fields.names else None
            rate = next((fields.read(name).item() for name in _FRAME_RATES if name in fields.names), 0.0)
        if stored is None:
            self.skip("no `poses` in the file", motion)
            return None
        num_joints = _LAYOUTS.get(stored.shape[1:])
        if num_joints is None:
            self.skip("`poses` not of shape (T, 156), (T, 165), (T, 72) or (T, 24, 3)", f"{motion}: {stored.shape}")
            return None
        frame = self.frame or ("z-up" if num_joints != 24 else None)
        if frame is None:
            self.skip("SMPL poses of no stated frame: `AmassMotions(folder, frame=...)` states it", motion)
            return None
        mask = None if num_joints == 24 else BODY_ONLY_MASK
        return Motion(len(stored), rate, lambda numbers: face_camera(stored[numbers], frame), mask)
