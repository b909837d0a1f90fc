"""What the lower layers of a ChatPose's language model say of rows, on disk, and batches of it for the layers above.

python examples/train_last_layers.py examples/configs/chatpose_smollm2.yaml --count 32000
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from chatpose_hf import ChatPoseProcessor
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.mixture import Mixture


BATCH = 64  # rows of a pass through the lower layers


def draw_rows(mixture: Mixture, count: int) -> list[dict]:
    """Rows of one epoch after another, none whose words about a pose, or whose whole question, came before."""
    rows, seen, epoch = [], set(), 0
    while len(rows) < count:
        mixture.set_epoch(epoch)
        before = len(rows)
        for row in map(mixture.__getitem__, range(len(mixture))):
            question = json.dumps(row["messages"][0]).lower()
            told = [
                text
                for text in (each["text"] for each in row["captions"])
                if json.dumps(text)[2:-2].lower() in question
            ]
            key = max(told, key=len, default=question)
            if key not in seen:
                seen.add(key)
                rows.append(row)
        if len(rows) == before:
            raise ValueError(
                f"expected a --count of at most {before}, the different questions of these rows, got {count}"
            )
        epoch += 1
    return rows[:count]


@torch.no_grad()
def write_states(file: Path, lower: nn.Module, processor: ChatPoseProcessor, rows: list[dict]) -> None:
    """Writes the states of rows, in bfloat16, and their labels and poses. `lower` is a language model without the layers above."""
    collator, parts = ChatPoseCollator(processor), []
    rows = sorted(rows, key=lambda row: len(str(row["messages"])))
    for start in trange(0, len(rows), BATCH, unit="batch"):
        batch = collator(some := rows[start : start + BATCH])
        if "pixel_values" in batch:
            raise ValueError("expected rows of words alone, got some with pictures")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = lower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        is_token = batch["attention_mask"] == 1
        counts = torch.tensor([len(row["poses"]) for row in some])
        poses = {name: batch[name][: counts.sum()] for name in ("pose_labels", "pose_mask")}
        words = {
            "states": states[is_token].bfloat16(),
            "labels": batch["labels"][is_token],
            "lengths": is_token.sum(1),
        }
        parts.append({**words, **poses, "pose_counts": counts})
    save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, file)


class LayerStates(torch.utils.data.Dataset):
    """The rows of such files: states `(T, C)`, labels `(T,)`, and poses as in [`ChatPoseCollator`]."""

    def __init__(self, files: list[Path]):
        parts = [load_file(file) for file in files]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.lengths, counts = whole["lengths"], whole["pose_counts"].tolist()
        self.states, self.labels = (whole[name].split(self.lengths.tolist()) for name in ("states", "labels"))
        self.poses, self.masks = (whole[name].split(counts) for name in ("pose_labels", "pose_mask"))

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict:
        pose = {"pose_labels": self.poses[index], "pose_mask": self.masks[index]}
        return {"id": str(index), "states": self.states[index].float(), "labels": self.labels[index], **pose}


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """A batch as [`ChatPoseCollator`]'s, with states for tokens. One pose more, that counts for nothing: no tensor is empty."""
    report = {"rows": [row["id"] for row in rows], "skipped": [], "truncated": []}
    return {
        "inputs_embeds": pad_sequence([row["states"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row["labels"]) for row in rows], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "pose_labels": torch.cat([*(row["pose_labels"] for row in rows), torch.eye(3).repeat(1, 24, 1, 1)]),
        "pose_mask": torch.cat([*(row["pose_mask"] for row in rows), torch.zeros(1, 24, dtype=torch.int)]),
        "row_report": torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8),
    }
