"""Configuration of ChatPose: a LLaVA with a pose token and a pose head."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig


# The one meaning this version implements: the last layer's state, after the final norm, at the position that predicts
# the pose token. It is stored so that a checkpoint of another meaning is refused instead of decoded into nonsense.
POSE_HIDDEN_STATE = "predicts_pose_token"


@strict
class ChatPoseConfig(LlavaConfig):
    r"""
    Configuration of a [`ChatPoseForConditionalGeneration`]. It is a [`~transformers.LlavaConfig`] with these fields:

    Args:
        pose_token_id (`int`, *optional*, defaults to 32002):
            Id of `<POSE>`, the token that stands for a pose in the text.
        num_pose_joints (`int`, *optional*, defaults to 24):
            Rotations a pose holds, in SMPL's joint order; joint 0 is the global orientation.
        pose_head_hidden_size (`int`, *optional*):
            Width of the pose head's hidden layer; the language model's width if not given (as the original).
        pose_hidden_state (`str`, *optional*, defaults to `"predicts_pose_token"`):
            Which hidden state feeds the pose head. Only the default exists: the last layer's state at the position
            that predicts `<POSE>`, one before the token itself.
        pose_lead_in_ids (`list[int]`, *optional*):
            Token ids of words that lead to a pose ("It is"), which `generate(force_pose=True)` says before `<POSE>`
            when the model would end its answer without one.
        ce_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the language modelling loss (lambda_t of the paper; value of the original code).
        pose_loss_weight (`float`, *optional*, defaults to 0.1):
            Weight of the L1 loss on rotation matrices (lambda_theta of the paper; value of the original code).
        rot6d_norm_weight (`float`, *optional*, defaults to 0.0):
            Weight, beside that L1 loss, of how far the pose head's vectors are from length 1; in training only.

    Raises:
        ValueError: when a value has no meaning; the message names the field, the value and what is allowed.
    """

    model_type = "chatpose"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - the name and the type that Trainer reads
        "past_key_values",
        "cache",  # its name from transformers 5.24 on
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "image_outputs",
        "last_hidden_state",
        "ce_loss",
        "pose_loss",
    ]

    pose_token_id: int = 32002
    num_pose_joints: int = 24
    pose_head_hidden_size: int | None = None
    pose_hidden_state: str = POSE_HIDDEN_STATE
    pose_lead_in_ids: list[int] | tuple[int, ...] | None = None
    ce_loss_weight: float | int = 1.0
    pose_loss_weight: float | int = 0.1
    rot6d_norm_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.pose_token_id < 0 or self.pose_token_id == self.image_token_index:
            raise ValueError(
                f"`pose_token_id` must be a token of its own, not negative and not the image token "
                f"({self.image_token_index}), got {self.pose_token_id}"
            )
        if self.pose_hidden_state != POSE_HIDDEN_STATE:
            raise ValueError(
                f"`pose_hidden_state` must be {POSE_HIDDEN_STATE!r}, the only rule this version decodes, got "
                f"{self.pose_hidden_state!r}; load the checkpoint with the version of chatpose_hf that wrote it"
            )
        for name in ("num_pose_joints", "pose_head_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        for name in ("ce_loss_weight", "pose_loss_weight", "rot6d_norm_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be a finite number, not negative, got {getattr(self, name)}")


ChatPoseConfig.register_for_auto_class()
