"""Rows for tests of training: words, pictures, and none to three poses each, of a few dozen tokens."""

import numpy as np
from PIL import Image

from chatpose_hf.data.rows import write_rows


ANSWERS = ("The person stands.", "It is <POSE>.", "First <POSE>, then <POSE>.", "It is <POSE>, <POSE> and <POSE>.")


def make_row(number, num_poses=1, num_images=0, turns=1):
    """All of it drawn by the number; what a row asks does not change from epoch to epoch."""
    rng = np.random.default_rng(number)
    images = [Image.fromarray(rng.integers(0, 255, (36, 30, 3), dtype=np.uint8)) for _ in range(num_images)]
    messages = []
    for turn in range(turns):
        words = " ".join(
            rng.choice(["the", "left", "arm", "knee", "raises", "bends", "person"], size=rng.integers(3, 9))
        )
        text = ANSWERS[num_poses if turn == turns - 1 else 0]
        pieces = text.split("<POSE>")
        answer = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            answer += [{"type": "pose", "text": None}, {"type": "text", "text": piece}]
        pictures = [{"type": "image", "text": None}] * (num_images if turn == 0 else 0)
        messages += [
            {"role": "user", "content": [*pictures, {"type": "text", "text": f"{words}?"}]},
            {"role": "assistant", "content": answer},
        ]
    mask = rng.random((num_poses, 24)) < 0.8
    mask[:, 0] = True
    return {
        "id": f"row_{number}",
        "source": "test",
        "task": "vqa",
        "messages": messages,
        "images": images,
        "poses": (0.5 * rng.standard_normal((num_poses, 24, 3))).tolist(),
        "pose_mask": mask.tolist(),
        "captions": [],
        "licence": "none",
    }


def make_rows(count=24, with_images=True):
    """Poses come in bunches, so that small batches hold from none to many."""
    poses = (0, 0, 1, 3, 0, 2, 1, 0)
    return [make_row(n, poses[n % 8], int(with_images and n % 3 == 0), turns=1 + (n % 5 == 0)) for n in range(count)]


def write_splits(folder, train, val=()):
    for split, rows in (("train", train), ("val", val)):
        if rows:
            (folder / split).mkdir(parents=True)
            write_rows(folder / split / "part.parquet", rows)
    return folder
