"""Named poses written down by hand, each with descriptions and situations of many people's kinds of words."""

import math
from collections.abc import Iterator

import torch

from ..body import JOINT_NAMES
from ..pose_files import turn_frame
from .captions import Captioner
from .source import BODY_ONLY_MASK, Source, load_json


_FIELDS = {"name", "turns", "explicit", "implicit"}
_SITUATIONS = 20  # of a row, about as many as descriptions: what has many texts is asked for often
_LEAST_TEXTS = 2  # of each kind: one to learn from, one to be asked by


class KeyPoses(Source):
    """
    `GROUP.json` files: arrays of `name`; `turns`, degrees about x, y, z (a rotation vector) of each joint that is not at rest,
    in the world of SMPL's rest pose (y up, facing +z); `explicit`, sentences that say what the body does; and `implicit`,
    situations in which somebody would take the pose.

    Every pose is in both splits. In val it is asked by the last sentence of each kind, which train does not have: the same
    pose in other words. A row of task `"text_to_pose"` by explicit sentences (kind `"human"`), in train also by geometry; and
    one or more of task `"spg"` by situations, which have the pose's name (kind `"name"`) to be said in the answer.
    """

    name = "key-poses"
    licence = "Apache-2.0, as the code"

    def parts(self) -> list[str]:
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        if not names:
            raise FileNotFoundError(f"expected files of named poses, GROUP.json, in {self.folder}, found none")
        return [f"{split}/{name}" for split in ("train", "val") for name in names]

    def read_part(self, part: str) -> Iterator[dict]:
        split, group = part.split("/", 1)
        path = self.folder / f"{group}.json"
        items = load_json(path)
        if not isinstance(items, list):
            raise ValueError(f"expected an array of named poses in {path}, got {type(items).__name__}")
        for number, item in enumerate(items):
            if fault := _find_fault(item):
                raise ValueError(f"pose {number} of {path}: {fault}")
        poses = torch.stack([make_pose(item["turns"]) for item in items]) if items else torch.zeros(0, 24, 3)
        geometry = Captioner().captions(poses, [f"{self.seed}/{group}/{item['name']}" for item in items])
        for item, pose, automatic in zip(items, poses.numpy(), geometry, strict=True):
            id = f"{group}/{item['name']}"
            chosen = slice(-1) if split == "train" else slice(-1, None)
            explicit = [("human", text) for text in item["explicit"][chosen]]
            implicit = [("implicit", text) for text in item["implicit"][chosen]]
            told = [("geometry", text) for text in automatic] if split == "train" else []
            yield self.make_row(id, "text_to_pose", [pose], [*explicit, *told], pose_mask=BODY_ONLY_MASK)
            for start in range(0, len(implicit), _SITUATIONS):
                said = [("name", item["name"]), *implicit[start : start + _SITUATIONS], *explicit]
                number = f"/{start // _SITUATIONS}" if start else ""
                yield self.make_row(f"{id}/spg{number}", "spg", [pose], said, pose_mask=BODY_ONLY_MASK)


def make_pose(turns: dict[str, list[float]]) -> torch.Tensor:
    """
    A pose from the turns of its joints.

    Args:
        turns (`dict[str, list[float]]`): SMPL's name of a joint to degrees about x, y, z, in the world of the rest pose.

    Returns:
        `torch.Tensor` of shape `(24, 3)`: axis-angle in radians, camera frame.
    """
    pose = torch.zeros(len(JOINT_NAMES), 3)
    for joint, degrees in turns.items():
        pose[JOINT_NAMES.index(joint)] = torch.tensor(degrees) * math.pi / 180
    return turn_frame(pose, "y-up")


def _find_fault(item: object) -> str | None:
    if not isinstance(item, dict) or item.keys() != _FIELDS:
        return f"expected {', '.join(sorted(_FIELDS))}, got {item!r:.200}"
    turns = item["turns"]
    if not isinstance(turns, dict) or not turns.keys() <= set(JOINT_NAMES[:22]):
        return f"expected `turns` of SMPL's first 22 joints, got {turns!r:.200}"
    for joint, degrees in turns.items():
        is_turn = isinstance(degrees, list) and len(degrees) == 3
        if not is_turn or not all(isinstance(angle, int | float) and math.isfinite(angle) for angle in degrees):
            return f"expected three angles in degrees for {joint}, got {degrees!r:.100}"
    for kind in ("explicit", "implicit"):
        texts = item[kind]
        is_list = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        if not is_list or len(set(texts)) < max(_LEAST_TEXTS, len(texts)):
            return f"expected at least {_LEAST_TEXTS} different sentences as `{kind}`, got {texts!r:.200}"
    return None
