"""A small CLIP vision tower that has seen people: it learns to tell the pose of synthetic pictures, without words.

    python examples/train_tower.py tower rows/pictures rows/key_pictures

A tower from nothing learns this way at several times the rate that it would inside a ChatPose, where each picture is read by
the language model too. Afterwards: `ChatPoseForConditionalGeneration.from_llava(vision_tower="tower", ...)`. About 750 pictures a
second on 2 CPU cores that multiply bfloat16. Val of 14 epochs: 0.756, of the mean pose 0.905.
"""

import argparse

import torch
from make_base import make_vision_tower
from torch import nn
from tqdm import trange

from chatpose_hf.collator import open_picture
from chatpose_hf.data.rows import load_rows
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


BATCH = 64


class PoseTower(nn.Module):
    def __init__(self, tower):
        super().__init__()
        size, patches = tower.config.hidden_size, (tower.config.image_size // tower.config.patch_size) ** 2
        self.tower = tower
        # Read patch by patch: of their mean nothing was learned in four epochs. Some of them are hidden, so that each has to
        # know of the others, as the language model is to find it.
        each = nn.LayerNorm(size), nn.Dropout1d(0.3), nn.Linear(size, 32), nn.Flatten()
        self.head = nn.Sequential(*each, nn.Linear(32 * patches, 512), nn.GELU(), nn.Linear(512, 24 * 6))
        self.head[-1].bias.data = torch.eye(2, 3).flatten().repeat(24)  # the rest pose, in the 6D form

    def forward(self, pixel_values):
        # As LLaVA takes them: without the class token, before the last norm.
        patches = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return rot6d_to_rotmat(self.head(patches).float().unflatten(-1, (24, 6)))


def load_pictures(names, split, image_processor):
    """Pixels `(N, 3, S, S)`, rotation matrices `(N, 24, 3, 3)` and masks `(N, 24)` of the pictures of one person."""
    pixels, poses, masks = [], [], []
    for name in names:
        rows = load_rows(name, split, decode=False)
        for row in rows.filter(lambda task: task == "pose_estimation", input_columns="task"):
            picture = image_processor(open_picture(row["images"][0]), return_tensors="pt")["pixel_values"][0]
            pixels.append(picture.half())
            poses.append(row["poses"][0])
            masks.append(row["pose_mask"][0])
    return torch.stack(pixels), rotvec_to_rotmat(torch.tensor(poses)), torch.tensor(masks)


def measure(model, pixels, poses, masks, loss_function):
    model.eval()
    with torch.no_grad():
        rotmats = torch.cat([model(part.float()) for part in pixels.split(BATCH)])
    model.train()
    return loss_function(rotmats, poses, masks).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("rows", nargs="+", help="rows of `chatpose data synthetic`")
    parser.add_argument("--epochs", type=int, default=14)
    options = parser.parse_args()
    torch.manual_seed(0)
    tower, image_processor = make_vision_tower(112, 16, hidden_size=160, layers=6, heads=5)
    tower.set_attn_implementation("eager")  # of short rows, on a CPU, the faster one to train
    model, loss_function = PoseTower(tower), PoseLoss(joint_position_weight=2.0)
    pixels, poses, masks = load_pictures(options.rows, "train", image_processor)
    val = load_pictures(options.rows[:1], "val", image_processor)
    steps = len(pixels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=options.epochs * steps, pct_start=0.1)
    compiled = torch.compile(model)
    for epoch in range(options.epochs):
        order, total = torch.randperm(len(pixels)), 0.0
        for step in trange(steps, desc=f"epoch {epoch + 1}"):
            batch = order[step * BATCH : (step + 1) * BATCH]
            with torch.autocast("cpu", torch.bfloat16):
                rotmats = compiled(pixels[batch].float())
            loss = loss_function(rotmats, poses[batch], masks[batch]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        of_val = measure(model, *val, loss_function)
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, of val {of_val:.4f}", flush=True)
    tower.save_pretrained(options.output)
    image_processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
