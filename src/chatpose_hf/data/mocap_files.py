"""Motion-capture files, BVH and Acclaim's ASF with AMC, as rotations of their own bones in space."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..array_files import value_errors_only


AMC_FRAME_RATE = 120.0  # of CMU's and HDM05's; the files do not say it
# Bounds on the time and the memory that a hostile file takes: people with fingers and faces have under 200 joints, and
# an hour of them is 200 MB.
_MAX_JOINTS = 500
_MAX_BYTES = 2**28
_MAX_LENGTH = 1e9  # of a bone, in any unit; squares of more could overflow


@dataclass
class _Joint:
    """
    Attributes:
        offset (`np.ndarray` of shape `(3,)`): where it is, from its parent, in the rest pose.
        dofs (`list[str]`): what each of its numbers turns about, `"x"`, `"y"` or `"z"`; `""` for no rotation.
        axes (`np.ndarray` of shape `(3, 3)`): the frame whose axes it turns about, in the rest pose.
    """

    name: str
    parent: int
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))
    dofs: list[str] = field(default_factory=list)
    axes: np.ndarray = field(default_factory=lambda: np.eye(3))


class Capture:
    """
    A skeleton and its frames. Frames are kept as text and read when they are asked for: a few of many are.

    Attributes:
        names (`list[str]`), parents (`list[int]`): of the `J` joints, parents first; a root's parent is -1.
        rest_joints (`np.ndarray` of shape `(J, 3)`): where they are in the rest pose, in the file's unit.
        num_frames (`int`), frame_rate (`float`): Hz, 0 where the file has no sensible one.
    """

    def __init__(
        self,
        joints: Sequence[_Joint],
        frames: Sequence[Any],
        read_frame: Callable[..., list[float]],
        frame_rate: float,
        is_outer_first: bool,
        unit: float,
    ):
        self.names = [joint.name for joint in joints]
        self.parents = [joint.parent for joint in joints]
        self.rest_joints = np.zeros((len(joints), 3))
        for index, joint in enumerate(joints):
            self.rest_joints[index] = joint.offset + (self.rest_joints[joint.parent] if joint.parent >= 0 else 0)
        self.num_frames = len(frames)
        self.frame_rate = frame_rate
        self._joints = joints
        self._frames = frames
        self._read_frame = read_frame
        self._is_outer_first = is_outer_first
        self._unit = unit

    def rotmats(self, numbers: Sequence[int]) -> np.ndarray:
        """
        Args:
            numbers (`Sequence[int]`): which frames, from 0.

        Returns:
            `np.ndarray` of shape `(N, J, 3, 3)`: what turns each bone from the rest pose to the frame, both in space.

        Raises:
            ValueError: where a frame is damaged.
        """
        width = sum(len(joint.dofs) for joint in self._joints)
        rows = np.array([self._read_frame(self._frames[number]) for number in numbers], dtype=np.float64)
        rows = rows.reshape(len(numbers), width)  # also where there are none
        rotmats = np.empty((len(rows), len(self.names), 3, 3))
        column = 0
        for index, joint in enumerate(self._joints):
            local = np.broadcast_to(np.eye(3), (len(rows), 3, 3))
            for dof in joint.dofs:
                if dof:
                    turn = axis_rotmats(dof, rows[:, column] * self._unit)
                    local = local @ turn if self._is_outer_first else turn @ local
                column += 1
            local = joint.axes @ local @ joint.axes.T
            rotmats[:, index] = rotmats[:, joint.parent] @ local if joint.parent >= 0 else local
        return rotmats


def axis_rotmats(axis: str, angles: np.ndarray) -> np.ndarray:
    """Rotations about `"x"`, `"y"` or `"z"` by angles `(N,)` in radians, `(N, 3, 3)`."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotmats = np.zeros((len(angles), 3, 3))
    rotmats[:] = np.eye(3)
    with np.errstate(invalid="ignore"):  # infinity becomes NaN, and that is found later
        rotmats[:, first, first] = rotmats[:, second, second] = np.cos(angles)
        rotmats[:, second, first] = np.sin(angles)
    rotmats[:, first, second] = -rotmats[:, second, first]
    return rotmats


def load_bvh(path: Path) -> Capture:
    """
    A BVH file: any order of channels, positions on any joint (they are passed over), one line for each frame.

    Raises:
        ValueError: names the file and what is wrong with it, such as fewer frames than it announces.
    """
    with value_errors_only(f"`{path}`"):
        lines = _load_lines(path)
        start = next((number for number, line in enumerate(lines) if line == "MOTION"), None)
        if start is None:
            raise ValueError("expected HIERARCHY and then MOTION on lines of their own, found no MOTION")
        joints = _read_hierarchy(lines[:start])
        head = re.match(r"Frames:\s*(\d+)\nFrame Time:\s*(\S+)$", "\n".join(lines[start + 1 : start + 3]), re.I)
        if head is None:
            raise ValueError(
                f"expected `Frames:` and `Frame Time:` after MOTION, got {lines[start + 1 : start + 3]!r:.200}"
            )
        frames = lines[start + 3 :]
        if len(frames) != int(head[1]):
            raise ValueError(f"expected {head[1]} frames, a line for each, got {len(frames)}: is the file truncated?")
        width = sum(len(joint.dofs) for joint in joints)

        def read_frame(line: str) -> list[float]:
            row = [float(number) for number in line.split()]
            if len(row) != width:
                raise ValueError(f"expected {width} numbers in a frame, one for each channel, got {len(row)}")
            return row

        if frames:
            read_frame(frames[-1])  # the one that a truncated file breaks off in
        seconds = float(head[2])
        rate = 1 / seconds if seconds > 0 else 0.0
        return Capture(joints, frames, read_frame, rate, is_outer_first=True, unit=np.pi / 180)


def _load_lines(path: Path) -> list[str]:
    """Lines that are not blank, stripped. What counts is ASCII; Latin-1 takes any byte in names and comments."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES} bytes, got {path.stat().st_size}")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("latin-1").splitlines()
    return [line for line in map(str.strip, lines) if line]


def _read_hierarchy(lines: list[str]) -> list[_Joint]:
    joints: list[_Joint] = []
    opened: list[int | None] = []  # joints whose braces are open; None is an End Site
    latest: int | None = None
    for line in re.sub(r"([{}])", r"\n\1\n", "\n".join(lines)).split("\n"):
        word, _, rest = line.strip().partition(" ")
        word = word.upper()
        if word in ("ROOT", "JOINT"):
            parent = opened[-1] if opened else -1
            if (word == "ROOT") != (parent == -1) or parent is None or len(joints) == _MAX_JOINTS:
                raise ValueError(f"expected a ROOT with JOINTs inside, at most {_MAX_JOINTS}, got {line!r:.100}")
            latest = len(joints)
            joints.append(_Joint(rest.strip(), parent))
        elif word == "END":
            latest = None
        elif word == "{":
            opened.append(latest)
        elif word == "}":
            opened.pop()
        elif word == "OFFSET":
            if opened[-1] is not None:
                joints[opened[-1]].offset = _read_vector(rest.split())
        elif word == "CHANNELS" and opened[-1] is not None:
            joints[opened[-1]].dofs = _read_channels(rest.split())
        elif word not in ("", "HIERARCHY"):
            raise ValueError(f"expected ROOT, JOINT, End Site, OFFSET or CHANNELS, got {line!r:.100}")
    if not joints or opened:
        raise ValueError("expected a ROOT and braces that close")
    return joints


def _read_channels(words: list[str]) -> list[str]:
    names = [word.lower() for word in words[1:]]
    known = [f"{axis}{kind}" for axis in "xyz" for kind in ("position", "rotation")]
    if int(words[0]) != len(names) or not set(names) <= set(known):
        raise ValueError(f"expected the number of channels and as many of {', '.join(known)}, got {words!r:.200}")
    return [name[0] if name.endswith("rotation") else "" for name in names]


def _read_vector(words: list[str], length: str = "1") -> np.ndarray:
    vector = np.array([float(word) for word in words]) * float(length)
    if vector.shape != (3,) or not (abs(vector) < _MAX_LENGTH).all():
        raise ValueError(f"expected 3 numbers under {_MAX_LENGTH:g}, got {words!r:.100} times {length:.30}")
    return vector


def load_amc(path: Path, skeleton: Path) -> Capture:
    """
    An AMC file with the ASF file of its skeleton, at 120 frames a second.

    Raises:
        ValueError: names the file and what is wrong with it, such as a bone of another number of values.
    """
    with value_errors_only(f"`{skeleton}`"):
        joints, unit = _read_asf(_load_lines(skeleton))
    with value_errors_only(f"`{path}` with the skeleton `{skeleton.name}`"):
        lines = _load_lines(path)
        words = [line.upper() for line in lines if line.startswith(":")]
        if ":DEGREES" in words or ":RADIANS" in words:
            unit = np.pi / 180 if ":DEGREES" in words else 1.0
        lines = [line for line in lines if not line.startswith((":", "#"))]
        starts = [number for number, line in enumerate(lines) if line.isdigit()]
        if not starts or starts[0] != 0:
            raise ValueError("expected the number of a frame on a line, then a line for each bone, and so on")
        frames = [lines[start + 1 : end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        known = {joint.name: len(joint.dofs) for joint in joints if joint.dofs}

        def read_frame(lines: list[str]) -> list[float]:
            values = {words[0]: [float(number) for number in words[1:]] for words in map(str.split, lines)}
            counts = {name: len(numbers) for name, numbers in values.items()}
            if counts != known:
                wrong = ", ".join(sorted(f"{name} ({count})" for name, count in counts.items() ^ known.items()))
                raise ValueError(
                    f"expected the bones of the skeleton, each with its numbers, in a frame; other: {wrong:.300}"
                )
            return [number for name in known for number in values[name]]

        read_frame(frames[-1])
        return Capture(joints, frames, read_frame, AMC_FRAME_RATE, is_outer_first=False, unit=unit)


def _read_asf(lines: list[str]) -> tuple[list[_Joint], float]:
    """The bones, each as a joint at its start, and how much of a radian the file's angles are in."""
    sections: dict[str, list[list[str]]] = {}
    for line in lines:
        if line.startswith(":"):
            section = sections.setdefault(line.split()[0].lower(), [])
        elif not line.startswith("#") and sections:
            section.append(line.split())
    for name in (":root", ":bonedata", ":hierarchy"):
        if name not in sections:
            raise ValueError(f"expected the section {name}, found {', '.join(sections) or 'none'}")
    angle = next((words[1].lower() for words in sections.get(":units", ()) if words[0].lower() == "angle"), "deg")
    unit = np.pi / 180 if angle.startswith("deg") else 1.0

    fields = {words[0].lower(): words[1:] for words in sections[":root"]}
    bones = {"root": _Joint("root", -1, dofs=_read_dofs(fields["order"]))}
    bones["root"].axes = _read_axes([*fields.get("orientation", "000"), fields.get("axis", ["XYZ"])[0]], unit)
    ends = {"root": np.zeros(3)}
    for words in sections[":bonedata"]:
        if words[0].lower() == "begin":
            fields = {}
        elif words[0].lower() == "end":
            name = fields["name"][0]
            if name in bones or len(bones) == _MAX_JOINTS:
                raise ValueError(f"expected at most {_MAX_JOINTS} bones of different names, got {name!r:.100}")
            bones[name] = _Joint(name, -1, dofs=_read_dofs(fields.get("dof", [])))
            bones[name].axes = _read_axes(fields.get("axis", [*"000", "XYZ"]), unit)
            ends[name] = _read_vector(fields["direction"], fields["length"][0])
        else:
            fields[words[0].lower()] = words[1:]

    joints = [bones.pop("root")]
    index = {"root": 0}
    for parent, *children in sections[":hierarchy"]:
        if parent.lower() in ("begin", "end"):
            continue
        for child in children:
            # A bone is taken out when it is placed, and its parent has been: no cycle can be written.
            if child not in bones or parent not in index:
                raise ValueError(
                    f"expected each bone once in :hierarchy, below one that is there, got {parent} {child}"
                )
            joint = bones.pop(child)
            joint.parent, joint.offset = index[parent], ends[parent]
            index[child] = len(joints)
            joints.append(joint)
    return joints, unit


def _read_dofs(words: list[str]) -> list[str]:
    """`rx`, `ry`, `rz` are rotations; `tx`, `ty`, `tz` and `l` are not."""
    return [word[1].lower() if word.lower() in ("rx", "ry", "rz") else "" for word in words]


def _read_axes(words: list[str], unit: float) -> np.ndarray:
    """Three angles and the order in which they are applied, `XYZ`."""
    axes = np.eye(3)
    for axis in words[3].lower():
        axes = axis_rotmats(axis, np.array([float(words["xyz".index(axis)]) * unit]))[0] @ axes
    return axes
