"""A checkpoint whose pose head gives vectors of length 1, with the same poses as before.

    python examples/rescale_pose_head.py runs/poser rescaled --rows rows/instructions

A head that was trained without `--rot6d_norm_weight` gives vectors of any length; where they are long, their directions hardly
change in further training (docs/training.md). Each joint's two vectors are divided by their mean lengths over some rows.
"""

import argparse
from itertools import islice

import torch

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.rows import load_rows


ROWS, BATCH = 256, 32


@torch.no_grad()
def mean_lengths(model, processor, rows) -> torch.Tensor:
    """`(J, 2)`: of each joint's vectors, over the rows' poses."""
    collator, rot6d = ChatPoseCollator(processor), []
    hook = model.pose_head.register_forward_hook(lambda module, args, output: rot6d.append(output[:-1]))
    for start in range(0, len(rows), BATCH):
        batch = collator(rows[start : start + BATCH])
        batch.pop("row_report", None)
        model(**batch)
    hook.remove()
    return torch.cat(rot6d).unflatten(-1, (2, 3)).norm(dim=-1).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--rows", required=True, help="folder of rows with poses")
    options = parser.parse_args()
    processor = ChatPoseProcessor.from_pretrained(options.model)
    model = ChatPoseForConditionalGeneration.from_pretrained(options.model, attn_implementation="sdpa").eval()
    lengths = mean_lengths(model, processor, list(islice(load_rows(options.rows, "train"), ROWS)))
    head, of_numbers = model.pose_head.linear_2, lengths.repeat_interleave(3, dim=1).flatten()
    with torch.no_grad():
        head.weight.div_(of_numbers[:, None])
        head.bias.div_(of_numbers)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"lengths were {lengths.min():.1f} to {lengths.max():.1f}")


if __name__ == "__main__":
    main()
