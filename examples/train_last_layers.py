"""Trains the last layers of a ChatPose's language model; what the layers below say of each row is computed once, and kept.

    torchrun --nproc-per-node 2 examples/train_last_layers.py examples/configs/chatpose_smollm2.yaml --count 32000

The settings are those of `chatpose train`, `lora_layers` among them; the rows are words alone. `--count` rows are drawn from the
mixture and come again in every pass. The adapter is one of the whole model, as `chatpose train` writes it; the states of what follows a
`<POSE>` are not yet, because `<POSE>` is learned too: a second part with `--adapter ADAPTER`, in a folder of its own, learns that. A run
that was stopped goes on from its last checkpoint. Hardware: 2 CPU cores.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from layer_states import LayerStates, collate, draw_rows, write_states
from peft import set_peft_model_state_dict
from torch import nn
from upper_layers import keep_tokens, put_into_whole_model, read_start

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.adapters import prepare_model
from chatpose_hf.checkpoints import find_last_checkpoint
from chatpose_hf.data.mixture import Mixture
from chatpose_hf.data.rows import load_rows
from chatpose_hf.trainer import ChatPoseTrainer
from chatpose_hf.training import parse_arguments, parse_weights, set_losses


class LastLayersTrainer(ChatPoseTrainer):
    """A [`ChatPoseTrainer`] of [`LayerStates`]."""

    def _count_tokens(self, dataset: LayerStates) -> np.ndarray:
        return dataset.lengths.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, required=True, help="rows to draw")
    parser.add_argument("--adapter", metavar="DIR", help="an adapter of the whole model, whose `<POSE>` is kept")
    options, arguments = parser.parse_known_args()
    model_args, data_args, tuning, loss_args, _, args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    output, state = Path(args.output_dir), PartialState()
    output.mkdir(parents=True, exist_ok=True)
    processor = ChatPoseProcessor.from_pretrained(model_args.model)
    model = ChatPoseForConditionalGeneration.from_pretrained(model_args.model, attn_implementation="eager")
    text = model.model.language_model
    layers, norm = text.layers, text.norm
    below = len(layers) - tuning.lora_layers
    start = read_start(options.adapter, model, below) if options.adapter else None
    files = [output / f"states_{process}.safetensors" for process in range(state.num_processes)]
    if not (own := files[state.process_index]).is_file():
        shares = parse_weights(data_args.train_data)
        mixture = Mixture([load_rows(name, "train") for name in shares], list(shares.values()), seed=args.seed)
        text.layers, text.norm = layers[:below], nn.Identity()
        rows = draw_rows(mixture, options.count)[state.process_index :: state.num_processes]
        write_states(own, text, processor, rows)
    state.wait_for_everyone()

    # The model without its lower layers is a model: one that reads states for embeddings.
    text.layers, text.norm = layers[below:], norm
    text.config.num_hidden_layers, text.config.use_cache = tuning.lora_layers, False
    set_losses(model, loss_args)
    trained = prepare_model(model, tuning, str(Path(model_args.model).resolve()))
    if start:
        set_peft_model_state_dict(trained, start)
        model.get_input_embeddings().token_adapter.trainable_tokens_delta.requires_grad_(False)
    dataset = LayerStates(files)
    dataset.labels = keep_tokens(model, dataset.labels)
    run = {"base_model": model_args.model, "command": shlex.join(sys.argv)}
    trainer = LastLayersTrainer(trained, args, processor, dataset, run=run)
    trainer.data_collator = collate
    checkpoint = find_last_checkpoint(output)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.was_terminated:
        trainer.model = put_into_whole_model(trained, model_args.model, tuning)
        trainer.save_model()


if __name__ == "__main__":
    main()
