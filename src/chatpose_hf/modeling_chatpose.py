"""ChatPose: a LLaVA whose `<POSE>` tokens carry a 3D human pose (Feng et al., CVPR 2024).

The last-layer hidden state at the position that predicts `<POSE>` goes through a small MLP to 24 joint rotations in
SMPL's order. Everything else is `LlavaForConditionalGeneration`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_chatpose import ChatPoseConfig
from .rotations import rot6d_to_rotmat


# Weight renames are looked up by model type: without this line a published LLaVA (`language_model.model...`) would load
# into ChatPose with a random lm_head and no error.
register_checkpoint_conversion_mapping("chatpose", get_checkpoint_conversion_mapping("llava"), overwrite=True)
# Scores of tokens that training holds at a time: 64 MiB in float32, 524 states of a vocabulary of 32,000.
_SCORES_AT_ONCE = 2**24
# Steps whose states are kept in one piece. Kept one by one, so small, they would lie between what each step takes and gives back, and
# hold that too.
_STEPS_A_BLOCK = 64


@dataclass
class ChatPoseOutput(LlavaCausalLMOutputWithPast):
    """
    Output of [`ChatPoseForConditionalGeneration.forward`]: LLaVA's fields and ours. `B` rows, `T` tokens, `P` poses,
    `J` joints.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            `ce_loss_weight * ce_loss + pose_loss_weight * pose_loss`, when `labels` are given.
        logits (`torch.Tensor` of shape `(B, T, vocab_size)`, *optional*):
            Scores of the next token. None in training mode with `labels`: there only the states that predict a label go
            through the output layer.
        pose_rotmats (`torch.Tensor` of shape `(P, J, 3, 3)`, *optional*):
            One pose for each `<POSE>` label, in row-major order, float32, camera frame; joint 0 is the global
            orientation. Given with `labels`.
        ce_loss, pose_loss (`torch.Tensor` of shape `()`, *optional*):
            The two terms of the loss before their weights, detached.
        last_hidden_state (`torch.Tensor` of shape `(B, T, hidden_size)`):
            The last layer's state after the final norm, at the positions that `logits` covers.
        past_key_values (`cache` from transformers 5.24 on), hidden_states, attentions, image_hidden_states:
            As in [`~transformers.LlavaForConditionalGeneration`].
    """

    pose_rotmats: Tensor | None = None
    ce_loss: Tensor | None = None
    pose_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None


@dataclass
class ChatPoseGenerateOutput(GenerateBeamDecoderOnlyOutput):
    """
    Output of [`ChatPoseForConditionalGeneration.generate`] with `return_dict_in_generate=True`: transformers' fields
    and the `P` poses of all sequences, ordered by sequence, then by position.

    Args:
        sequences (`torch.Tensor` of shape `(S, L)`):
            Prompts and answers; `S` is the batch size times `num_return_sequences`.
        pose_rotmats (`torch.Tensor` of shape `(P, J, 3, 3)`):
            The pose of each generated `<POSE>`, float32, camera frame.
        pose_sequence_index (`torch.Tensor` of shape `(P,)`):
            The row of `sequences` that each pose belongs to.
        pose_token_positions (`torch.Tensor` of shape `(P,)`):
            The column of `sequences` where each pose's `<POSE>` stands.
        prompt_length (`int`):
            Columns of `sequences` that are prompt.
        sequences_scores, scores, logits, beam_indices, attentions, hidden_states, past_key_values (`cache` from
        transformers 5.24 on):
            As in [`~transformers.generation.GenerateDecoderOnlyOutput`] and its beam form.
    """

    pose_rotmats: Tensor | None = None
    pose_sequence_index: Tensor | None = None
    pose_token_positions: Tensor | None = None
    prompt_length: int | None = None


class PoseHead(nn.Module):
    """g_Theta of the paper: Linear, ReLU, Linear to 6 numbers a joint. Runs in float32."""

    def __init__(self, config: ChatPoseConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        head_size = config.pose_head_hidden_size or hidden_size
        self.linear_1 = nn.Linear(hidden_size, head_size)
        self.linear_2 = nn.Linear(head_size, 6 * config.num_pose_joints)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., hidden_size)` to `(..., J, 6)`, float32, for [`rot6d_to_rotmat`]."""
        # Autocast would bring the 6D numbers back to 8 bits of mantissa, which is degrees of rotation.
        with torch.autocast(hidden_states.device.type, enabled=False):
            features = self.linear_1(hidden_states.to(self.linear_1.weight.dtype)).relu()
            return self.linear_2(features).float().unflatten(-1, (-1, 6))


def rotmat_l1(pose_rotmats: Tensor, pose_labels: Tensor) -> Tensor:
    """Mean absolute difference of each joint's matrix entries, `(P, J, 3, 3)` twice to `(P, J)`; the original's."""
    return (pose_rotmats - pose_labels).abs().mean((-2, -1))


def compute_pose_loss(
    pose_rotmats: Tensor,
    pose_labels: Tensor,
    pose_mask: Tensor | None = None,
    joint_error: Callable[[Tensor, Tensor], Tensor] = rotmat_l1,
    joint_weights: Tensor | None = None,
) -> Tensor:
    """
    The original's pose loss for each pose: mean absolute difference of the body's rotation matrices plus that of the
    global orientation, which so weighs as much as the whole body (`hmr_loss` of model/chatpose.py, before the mean).

    Args:
        pose_rotmats (`torch.Tensor` of shape `(P, J, 3, 3)`): predictions.
        pose_labels (`torch.Tensor` of shape `(P, J, 3, 3)`): targets.
        pose_mask (`torch.Tensor` of shape `(P, J)`, *optional*): nonzero where a joint is supervised; default all.
        joint_error (`Callable`, *optional*, defaults to [`rotmat_l1`]): `(P, J, 3, 3)` twice to `(P, J)`.
        joint_weights (`torch.Tensor` of shape `(J,)`, *optional*):
            How much each joint counts: in the mean over the body, and before the global orientation's error.

    Returns:
        `torch.Tensor` of shape `(P,)`; zero for a pose without a supervised joint.
    """
    weights = torch.ones_like(pose_rotmats[..., 0, 0]) if pose_mask is None else (pose_mask > 0).to(pose_rotmats)
    # What stands in an unsupervised slot may be anything, NaN included: replace it, do not multiply it by zero.
    pose_labels = torch.where(weights[..., None, None] > 0, pose_labels.to(pose_rotmats), pose_rotmats.detach())
    if joint_weights is not None:
        weights = weights * joint_weights.to(weights)
    errors = joint_error(pose_rotmats, pose_labels) * weights
    body_weight = weights[:, 1:].sum(-1)
    body_error = errors[:, 1:].sum(-1) / torch.where(body_weight > 0, body_weight, 1.0)
    return body_error + errors[:, 0]


def compute_rot6d_norm_loss(rot6d: Tensor, pose_mask: Tensor | None = None) -> Tensor:
    """
    How far the two vectors of each joint are from length 1, squared. A rotation says nothing of these lengths, they grow
    as an optimizer steps (to 270 in a model of ours), and the gradient of a rotation is divided by them: joints that
    seldom turn then learn nothing more.

    Args:
        rot6d (`torch.Tensor` of shape `(P, J, 6)`): what the pose head says.
        pose_mask (`torch.Tensor` of shape `(P, J)`, *optional*): nonzero where a joint is supervised; default all.

    Returns:
        `torch.Tensor` of shape `(P,)`: the mean over the supervised joints; zero for a pose without one.
    """
    losses = (rot6d.unflatten(-1, (2, 3)).norm(dim=-1) - 1).square().mean(-1)
    weights = torch.ones_like(losses) if pose_mask is None else (pose_mask > 0).to(losses)
    return (losses * weights).sum(-1) / weights.sum(-1).clamp(min=1)


def _is_shard(weight: Tensor) -> bool:
    """Whether a call of the weight's module gathers it from all processes: FSDP2's have a mesh, DeepSpeed ZeRO-3's an id."""
    return hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")


class _LossInChunks(torch.autograd.Function):
    """
    The sum of a loss over chunks of states, and its gradients in the same pass: the scores of one chunk are held at a time, and
    computed once (as in Liger's fused linear cross-entropy, Hsu et al. 2024, whatever the output layer is).
    """

    @staticmethod
    def forward(ctx, compute_loss, size: int, targets: Tensor, states: Tensor, *weights: nn.Parameter) -> Tensor:
        losses, of_states, of_weights = [], [], [torch.zeros_like(weight) for weight in weights]
        for chunk, chunk_targets in zip(states.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                loss = compute_loss(chunk, chunk_targets)
            gradient, *gradients = torch.autograd.grad(loss, (chunk, *weights), materialize_grads=True)
            losses.append(loss.detach())
            of_states.append(gradient)
            for total, gradient in zip(of_weights, gradients, strict=True):
                total += gradient
        ctx.save_for_backward(torch.cat(of_states), *of_weights)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, None, *(each * gradient.to(each.dtype) for each in ctx.saved_tensors)


class PoseStateCollector:
    """What `generate` remembers for the pose head: one hidden state a row and step, and where the answer starts."""

    def __init__(self):
        self.prompt_length = 0
        self.blocks: list[Tensor] = []  # (steps, rows, hidden_size) each, the last one filled in part
        self.num_steps = 0

    def append(self, states: Tensor) -> None:
        """Copies the states `(rows, steps, hidden_size)` of what was generated next."""
        for state in states.unbind(1):
            step = self.num_steps % _STEPS_A_BLOCK
            if step == 0:
                self.blocks.append(state.new_empty(_STEPS_A_BLOCK, *state.shape))
            self.blocks[-1][step] = state
            self.num_steps += 1

    def gather(self, rows: Tensor, steps: Tensor) -> Tensor:
        """The states `(N, hidden_size)` of rows `(N,)` at steps `(N,)`, counted from the answer's start."""
        states = self.blocks[0].new_empty(len(rows), self.blocks[0].shape[-1])
        rows, steps = rows.to(states.device), steps.to(states.device)
        blocks = steps // _STEPS_A_BLOCK
        for number, block in enumerate(self.blocks):
            is_here = blocks == number
            states[is_here] = block[steps[is_here] % _STEPS_A_BLOCK, rows[is_here]]
        return states


class ForcePoseLogitsProcessor(LogitsProcessor):
    """
    Makes every answer contain a pose: where the model would end an answer without one, or has no room left to wait,
    it says the lead-in words and `<POSE>` first. Answers that bring a pose by themselves stay as they are.

    Args:
        pose_token_id (`int`): id of `<POSE>`.
        lead_in_ids (`list[int]`): token ids said before `<POSE>`; may be empty.
        eos_token_ids (`list[int]`): tokens that end an answer.
        prompt_length (`int`): columns of `input_ids` that are prompt; a `<POSE>` there is text.
        max_length (`int`): length at which generation stops.
        rows_per_prompt (`int`): beams, or sequences, that share one prompt.
    """

    def __init__(
        self,
        pose_token_id: int,
        lead_in_ids: list[int],
        eos_token_ids: list[int],
        prompt_length: int,
        max_length: int,
        rows_per_prompt: int = 1,
    ):
        self.pose_token_id = pose_token_id
        self.phrase = [*lead_in_ids, pose_token_id]
        self.eos_token_ids = eos_token_ids
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.rows_per_prompt = rows_per_prompt
        # Answers (prompt, tokens) after which the phrase began: by content, because beam search moves rows about.
        self.begun: set[tuple[int, ...]] = set()

    def _words_said(self, prompt: int, answer: list[int]) -> int | None:
        """How many words of the phrase the answer ends with; None where the phrase has not begun."""
        for words in range(min(len(self.phrase) - 1, len(answer)), -1, -1):
            before = len(answer) - words
            if (prompt, *answer[:before]) in self.begun and answer[before:] == self.phrase[:words]:
                return words
        return None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        room = self.max_length - input_ids.shape[1]
        wants_end = torch.isin(scores.argmax(-1), scores.new_tensor(self.eos_token_ids, dtype=torch.long)).tolist()
        scores = scores.clone()
        for row, answer in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.pose_token_id in answer:
                continue
            prompt = row // self.rows_per_prompt
            words = self._words_said(prompt, answer)
            if words is None and wants_end[row]:
                self.begun.add((prompt, *answer))
                words = 0
            if room <= len(self.phrase):
                words = max(words or 0, len(self.phrase) - room)
            if words is None:
                scores[row, self.eos_token_ids] = -torch.inf
            else:
                scores[row] = -torch.inf
                scores[row, self.phrase[words]] = 0
        return scores


class ChatPoseForConditionalGeneration(LlavaForConditionalGeneration):
    """
    A LLaVA that answers with `<POSE>` tokens and decodes each into SMPL joint rotations.

    Trains with `forward(labels=..., pose_labels=...)`, answers with `generate(..., return_dict_in_generate=True)`.

    Args:
        config ([`ChatPoseConfig`]): the LLaVA's configuration with the pose token and the head's sizes.

    Attributes:
        pose_loss_function (`Callable`):
            What compares poses in `forward`, with the arguments and the result of [`compute_pose_loss`], which it is.
    """

    config: ChatPoseConfig
    # float16 and bfloat16 are too coarse for rotations, and 8 bits more so; the head is some thousandth of the model. By the
    # first name transformers leaves the types of half precision alone, by the second its quantizers do.
    _keep_in_fp32_modules_strict = {"pose_head"}  # noqa: RUF012 - the name and the type that transformers reads
    _keep_in_fp32_modules = {"pose_head"}  # noqa: RUF012

    def __init__(self, config: ChatPoseConfig):
        super().__init__(config)
        self.pose_head = PoseHead(config)
        # As transformers' `loss_function` for the words: another may be put in its place; it is not saved.
        self.pose_loss_function: Callable[[Tensor, Tensor, Tensor | None], Tensor] = compute_pose_loss
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # The layer, not the head: for remote code transformers skips modules that hold no weight of their own.
        pose_head = getattr(self, "pose_head", None)
        if pose_head is not None and module is pose_head.linear_2:
            # The rest pose, facing the camera: from a random start single joints stay in half-turn minima of the L1.
            rest_rot6d = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).repeat(self.config.num_pose_joints, 1)
            rest_rot6d[0, 4] = -1.0
            init.copy_(module.bias, rest_rot6d.flatten())

    @classmethod
    def from_llava(cls, base: str | None = None, *, processor, text_model=None, vision_tower=None, **kwargs):
        """
        Starts a ChatPose from a LLaVA-1.5 checkpoint, or from a language model and a vision tower of your choice. The
        pose head is new; so is the projector where the towers come apart.

        Args:
            base (`str`, *optional*):
                Hub id or folder of a LLaVA-1.5 in transformers' layout, such as "llava-hf/llava-1.5-7b-hf".
            processor ([`ChatPoseProcessor`]):
                The processor of the same base; its tokenizer says the ids of `<POSE>` and `<image>`.
            text_model (`str` or `PreTrainedModel`, *optional*):
                Hub id or folder of a causal language model, or a loaded one; instead of `base`.
            vision_tower (`str` or `PreTrainedModel`, *optional*):
                Hub id or folder of a CLIP-like vision model, or a loaded one; with `text_model`.
            kwargs:
                Passed to `from_pretrained` (`dtype`, `device_map`, `revision`, ...); fields of [`ChatPoseConfig`] are
                set in the configuration.

        Returns:
            [`ChatPoseForConditionalGeneration`], its embeddings grown to hold `<POSE>` where they did not.

        Raises:
            ValueError: when neither or both kinds of base are given, or the base's weights do not fit.

        Example:

        ```python
        processor = ChatPoseProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")
        model = ChatPoseForConditionalGeneration.from_llava("llava-hf/llava-1.5-7b-hf", processor=processor)
        ```
        """
        has_towers = text_model is not None and vision_tower is not None
        if (base is not None) == has_towers or (text_model is None) != (vision_tower is None):
            raise ValueError(
                "expected `base`, or `text_model` and `vision_tower` together, got "
                f"base={base!r}, text_model={text_model!r}, vision_tower={vision_tower!r}"
            )
        token_ids = {"pose_token_id": processor.pose_token_id, "image_token_index": processor.image_token_id}
        token_ids["pose_lead_in_ids"] = processor.pose_lead_in_ids
        names = LlavaConfig.__annotations__ | ChatPoseConfig.__annotations__
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        if base is not None:
            hub = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download", "proxies")
            llava = LlavaConfig.from_pretrained(base, **{name: kwargs[name] for name in hub if name in kwargs})
            settings = {k: v for k, v in llava.to_dict().items() if k not in ("model_type", "architectures")}
            config = ChatPoseConfig(**{**settings, **token_ids, **fields})
            model, info = cls.from_pretrained(base, config=config, output_loading_info=True, **kwargs)
            wrong = [key for key in info["missing_keys"] if not key.startswith("pose_head.")]
            wrong += [*info["unexpected_keys"], *info["mismatched_keys"]]
            if wrong:
                raise ValueError(
                    f"{base!r} is not a LLaVA-1.5 checkpoint this version can start from: only the pose head may be "
                    f"missing, but these weights are missing, left over or of another shape: {sorted(map(str, wrong))}"
                )
        else:
            if isinstance(text_model, str):
                text_model = AutoModelForCausalLM.from_pretrained(text_model, **kwargs)
            if isinstance(vision_tower, str):
                tower_config = AutoConfig.from_pretrained(vision_tower)
                tower_config = getattr(tower_config, "vision_config", tower_config)
                with torch.device("meta"):
                    tower_class = type(AutoModel.from_config(tower_config))
                vision_tower = tower_class.from_pretrained(vision_tower, **kwargs)
            text_config = text_model.config.to_dict()
            # Its weights are plain numbers now, also if they came from a GGUF file; the Trainer refuses those that are not.
            text_config.pop("quantization_config", None)
            config = ChatPoseConfig(
                vision_config=vision_tower.config.to_dict(),
                text_config=text_config,
                image_seq_length=processor.num_image_tokens,
                **{
                    "vision_feature_select_strategy": processor.vision_feature_select_strategy,
                    "tie_word_embeddings": text_model.config.tie_word_embeddings,
                    **token_ids,
                    **fields,
                },
            )
            model = cls(config).to(text_model.dtype)
            model.model.vision_tower.load_state_dict(vision_tower.state_dict())
            model.model.language_model.load_state_dict(text_model.base_model.state_dict())
            model.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())
            model.tie_weights()
            model.generation_config = deepcopy(text_model.generation_config)
            model.to(text_model.device)
        vocabulary = len(processor.tokenizer)
        if vocabulary > model.get_input_embeddings().num_embeddings:
            old = model.get_input_embeddings().num_embeddings
            # A multiple of 64 keeps the matrix products of the output layer on the hardware's fast path.
            model.resize_token_embeddings(vocabulary, pad_to_multiple_of=64, mean_resizing=False)
            # The mean, not a random draw: an adapter finds the same base again.
            with torch.no_grad():
                for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                    embeddings.weight[old:] = embeddings.weight[:old].float().mean(0).to(embeddings.weight.dtype)
        model.pose_head.float()  # new, so not from a file, where the rule for float32 would have met it
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, getattr(processor.tokenizer, name))
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pose_labels: Tensor | None = None,
        pose_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_poses_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        cache: Any = None,
        **kwargs,
    ) -> ChatPoseOutput:
        """
        One pass over the tokens. `B` rows, `T` tokens, `P` poses, `J` joints.

        A `<POSE>` in `input_ids` is text; a `<POSE>` in `labels` is a pose: the state before it is decoded, and
        compared with its row of `pose_labels` where those are given.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Tokens, with one `<image>` token for each vision feature.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, H, W)`, *optional*):
                The pictures of all rows, in order; rows without one are welcome.
            attention_mask, position_ids, past_key_values, inputs_embeds, logits_to_keep, vision_feature_layer,
            vision_feature_select_strategy, image_sizes, mm_encoder_outputs, cache:
                As in [`~transformers.LlavaForConditionalGeneration`].
            labels (`torch.Tensor` of shape `(B, T)`, *optional*):
                Tokens to learn, -100 elsewhere; shifted here.
            pose_labels (`torch.Tensor` of shape `(P, J, 3, 3)`, *optional*):
                Rotation matrices, camera frame, one for each `<POSE>` in `labels` in row-major order. More rows may
                follow as padding when `pose_mask` is zero for them.
            pose_mask (`torch.Tensor` of shape `(P, J)`, *optional*):
                Nonzero where a joint is supervised; all are by default.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Label tokens of the whole accumulated batch, as the Trainer counts them; divides the CE sum.
            num_poses_in_batch (`torch.Tensor` or `int`, *optional*):
                Poses with a supervised joint in the whole accumulated batch; divides the pose sum. Without it the
                mean over this batch's poses is taken, weighted by this batch's share of the label tokens.

        Returns:
            [`ChatPoseOutput`].

        Raises:
            ValueError: when `pose_labels` and the `<POSE>` labels do not match.
        """
        if mm_encoder_outputs is not None:  # new in 5.2x: `generate` encodes the pictures once, before it adds beams
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        if cache is not None:  # `past_key_values` is called so from transformers 5.24 on
            kwargs["cache"] = cache
        elif past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        if labels is not None and pixel_values is None and self._needs_every_module():
            # Before the language model, as with pictures: processes that wait for one another must go the same way.
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds, input_ids = inputs_embeds + self._touch_vision(inputs_embeds), None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last_hidden_state = hidden_states[:, kept]
        logits = loss = ce_loss = pose_loss = pose_rotmats = None
        if labels is None or not self.training:
            logits = self.lm_head(last_hidden_state)
        if labels is not None:
            labels = labels.to(hidden_states.device)
            is_label = labels[:, 1:] != -100
            # At least 1: a batch of rows that all were left out has a loss of zero.
            num_tokens = torch.as_tensor(is_label.sum() if num_items_in_batch is None else num_items_in_batch).clamp(
                min=1
            )
            if self.training:
                # Questions and pictures have no labels, and are most of a row. One state more, as below.
                states = torch.cat([hidden_states[:, :-1][is_label], hidden_states[:1, 0]])
                targets = torch.cat([labels[:, 1:][is_label], labels.new_full((1,), -100)])
                ce_loss = self._ce_loss_of_states(states, targets, num_tokens)
            else:
                vocab_size = self.config.text_config.vocab_size
                ce_loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_tokens
                )
            is_pose = labels[:, 1:] == self.config.pose_token_id
            # One state more, and one call whatever the batch holds: DDP waits for a gradient of every trained weight, and
            # FSDP for every process at every module.
            rot6d = self.pose_head(torch.cat([hidden_states[:, :-1][is_pose], hidden_states[:1, 0]]))
            rot6d, unused = rot6d[:-1], rot6d[-1:].sum() * 0.0
            pose_rotmats = rot6d_to_rotmat(rot6d)
            pose_errors = self._pose_errors(rot6d, pose_rotmats, is_pose, pose_labels, pose_mask)
            if pose_errors is None:
                pose_loss = unused
            else:
                errors, num_poses = pose_errors
                pose_loss = errors.sum() / (num_poses if num_poses_in_batch is None else num_poses_in_batch) + unused
                if num_poses_in_batch is None and num_items_in_batch is not None:
                    pose_loss = pose_loss * (is_label.sum() / num_tokens)
            loss = self.config.ce_loss_weight * ce_loss + self.config.pose_loss_weight * pose_loss
            ce_loss, pose_loss = ce_loss.detach(), pose_loss.detach()
        elif pose_labels is not None:
            raise ValueError("`pose_labels` need `labels`: they belong to the `<POSE>` tokens among the labels")
        # The keys and values, the hidden states and what the pictures became pass through, however this version names them.
        passed = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return ChatPoseOutput(
            loss=loss,
            logits=logits,
            pose_rotmats=pose_rotmats,
            ce_loss=ce_loss,
            pose_loss=pose_loss,
            last_hidden_state=last_hidden_state,
            **passed,
        )

    def _ce_loss_of_states(self, states: Tensor, targets: Tensor, num_tokens: Tensor) -> Tensor:
        """
        The cross-entropy of states `(S, hidden_size)` and the tokens `(S,)` they predict, in chunks where there are many: all
        their scores at once would be most of a step's memory.
        """
        vocab_size = self.config.text_config.vocab_size

        def compute_sum(states: Tensor, targets: Tensor) -> Tensor:
            logits, targets = self.lm_head(states)[None], targets[None]
            told = {"logits": logits, "labels": targets, "shift_labels": targets}
            return self.loss_function(**told, vocab_size=vocab_size, num_items_in_batch=1)

        size = max(1, _SCORES_AT_ONCE // vocab_size)
        weights = tuple(self.lm_head.parameters())
        # Processes that wait for one another at this layer must call it equally often.
        if len(states) <= size or not torch.is_grad_enabled() or any(map(_is_shard, weights)):
            loss = compute_sum(states, targets)
        else:
            trained = (weight for weight in weights if weight.requires_grad)
            loss = _LossInChunks.apply(compute_sum, size, targets, states, *trained)
        return loss / num_tokens.to(loss.device)

    def _pose_errors(self, rot6d, pose_rotmats, is_pose, pose_labels, pose_mask) -> tuple[Tensor, Tensor | int] | None:
        """Each pose's error and the number of supervised poses, at least 1; None where there is nothing to compare."""
        num_tokens = pose_rotmats.shape[0]
        if pose_labels is None:
            return None
        num_joints = self.config.num_pose_joints
        if pose_labels.shape[1:] != (num_joints, 3, 3):
            raise ValueError(
                f"expected `pose_labels` of shape (P, {num_joints}, 3, 3), got {tuple(pose_labels.shape)}"
            )
        if pose_mask is not None and pose_mask.shape != pose_labels.shape[:2]:
            raise ValueError(
                f"expected `pose_mask` of shape {tuple(pose_labels.shape[:2])}, got {tuple(pose_mask.shape)}"
            )
        padding = pose_labels.shape[0] - num_tokens
        if padding < 0 or (padding > 0 and (pose_mask is None or (pose_mask[num_tokens:] > 0).any())):
            raise ValueError(
                f"expected one row of `pose_labels` for each `<POSE>` in `labels`, got {pose_labels.shape[0]} poses "
                f"for {num_tokens} tokens ({is_pose.sum(-1).tolist()} in the rows of the batch); check the poses "
                "against the messages, and that truncation cut no `<POSE>`"
            )
        if num_tokens == 0:
            return None
        pose_labels = pose_labels[:num_tokens]
        pose_mask = None if pose_mask is None else pose_mask[:num_tokens]
        num_poses = num_tokens if pose_mask is None else (pose_mask > 0).any(-1).sum().clamp(min=1)
        errors = self.pose_loss_function(pose_rotmats, pose_labels, pose_mask)
        if self.training and self.config.rot6d_norm_weight:
            errors = errors + self.config.rot6d_norm_weight * compute_rot6d_norm_loss(rot6d, pose_mask)
        return errors, num_poses

    def _needs_every_module(self) -> bool:
        """Whether some process would wait for this one to use the vision path: it is trained, or cut into shards."""
        vision = (*self.model.vision_tower.parameters(), *self.model.multi_modal_projector.parameters())
        return any(weight.requires_grad or _is_shard(weight) for weight in vision)

    def _touch_vision(self, like: Tensor) -> Tensor:
        """Zero, computed through the vision path; of another tensor's type and device."""
        size = self.config.vision_config.image_size
        features = self.get_image_features(like.new_zeros(1, 3, size, size)).pooler_output
        return torch.stack([feature.sum() for feature in features]).sum().to(like) * 0.0

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, force_pose: bool = False, **kwargs):
        """
        Generates as every transformers model does, and decodes each generated `<POSE>`.

        The states that predict the tokens are kept as they go by, one vector a token; no second pass is made and no
        other layer's states are kept. A `<POSE>` in the prompt is text and is not decoded.

        Args:
            inputs, generation_config, args, kwargs:
                As in [`~transformers.GenerationMixin.generate`].
            force_pose (`bool`, *optional*, defaults to `False`):
                Make every answer contain a pose: an answer that would end without one goes on with the words of
                `config.pose_lead_in_ids` and `<POSE>`.

        Returns:
            `torch.Tensor` of token ids, or [`ChatPoseGenerateOutput`] with `return_dict_in_generate=True`.
        """
        returns_dict = kwargs.get("return_dict_in_generate")
        if returns_dict is None:  # what a given configuration leaves open comes from the model's
            settings = (generation_config or self.generation_config, self.generation_config)
            returns_dict = any(config.return_dict_in_generate for config in settings)
        kwargs.pop("logits_to_keep", None)  # the states are kept where the logits are: at the last position
        collector = PoseStateCollector() if returns_dict else None
        output = super().generate(
            inputs, generation_config, *args, pose_states=collector, force_pose=force_pose, **kwargs
        )
        if collector is None or not isinstance(output, ModelOutput):
            return output

        answers = output.sequences[:, collector.prompt_length :]
        sequence_index, steps = torch.nonzero(answers == self.config.pose_token_id, as_tuple=True)
        # A beam's tokens were predicted in other rows than the one it ended in.
        beam_indices = output.get("beam_indices")
        rows = sequence_index if beam_indices is None else beam_indices[sequence_index, steps]
        result = ChatPoseGenerateOutput(
            sequences=output.sequences,
            pose_rotmats=rot6d_to_rotmat(self.pose_head(collector.gather(rows, steps))),
            pose_sequence_index=sequence_index,
            pose_token_positions=steps + collector.prompt_length,
            prompt_length=collector.prompt_length,
        )
        for name, value in output.items():  # also what a later transformers may add
            result[name] = value
        return result

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, pose_states=None, force_pose=False, **kwargs
    ):
        """Leaves out what is meant for `generate` alone; `generate` accepts only arguments that are named here."""
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # transformers up to 5.17 repeats picture by picture, which mixes up the pictures of a row that has several;
        # later versions encode first and bring no `pixel_values` here.
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and input_ids is not None and input_ids.numel() > 0:
            image_tokens = (input_ids == self.config.image_token_id).sum(-1)
            counts = (image_tokens * len(pixel_values) // image_tokens.sum().clamp(min=1)).tolist()
            del model_kwargs["pixel_values"]
            input_ids, model_kwargs = super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids, **model_kwargs
            )
            row_pictures = [rows.repeat(expand_size, 1, 1, 1) for rows in pixel_values.split(counts)]
            return input_ids, {**model_kwargs, "pixel_values": torch.cat(row_pictures)}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        collector = model_kwargs.get("pose_states")
        if collector is not None:
            # A copy, because the next step of a compiled model overwrites its outputs. Assisted decoding runs over
            # more candidates than it accepts: the first `num_new_tokens` states predicted what was kept.
            collector.append(outputs.last_hidden_state[:, :num_new_tokens])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, *args, model_kwargs=None, **kwargs):
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs
        )
        model_kwargs = model_kwargs or {}
        if model_kwargs.get("pose_states") is not None:
            model_kwargs["pose_states"].prompt_length = input_ids_seq_length
        if model_kwargs.get("force_pose"):
            eos_token_id = generation_config.eos_token_id
            eos_token_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
            processors.append(
                ForcePoseLogitsProcessor(
                    pose_token_id=self.config.pose_token_id,
                    lead_in_ids=list(self.config.pose_lead_in_ids or ()),
                    eos_token_ids=[token_id for token_id in eos_token_ids if token_id is not None],
                    prompt_length=input_ids_seq_length,
                    max_length=generation_config.max_length,
                    rows_per_prompt=max(generation_config.num_beams, generation_config.num_return_sequences),
                )
            )
        return processors

    def _get_candidate_generator(self, *args, logits_processor, model_kwargs, **kwargs):
        # A draft model would refuse, and copy, what belongs to this call; and where the draft wants to end an answer
        # is no reason to force a pose into ours.
        own = ("pose_states", "force_pose")
        return super()._get_candidate_generator(
            *args,
            logits_processor=LogitsProcessorList(
                item for item in logits_processor if not isinstance(item, ForcePoseLogitsProcessor)
            ),
            model_kwargs={name: value for name, value in model_kwargs.items() if name not in own},
            **kwargs,
        )

    def describe_remote_code(self) -> None:
        """Writes into the configuration which classes of the code files the Auto classes and `pipeline` load."""
        # The import also makes transformers copy the pipeline's file: it follows the relative imports of this one.
        from .pipeline_chatpose import ChatPosePipeline

        self.config.custom_pipelines = {
            "image-text-to-pose": {
                "impl": f"pipeline_chatpose.{ChatPosePipeline.__name__}",
                "pt": ["AutoModelForImageTextToText"],
                "type": "multimodal",
                "default": {},
            }
        }
        self.config.auto_map = {
            "AutoConfig": "configuration_chatpose.ChatPoseConfig",
            **dict.fromkeys(AUTO_CLASSES, "modeling_chatpose.ChatPoseForConditionalGeneration"),
        }

    def save_pretrained(self, save_directory, **kwargs):
        """Saves weights, configuration and the code files that `trust_remote_code=True` loads."""
        self.describe_remote_code()
        super().save_pretrained(save_directory, **kwargs)


# The Auto classes that load this model from a folder with `trust_remote_code=True`.
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
ChatPoseForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
