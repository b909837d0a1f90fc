"""A vision tower with heads that read it while it learns to see people (train_tower.py)."""

import torch
from torch import nn

from chatpose_hf.body import JOINT_NAMES
from chatpose_hf.data.captions import MIRRORED_JOINTS, mirror
from chatpose_hf.modeling_chatpose import compute_rot6d_norm_loss
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


GRID, CELLS, JOINTS = 7, 4, len(JOINT_NAMES)  # patches of a picture's side, cells of a patch's
PATCHES_READ = 4  # of each picture in a step


class PoseTower(nn.Module):
    """The tower with what reads it: parts half-way and at the end, places, the pose from all joints and from any one patch."""

    def __init__(self, tower):
        super().__init__()
        size = tower.config.hidden_size
        self.tower = tower
        angles = torch.arange(GRID)[:, None] * 8 ** (torch.arange(size // 4) / (size // 4)) * 1.5 / GRID
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        places = torch.cat([waves.repeat(GRID, 1), waves.repeat_interleave(GRID, 0)], dim=1)
        (embedding,) = (
            weight for name, weight in tower.named_parameters() if name.endswith("position_embedding.weight")
        )
        embedding.data[1:] = places / 2  # as strong as what is seen
        self.parts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, CELLS**2 * (JOINTS + 1))) for _ in "12"
        )
        self.places = nn.ModuleList(nn.Sequential(nn.LayerNorm(size), nn.Linear(size, JOINTS * 3)) for _ in "12")
        self.joints = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 64))
        self.lift = nn.Sequential(nn.Linear(JOINTS * 66, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
        self.lifted = nn.Linear(512, JOINTS * 6)
        self.read = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 512), nn.GELU(), nn.Linear(512, JOINTS * 6))
        for layer in (self.lifted, self.read[-1]):
            layer.bias.data = torch.tensor([1.0, 0, 0, 0, -1, 0, *[1.0, 0, 0, 0, 1, 0] * (JOINTS - 1)])
        line = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        self.register_buffer("centers", torch.cartesian_prod(line, line).flip(-1))

    def forward(self, pixel_values, count=None):
        """Cells' parts, joints' places, both twice; the pose `(N, 24, 6)` of all joints, and of `count` patches each."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        # As LLaVA takes them: without the class token.
        middle, last = states[len(states) // 2][:, 1:], states[-1][:, 1:]
        parts = [head(state).float() for head, state in zip(self.parts, (middle, last), strict=True)]
        places = []
        for head, state in zip(self.places, (middle, last), strict=True):
            score, offset = head(state).float().unflatten(-1, (-1, 3)).split((1, 2), dim=-1)
            weights = score.softmax(1)
            places.append(((self.centers[:, None] + offset) * weights).sum(1))
        pooled = weights[..., 0].mT.to(last.dtype) @ self.joints(last)
        lifted = self.lifted(self.lift(torch.cat([pooled, places[-1].to(pooled.dtype)], dim=-1).flatten(1)))
        if count is not None:  # each patch is to know all: then the language model finds it wherever it looks
            patches = torch.randint(last.shape[1], (len(last), count, 1)).expand(-1, -1, last.shape[-1])
            last = last.gather(1, patches)
        return parts, places, *(pose.float().unflatten(-1, (-1, 6)) for pose in (lifted, self.read(last)))


@torch.no_grad()
def rescale_states(tower, pixel_values):
    """
    Gives the tower's last states a standard deviation of 1: a language model takes them beside its words, and states a
    hundred times as large go through its layers unchanged. All that is added up to a state is divided, which every norm in the
    tower undoes.
    """
    scale = tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:].std()
    for name, weight in tower.named_parameters():
        if any(part in name for part in ("pre_layrnorm", "out_proj", "fc2")):
            weight.div_(scale)


def mirror_some(pixels, poses, points, parts):
    """Every second picture of a batch as in a looking glass, with what is in it: `(N, S, S, 3)`, `(N, 24, 3)`, `(N, 24, 2)`, `(N, C, C)`."""
    swapped = torch.tensor([0, *(joint + 1 for joint in MIRRORED_JOINTS)])
    pixels, poses, points, parts = pixels.clone(), poses.clone(), points.clone(), parts.long()
    pixels[::2] = pixels[::2].flip(2)
    poses[::2] = mirror(poses[::2])
    points[::2] = points[::2, MIRRORED_JOINTS] * torch.tensor([-1.0, 1.0])
    parts[::2] = swapped[parts[::2].flip(2)]
    return pixels, poses, points, parts


def compute_loss(model, pixel_values, poses, points, parts, pose_loss):
    with torch.autocast("cpu", torch.bfloat16):
        told_parts, told_points, lifted, read = model(pixel_values, PATCHES_READ)
    parts = parts.reshape(-1, GRID, CELLS, GRID, CELLS).transpose(2, 3).flatten()
    rotmats = rotvec_to_rotmat(poses)
    loss = sum(0.5 * nn.functional.cross_entropy(told.reshape(len(parts), -1), parts) for told in told_parts)
    loss = loss + sum((told - points).abs().mean() for told in told_points)
    for rot6d, count in ((lifted, 1), (read.flatten(0, 1), PATCHES_READ)):
        losses = pose_loss(rot6d_to_rotmat(rot6d), rotmats.repeat_interleave(count, 0))
        loss = loss + (losses + 0.1 * compute_rot6d_norm_loss(rot6d)).mean()
    return loss
