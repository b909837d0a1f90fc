"""Replies and poses as files: SMPL parameters, motion, meshes, pictures, and a page that shows the body in 3D.

Poses come in the camera frame (docs/conventions.md) and leave upright: y up in meshes, BVH and the page; z up in AMASS.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from .atomic_write import npz_bytes, write_atomically
from .body import JOINT_NAMES, PARENTS, BodyModel
from .pose_files import FRAME_RATE, poses_to_amass, turn_frame
from .render import COLORS, contact_sheet, overlay_bodies, render_bodies, vertex_normals
from .rotations import rotvec_to_rotmat


PAGE_TEMPLATE = Path(__file__).parent / "assets" / "page.html"
POSE_TOKEN = "<POSE>"
_BACKGROUND = "#f4f6fa"
_MAX_TILES = 200  # of one sheet: what one can look at, and under the renderer's limit of pixels


class Turn(NamedTuple):
    """
    A question and its answer.

    Args:
        prompt (`str`): the question.
        images (`Sequence[tuple[str, PIL.Image.Image]]`): name and content of each picture that came with it.
        reply (`dict`): as from [`ChatPoseProcessor.post_process_poses`].
    """

    prompt: str
    images: Sequence[tuple[str, Image.Image]]
    reply: dict

    @property
    def thetas(self) -> list[Tensor]:
        """The reply's poses, `(72,)` each."""
        return [pose["theta"] for pose in self.reply["poses"]]


def make_messages(turns: Sequence[Turn], image_token: str) -> list[dict]:
    """
    A conversation as transformers' chats, up to the last turn's question; that turn's own reply is not read.

    Args:
        turns (`Sequence[Turn]`): the conversation.
        image_token (`str`): the processor's; an answer that happens to spell it would spoil every later question.
    """
    messages = []
    for turn in turns:
        images = [{"type": "image", "image": image} for _, image in turn.images]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.prompt}]})
        text = turn.reply["text"].replace(image_token, "")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return messages[:-1]


def stand_side_by_side(vertices: Tensor, gap: float = 0.2) -> Tensor:
    """
    Bodies in a row on one floor, the first at the viewer's left.

    Args:
        vertices (`torch.Tensor` of shape `(N, V, 3)`): metres, camera frame.
        gap (`float`, *optional*, defaults to 0.2): metres between neighbours.

    Returns:
        `torch.Tensor` of shape `(N, V, 3)`: camera frame, the floor at y = 0, the row's middle at x = 0.
    """
    low, high = vertices.amin(-2), vertices.amax(-2)
    widths = high[:, 0] - low[:, 0] + gap
    places = widths.cumsum(0) - widths - (widths.sum() - gap) / 2 - low[:, 0]
    shift = torch.stack([places, -high[:, 1], torch.zeros_like(places)], dim=-1)
    return vertices + shift[:, None]


def to_upright(vertices: Tensor) -> Tensor:
    """Camera frame (y down, z away) to y up, z towards the viewer; `(..., 3)`."""
    return vertices * vertices.new_tensor([1.0, -1.0, -1.0])


def mesh_bytes(poses: Tensor, body: BodyModel, suffix: str) -> bytes:
    """
    Bodies as a mesh file, side by side on the floor y = 0, metres, y up, facing +z.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle, camera frame.
        body ([`BodyModel`]): whose shape.
        suffix (`str`): `".glb"`, `".obj"` or `".ply"`.
    """
    import trimesh

    faces = body.faces.cpu().numpy()
    vertices = to_upright(stand_side_by_side(_vertices(poses, body))).numpy()
    # Left to itself, trimesh wants SciPy for the normals, and renumbers vertices.
    normals = vertex_normals(vertices, faces).reshape(vertices.shape)
    meshes = [
        trimesh.Trimesh(vertices=body_vertices, faces=faces, vertex_normals=body_normals, process=False)
        for body_vertices, body_normals in zip(vertices, normals, strict=True)
    ]
    if suffix == ".glb":
        for number, mesh in enumerate(meshes):
            # glTF's colours are linear.
            color = [(value / 255) ** 2.2 for value in ImageColor.getrgb(COLORS[number % len(COLORS)])]
            material = trimesh.visual.material.PBRMaterial(
                baseColorFactor=[*color, 1.0], metallicFactor=0.0, roughnessFactor=0.7
            )
            mesh.visual = trimesh.visual.TextureVisuals(material=material)
        scene = trimesh.Scene({f"pose_{number}": mesh for number, mesh in enumerate(meshes, start=1)})
        return scene.export(file_type="glb", include_normals=True)
    exported = trimesh.util.concatenate(meshes).export(file_type=suffix.removeprefix("."))
    return exported.encode() if isinstance(exported, str) else exported


def _vertices(poses: Tensor, body: BodyModel) -> Tensor:
    with torch.no_grad():
        return body.vertices(poses.to(body.rest_joints.device)).cpu()


def bvh_bytes(poses: Tensor, body: BodyModel, frame_rate: float = FRAME_RATE) -> bytes:
    """
    Poses as the frames of a BVH motion: metres, y up, feet on the floor, rotations Z, X, Y in degrees. In Blender:
    File, Import, Motion Capture, with its default axes.

    Args:
        poses (`torch.Tensor` of shape `(T, 24, 3)`): axis-angle, camera frame.
        body ([`BodyModel`]): whose bones; SMPL-H's and SMPL-X's without the fingers and the face.
        frame_rate (`float`, *optional*, defaults to 30): frames a second.
    """
    from trimesh.transformations import euler_from_matrix

    count = 24 if body.num_joints == 24 else 22
    parents = PARENTS[:count]
    rest = body.rest_joints.double().cpu()
    lines, order = ["HIERARCHY"], []

    def write_joint(joint: int, indent: str) -> None:
        order.append(joint)
        offset = rest[joint] - rest[parents[joint]] if joint else torch.zeros(3)
        channels = "6 Xposition Yposition Zposition" if joint == 0 else "3"
        lines.append(f"{indent}{'JOINT' if joint else 'ROOT'} {JOINT_NAMES[joint]}")
        lines.append(f"{indent}{{")
        lines.append(f"{indent}  OFFSET {offset[0]:.6f} {offset[1]:.6f} {offset[2]:.6f}")
        lines.append(f"{indent}  CHANNELS {channels} Zrotation Xrotation Yrotation")
        children = [child for child in range(count) if parents[child] == joint]
        for child in children:
            write_joint(child, indent + "  ")
        if not children:
            tip = offset / offset.norm() * 0.08
            lines.append(f"{indent}  End Site")
            lines.append(f"{indent}  {{")
            lines.append(f"{indent}    OFFSET {tip[0]:.6f} {tip[1]:.6f} {tip[2]:.6f}")
            lines.append(f"{indent}  }}")
        lines.append(f"{indent}}}")

    write_joint(0, "")
    upright = turn_frame(poses.double(), "y-up", inverse=True)
    rotmats = rotvec_to_rotmat(upright).numpy()
    lines += ["MOTION", f"Frames: {len(poses)}", f"Frame Time: {1 / frame_rate:.6f}"]
    for pose, rotmat in zip(poses, rotmats, strict=True):
        root = rest[0].clone()
        root[1] -= to_upright(_vertices(pose, body))[:, 1].min()
        values = root.tolist()
        for joint in order:
            # Z, then X, then Y, each about the axes that the one before has turned.
            values += np.degrees(euler_from_matrix(rotmat[joint], axes="rzxy")).tolist()
        lines.append(" ".join(f"{value:.6f}" for value in values))
    return ("\n".join(lines) + "\n").encode()


def make_picture(poses: Tensor, body: BodyModel, photos: Iterable[Image.Image] = (), size: int = 512) -> Image.Image:
    """
    One picture to look at: the photos, then the bodies, side by side, from the front and from three quarters.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle, camera frame; at least one.
        body ([`BodyModel`]): whose shape.
        photos (`Iterable[PIL.Image.Image]`, *optional*): what the poses were asked about.
        size (`int`, *optional*, defaults to 512): pixels of each part.
    """
    vertices = stand_side_by_side(_vertices(poses, body))
    views = [
        render_bodies(vertices, body.faces.cpu(), size=size, view=view, background=_BACKGROUND)
        for view in ("front", "three_quarter")
    ]
    parts = [*photos, *views]
    return contact_sheet(parts, columns=len(parts), tile=size)


def overlay_picture(photo: Image.Image, pose: Tensor, body: BodyModel, box=None) -> Image.Image:
    """One pose `(24, 3)` over a photo; see [`overlay_bodies`]."""
    return overlay_bodies(photo, _vertices(pose, body), body.faces.cpu(), box)


def make_page(turns: Sequence[Turn], body: BodyModel) -> str:
    """
    A page that shows a chat and its bodies in 3D: one HTML file, about half a megabyte, that loads nothing.

    Args:
        turns (`Sequence[Turn]`): the conversation.
        body ([`BodyModel`]): whose shape.

    Returns:
        `str`: the HTML.
    """
    poses: list[dict] = []
    shown: list[dict] = []
    vertices = None
    for turn in turns:
        shown.append(
            {"role": "user", "images": [_data_uri(image) for _, image in turn.images], "parts": [turn.prompt]}
        )
        numbers = list(range(len(poses), len(poses) + len(turn.thetas)))
        shown.append({"role": "assistant", "images": [], "parts": _split_at_poses(turn.reply["text"], numbers)})
        for theta in turn.thetas:
            vertices = _vertices(theta.reshape(1, 24, 3), body)
            # On the floor, the middle of its outline over the origin.
            upright = to_upright(stand_side_by_side(vertices))[0]
            upright[:, 2] -= (upright[:, 2].min() + upright[:, 2].max()) / 2
            poses.append({"theta": [round(value, 6) for value in theta.tolist()], **_pack(upright.numpy())})
    faces = body.faces.cpu().numpy()
    wide = len(body.rest_vertices) > 2**16
    data = {
        "body": body.name,
        "turns": shown,
        "poses": poses,
        "wide": wide,
        "faces": _base64(faces.astype("<u4" if wide else "<u2").tobytes()) if poses else "",
        "poster": "" if vertices is None else _data_uri(render_bodies(vertices, faces, view="three_quarter")),
    }
    # "<" could end the script element; this is the same string in JSON.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE_TEMPLATE.read_text(encoding="utf-8").replace("DATA_AS_JSON", text)


def _split_at_poses(text: str, numbers: list[int]) -> list[str | dict]:
    """The text in pieces with a pose's number in place of each `<POSE>`; numbers that find no place follow."""
    pieces = text.split(POSE_TOKEN)
    if len(pieces) - 1 != len(numbers):
        return [text, *({"pose": number} for number in numbers)]
    parts: list[str | dict] = [pieces[0]]
    for number, piece in zip(numbers, pieces[1:], strict=True):
        parts += [{"pose": number}, piece]
    return parts


def _pack(vertices: np.ndarray) -> dict:
    """Vertices `(V, 3)` as 16-bit numbers between their extremes: 0.03 mm for a person."""
    low, high = vertices.min(0), vertices.max(0)
    step = np.maximum(high - low, 1e-9) / (2**16 - 1)
    return {
        "low": low.tolist(),
        "step": step.tolist(),
        "height": float(high[1]),
        "width": float(max(high[0] - low[0], high[2] - low[2])),
        "vertices": _base64(np.round((vertices - low) / step).astype("<u2").tobytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _data_uri(picture: Image.Image, longest: int = 768) -> str:
    small = picture.copy()
    small.thumbnail((longest, longest))
    buffer = io.BytesIO()
    kind = "PNG" if small.mode == "RGBA" else "JPEG"
    (small if kind == "PNG" else small.convert("RGB")).save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{_base64(buffer.getvalue())}"


def save_reply(folder: str | Path, turns: Sequence[Turn], body: BodyModel) -> list[Path]:
    """
    Writes the last turn of a conversation as `reply.json`, `pose.npz`, `body.glb` and `picture.png`, and the whole of
    it as `page.html`. A reply without a pose has no npz, glb and png.

    Args:
        folder (`str` or `Path`): created if absent.
        turns (`Sequence[Turn]`): the conversation.
        body ([`BodyModel`]): whose shape meshes and pictures have.

    Returns:
        `list[Path]`: the files written. `reply.json` holds `prompt`, `images` (names), `reply`, `body` (its name) and
        `poses`, a list of `{"theta": [72 numbers]}`, axis-angle in radians, camera frame, SMPL's joint order;
        `pose.npz` is [`poses_to_amass`]'s.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    turn = turns[-1]
    contents: dict[str, bytes] = {}
    if turn.thetas:
        poses = torch.stack(turn.thetas).unflatten(1, (24, 3))
        contents["pose.npz"] = npz_bytes(poses_to_amass(poses))
        contents["body.glb"] = mesh_bytes(poses, body, ".glb")
        contents["picture.png"] = png_bytes(make_picture(poses, body, [image for _, image in turn.images]))
    contents["page.html"] = make_page(turns, body).encode(errors="backslashreplace")
    record = reply_record(turn.prompt, [name for name, _ in turn.images], turn.reply)
    contents["reply.json"] = _json_bytes({**record, "body": body.name})
    for name in ("pose.npz", "body.glb", "picture.png"):
        # An older answer's pose beside the new answer would be taken for its own.
        if name not in contents:
            (folder / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def save_poses(
    path: str | Path,
    poses: Tensor,
    names: Sequence[str],
    body: BodyModel,
    view: str | float | None = None,
    limit: int = 16,
) -> int:
    """
    Writes poses in the format that the file's ending names: all of them as motion or numbers (`.npz` in AMASS's layout,
    `.bvh`, `.json`); evenly chosen ones as pictures (`.png`), meshes (`.glb`, `.obj`, `.ply`) or a page (`.html`).

    Args:
        path (`str` or `Path`): the file; its folder must exist.
        poses (`torch.Tensor` of shape `(T, 24, 3)`): axis-angle, camera frame; at least one.
        names (`Sequence[str]`): of the poses, for captions.
        body ([`BodyModel`]): whose shape.
        view (`str` or `float`, *optional*): of the picture, as in [`render_bodies`].
        limit (`int`, *optional*, defaults to 16): most poses to draw.

    Returns:
        `int`: how many poses were written.
    """
    path = Path(path)
    if len(poses) == 0 or limit < 1:
        raise ValueError(f"expected at least one pose to write to {path}, got {len(poses)} and a limit of {limit}")
    suffix = path.suffix.lower()
    if suffix == ".png" and min(limit, len(poses)) > _MAX_TILES:
        raise ValueError(
            f"expected at most {_MAX_TILES} poses in one picture, got {min(limit, len(poses))}; lower the limit"
        )
    chosen = torch.linspace(0, len(poses) - 1, min(limit, len(poses))).round().long()
    some, some_names = poses[chosen], [names[index] for index in chosen]
    writers = {
        ".npz": lambda: (npz_bytes(poses_to_amass(poses)), len(poses)),
        ".bvh": lambda: (bvh_bytes(poses, body), len(poses)),
        ".json": lambda: (_json_bytes({"poses": [{"theta": pose.flatten().tolist()} for pose in poses]}), len(poses)),
        ".png": lambda: (png_bytes(_make_sheet(some, some_names, body, view)), len(some)),
        ".html": lambda: (make_page([_as_turn(some, some_names)], body).encode(), len(some)),
        **dict.fromkeys((".glb", ".obj", ".ply"), lambda: (mesh_bytes(some, body, suffix), len(some))),
    }
    if suffix not in writers:
        raise ValueError(f"expected a file that ends in {', '.join(writers)}, got {path}")
    content, count = writers[suffix]()
    write_atomically(path, content)
    return count


def _make_sheet(poses: Tensor, names: Sequence[str], body: BodyModel, view: str | float | None) -> Image.Image:
    if len(poses) == 1 and view is None:
        return make_picture(poses, body)
    view = "three_quarter" if view is None else view  # 0 degrees is a view
    pictures = [
        render_bodies(_vertices(pose, body), body.faces.cpu(), view=view, background=_BACKGROUND)
        for pose in tqdm(poses, unit="pose", disable=len(poses) == 1)
    ]
    return pictures[0] if len(poses) == 1 else contact_sheet(pictures, names)


def _as_turn(poses: Tensor, names: Sequence[str]) -> Turn:
    text = "\n".join(f"{name}: {POSE_TOKEN}" for name in names)
    return Turn("Poses", [], {"text": text, "poses": [{"theta": pose.flatten()} for pose in poses]})


def _json_bytes(value: dict) -> bytes:
    # File names may hold bytes that are no text.
    return json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace")


def reply_record(prompt: str, images: Sequence[str], reply: dict) -> dict:
    """A reply as JSON: `prompt`, `images` (names), `reply`, `poses`."""
    return {
        "prompt": prompt,
        "images": list(images),
        "reply": reply["text"],
        "poses": [{"theta": pose["theta"].tolist()} for pose in reply["poses"]],
    }


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
