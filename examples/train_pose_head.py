"""A pose head for a language model as it is: each row's state before <POSE> is computed once, and the head learns from them all.

    python examples/train_pose_head.py start smollm2_base --rows rows/key_poses rows/instructions --count 20000

LoRA then need not wait for a head that knows nothing ("linear probing, then fine-tuning", Kumar et al., ICLR 2022); and what the
head reaches says how much of poses a language model knows before it is trained on any. Hardware: 2 CPU cores.
"""

import argparse

import torch
from torch import nn
from tqdm import trange

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.body import BodyModel
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.mixture import Mixture
from chatpose_hf.data.rows import load_rows
from chatpose_hf.metrics import pa_mpjpe_mm
from chatpose_hf.modeling_chatpose import compute_rot6d_norm_loss
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import rot6d_to_rotmat


BATCH = 32  # rows of a forward pass


@torch.no_grad()
def read_states(model, processor, mixture: Mixture, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The states `(P, C)` that the pose head is given for `count` rows, an epoch after another, and the poses `(P, J, 3, 3)`."""
    collator, states, poses, rows = ChatPoseCollator(processor), [], [], []
    while len(rows) < count:
        mixture.set_epoch(len(rows) // len(mixture))
        rows += [mixture[index] for index in range(min(len(mixture), count - len(rows)))]
    rows.sort(key=lambda row: len(str(row["messages"])))
    hook = model.pose_head.register_forward_hook(lambda head, args, output: states.append(args[0][:-1].float()))
    for start in trange(0, count, BATCH, unit="batch"):
        batch = collator(rows[start : start + BATCH])
        model(**batch)
        poses.append(batch["pose_labels"][: len(states[-1])])
    hook.remove()
    return torch.cat(states), torch.cat(poses)


def fit(head: nn.Module, states: torch.Tensor, poses: torch.Tensor, epochs: int) -> None:
    """Trains the head on states that are brought to mean 0 and size 1, and then puts that into its first layer."""
    mean, scale = states.mean(0), states.std(0) + 1e-6
    states, pose_loss = (states - mean) / scale, PoseLoss("rotmat_mse", joint_position_weight=1.0)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(states) // 256 + 1))
    for _ in (bar := trange(epochs, unit="epoch")):
        for indices in torch.randperm(len(states)).split(256):
            rot6d = head(states[indices])
            losses = pose_loss(rot6d_to_rotmat(rot6d), poses[indices]) + 0.05 * compute_rot6d_norm_loss(rot6d)
            losses.mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=losses.mean().item())
    with torch.no_grad():
        head.linear_1.weight.div_(scale)
        head.linear_1.bias.sub_(head.linear_1.weight @ mean)


@torch.no_grad()
def compare(head: nn.Module, states: torch.Tensor, poses: torch.Tensor) -> tuple[float, float]:
    """Millimetres, and of how many rows, in percent, no other row's pose is nearer than its own (or one like it)."""
    joints, targets = (BodyModel.load("default").joints(each) for each in (rot6d_to_rotmat(head(states)), poses))
    distances = torch.cdist(joints.flatten(1), targets.flatten(1))
    is_nearest = distances.diagonal() <= distances.min(dim=1).values + 1e-4
    return pa_mpjpe_mm(joints, targets).mean().item(), 100 * is_nearest.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("model", help="a ChatPose")
    parser.add_argument("--rows", nargs="+", required=True, metavar="DIR", help="folders of rows, in equal shares")
    parser.add_argument("--count", type=int, default=20_000, help="rows to learn from")
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = ChatPoseProcessor.from_pretrained(options.model)
    model = ChatPoseForConditionalGeneration.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    mixture = Mixture([load_rows(folder, "train") for folder in options.rows], [1.0] * len(options.rows))
    fit(model.pose_head, *read_states(model, processor, mixture, options.count), options.epochs)
    for folder in options.rows:
        val = Mixture([load_rows(folder, "val")], [1.0])
        error, nearest = compare(model.pose_head, *read_states(model, processor, val, min(len(val), 600)))
        print(f"{folder}, val: PA-MPJPE {error:.1f} mm; the nearest of its poses is the right one in {nearest:.1f} %")
    model.float().save_pretrained(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
