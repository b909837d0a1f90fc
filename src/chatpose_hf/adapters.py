"""Which weights are trained, and how a trained folder becomes a model again."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

# By the package's names, which make the Auto classes know ChatPose: a folder's own code is never asked for.
from . import ChatPoseConfig, ChatPoseForConditionalGeneration, ChatPoseProcessor


METHODS = ("lora", "full")
# Each part of the model by what its weights' names begin with.
PARTS = {
    "vision tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "token embeddings": "model.language_model.embed_tokens.",
    "language model": "model.language_model.",
    "output layer": "lm_head.",
    "pose head": "pose_head.",
}


@dataclass
class TuningArguments:
    """
    What is trained. The pose head always is, all of it; vision tower and projector are frozen unless asked for.

    Args:
        method (`str`, *optional*, defaults to `"lora"`):
            `"lora"`: low-rank updates of the language model, and the `<POSE>` rows of the token embeddings and the output
            layer. `"full"`: all of the language model.
        lora_r (`int`, *optional*, defaults to 128), lora_alpha (`int`, *optional*, defaults to 256):
            Rank and scale (the original's script).
        lora_dropout (`float`, *optional*, defaults to 0.05), lora_targets (`list[str]`, *optional*):
            Dropout, and the layers of the language model by name; `q_proj` and `v_proj` by default (the original's
            merge script).
        lora_layers (`int`, *optional*):
            Update the last so many layers of the language model only; all by default. Where no projector or tower is trained
            the backward pass ends there, and the embedding of `<POSE>` learns only if it is tied to the output layer.
        use_dora (`bool`, *optional*, defaults to `False`), use_rslora (`bool`, *optional*, defaults to `False`):
            As in [`~peft.LoraConfig`].
        vision_layers (`int`, *optional*, defaults to 0):
            Train the last so many layers of the vision tower, of those whose output is used; -1 trains the whole tower.
        train_projector (`bool`, *optional*, defaults to `False`): train the projector.
    """

    method: str = field(default="lora", metadata={"help": "lora or full: how the language model is trained"})
    lora_r: int = field(default=128, metadata={"help": "rank of the updates"})
    lora_alpha: int = field(default=256, metadata={"help": "scale of the updates"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the updates"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "layers of the language model, by name"}
    )
    lora_layers: int | None = field(
        default=None, metadata={"help": "update the last so many layers of the language model only (default: all)"}
    )
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed updates (DoRA)"})
    use_rslora: bool = field(default=False, metadata={"help": "updates scaled by the root of the rank (rsLoRA)"})
    vision_layers: int = field(
        default=0, metadata={"help": "train the last so many used layers of the vision tower; -1: all of it"}
    )
    train_projector: bool = field(default=False, metadata={"help": "train the projector"})

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"expected `method` of {', '.join(METHODS)}, got {self.method!r}")
        if self.lora_r < 1 or self.vision_layers < -1:
            raise ValueError(
                f"expected `lora_r` of at least 1 and `vision_layers` of at least -1, got {self.lora_r} and "
                f"{self.vision_layers}"
            )
        if self.lora_layers is not None and (self.lora_layers < 1 or self.method != "lora"):
            raise ValueError(
                f"expected `lora_layers` of at least 1, with `method=lora`, got {self.lora_layers} and {self.method!r}"
            )


def prepare_model(
    model: ChatPoseForConditionalGeneration,
    tuning: TuningArguments,
    base: str | None = None,
    revision: str | None = None,
) -> ChatPoseForConditionalGeneration | PeftModel:
    """
    Freezes what is not trained; for LoRA, wraps the model in PEFT.

    Args:
        model ([`ChatPoseForConditionalGeneration`]): changed in place; may be loaded in 4 bits (QLoRA).
        tuning ([`TuningArguments`]): what is trained.
        base (`str`, *optional*), revision (`str`, *optional*): what the adapter names as its base.

    Raises:
        ValueError: where no layer has a name of `lora_targets`, the tower has fewer layers than asked for, or a model in
            4 bits is to be trained in full.
    """
    is_quantized = getattr(model, "is_loaded_in_4bit", False)
    if is_quantized and tuning.method == "full":
        raise ValueError(
            "expected `method=lora` for a model loaded in 4 bits, got full: quantised weights do not train"
        )
    trained = _trained_modules(model, tuning)
    if tuning.method == "full":
        model.requires_grad_(False)
        for module in (model.model.language_model, model.lm_head, *map(model.get_submodule, trained)):
            module.requires_grad_(True)
        return model
    if is_quantized:
        # The Trainer turns on checkpointing where it is asked for.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    names = "|".join(map(re.escape, tuning.lora_targets))
    layers = model.model.language_model.layers
    count = len(layers) if tuning.lora_layers is None else tuning.lora_layers
    if count > len(layers):
        raise ValueError(f"expected at most {len(layers)} `lora_layers`, got {count}")
    numbers = "|".join(map(str, range(len(layers) - count, len(layers))))
    targets = rf"model\.language_model\.layers\.({numbers})\..*\.({names})"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if re.fullmatch(targets, name)]
    absent = [name for name in tuning.lora_targets if not any(path.endswith(f".{name}") for path in found)]
    if absent or not found:
        names = sorted({name.split(".")[-1] for name in linear if name.startswith("model.language_model.")})
        raise ValueError(f"expected `lora_targets` of {', '.join(names)}, got {', '.join(absent) or 'none'}")
    # Below its first updated layer the language model stays as it is, <POSE> where it is read included, unless a picture's way in
    # is trained.
    ends_early = count < len(layers) and trained == ["pose_head"]
    is_tied = model.config.tie_word_embeddings
    tokens = {} if ends_early and not is_tied else {"embed_tokens": [model.config.pose_token_id]}
    if not is_tied:
        tokens["lm_head"] = [model.config.pose_token_id]
    config = LoraConfig(
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=targets,
        modules_to_save=trained,
        trainable_token_indices=tokens,
        use_dora=tuning.use_dora,
        use_rslora=tuning.use_rslora,
        revision=revision,
    )
    if ends_early:
        # A tied embedding, which learns as the output layer, would take the backward pass through all the layers below.
        layers[-count].register_forward_pre_hook(lambda layer, args: (args[0].detach(), *args[1:]))
    model = get_peft_model(model, config)
    # Also the copies of vision modules of a base in bfloat16, which would round small changes away.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    model.peft_config["default"].base_model_name_or_path = base
    return model


def _trained_modules(model: ChatPoseForConditionalGeneration, tuning: TuningArguments) -> list[str]:
    """Names of the modules outside the language model that are trained in full."""
    names = ["pose_head"]
    if tuning.train_projector:
        names.append("model.multi_modal_projector")
    if tuning.vision_layers:
        # Layers above the one whose output is taken get no gradient: DDP would wait for them.
        layer_names = [
            name for name, _ in model.named_modules() if re.fullmatch(r".*vision_tower.*\.layers\.\d+", name)
        ]
        taken = model.config.vision_feature_layer
        taken = taken if isinstance(taken, list | tuple) else [taken]
        used = layer_names[: max(layer if layer >= 0 else len(layer_names) + 1 + layer for layer in taken)]
        if not used or tuning.vision_layers > len(used):
            raise ValueError(f"expected at most {len(used)} `vision_layers`, got {tuning.vision_layers}")
        if tuning.vision_layers == -1:
            tower = used[0].split(".encoder.")[0]
            above = ("encoder", "post_layernorm", "head")
            names += [
                f"{tower}.{name}" for name, _ in model.get_submodule(tower).named_children() if name not in above
            ]
        names += used if tuning.vision_layers == -1 else used[-tuning.vision_layers :]
    return names


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """
    Trained and all weights of each part.

    Args:
        model ([`ChatPoseForConditionalGeneration`] or `PeftModel` of one): tied weights count once, with the embeddings;
            what PEFT keeps of a module that it copied does not count.

    Returns:
        `dict[str, tuple[int, int]]`: part to its numbers of trained weights and of weights.
    """
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, weight in model.named_parameters():
        if ".original_module." in name:
            continue
        name = name.removeprefix("base_model.model.")
        part = next(part for part, start in PARTS.items() if name.startswith(start))
        trained, total = counts[part]
        # bitsandbytes packs several weights into a number.
        size = math.prod(getattr(weight, "quant_state", weight).shape)
        counts[part] = trained + size * weight.requires_grad, total + size
    return counts


def format_parameters(counts: dict[str, tuple[int, int]]) -> str:
    """The counts as a table."""
    rows = {**counts, "all": tuple(map(sum, zip(*counts.values(), strict=True)))}
    lines = [f"{'part':<18}{'trained':>15}{'of':>17}{'%':>9}"]
    for part, (trained, total) in rows.items():
        lines.append(f"{part:<18}{trained:>15,}{total:>17,}{100 * trained / max(total, 1):>9.3f}")
    return "\n".join(lines)


def load_base(
    name: str, processor: ChatPoseProcessor, revision: str | None = None, **kwargs
) -> ChatPoseForConditionalGeneration:
    """
    A ChatPose, or a new one on a LLaVA-1.5.

    Args:
        name (`str`): folder or Hub id.
        processor ([`ChatPoseProcessor`]): of the base.
        revision (`str`, *optional*): on the Hub.
        kwargs: as for `from_pretrained` (`dtype`, `quantization_config`, ...).

    Raises:
        ValueError: for a checkpoint of another kind.
    """
    model_type = AutoConfig.from_pretrained(name, revision=revision).model_type
    if model_type == ChatPoseConfig.model_type:
        return ChatPoseForConditionalGeneration.from_pretrained(name, revision=revision, **kwargs)
    if model_type == "llava":
        return ChatPoseForConditionalGeneration.from_llava(name, processor=processor, revision=revision, **kwargs)
    raise ValueError(
        f"expected a ChatPose or a LLaVA-1.5 checkpoint in {name!r}, got one of model type {model_type!r}"
    )


def load_trained(
    folder: str | Path, revision: str | None = None, **kwargs
) -> tuple[ChatPoseForConditionalGeneration, ChatPoseProcessor]:
    """
    What a training wrote, as a model to ask: an adapter is merged into the base that it names.

    Args:
        folder (`str` or `Path`): folder or Hub id of an adapter or of a whole model.
        revision (`str`, *optional*): on the Hub.
        kwargs: as for `from_pretrained` of the base (`dtype`, `device_map`, ...).

    Returns:
        [`ChatPoseForConditionalGeneration`] in evaluation mode and its [`ChatPoseProcessor`].

    Raises:
        ValueError: where the adapter names no base, or one of another kind.
    """
    folder = str(folder)
    processor = ChatPoseProcessor.from_pretrained(folder, revision=revision)
    if find_adapter_config_file(folder, revision=revision) is None:
        return load_base(folder, processor, revision, **kwargs).eval(), processor
    config = PeftConfig.from_pretrained(folder, revision=revision)
    if not config.base_model_name_or_path:
        raise ValueError(f"expected an adapter that names its base, got none in {folder!r}")
    model = load_base(config.base_model_name_or_path, processor, config.revision, **kwargs)
    model = PeftModel.from_pretrained(model, folder, revision=revision).merge_and_unload()
    return model.eval(), processor
