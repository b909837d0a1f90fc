"""Bodies: SMPL joint rotations in, joints and vertices out, in metres.

Two sources, one class: the default body of `assets/`, which needs no licence and no download, and SMPL, SMPL-H or SMPL-X
from the user's own file. The rest skeletons differ, so a distance between joints belongs to a body: state `BodyModel.name`
beside every figure in millimetres.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .rotations import rotvec_to_rotmat
from .smpl_files import load_smpl_file


# SMPL's order; the first 22 are the same in SMPL-H and SMPL-X.
# fmt: off
JOINT_NAMES = [
    "pelvis", "l_hip", "r_hip", "spine1", "l_knee", "r_knee", "spine2", "l_ankle", "r_ankle", "spine3", "l_foot", "r_foot",
    "neck", "l_collar", "r_collar", "head", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow", "l_wrist", "r_wrist",
    "l_hand", "r_hand",
]
# fmt: on
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
_NUM_SHARED_JOINTS = 22
_FINGERS = [
    f"{side}_{finger}{n}"
    for side in "lr"
    for finger in ("index", "middle", "pinky", "ring", "thumb")
    for n in (1, 2, 3)
]

DEFAULT_BODY_FILE = Path(__file__).parent / "assets" / "default_body.npz"
SMPL_MODEL_DIR = "SMPL_MODEL_DIR"  # the environment variable
_REGISTRATION = {
    "smpl": "https://smpl.is.tue.mpg.de",
    "smplx": "https://smpl-x.is.tue.mpg.de",
    "smplh": "https://mano.is.tue.mpg.de",
}


class BodyModel(nn.Module):
    """
    A skinned body with beta = 0 (or the given shape), driven by SMPL joint rotations; differentiable, on any device.

    Its buffers are not persistent: no `state_dict` and no checkpoint ever holds a licensed array.

    Poses are axis-angle in radians, `(..., 24, 3)` or flat `(..., 72)`, or rotation matrices, `(..., 24, 3, 3)`; each
    rotation is relative to the parent joint, joint 0 is the global orientation. Poses of 52 (SMPL-H, AMASS) or 55
    (SMPL-X) joints are welcome on every body: joints 0 to 21 are the same everywhere, the rest is used by a body of as
    many joints and left out by others, whose hands stay flat. Output is in the frame that the global orientation leads
    to; with identity, y is up, the body faces +z, its left is at +x. There is no translation: the pelvis stays where
    the rest body has it.

    Attributes:
        name (`str`): which body, for figures and files.
        joint_names (`list[str]`), parents (`tuple[int, ...]`): of the `J` joints; the root's parent is -1.
        faces (`torch.Tensor` of shape `(F, 3)`): triangles, counter-clockwise seen from outside.

    Example:

    ```python
    body = BodyModel.load()
    vertices = body.vertices(reply["poses"][0]["theta"])  # (V, 3), camera frame
    ```
    """

    faces: Tensor
    rest_vertices: Tensor
    rest_joints: Tensor
    weights: Tensor
    pose_offsets: Tensor | None
    _bones: Tensor
    _skinning: Tensor
    _is_ancestor: Tensor
    _by_depth: Tensor
    _from_by_depth: Tensor
    _parent_in_level: Tensor
    _parents: Tensor

    def __init__(
        self,
        name: str,
        rest_vertices: Tensor,
        rest_joints: Tensor,
        weights: Tensor,
        faces: Tensor,
        parents: Sequence[int],
        joint_names: Sequence[str],
        pose_offsets: Tensor | None = None,
    ):
        """
        Args:
            name (`str`): which body.
            rest_vertices (`torch.Tensor` of shape `(V, 3)`), rest_joints (`torch.Tensor` of shape `(J, 3)`): metres.
            weights (`torch.Tensor` of shape `(V, J)`): skinning weights; rows sum to 1.
            faces (`torch.Tensor` of shape `(F, 3)`), parents, joint_names: see the class.
            pose_offsets (`torch.Tensor` of shape `(9 (J - 1), 3 V)`, *optional*): SMPL's pose blend shapes.
        """
        super().__init__()
        self.name = name
        self.parents = tuple(parents)
        self.joint_names = list(joint_names)
        num_joints = len(self.parents)

        depth = [0] * num_joints
        is_ancestor = torch.eye(num_joints)
        for joint, parent in enumerate(self.parents[1:], start=1):
            depth[joint] = depth[parent] + 1
            is_ancestor[joint] += is_ancestor[parent]
        # Joints of one depth hang on joints that are done: one product for each depth instead of one for each joint.
        self._level_sizes = [depth.count(level) for level in range(max(depth) + 1)]
        by_depth = sorted(range(num_joints), key=depth.__getitem__)
        level_starts = [0, *accumulate(self._level_sizes)]
        parent_in_level = [by_depth.index(self.parents[j]) - level_starts[depth[j] - 1] for j in by_depth[1:]]
        bones = rest_joints.clone()
        bones[1:] -= rest_joints[list(self.parents[1:])]
        # sum_j w_j (R_j v + t_j) = sum_j [R_j t_j] (w_j [v 1]): one product for all poses instead of a matrix a vertex.
        skinning = (weights[..., None] * nn.functional.pad(rest_vertices, (0, 1), value=1.0)[:, None]).flatten(1).T
        if pose_offsets is not None:
            pose_offsets = pose_offsets.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
        for buffer_name, value in {
            "rest_vertices": rest_vertices,
            "rest_joints": rest_joints,
            "weights": weights,
            "faces": faces,
            "pose_offsets": pose_offsets,
            "_bones": bones,
            "_skinning": skinning.contiguous(),
            "_is_ancestor": is_ancestor.to(rest_joints),
            "_by_depth": torch.tensor(by_depth),
            "_from_by_depth": torch.tensor(by_depth).argsort(),
            "_parent_in_level": torch.tensor([0, *parent_in_level]),
            "_parents": torch.tensor([0, *self.parents[1:]]),
        }.items():
            self.register_buffer(buffer_name, value, persistent=False)

    @classmethod
    def load(
        cls, source: str | Path | None = None, gender: str = "neutral", betas: Sequence[float] | Tensor | None = None
    ) -> "BodyModel":
        """
        Args:
            source (`str` or `Path`, *optional*):
                `"default"`, the body of the package; `"smpl"`, `"smplh"` or `"smplx"`, found under the folder that the
                environment variable `SMPL_MODEL_DIR` names; or a path, a model file or a folder of them. Left out, it
                is what `SMPL_MODEL_DIR` holds where that is set (SMPL, else SMPL-X, else SMPL-H), and the default body
                otherwise.
            gender (`str`, *optional*, defaults to `"neutral"`): which file is looked for: neutral, male or female.
            betas (`Sequence[float]`, *optional*): shape of an SMPL-family body; zeros by default.

        Raises:
            FileNotFoundError: where a licensed file is asked for and absent; says where it was looked for, where to
                register, and that the default body needs no file.
            ValueError: for a file that is no body model, and for `betas` of the default body, which has one shape.
        """
        directory = os.environ.get(SMPL_MODEL_DIR)
        if source is None:
            source = directory or "default"
        if source == "default":
            if betas is not None:
                raise ValueError("expected no `betas`, got some: the default body has one shape; name an SMPL file")
            return cls._load_default()
        if str(source) in _REGISTRATION:
            path = _find_model_file(Path(directory) if directory else None, [str(source)], gender)
        elif Path(source).is_dir() or not Path(source).exists():
            path = _find_model_file(Path(source), list(_REGISTRATION), gender)
        else:
            path = Path(source)
        return cls._load_smpl(path, betas)

    @classmethod
    def _load_default(cls) -> "BodyModel":
        with np.load(DEFAULT_BODY_FILE, allow_pickle=False) as arrays:
            weights = torch.from_numpy(arrays["W"]).float()
            return cls(
                name="default",
                rest_vertices=torch.from_numpy(arrays["v"]),
                rest_joints=torch.from_numpy(arrays["J"]),
                weights=weights / weights.sum(-1, keepdim=True),  # the file's are float16
                faces=torch.from_numpy(arrays["f"]).long(),
                parents=PARENTS,
                joint_names=JOINT_NAMES,
            )

    @classmethod
    def _load_smpl(cls, path: Path, betas: Sequence[float] | Tensor | None) -> "BodyModel":
        from smplx import SMPLLayer
        from smplx.lbs import blend_shapes, vertices2joints
        from smplx.utils import Struct

        arrays = load_smpl_file(path)
        betas = torch.zeros(10) if betas is None else torch.as_tensor(betas, dtype=torch.float32).flatten()
        # The number of joints tells the kind; smplx would guess it from the file's name.
        num_joints = arrays["weights"].shape[1]
        kinds = {
            24: ("SMPL", JOINT_NAMES),
            52: ("SMPL-H", JOINT_NAMES[:_NUM_SHARED_JOINTS] + _FINGERS),
            55: ("SMPL-X", [*JOINT_NAMES[:_NUM_SHARED_JOINTS], "jaw", "l_eye", "r_eye", *_FINGERS]),
        }
        if num_joints not in kinds:
            raise ValueError(
                f"expected a body of 24 (SMPL), 52 (SMPL-H) or 55 (SMPL-X) joints, got {num_joints} in {path}"
            )
        kind, joint_names = kinds[num_joints]
        # SMPLLayer reads what the three kinds share. SMPLXLayer (0.1.28) would ignore `data_struct` and unpickle the path.
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning for every model of 10 shape numbers
            layer = SMPLLayer("", data_struct=Struct(**arrays), num_betas=len(betas))
        # smplx knows which of SMPL-X's directions are expressions; of other files with under 300 it would use 10 only.
        most = layer.num_betas if num_joints == 55 else arrays["shapedirs"].shape[-1]
        if len(betas) > most or not torch.isfinite(betas).all():
            raise ValueError(f"expected at most {most} finite `betas` for {path}, got {len(betas)}: {betas.tolist()}")
        shapedirs = torch.from_numpy(arrays["shapedirs"][..., : len(betas)])
        rest_vertices = layer.v_template + blend_shapes(betas[None], shapedirs)[0]
        return cls(
            name=f"{kind} ({path.name})",
            rest_vertices=rest_vertices,
            rest_joints=vertices2joints(layer.J_regressor, rest_vertices[None])[0],
            weights=layer.lbs_weights,
            faces=layer.faces_tensor,
            parents=layer.parents.tolist(),
            joint_names=joint_names,
            pose_offsets=layer.posedirs,
        )

    @property
    def num_joints(self) -> int:
        return len(self.parents)

    def joints(self, pose: Tensor) -> Tensor:
        """
        Args:
            pose (`torch.Tensor`): see the class.

        Returns:
            `torch.Tensor` of shape `(..., J, 3)`, metres.
        """
        rotmats, leading = self._local_rotmats(pose)
        joints = self._pose_skeleton(rotmats)[1]
        return joints.reshape(*leading, *joints.shape[1:])

    def vertices(self, pose: Tensor) -> Tensor:
        """
        Args:
            pose (`torch.Tensor`): see the class.

        Returns:
            `torch.Tensor` of shape `(..., V, 3)`, metres, by linear blend skinning.
        """
        rotmats, leading = self._local_rotmats(pose)
        world_rotmats, joints = self._pose_skeleton(rotmats)
        shifts = joints - (world_rotmats @ self.rest_joints[..., None]).squeeze(-1)
        # From here vertices come last: each product is one large matrix product for all poses.
        transforms = torch.cat([world_rotmats, shifts[..., None]], dim=-1).transpose(1, 2)  # (N, 3, J, 4)
        vertices = (transforms.reshape(3 * len(rotmats), 4 * self.num_joints) @ self._skinning).unflatten(0, (-1, 3))
        if self.pose_offsets is not None:
            bends = rotmats[:, 1:] - torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)
            offsets = (bends.flatten(1) @ self.pose_offsets).unflatten(1, (3, -1))
            turns = world_rotmats.flatten(2).transpose(1, 2).reshape(9 * len(rotmats), self.num_joints)
            turns = (turns @ self.weights.T).unflatten(0, (-1, 3, 3))
            for axis in range(3):
                vertices = torch.addcmul(vertices, turns[:, :, axis], offsets[:, axis : axis + 1])
        vertices = vertices.transpose(1, 2).contiguous()
        return vertices.reshape(*leading, *vertices.shape[1:])

    def _local_rotmats(self, pose: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Rotation matrices `(N, J, 3, 3)` of this body's joints, and the leading shape."""
        pose = torch.as_tensor(pose)  # NumPy arrays too
        sizes = {24, 52, 55}
        if pose.shape[-2:] == (3, 3) and pose.ndim > 2 and pose.shape[-3] in sizes:
            rotmats = pose
        elif pose.shape[-1:] == (3,) and pose.ndim > 1 and pose.shape[-2] in sizes:
            rotmats = rotvec_to_rotmat(pose)
        elif pose.ndim and pose.shape[-1] in {3 * size for size in sizes}:
            rotmats = rotvec_to_rotmat(pose.unflatten(-1, (-1, 3)))
        else:
            raise ValueError(
                "expected a pose as axis-angle of shape (..., 24, 3) or (..., 72), or rotation matrices of shape "
                f"(..., 24, 3, 3), got {tuple(pose.shape)}"
            )
        leading = rotmats.shape[:-3]
        rotmats = rotmats.to(self.rest_joints.dtype).reshape(-1, *rotmats.shape[-3:])
        if rotmats.shape[1] != self.num_joints:
            rest = torch.eye(3, dtype=rotmats.dtype, device=rotmats.device)
            rest = rest.expand(len(rotmats), self.num_joints - _NUM_SHARED_JOINTS, 3, 3)
            rotmats = torch.cat([rotmats[:, :_NUM_SHARED_JOINTS], rest], dim=1)
        return rotmats, leading

    def _pose_skeleton(self, rotmats: Tensor) -> tuple[Tensor, Tensor]:
        """Local rotations `(N, J, 3, 3)` to rotations in the body's frame, same shape, and joints `(N, J, 3)`."""
        local_levels = rotmats.index_select(1, self._by_depth).split(self._level_sizes, dim=1)
        parent_levels = self._parent_in_level.split(self._level_sizes)
        levels = [local_levels[0]]
        for local, parents in zip(local_levels[1:], parent_levels[1:], strict=True):
            levels.append(levels[-1].index_select(1, parents) @ local)
        world_rotmats = torch.cat(levels, dim=1).index_select(1, self._from_by_depth)
        # A joint stands at the sum of the bones above it, each turned as the joint it hangs on; the root's own bone is
        # its place, which nothing turns.
        bones = (world_rotmats.index_select(1, self._parents) @ self._bones[..., None]).squeeze(-1)
        bones = torch.cat([self._bones[:1].expand(len(bones), 1, 3), bones[:, 1:]], dim=1)
        return world_rotmats, self._is_ancestor @ bones


def placed_joints(known: Tensor) -> Tensor:
    """
    Which joints stand where they should, of poses that are known in part: a joint's own rotation does not move it, those
    of all joints above it do.

    Args:
        known (`torch.Tensor` of shape `(..., 24)`, bool): the joints whose rotation is known.

    Returns:
        `torch.Tensor` of shape `(..., 24)`, bool; the root is placed where anything is known.
    """
    placed = known.any(-1, keepdim=True).repeat_interleave(len(PARENTS), -1)
    for joint, parent in enumerate(PARENTS[1:], start=1):
        placed[..., joint] = placed[..., parent] & known[..., parent]
    return placed


def _find_model_file(directory: Path | None, kinds: list[str], gender: str) -> Path:
    letters = {"neutral": "neutral", "male": "m", "female": "f"}
    if gender not in letters:
        raise ValueError(f"expected gender neutral, male or female, got {gender!r}")
    stems = {
        "smpl": [f"smpl_{gender}", *(f"basicmodel_{letters[gender]}_lbs_10_207_0_v1.{n}.0" for n in (1, 0))],
        "smplh": [f"smplh_{gender}"],
        "smplx": [f"smplx_{gender}", f"smplx_{gender}_2020"],
    }
    looked_for = [
        (folder, f"{stem}{suffix}")
        for kind in kinds
        for folder in ((directory, directory / kind) if directory else ())
        for stem in stems[kind]
        for suffix in (".npz", ".pkl")
    ]
    if directory and "smplh" in kinds:  # as AMASS's site has it, a folder for each gender
        looked_for += [(folder / gender, "model.npz") for folder in (directory, directory / "smplh")]
    for folder, file_name in looked_for:
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.name.lower() == file_name:
                    return path
    kind = kinds[0]
    places = (
        ", ".join(dict.fromkeys(str(folder) for folder, _ in looked_for))
        or f"nowhere, for the environment variable {SMPL_MODEL_DIR} is not set"
    )
    raise FileNotFoundError(
        f"no {kind.upper()} body model: expected a file {kind.upper()}_{gender.upper()}.npz or .pkl, looked in {places}. "
        f"Register at {_REGISTRATION[kind]}, download it, and pass its path or set {SMPL_MODEL_DIR} to its folder. "
        'The default body ("default") needs no file'
    )
