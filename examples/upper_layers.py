"""A ChatPose without the lower layers of its language model, made ready to learn by LoRA; its adapter as the whole model's, and back.

See examples/train_last_layers.py.
"""

import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from chatpose_hf import ChatPoseForConditionalGeneration
from chatpose_hf.adapters import TuningArguments, prepare_model


COMMON = 8192  # tokens: a vocabulary that was merged from pairs has the commonest first


class OutputRows(nn.Module):
    """The output layer's rows of some tokens, frozen, and last that of `<POSE>`, which the adapter trains."""

    def __init__(self, weight: Tensor, pose_row: nn.Parameter):
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.pose_row = pose_row

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(states, weight) for weight in (self.weight, self.pose_row)], dim=-1)


def keep_tokens(model: ChatPoseForConditionalGeneration, labels: list[Tensor]) -> list[Tensor]:
    """
    Leaves the commonest tokens and those of the answers: a fifth of SmolLM2's, of which all are half of a step's time. Changes a
    model that is ready to train, its embeddings tied; gives the labels as the numbers that its tokens have now.
    """
    if not model.config.tie_word_embeddings:
        raise ValueError("expected a model whose output layer is its embeddings, got one with both")
    is_kept = torch.arange(model.config.text_config.vocab_size) < COMMON
    is_kept[torch.cat(labels).clamp(min=0)] = True
    is_kept[pose_token_id := model.config.pose_token_id] = False
    numbers, count = is_kept.cumsum(0) - 1, int(is_kept.sum())
    numbers[pose_token_id] = count
    tied = model.get_input_embeddings().token_adapter
    model.lm_head = OutputRows(tied.base_layer.weight[is_kept], tied.trainable_tokens_delta["default"])
    model.config.pose_token_id, model.config.text_config.vocab_size = count, count + 1
    return [torch.where(row == -100, -100, numbers[row]) for row in labels]


def shift_layers(weights: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """An adapter's weights by the names of layers that have so many more, or fewer, below them."""

    def shift(match: re.Match) -> str:
        return f".language_model.layers.{int(match[1]) + by}."

    return {re.sub(r"\.language_model\.layers\.(\d+)\.", shift, name): weight for name, weight in weights.items()}


def put_into_whole_model(trained: PeftModel, base: str, tuning: TuningArguments) -> PeftModel:
    """The base with the adapter of its last layers."""
    whole = ChatPoseForConditionalGeneration.from_pretrained(base)
    below = len(whole.model.language_model.layers) - tuning.lora_layers
    whole = prepare_model(whole, tuning, trained.peft_config["default"].base_model_name_or_path)
    set_peft_model_state_dict(whole, shift_layers(get_peft_model_state_dict(trained), below))
    return whole


def read_start(folder: str, model: ChatPoseForConditionalGeneration, below: int) -> dict[str, Tensor]:
    """
    An adapter of the whole model, for [`set_peft_model_state_dict`] of one without the layers below. The model reads its `<POSE>`
    from here on, so that the states of what follows one are those of the whole model too.
    """
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    (row,) = (weight for name, weight in weights.items() if name.endswith("trainable_tokens_delta"))
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pose_token_id] = row[0]
    return shift_layers(weights, -below)
