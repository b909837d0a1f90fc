"""
Forward kinematics and skinning of the bodies against smplx's own forward, in one process, taking turns.

    python benchmarks/bench_body.py [--device cuda] [--json benchmarks/results/body_cpu.json]

The SMPL body is a made-up file of SMPL's sizes (6890 vertices, 24 joints, 207 pose directions); the default body has
13718 vertices and no pose directions. Ends in under a minute on 2 CPU cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import smplx
import torch
from bench_generate import describe_environment
from smplx.utils import Struct
from tqdm import tqdm

from chatpose_hf.body import BodyModel
from chatpose_hf.render import render_bodies
from chatpose_hf.rotations import rotvec_to_rotmat


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from make_smpl_files import make_model


def time_in_turns(sides: dict, rounds: int, device: str, repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of each side in each round; the sides alternate, so what slows the machine down meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in tqdm(range(-2, rounds), unit="round"):  # the first two warm up
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_number >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def summarise(name: str, ours: list[float], theirs: list[float], count: int) -> dict:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "name": name,
        "ms_per_pose": statistics.median(ours) / count * 1e3,
        "smplx_ms_per_pose": statistics.median(theirs) / count * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    arrays = make_model("smpl")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "SMPL_NEUTRAL.npz", **arrays)
        smpl = BodyModel.load(folder).to(options.device)
    default = BodyModel.load("default").to(options.device)
    layer = smplx.SMPLLayer("", data_struct=Struct(**arrays)).to(options.device)
    generator = torch.Generator().manual_seed(0)
    poses = (torch.randn(options.poses, 24, 3, generator=generator) * 0.3).to(options.device)
    betas = torch.zeros(options.poses, 10, device=options.device)

    def smplx_forward():
        rotmats = rotvec_to_rotmat(poses)
        return layer(betas=betas, global_orient=rotmats[:, :1], body_pose=rotmats[:, 1:])

    results = []
    with torch.no_grad():
        difference = (smpl.vertices(poses) - smplx_forward().vertices).abs().max().item()
        if difference > 1e-5:
            raise SystemExit(f"the two give different bodies: {difference} m")
        sides = {
            "default body, vertices": lambda: default.vertices(poses),
            "default body, joints": lambda: default.joints(poses),
            "SMPL, vertices": lambda: smpl.vertices(poses),
            "SMPL, joints": lambda: smpl.joints(poses),
            "smplx": smplx_forward,
        }
        seconds = time_in_turns(sides, options.rounds, options.device)
        results += [
            summarise(name, seconds[name], seconds["smplx"], options.poses) for name in sides if name != "smplx"
        ]
        vertices = default.vertices(poses[:1]).cpu()
        faces = default.faces.cpu()
        pictures = time_in_turns({"picture": lambda: render_bodies(vertices, faces)}, options.rounds, "cpu", repeats=1)

    print(f"{options.poses} poses a call, {options.rounds} rounds, largest difference to smplx {difference:.1e} m")
    print(f"{'':24} {'ms a pose':>10} {'smplx':>10} {'ratio':>8}   least-most")
    for row in results:
        low, high = row["ratio_range"]
        print(
            f"{row['name']:24} {row['ms_per_pose']:10.4f} {row['smplx_ms_per_pose']:10.4f} {row['ratio']:8.3f}   "
            f"{low:.3f}-{high:.3f}"
        )
    picture_ms = statistics.median(pictures["picture"]) * 1e3
    print(f"one picture of 512 x 512: {picture_ms:.1f} ms ({min(pictures['picture']) * 1e3:.1f} at least)")
    if options.json:
        record = {
            **describe_environment(options),
            "poses": options.poses,
            "rounds": options.rounds,
            "results": results,
            "picture_512_ms": picture_ms,
            "largest_difference_m": difference,
        }
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
