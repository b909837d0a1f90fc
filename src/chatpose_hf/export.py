"""Replies and poses as files."""

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def _write_atomically(path: Path, content: bytes) -> None:
    """All of the file or none of it, whatever interrupts."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def save_reply(folder: str | Path, reply: dict, prompt: str, images: Sequence[str] = ()) -> list[Path]:
    """
    Writes one reply as `reply.json` and, if it holds poses, `pose.npz`.

    Args:
        folder (`str` or `Path`): created if absent.
        reply (`dict`): as from [`ChatPoseProcessor.post_process_poses`].
        prompt (`str`): the question.
        images (`Sequence[str]`, *optional*): file names of its pictures.

    Returns:
        `list[Path]`: the files written. `reply.json` holds `prompt`, `images`, `reply` and `poses`, a list of
        `{"theta": [72 numbers]}`; `pose.npz` holds, for P poses, `poses` (P, 72), `global_orient` (P, 3),
        `body_pose` (P, 69) and `betas` (10,), zeros; float32 axis-angle in radians, camera frame, SMPL's joint order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    thetas = [pose["theta"].tolist() for pose in reply["poses"]]
    record = {
        "prompt": prompt,
        "images": list(images),
        "reply": reply["text"],
        "poses": [{"theta": theta} for theta in thetas],
    }
    paths = [folder / "reply.json"]
    if thetas:
        poses = np.asarray(thetas, dtype=np.float32)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            poses=poses,
            global_orient=poses[:, :3],
            body_pose=poses[:, 3:],
            betas=np.zeros(10, dtype=np.float32),
        )
        paths.append(folder / "pose.npz")
        _write_atomically(paths[1], buffer.getvalue())
    else:
        # An older answer's pose beside the new answer would be taken for its own.
        (folder / "pose.npz").unlink(missing_ok=True)
    _write_atomically(paths[0], json.dumps(record, indent=2, ensure_ascii=False).encode())
    return paths
