"""An output layer that scores the commonest tokens and those of the answers, while a model learns by LoRA on a CPU.

They are a fifth of SmolLM2's tokens, and all of them are half of a step's time. See examples/train_last_layers.py.
"""

import torch
from torch import Tensor, nn

from chatpose_hf import ChatPoseForConditionalGeneration


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
    """Changes a model that is ready to train, its embeddings tied; gives the labels as the numbers that its tokens have now."""
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
