"""How far a predicted body is from the true one, by the field's protocols, each under its name."""

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .array_files import load_array_pickle, read_limited, value_errors_only
from .body import JOINT_NAMES, PARENTS, SMPL_MODEL_DIR, BodyModel, placed_joints
from .data.source import Truth
from .metrics import (
    align_by_similarity,
    auc_percent,
    global_orient_deg,
    mpjae_deg,
    mpjpe_mm,
    mpjre_deg,
    mpjre_rad_x100,
    pa_mpjpe_mm,
    pck_percent,
    pve_mm,
)


# Among the 19 joints that HMR2's evaluation files hold, numbers 25 to 43 of its 44: ankles, knees, hips, wrists, elbows,
# shoulders, LSP's neck, Human3.6M's head; and MPII's pelvis (4D-Humans' [25..37, 43] and 39).
_HMR2_JOINTS = (*range(13), 18)
_HMR2_PELVIS = 14
_NUM_HMR2 = 19
# Rows of the 17-joint regressor in the order of those 14 joints (SPIN's H36M_TO_J14); row 0 is the pelvis.
_SPIN_ROWS = (6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10)
_NUM_SHARED = 22  # SMPL's joints that SMPL-X has too
_REGRESSOR_FILES = {19: "SMPL_to_J19.pkl of 4D-Humans' data", 17: "J_regressor_h36m.npy of SPIN's data"}
_CHUNK = 64  # bodies at once: the vertices of thousands would not fit into memory


class Protocol(NamedTuple):
    """
    What a protocol needs, and in words what it measures.

    Args:
        text (`str`): for results.json.
        regressor_rows (`int`): of the regressor from vertices to joints; 0 where the body's own joints are taken.
        needs_truth (`bool`): whether the data set's files are needed beside the rows.
    """

    text: str
    regressor_rows: int
    needs_truth: bool


PROTOCOLS = {
    "smpl-24": Protocol(
        "SMPL's 24 joints, from the pelvis; both sides pose one body with beta = 0, so the figures hold no error of shape. "
        "Joints that the row does not know are left out.",
        0,
        False,
    ),
    "3dpw-24": Protocol(
        "3DPW's own: 24 SMPL joints, from the pelvis; truth: the gendered body with its shape; prediction: the neutral "
        "body with beta = 0. MPJAE over 9 joints' accumulated orientations, PCK at 50 mm and AUC over 12 joints. The "
        "official scorer takes all splits together.",
        0,
        True,
    ),
    "hmr2-14": Protocol(
        "HMR2's (4D-Humans): 14 of the 19 stored joints, from MPII's pelvis; truth: `extra_keypoints_3d`; prediction: "
        "the neutral body with beta = 0 through the 19-joint regressor. PVE, against the gendered body, where its file is "
        "there.",
        19,
        True,
    ),
    "spin-14": Protocol(
        "SPIN's: 14 joints of the Human3.6M regressor, from its pelvis; truth: the gendered body through the same "
        "regressor, or motion capture where the data set has that (Human3.6M); prediction: the neutral body with "
        "beta = 0.",
        17,
        True,
    ),
    "rpe-22": Protocol(
        "RPE-Refined's: the first 22 SMPL joints, from the pelvis; truth: `fitted_joint_cam`; prediction: the body's "
        "joints with beta = 0 (the authors regressed SMPL-X's from its posed vertices).",
        0,
        True,
    ),
}


class Targets(NamedTuple):
    """
    What is true of `N` people.

    Args:
        rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): camera frame; the rest pose where nobody knows.
        mask (`torch.Tensor` of shape `(N, 24)`, bool): the rotations that are known.
        truths (`list[Truth]`, *optional*): what the data set says beside the poses.
    """

    rotmats: Tensor
    mask: Tensor
    truths: list[Truth] | None

    def select(self, items: slice) -> "Targets":
        return Targets(self.rotmats[items], self.mask[items], None if self.truths is None else self.truths[items])


class PoseRuler:
    """
    Measures poses by a protocol.

    Args:
        protocol (`str`): one of `PROTOCOLS`.
        body (`str`, *optional*): the predictions' body, as for [`BodyModel.load`].
        regressor (`str` or `Path`, *optional*):
            `.npy` or `.pkl` with an array (19 or 17, V): `SMPL_to_J19.pkl` (HMR2) or `J_regressor_h36m.npy` (SPIN).

    Attributes:
        body ([`BodyModel`]): the predictions' body.
        protocol ([`Protocol`]): what it is.

    Raises:
        ValueError: where there is no such protocol, or not what it needs.
    """

    def __init__(self, protocol: str, body: str | None = None, regressor: str | Path | None = None):
        if protocol not in PROTOCOLS:
            raise ValueError(f"expected a protocol of {', '.join(PROTOCOLS)}, got {protocol!r}")
        self.name = protocol
        self.protocol = PROTOCOLS[protocol]
        self._source = body or os.environ.get(SMPL_MODEL_DIR) or None
        self.body = BodyModel.load(self._source)
        rows = self.protocol.regressor_rows
        if rows and regressor is None:
            raise ValueError(f"expected a regressor for {protocol}, {_REGRESSOR_FILES[rows]}, got none")
        if regressor is not None and not rows:
            raise ValueError(
                f"expected no regressor for {protocol}, which takes the body's own joints, got {regressor}"
            )
        shape = (rows, len(self.body.rest_vertices))
        self._regressor = None if regressor is None else _load_regressor(Path(regressor), shape)
        # Not SMPL-X's jaw and eyes, which stand where SMPL has hands.
        self._shared = [joint for joint, name in enumerate(JOINT_NAMES) if self.body.joint_names[joint] == name]
        # Shapes are SMPL's; SMPL-H, of as many vertices, has others.
        is_smpl = self.body.name != "default" and len(self._shared) == len(JOINT_NAMES)
        if protocol not in ("smpl-24", "rpe-22") and not is_smpl:
            raise ValueError(f"expected SMPL as the body of {protocol}, got {self.body.name}")
        self._find_true_body = lru_cache(maxsize=8)(self._load_true_body)

    @property
    def description(self) -> str:
        """What is measured, for results.json."""
        is_partial = self.name == "smpl-24" and len(self._shared) < len(JOINT_NAMES)
        partial = f" Here {len(self._shared)} of them, which {self.body.name} has too." if is_partial else ""
        return f"{self.name}: {self.protocol.text}{partial}"

    def check(self, targets: Targets) -> None:
        """
        Raises:
            ValueError: where the protocol needs a truth that is not there.
            FileNotFoundError: where it needs the body of a gender that is not there.
        """
        truths = targets.truths
        is_known = targets.mask[:, 0] if self.name == "smpl-24" else targets.mask.all(1)
        if self.protocol.needs_truth and truths is None:
            raise ValueError(
                f"expected the data set's own files for {self.name}, which say more than rows do, got none"
            )
        if self.name in ("smpl-24", "3dpw-24") and not is_known.all():
            raise ValueError(
                f"expected rows with known poses for {self.name}, got {int((~is_known).sum())} of {len(is_known)} without; "
                "hmr2-14 and spin-14 compare with stored joints"
            )
        if self.name == "3dpw-24" and not self._poses_truth(targets):
            raise ValueError("expected shape and gender of everybody for 3dpw-24, and the data set has none")
        needs_joints = self.name in ("hmr2-14", "rpe-22")
        if self.name == "spin-14" and not self._poses_truth(targets):
            if targets.mask.any():
                raise ValueError(
                    "expected for spin-14 pose, shape and gender of everybody, or, for motion capture's joints as the truth, "
                    "nobody's pose, got neither; evaluate people of both kinds apart"
                )
            needs_joints = True
        if needs_joints:
            _stored_joints(truths, len(JOINT_NAMES) if self.name == "rpe-22" else _NUM_HMR2, self.name)

    def measure(self, rotmats: Tensor, targets: Targets) -> dict[str, Tensor]:
        """
        Args:
            rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): predictions, camera frame.
            targets ([`Targets`]): of the same people.

        Returns:
            `dict[str, torch.Tensor]` of shape `(N,)`: of each person every metric that the truth allows.

        Raises:
            ValueError, FileNotFoundError: as [`~PoseRuler.check`].
        """
        self.check(targets)
        chunks = [
            self._measure(rotmats[start : start + _CHUNK], targets.select(slice(start, start + _CHUNK)))
            for start in range(0, len(rotmats), _CHUNK)
        ]
        # What is not known of all people is not averaged over some of them.
        names = [name for name in chunks[0] if all(name in chunk for chunk in chunks)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}

    def _measure(self, rotmats: Tensor, targets: Targets) -> dict[str, Tensor]:
        measured = self._measure_places(rotmats, targets)
        if targets.mask[:, 0].all():
            measured |= {
                "mpjre_deg": mpjre_deg(rotmats, targets.rotmats, targets.mask),
                "mpjre_rad_x100": mpjre_rad_x100(rotmats, targets.rotmats, targets.mask),
                "global_orient_deg": global_orient_deg(rotmats, targets.rotmats),
            }
        return measured

    def _measure_places(self, rotmats: Tensor, targets: Targets) -> dict[str, Tensor]:
        if self.name == "smpl-24":
            known = placed_joints(targets.mask)[:, self._shared]
            # Where nobody knows a rotation, both sides have the same.
            rotmats = torch.where(targets.mask[..., None, None], rotmats, targets.rotmats)
            joints, true_joints = (self.body.joints(poses)[:, self._shared] for poses in (rotmats, targets.rotmats))
            vertices, true_vertices = (self.body.vertices(poses) for poses in (rotmats, targets.rotmats))
            return {
                "mpjpe_mm": mpjpe_mm(joints, true_joints, mask=known),
                "pa_mpjpe_mm": pa_mpjpe_mm(joints, true_joints, mask=known),
                "pve_mm": pve_mm(vertices, true_vertices, joints[:, 0], true_joints[:, 0]),
            }
        if self.name == "3dpw-24":
            return self._measure_3dpw(rotmats, targets)
        if self.name == "rpe-22":
            joints = self.body.joints(rotmats)[:, :_NUM_SHARED]
            true_joints, known = _stored_joints(targets.truths, len(JOINT_NAMES), self.name)
            true_joints, known = true_joints[:, :_NUM_SHARED], known[:, :_NUM_SHARED]
            return {
                "mpjpe_mm": mpjpe_mm(joints, true_joints, mask=known),
                "pa_mpjpe_mm": pa_mpjpe_mm(joints, true_joints, mask=known),
            }
        return self._measure_regressed(rotmats, targets)

    def _measure_3dpw(self, rotmats: Tensor, targets: Targets) -> dict[str, Tensor]:
        joints = self.body.joints(rotmats)
        true_joints, true_vertices = self._pose_true_bodies(targets)
        _, turn, _ = align_by_similarity(joints, true_joints)
        return {
            "mpjpe_mm": mpjpe_mm(joints, true_joints),
            "pa_mpjpe_mm": pa_mpjpe_mm(joints, true_joints),
            "pve_mm": pve_mm(self.body.vertices(rotmats), true_vertices, joints[:, 0], true_joints[:, 0]),
            "mpjae_deg": mpjae_deg(rotmats, targets.rotmats, PARENTS),
            "mpjae_pa_deg": mpjae_deg(rotmats, targets.rotmats, PARENTS, align=turn),
            "pck50_percent": pck_percent(joints, true_joints),
            "auc_percent": auc_percent(joints, true_joints),
        }

    def _measure_regressed(self, rotmats: Tensor, targets: Targets) -> dict[str, Tensor]:
        vertices = self.body.vertices(rotmats)
        regressed = self._regressor @ vertices
        has_bodies = self._poses_truth(targets)
        is_hmr2 = self.name == "hmr2-14"
        rows, pelvis = (_HMR2_JOINTS, _HMR2_PELVIS) if is_hmr2 else (_SPIN_ROWS, 0)
        joints = (regressed - regressed[:, [pelvis]])[:, rows]
        known = torch.ones(joints.shape[:2], dtype=torch.bool)
        if has_bodies:
            _, true_vertices = self._pose_true_bodies(targets)
            true_regressed = self._regressor @ true_vertices
        if is_hmr2 or not has_bodies:
            stored, is_stored = _stored_joints(targets.truths, _NUM_HMR2, self.name)
            true_joints = (stored - stored[:, [_HMR2_PELVIS]])[:, _HMR2_JOINTS]
            known = is_stored[:, _HMR2_JOINTS]
        else:
            true_joints = (true_regressed - true_regressed[:, [pelvis]])[:, rows]
        measured = {
            "mpjpe_mm": mpjpe_mm(joints, true_joints, root=None, mask=known),
            "pa_mpjpe_mm": pa_mpjpe_mm(joints, true_joints, mask=known),
        }
        if has_bodies:
            measured["pve_mm"] = pve_mm(vertices, true_vertices, regressed[:, pelvis], true_regressed[:, pelvis])
        return measured

    def _poses_truth(self, targets: Targets) -> bool:
        """Whether everybody's own body can be posed."""
        if not (_have_shapes(targets.truths) and targets.mask.all()):
            return False
        try:
            for gender, betas in {truth.gender: _shape_of(truth) for truth in targets.truths}.items():
                self._find_true_body(gender, betas)
        except FileNotFoundError:
            if self.name == "hmr2-14":  # its joints are stored
                return False
            raise
        return True

    def _pose_true_bodies(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Joints `(N, J, 3)` and vertices `(N, V, 3)` of everybody's own body."""
        people: dict[tuple, list[int]] = {}
        for index, truth in enumerate(targets.truths):
            people.setdefault((truth.gender, _shape_of(truth)), []).append(index)
        joints = torch.zeros(len(targets.rotmats), self.body.num_joints, 3)
        vertices = torch.zeros(len(targets.rotmats), len(self.body.rest_vertices), 3)
        for (gender, betas), indices in people.items():
            body = self._find_true_body(gender, betas)
            joints[indices], vertices[indices] = (of(targets.rotmats[indices]) for of in (body.joints, body.vertices))
        return joints, vertices

    def _load_true_body(self, gender: str, betas: tuple[float, ...]) -> BodyModel:
        # The file of the neutral body leads to the others beside it.
        is_file = self._source is not None and Path(self._source).is_file()
        source = str(Path(self._source).parent) if is_file else self._source
        body = BodyModel.load(source, gender=gender, betas=betas)
        sizes, own_sizes = ((of.num_joints, len(of.rest_vertices)) for of in (body, self.body))
        if sizes != own_sizes:
            raise ValueError(f"expected the {gender} body to be of the kind of {self.body.name}, got {body.name}")
        return body


def _have_shapes(truths: Sequence[Truth]) -> bool:
    return all(truth.betas is not None and truth.gender is not None for truth in truths)


def _shape_of(truth: Truth) -> tuple[float, ...]:
    return tuple(truth.betas.tolist())


def _stored_joints(truths: Sequence[Truth], count: int, protocol: str) -> tuple[Tensor, Tensor]:
    """Joints `(N, count, 3)`, and which of them are there `(N, count)`."""
    if any(truth.joints is None or len(truth.joints) != count for truth in truths):
        raise ValueError(f"expected {count} joints of everybody for {protocol}, and the data set has none or others")
    joints = torch.from_numpy(np.stack([truth.joints for truth in truths])).double()
    known = torch.from_numpy(np.stack([truth.known for truth in truths]))
    root = _HMR2_PELVIS if count == _NUM_HMR2 else 0
    if not known[:, root].all():
        raise ValueError(f"expected everybody's pelvis for {protocol}, got {int((~known[:, root]).sum())} without")
    return joints, known


def _load_regressor(path: Path, shape: tuple[int, int]) -> Tensor:
    content = read_limited(path)
    with value_errors_only(f"`{path}`"):
        if path.suffix == ".npy":
            array = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            array = load_array_pickle(content)
        array = np.array(array, dtype=np.float32)  # a copy: those of a pickle are read-only
    if array.shape != shape:
        raise ValueError(
            f"expected a regressor of shape {shape}, joints by the body's vertices, got {array.shape} in {path}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers in the regressor {path}, got NaN or infinity")
    return torch.from_numpy(array)
