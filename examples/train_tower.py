"""A small CLIP vision tower that has seen people: it learns where each part of the body is, then how the person stands.

    python examples/train_tower.py tower people.safetensors people_val.safetensors      # of draw_people.py

Inside a ChatPose a tower from nothing learns neither (docs/training.md). Afterwards:
`ChatPoseForConditionalGeneration.from_llava(vision_tower="tower", ...)`.
"""

import argparse
import math

import torch
from make_base import make_vision_tower
from pose_tower import PoseTower, compute_loss, mirror_some, rescale_states
from safetensors.torch import load_file
from torch import nn
from tqdm import trange

from chatpose_hf.body import BodyModel
from chatpose_hf.metrics import pa_mpjpe_mm
from chatpose_hf.muon import MuonAdamW
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


BATCH = 64


def to_pixel_values(pixels, image_processor):
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def measure(model, pixel_values, poses, body):
    """Mean PA-MPJPE in mm of what the patches say on the average."""
    model.eval()
    read = torch.cat([model(part)[-1].mean(1) for part in pixel_values.split(BATCH)])
    model.train()
    joints, targets = (body.joints(rotmats) for rotmats in (rot6d_to_rotmat(read), rotvec_to_rotmat(poses)))
    return pa_mpjpe_mm(joints, targets).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("people", help="drawn people")
    parser.add_argument("val", help="others, of the split val")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    tower, image_processor = make_vision_tower(112, 16, hidden_size=192, layers=6, heads=6)
    tower.set_attn_implementation("eager")  # of short rows, on a CPU, the faster one to train
    model, pose_loss, body = PoseTower(tower), PoseLoss(joint_position_weight=2.0), BodyModel.load("default")
    people, val = load_file(options.people), load_file(options.val)
    steps = options.epochs * (len(people["poses"]) // BATCH)
    named = dict(model.named_parameters())
    matrices = [name for name, weight in named.items() if ".layers." in name and weight.ndim == 2]
    optimizer = MuonAdamW(
        [{"params": [named.pop(name) for name in matrices], "lr": 2e-3, "weight_decay": 0.05}],
        [{"params": list(named.values())}], 1e-3, betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    rate = lambda step: min(1, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(options.epochs):
        order, total = torch.randperm(len(people["poses"])), 0.0
        for step in (bar := trange(len(order) // BATCH, desc=f"epoch {epoch + 1}")):
            rows = order[step * BATCH : (step + 1) * BATCH]
            pixels, *targets = mirror_some(*(people[name][rows] for name in ("pixels", "poses", "points", "parts")))
            contrast, brightness = 0.4 * (torch.rand(2, BATCH, 3, 1, 1) - 0.5)
            pixel_values = to_pixel_values(pixels, image_processor) * (1 + contrast) + brightness
            loss = compute_loss(model, pixel_values, *targets, pose_loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
            bar.set_postfix(loss=total / (step + 1))
        found = measure(model, to_pixel_values(val["pixels"], image_processor), val["poses"], body)
        print(f"epoch {epoch + 1}: loss {total / (step + 1):.4f}, PA-MPJPE of val {found:.1f} mm", flush=True)
    rescale_states(tower, to_pixel_values(val["pixels"], image_processor))
    image_processor.save_pretrained(options.output)
    tower.save_pretrained(options.output)


if __name__ == "__main__":
    main()
