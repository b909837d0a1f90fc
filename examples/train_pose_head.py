"""A pose head for a language model as it is: each row's state before <POSE> is computed once, and the head learns from them all.

    python examples/train_pose_head.py start smollm2_base --rows rows/key_poses rows/instructions --count 20000

LoRA that starts from there need not wait for a head that knows nothing ("linear probing, then fine-tuning", Kumar et al., ICLR 2022).
What the head reaches says how much of poses a language model knows before it is trained on any. Hardware: 2 CPU cores.
"""

import argparse

import torch
from torch import nn
from tqdm import tqdm, trange

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.body import BodyModel
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.mixture import Mixture
from chatpose_hf.data.rows import load_rows
from chatpose_hf.metrics import pa_mpjpe_mm
from chatpose_hf.modeling_chatpose import compute_rot6d_norm_loss
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import rot6d_to_rotmat


BATCH, NEIGHBOURS = 32, 32  # rows a forward pass; batches among which rows are sorted by length


@torch.no_grad()
def read_states(model, processor, mixture: Mixture, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The states `(P, C)` that the pose head is given for `count` rows, an epoch after another, and the poses `(P, J, 3, 3)`."""
    collator, states, poses, rows = ChatPoseCollator(processor), [], [], []
    hook = model.pose_head.register_forward_hook(lambda head, args, output: states.append(args[0][:-1].float()))
    for number in tqdm(range(count), unit="row"):
        epoch, index = divmod(number, len(mixture))
        if index == 0:
            mixture.set_epoch(epoch)
        rows.append(mixture[index])
        if len(rows) == BATCH * NEIGHBOURS or number == count - 1:
            rows.sort(key=lambda row: len(str(row["messages"])))
            for start in range(0, len(rows), BATCH):
                batch = collator(rows[start : start + BATCH])
                model(**batch)
                poses.append(batch["pose_labels"][: len(states[-1])])
            rows = []
    hook.remove()
    return torch.cat(states), torch.cat(poses)


def fit(head: nn.Module, states: torch.Tensor, poses: torch.Tensor, epochs: int) -> None:
    """Trains the head on states that are brought to mean 0 and size 1, and then puts that into its first layer."""
    mean, scale = states.mean(0), states.std(0).clamp(min=1e-6)
    states, pose_loss = (states - mean) / scale, PoseLoss("rotmat_mse", joint_position_weight=1.0)
    steps = epochs * -(-len(states) // 256)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in (bar := trange(epochs, unit="epoch")):
        for indices in torch.randperm(len(states)).split(256):
            rot6d = head(states[indices])
            losses = pose_loss(rot6d_to_rotmat(rot6d), poses[indices]) + 0.05 * compute_rot6d_norm_loss(rot6d)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=losses.mean().item())
    with torch.no_grad():
        head.linear_1.weight.div_(scale)
        head.linear_1.bias.sub_(head.linear_1.weight @ mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("model", help="a ChatPose: its pose head is trained, all else stays")
    parser.add_argument("--rows", nargs="+", required=True, metavar="DIR", help="folders of rows, in equal shares")
    parser.add_argument(
        "--count", type=int, default=20_000, help="rows to learn from, drawn anew where there are fewer"
    )
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = ChatPoseProcessor.from_pretrained(options.model)
    model = ChatPoseForConditionalGeneration.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    mixtures = [
        Mixture([load_rows(folder, split) for folder in options.rows], [1] * len(options.rows))
        for split in ("train", "val")
    ]
    states, poses = read_states(model, processor, mixtures[0], options.count)
    val_states, val_poses = read_states(model, processor, mixtures[1], min(len(mixtures[1]), 1000))
    fit(model.pose_head, states, poses, options.epochs)
    body = BodyModel.load("default")
    with torch.no_grad():
        found = rot6d_to_rotmat(model.pose_head(val_states))
    print(f"PA-MPJPE of val {pa_mpjpe_mm(body.joints(found), body.joints(val_poses)).mean():.1f} mm")
    model = model.float()
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
