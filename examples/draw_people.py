"""Drawn people as tensors, with what a picture shows where: for a vision tower to learn from (train_tower.py).

    python examples/draw_people.py people.safetensors rows/cmu rows/key_poses --count 20000
    python examples/draw_people.py people_val.safetensors rows/cmu --split val --count 500

`pixels` (N, S, S, 3), bytes; `poses` (N, 24, 3), axis-angle; `points` (N, 24, 2), the joints' places from -1 to 1; `parts` (N, S / 4,
S / 4), each cell's nearest joint, counted from 1, where somebody is. About a hundred a second on 2 CPU cores.
"""

import argparse
import multiprocessing
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from chatpose_hf.atomic_write import atomic_file
from chatpose_hf.data.rows import NUM_JOINTS
from chatpose_hf.data.synthetic import Studio, find_near_val, load_sampler


CELL = 4  # pixels of a side within which one joint is told
studio = lru_cache(maxsize=1)(Studio)


def draw(task):
    """One picture's arrays; None where its pose is nearly one of val."""
    folders, split, size, number = task
    rng = np.random.default_rng([7, split == "train", number])
    folder = Path(rng.choice(folders))
    pose, _ = load_sampler(folder, split).sample(rng)
    if find_near_val(torch.from_numpy(pose)[None].float(), folder, split).any():
        return None
    scene = studio().draw(pose[None], rng, size)
    pose = scene.people[0].pose.astype(np.float32)
    joints = studio().body.joints(torch.from_numpy(pose)[None])[0, :NUM_JOINTS].numpy() + scene.translations[0]
    points = joints[:, :2] / joints[:, 2:] * scene.focal + scene.center
    middles = np.arange(CELL // 2, size, CELL)
    cells = np.stack(np.meshgrid(middles, middles), axis=-1)
    nearest = np.linalg.norm(cells[:, :, None] - points, axis=-1).argmin(-1) + 1
    parts = np.where(scene.owners[CELL // 2 :: CELL, CELL // 2 :: CELL] >= 0, nearest, 0).astype(np.uint8)
    return np.array(scene.image), pose, (points / size * 2 - 1).astype(np.float32), parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="file to write")
    parser.add_argument("rows", nargs="+", help="folders of rows whose poses are drawn, each as often")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=112, help="pixels of a side")
    options = parser.parse_args()
    tasks = ((options.rows, options.split, options.size, number) for number in range(options.count))
    # One thread each: what is drawn is to repeat to the last bit.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        drawn = list(tqdm(pool.imap(draw, tasks, chunksize=25), total=options.count))
    drawn = [picture for picture in drawn if picture is not None]
    print(f"{options.count - len(drawn)} of {options.count} poses were nearly poses of val and are left out")
    tensors = {}
    for name, arrays in zip(("pixels", "poses", "points", "parts"), zip(*drawn, strict=True), strict=True):
        tensors[name] = torch.from_numpy(np.stack(arrays))
    with atomic_file(options.output) as file:
        save_file(tensors, file)


if __name__ == "__main__":
    main()
