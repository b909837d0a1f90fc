"""States of parts of the body, as data: angles, phrases and checks in files; poses in which some of them hold together."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..body import JOINT_NAMES, PARENTS, BodyModel
from ..pose_files import turn_frame
from ..rotations import rotvec_to_rotmat
from .source import load_json


_NUM_JOINTS = 22
_TRIES = 12  # draws of the angles before a pose is given up
_NOISE = 1.7  # degrees, of each axis of a joint
_CHEST = (0, 3, 6, 9)  # from the pelvis to the last joint that the shoulders hang on
_UPPER = {JOINT_NAMES.index(joint) for joint in ("head", "l_shoulder", "r_shoulder")}
_FIELDS = {"name", "part", "turns", "checks", "do", "is"}
_MORE_FIELDS = {"both_do", "both_is", "undo", "leaves"}
# How many joints and how many numbers a check takes.
_CHECKS = {
    **dict.fromkeys(("above", "before", "outward", "near", "level"), (2, 1)),
    "angle": (3, 2),
    **dict.fromkeys(("yaw", "pitch", "roll"), (1, 2)),
}


@dataclass(frozen=True, eq=False)
class Choice:
    """
    A state of a part of the body, of one side, of both, or of none.

    Attributes:
        name (`str`), part (`str`): of the state.
        side (`str`): the person's own `"left"` or `"right"`, `"both"`, or `""`.
        joints (`np.ndarray` of shape `(K,)`): which it turns.
        low (`np.ndarray` of shape `(K, 3)`), high:
            The two ends of the movement in degrees, rotation vectors in the world of the rest pose (y up, facing +z).
        checks (`tuple[list, ...]`): what must be true of the joints' positions, joints by name.
        do (`tuple[str, ...]`), tell (`tuple[str, ...]`), undo (`tuple[str, ...]`): imperatives, statements, and ways back.
        leaves (`frozenset[str]`): of a posture, the parts and states that go with it.
    """

    name: str
    part: str
    side: str
    joints: np.ndarray
    low: np.ndarray
    high: np.ndarray
    checks: tuple[list[Any], ...]
    do: tuple[str, ...]
    tell: tuple[str, ...]
    undo: tuple[str, ...]
    leaves: frozenset[str]

    @property
    def limb(self) -> str:
        return self.part.split()[-1]


class Grammar(NamedTuple):
    """`postures`, the first of which is what nobody needs to say, and for each the `choices` that go with it, by name."""

    postures: list[Choice]
    choices: dict[str, list[Choice]]


# Kept for the parts to come.
@lru_cache(maxsize=2)
def load_grammar(folder: Path) -> Grammar:
    """
    The states of all `GROUP.json` of a folder.

    A state has a `name`, a `part`, `turns` (joint to [low, high] of three angles in degrees, the two ends of one movement in
    either order; see [`Choice`]), `checks`, imperatives `do` and statements `is`, where `{side}`, `{other}` and `{the}` (or
    a possessor) are filled in and `[is]` is said or left out; the statements of a posture are what follows "somebody is".
    What has `{side}` is written for the left and mirrored. `both_do` and `both_is` are for both sides; `undo`, what takes a
    state back. A state of part `body` is a posture, which `leaves` other parts or states free.

    Checks: `["above" | "before" | "outward", joint, joint, metres]`, the first at least so far up, ahead, or towards the
    state's side; `["near" | "level", joint, joint, metres]`, at most; `["angle", joint, joint, joint, low, high]`, degrees;
    `["yaw" | "pitch" | "roll", "head", low, high]`, degrees, to the state's side, down, to the state's side. Those of a
    posture are in the world, of legs and torso in the pelvis' frame, of arms and head in the chest's.

    Raises:
        FileNotFoundError, ValueError: name the file, the state and what was expected.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"expected files of states, GROUP.json, in {folder}, found none")
    places: dict[str, str] = {}
    choices: list[Choice] = []
    for path in paths:
        states = load_json(path)
        if not isinstance(states, list):
            raise ValueError(f"expected an array of states in {path}, got {type(states).__name__}")
        for number, state in enumerate(states):
            place = f"state {(state.get('name', number) if isinstance(state, dict) else number)!r:.100} of {path}"
            if fault := _find_fault(state):
                raise ValueError(f"{place}: {fault}")
            name = state["name"]
            if name in places:
                raise ValueError(f"{place}: expected a name of its own, got that of {places[name]}")
            places[name] = place
            choices += _make_choices(state)
    postures = [choice for choice in choices if choice.part == "body"]
    postures.sort(key=lambda posture: posture.name != "standing")
    if not postures or postures[0].name != "standing":
        raise ValueError(f"expected a state `standing` of part `body` in {folder}, got none")
    known = {word for choice in choices for word in (choice.name, choice.part)}
    for choice in choices:
        if unknown := choice.leaves - known:
            raise ValueError(f"{places[choice.name]}: expected parts or states as `leaves`, got {sorted(unknown)}")
    grammar = Grammar(
        postures, {p.name: [c for c in choices if {c.name, c.part} & p.leaves and c.part != "body"] for p in postures}
    )
    for posture in postures:
        checked = [[posture], *([posture, choice] for choice in grammar.choices[posture.name])]
        plans = [([pose], random.Random(number)) for number, pose in enumerate(checked)]
        for pose, fault in zip(checked, draw_poses(grammar, plans)[1], strict=True):
            if fault:
                raise ValueError(
                    f"{places[pose[-1].name]}: expected `turns` that hold `checks`, got none in {_TRIES} draws "
                    f"({pose[-1].side or 'no side'}, {posture.name}): {fault}"
                )
    return grammar


def _find_fault(state: object) -> str | None:
    if not isinstance(state, dict) or not _FIELDS <= state.keys() <= _FIELDS | _MORE_FIELDS:
        more = ", ".join(sorted(_MORE_FIELDS))
        return f"expected {', '.join(sorted(_FIELDS))}, and perhaps {more}, got {state!r:.200}"
    for key in ("name", "part"):
        if not isinstance(state[key], str) or not state[key]:
            return f"expected a text as `{key}`, got {state[key]!r:.100}"
    turns = state["turns"]
    if not isinstance(turns, dict) or not turns or not turns.keys() <= set(JOINT_NAMES[:_NUM_JOINTS]):
        return f"expected `turns` of SMPL's first 22 joints, got {turns!r:.200}"
    for joint, ranges in turns.items():
        try:
            angles = np.array(ranges, dtype=np.float64)
        except (TypeError, ValueError):
            angles = np.zeros(0)
        if angles.shape != (3, 2) or not np.isfinite(angles).all():
            return f"expected three ranges [low, high] in degrees for {joint}, got {ranges!r:.100}"
    for key in ("do", "is", *sorted(state.keys() & {"both_do", "both_is", "undo", "leaves"})):
        words = state[key]
        is_list = isinstance(words, list) and all(isinstance(text, str) and text.strip() for text in words)
        if not is_list or not (words or key == "leaves"):
            return f"expected texts as `{key}`, got {words!r:.200}"
    if not isinstance(state["checks"], list):
        return f"expected a list as `checks`, got {state['checks']!r:.200}"
    for check in state["checks"]:
        kind = check[0] if isinstance(check, list) and check else None
        names, numbers = _CHECKS.get(kind, (0, 0)) if isinstance(kind, str) else (0, 0)
        is_check = names > 0 and len(check) == 1 + names + numbers
        is_check = is_check and all(word in JOINT_NAMES for word in check[1 : 1 + names])
        if not is_check or not all(isinstance(number, int | float) for number in check[1 + names :]):
            return f"expected a check of {', '.join(_CHECKS)} with its joints and numbers, got {check!r:.100}"
    return None


def _make_choices(state: dict[str, Any]) -> list[Choice]:
    is_sided = any("{side}" in text for text in (*state["do"], *state["is"]))
    made = []
    for side in ("left", "right", "both") if is_sided else ("",):
        do, tell = ("both_do", "both_is") if side == "both" else ("do", "is")
        if do not in state or tell not in state:
            continue
        turns, checks = {}, []
        for is_right in {"left": [False], "right": [True], "both": [False, True]}.get(side, [False]):
            for joint, ranges in state["turns"].items():
                low_high = np.array(ranges, dtype=np.float64)
                turns[_mirror(joint) if is_right else joint] = low_high * ([[1], [-1], [-1]] if is_right else 1)
            checks += [
                [_mirror(word) if is_right else word for word in check] + [is_right] for check in state["checks"]
            ]
        other = {"left": "right", "right": "left"}.get(side, "")
        do_texts, is_texts, undo_texts = (
            tuple(_name_side(text, side, other) for text in state.get(key, ())) for key in (do, tell, "undo")
        )
        angles = np.stack(list(turns.values()))
        made.append(
            Choice(
                name=state["name"],
                part=state["part"],
                side=side,
                joints=np.array([JOINT_NAMES.index(joint) for joint in turns]),
                low=angles[..., 0],
                high=angles[..., 1],
                checks=tuple(checks),
                do=do_texts,
                tell=is_texts,
                undo=undo_texts,
                leaves=frozenset(state.get("leaves", ())),
            )
        )
    return made


def _name_side(text: str, side: str, other: str) -> str:
    if side == "both":  # what takes a state back is written for one side
        text = re.sub(r"\{the\} \{side\} (\w+)", r"both \1s", text).replace("foots", "feet")
    return text.replace("{side}", side).replace("{other}", other)


def _mirror(word: Any) -> Any:
    return (
        {"l_": "r_", "r_": "l_"}[word[:2]] + word[2:] if isinstance(word, str) and word[:2] in ("l_", "r_") else word
    )


def draw_poses(
    grammar: Grammar, plans: Sequence[tuple[list[list[Choice]], random.Random]]
) -> tuple[list[list[np.ndarray]], list[str]]:
    """
    Poses that hold the checks of their choices. Within a plan what is kept from pose to pose keeps its angles.

    Args:
        grammar ([`Grammar`]): says how everybody stands.
        plans (`Sequence[tuple]`): of each, the choices of its poses, a posture first, and what decides the angles.

    Returns:
        `list[list[np.ndarray]]`, of each plan its poses of shape `(24, 3)`, axis-angle in radians, camera frame; and
        `list[str]`, of each the state and check that no draw held, `""` where all is well.
    """
    poses: list[list[np.ndarray]] = [[] for _ in plans]
    faults = [""] * len(plans)
    todo = list(range(len(plans)))
    for _ in range(_TRIES):
        if not todo:
            break
        degrees = [_draw_degrees(grammar, *plans[number]) for number in todo]
        angles = torch.from_numpy(np.radians(np.concatenate(degrees))).float()
        world = torch.cat([angles, torch.zeros(len(angles), 24 - _NUM_JOINTS, 3)], dim=1)
        measured = _measure(world)
        turned = turn_frame(world, "y-up").numpy()
        start, left = 0, []
        for number, drawn in zip(todo, degrees, strict=True):
            span = range(start, start + len(drawn))
            start += len(drawn)
            faults[number] = next(
                filter(
                    None,
                    (
                        _find_broken(pose, *(values[index] for values in measured))
                        for index, pose in zip(span, plans[number][0], strict=True)
                    ),
                ),
                "",
            )
            poses[number] = [turned[index] for index in span]
            if faults[number]:
                left.append(number)
        todo = left
    return poses, faults


def _draw_degrees(grammar: Grammar, plan: list[list[Choice]], draw: random.Random) -> np.ndarray:
    """Rotation vectors `(P, 22, 3)` of a plan's poses, world of the rest pose."""
    rng = np.random.default_rng(draw.getrandbits(64))
    noise = np.clip(rng.normal(0, _NOISE, (_NUM_JOINTS, 3)), -2 * _NOISE, 2 * _NOISE)
    amounts: dict[tuple[str, str], float] = {}
    poses = []
    for choices in plan:
        pose = noise.copy()
        settled: set[int] = set()
        # The last word on a joint is the first here: what is said, then the posture, then how everybody stands.
        for choice in (*choices[:0:-1], choices[0], grammar.postures[0]):
            amount = amounts.setdefault((choice.name, choice.side), rng.random())
            free = np.array([joint not in settled for joint in choice.joints])
            pose[choice.joints[free]] += (choice.low + amount * (choice.high - choice.low))[free]
            settled |= set(choice.joints.tolist())
        poses.append(pose)
    return np.stack(poses)


@lru_cache(maxsize=1)
def _load_body() -> BodyModel:
    return BodyModel.load("default")


def _measure(world: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Joints `(N, 3, 24, 3)` in the frames of world, pelvis and chest; the head's matrix `(N, 3, 3)` in the chest's."""
    with torch.no_grad():
        joints = _load_body().joints(world)
    rotmats = rotvec_to_rotmat(world[:, [*_CHEST, 12, 15]])
    pelvis, chest = rotmats[:, 0], rotmats[:, 0] @ rotmats[:, 1] @ rotmats[:, 2] @ rotmats[:, 3]
    frames = torch.stack([joints, joints @ pelvis, joints @ chest], dim=1)
    return frames.numpy(), (rotmats[:, 4] @ rotmats[:, 5]).numpy()


def _find_broken(pose: list[Choice], frames: np.ndarray, head: np.ndarray) -> str:
    """The first check of a pose's choices that is not held, and the state's name; see [`_measure`]."""
    moved = {joint for choice in pose[1:] for joint in choice.joints.tolist()}
    for choice in pose:
        is_upper = not _UPPER.isdisjoint(choice.joints.tolist())
        joints = frames[0 if choice.part == "body" else 2 if is_upper else 1]
        for *check, is_right in choice.checks:
            # What a posture leaves free and somebody moved is no longer the posture's to check.
            if choice.part == "body" and any(_is_moved(word, moved) for word in check[1:]):
                continue
            if not _holds(check, -1 if is_right else 1, joints, head):
                return f"{choice.name} {check}"
    return ""


def _is_moved(word: object, moved: set[int]) -> bool:
    joint = JOINT_NAMES.index(word) if isinstance(word, str) else -1
    while joint >= 0:
        if joint in moved:
            return True
        joint = PARENTS[joint]
    return False


def _holds(check: list[Any], sign: int, joints: np.ndarray, head: np.ndarray) -> bool:
    kind = check[0]
    if kind in ("yaw", "pitch", "roll"):
        front, up = head[:, 2], head[:, 1]
        value = {
            "yaw": sign * np.arctan2(front[0], front[2]),
            "pitch": -np.arcsin(front[1]),
            "roll": sign * np.arctan2(up[0], up[1]),
        }[kind]
        return bool(check[2] <= np.degrees(value) <= check[3])
    if kind == "angle":
        first, middle, last = (joints[JOINT_NAMES.index(name)] for name in check[1:4])
        a, b = first - middle, last - middle
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        return bool(check[4] <= np.degrees(np.arccos(np.clip(cosine, -1, 1))) <= check[5])
    way = joints[JOINT_NAMES.index(check[1])] - joints[JOINT_NAMES.index(check[2])]
    if kind == "near":
        return bool(way @ way <= check[3] ** 2)
    if kind == "level":
        return bool(abs(way[1]) <= check[3])
    return bool({"above": way[1], "before": way[2], "outward": sign * way[0]}[kind] >= check[3])
