"""A projector that says what a tower sees in the language model's own terms: its states of poses.

    python examples/train_projector.py start words people.safetensors people_val.safetensors      # of draw_people.py

What a new projector says means nothing to a language model that knows poses from words, and it learns to ignore it (docs/training.md).
Here each patch's state is to give the picture's pose through the model's last norm and pose head, which stay as they are; then all that
is left to learn is to look at it.
"""

import argparse

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import trange
from train_tower import to_pixel_values

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.body import BodyModel
from chatpose_hf.metrics import pa_mpjpe_mm
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


BATCH, PATCHES = 256, 2
SIZE = 0.2  # of a state's numbers; the norm takes any


@torch.no_grad()
def see(model, pixels, image_processor):
    """The tower's states of all patches, `(N, P, C)`, bfloat16."""
    parts = [to_pixel_values(part, image_processor) for part in pixels.split(BATCH)]
    states = [model.model.vision_tower(part, output_hidden_states=True).hidden_states[-1][:, 1:] for part in parts]
    return torch.cat([state.bfloat16() for state in states])


def read(model, states):
    return model.pose_head(model.model.language_model.norm(states))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument("model", help="a ChatPose that knows poses from words, with a tower of train_tower.py")
    parser.add_argument("people", help="drawn people")
    parser.add_argument("val", help="others, of the split val")
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    if options.steps < 40:
        parser.error(f"--steps must be at least 40, of which the first twentieth warms up, got {options.steps}")
    torch.manual_seed(0)
    model = ChatPoseForConditionalGeneration.from_pretrained(options.model, attn_implementation="eager")
    model.requires_grad_(False)
    processor = ChatPoseProcessor.from_pretrained(options.model)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    people, val = load_file(options.people), load_file(options.val)
    states, val_states = (see(model, part["pixels"], processor.image_processor) for part in (people, val))
    poses, targets = (rotvec_to_rotmat(part["poses"]) for part in (people, val))
    pose_loss, body = PoseLoss(joint_position_weight=2.0), BodyModel.load("default")
    optimizer = torch.optim.AdamW(projector.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.05)
    for _ in (bar := trange(options.steps)):
        rows = torch.randint(len(states), (BATCH,)).repeat_interleave(PATCHES)
        told = projector(states[rows, torch.randint(states.shape[1], rows.shape)].float())
        losses = pose_loss(rot6d_to_rotmat(read(model, told)), poses[rows])
        loss = losses.mean() + (told.square().mean(-1).sqrt() - SIZE).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=loss.item())
    with torch.no_grad():
        found = rot6d_to_rotmat(read(model, projector(val_states.float())).mean(1))
    print(f"PA-MPJPE of val {pa_mpjpe_mm(body.joints(found), body.joints(targets)).mean():.1f} mm")
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
