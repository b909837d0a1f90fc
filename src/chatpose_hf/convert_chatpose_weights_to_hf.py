"""Converts the original ChatPose (`YaoFeng/CHATPOSE-V0`) and original-layout LLaVA-1.5 checkpoints to this library's.

In: a folder with the flat LLaMA configuration, `.bin` (or safetensors) shards without the vision tower, and the slow
LLaMA tokenizer. Out: a folder that `from_pretrained` and the Auto classes load. Nothing is unpickled but tensors.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlavaImageProcessorPil,
)
from transformers.dynamic_module_utils import custom_object_save

from .configuration_chatpose import ChatPoseConfig
from .convert_chatpose_tokenizer_to_hf import convert_tokenizer, has_pose_token
from .modeling_chatpose import ChatPoseForConditionalGeneration, PoseHead
from .processing_chatpose import SYSTEM_PROMPT, ChatPoseProcessor, vicuna_chat_template


# Original key -> key in the layout of the Hub's LLaVA checkpoints, which every transformers 5 loads.
KEY_PATTERNS = (
    (r"model\.(embed_tokens|norm)\.weight", r"language_model.model.\1.weight"),
    (r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.weight", r"language_model.model.layers.\1.\2.\3.weight"),
    (r"model\.layers\.(\d+)\.(\w+_layernorm)\.weight", r"language_model.model.layers.\1.\2.weight"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"model\.text_hidden_fcs\.0\.0\.(weight|bias)", r"pose_head.linear_1.\1"),
    (r"model\.text_hidden_fcs\.0\.2\.(weight|bias)", r"pose_head.linear_2.\1"),
    (r"model\.vision_tower\.vision_tower\.(.+)", r"vision_tower.\1"),
)
# Buffers that are computed anew, and the licensed body model, which has no place in a checkpoint.
IGNORED_PATTERNS = (r".*\.rotary_emb\.inv_freq", r"model\.smplx\..+", r"model\.vision_tower\..+\.position_ids")
# The fields of the flat original configuration that describe the language model.
TEXT_FIELDS = [
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
]
# LLaVA-1.5's own system prompt (conversation template `vicuna_v1`); ChatPose's chat program says "human" for "user".
LLAVA_SYSTEM_PROMPT = SYSTEM_PROMPT.replace("human", "user")


@dataclass
class ConvertedKey:
    """One line of the key table: `new` is None where a tensor of the checkpoint is left out."""

    old: str
    new: str | None
    shape: tuple[int, ...]


def convert_checkpoint(checkpoint: str | Path, output: str | Path, vision_tower: str | None = None):
    """
    Converts a checkpoint folder, shard by shard, and writes the output folder whole or not at all.

    Args:
        checkpoint (`str` or `Path`): folder of the original layout.
        output (`str` or `Path`): folder to write; must not exist yet, or be empty.
        vision_tower (`str`, *optional*):
            Folder or Hub id of the vision tower; by default what the checkpoint's configuration names.

    Returns:
        `list[ConvertedKey]`: every tensor of the checkpoint and what became of it, then every tensor that was added.

    Raises:
        FileNotFoundError: when a file of the checkpoint or the vision tower is missing.
        FileExistsError: when `output` holds something.
        ValueError: when the checkpoint is of another layout or its tensors do not fill the model exactly.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    settings = _read_settings(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`{output}` exists and is not an empty folder; name a new one, or remove it first")
    shards = _find_shards(checkpoint)
    tower, tower_source = _load_vision_tower(checkpoint, settings, vision_tower)
    processor = _make_processor(checkpoint, settings, tower.config, tower_source)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        table = _write_checkpoint(partial, settings, shards, tower, processor)
        partial.chmod(0o755)
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return table


def _read_settings(checkpoint: Path) -> dict:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint folder with config.json, got `{checkpoint}`")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "mm_hidden_size" not in settings or "text_config" in settings:
        raise ValueError(
            f"`{checkpoint}` is not of the original LLaVA layout (flat config.json with `mm_hidden_size`), its "
            f"`model_type` is {settings.get('model_type')!r}; a LLaVA in transformers' layout needs no conversion: "
            "use ChatPoseForConditionalGeneration.from_llava"
        )
    if settings.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(
            f"expected `mm_projector_type` 'mlp2x_gelu', the projector of LLaVA-1.5, got "
            f"{settings.get('mm_projector_type')!r}"
        )
    layer, feature = settings.get("mm_vision_select_layer"), settings.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or feature not in ("patch", "cls_patch"):
        raise ValueError(
            "expected `mm_vision_select_layer` as a whole number and `mm_vision_select_feature` 'patch' or "
            f"'cls_patch', got {layer!r} and {feature!r}"
        )
    return settings


def _find_shards(checkpoint: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = checkpoint / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if unsafe := [shard for shard in names if Path(shard).name != shard]:
                raise ValueError(f"{index} names files outside its folder: {unsafe}")
        elif (checkpoint / name).is_file():
            names = [name]
        else:
            continue
        if missing := [shard for shard in names if not (checkpoint / shard).is_file()]:
            raise FileNotFoundError(f"`{checkpoint}` lacks {missing} of its {len(names)} weight files")
        return [checkpoint / shard for shard in names]
    raise FileNotFoundError(
        f"`{checkpoint}` has no weights: expected pytorch_model.bin or model.safetensors, or shards"
    )


def _load_shard(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files of torch < 1.6 are no zip archives and cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"`{path}` is not a file of plain tensors, or it is cut short; nothing of it was run: {error}"
        ) from error


def _load_vision_tower(checkpoint: Path, settings: dict, vision_tower: str | None):
    """The tower, and where it (and its picture settings) came from."""
    name = vision_tower or settings.get("mm_vision_tower") or settings.get("vision_tower")
    candidates = [str(name)] if vision_tower else [str(checkpoint / str(name)), str(name)]
    source = next((candidate for candidate in candidates if Path(candidate).is_dir()), str(name))
    try:
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        with torch.device("meta"):
            tower_class = type(AutoModel.from_config(config))
        dtype = getattr(torch, settings.get("torch_dtype", "float32"))
        tower, info = tower_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:  # a name that is neither a folder nor a Hub id is a ValueError
        raise FileNotFoundError(
            f"cannot load the vision tower {source!r} (looked at {', '.join(candidates)} and on the Hub); pass the "
            "folder or Hub id of the tower the checkpoint was trained with, for LLaVA-1.5 "
            f"`--vision-tower openai/clip-vit-large-patch14-336`. What went wrong: {error}"
        ) from error
    if info["missing_keys"]:
        raise ValueError(f"the vision tower {source!r} lacks weights: {sorted(info['missing_keys'])}")
    if tower.config.hidden_size != settings["mm_hidden_size"]:
        raise ValueError(
            f"expected a vision tower of width {settings['mm_hidden_size']} (`mm_hidden_size`), got "
            f"{tower.config.hidden_size} in {source!r}; pass another one as `--vision-tower`"
        )
    return tower, source


def _make_processor(checkpoint: Path, settings: dict, vision_config, tower_source: str) -> ChatPoseProcessor:
    tokenizer = convert_tokenizer(checkpoint)
    is_chatpose = has_pose_token(checkpoint)
    marks = ("<im_start>", "<im_end>") if settings.get("mm_use_im_start_end") else ("", "")
    if missing := [mark for mark in marks if mark and mark not in tokenizer.get_vocab()]:
        raise ValueError(f"config.json says `mm_use_im_start_end`, but the tokenizer lacks {missing}")
    # ChatPose never pads pictures to a square. Pillow resizes as the original did; torchvision differs a little.
    pads = not is_chatpose and settings.get("image_aspect_ratio") == "pad"
    image_processor_class = LlavaImageProcessorPil if pads else CLIPImageProcessorPil
    return ChatPoseProcessor(
        image_processor=image_processor_class.from_pretrained(tower_source),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="full"
        if settings.get("mm_vision_select_feature") == "cls_patch"
        else "default",
        num_additional_image_tokens=1,
        chat_template=vicuna_chat_template(
            system_prompt=SYSTEM_PROMPT if is_chatpose else LLAVA_SYSTEM_PROMPT,
            image_placeholder=f"{marks[0]}<image>{marks[1]}\n",
            # The original's chat program wrote this plain text into its history, never the token.
            pose_in_history="[POSE]" if is_chatpose else None,
        ),
    )


def _make_config(
    settings: dict, vision_config, processor: ChatPoseProcessor, vocab_size: int, **head
) -> ChatPoseConfig:
    text = {name: settings[name] for name in TEXT_FIELDS if settings.get(name) is not None}
    text["vocab_size"] = vocab_size
    return ChatPoseConfig(
        vision_config=vision_config.to_dict(),
        text_config=LlamaConfig(**text).to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        vision_feature_layer=settings["mm_vision_select_layer"],
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
        pose_token_id=processor.pose_token_id,
        pose_lead_in_ids=processor.pose_lead_in_ids,
        **head,
    )


def _write_checkpoint(folder: Path, settings: dict, shards: list[Path], tower, processor: ChatPoseProcessor):
    table: list[ConvertedKey] = []
    weight_map: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    total_size = 0
    num_files = len(shards) + 1

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total_size
        name = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        if doubled := set(tensors) & set(weight_map):
            raise ValueError(f"the checkpoint holds these weights twice: {sorted(doubled)}")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        shapes.update({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        total_size += sum(tensor.nbytes for tensor in tensors.values())

    for number, path in enumerate(tqdm(shards, desc="Converting", unit="file"), start=1):
        tensors = {}
        for old, tensor in _load_shard(path).items():
            new = _new_key(old)
            table.append(ConvertedKey(old, new, tuple(tensor.shape)))
            if new is None:
                continue
            if new.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = _grow_vocabulary(tensor, processor)
            tensors[new] = tensor.float() if new.startswith("pose_head.") else tensor
        write(number, tensors)
        del tensors, tensor  # the shard is mapped into memory as long as one of its tensors is

    added = {}
    for key, tensor in tower.state_dict().items():
        name = f"vision_tower.vision_model.{key.removeprefix('vision_model.')}"
        if name not in weight_map:
            added[name] = tensor
    vocab_size = shapes.get("language_model.model.embed_tokens.weight", (len(processor.tokenizer),))[0]
    head = {}
    if "pose_head.linear_2.weight" in shapes:
        numbers, head_size = shapes["pose_head.linear_2.weight"]
        head = {"num_pose_joints": numbers // 6, "pose_head_hidden_size": head_size}
    config = _make_config(settings, tower.config, processor, vocab_size, **head)
    with torch.device("meta"):
        model = ChatPoseForConditionalGeneration(config)
    if not any(key.startswith("pose_head.") for key in shapes):  # a plain LLaVA: the pose head is new
        model.pose_head = PoseHead(config)
        model.pose_head.apply(model._init_weights)
        added |= {f"pose_head.{key}": tensor for key, tensor in model.pose_head.state_dict().items()}
    write(num_files, added)
    table += [ConvertedKey("(new)", key, tuple(tensor.shape)) for key, tensor in added.items()]

    expected = {_hub_key(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight")
    _check_keys(expected, {_hub_key(key): shape for key, shape in shapes.items()})

    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.dtype = settings.get("torch_dtype", "float32")
    config.architectures = [type(model).__name__]
    model.describe_remote_code()
    config.save_pretrained(folder)
    custom_object_save(model, folder)
    GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=512,  # the original chat program's limit
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    return table


def _new_key(old: str) -> str | None:
    if any(re.fullmatch(pattern, old) for pattern in IGNORED_PATTERNS):
        return None
    for pattern, new in KEY_PATTERNS:
        if re.fullmatch(pattern, old):
            return re.sub(pattern, new, old)
    raise ValueError(f"the checkpoint holds a weight that no ChatPose or LLaVA-1.5 has: {old!r}")


def _hub_key(key: str) -> str:
    """A module's name in transformers 5 in the layout of KEY_PATTERNS, without CLIP's varying inner prefix."""
    key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
    key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
    key = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", key)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", key)


def _grow_vocabulary(tensor: torch.Tensor, processor: ChatPoseProcessor) -> torch.Tensor:
    """Rows for tokens the checkpoint lacks."""
    rows = [tensor]
    for token_id in range(tensor.shape[0], len(processor.tokenizer)):
        if token_id == processor.pose_token_id:
            rows.append(tensor.float().mean(0, keepdim=True).to(tensor.dtype))
        else:
            # `<image>`, which is never answered: the unknown token's row makes it as unlikely as that one, where a
            # row of zeros would take part in the loss.
            unknown = processor.tokenizer.unk_token_id
            rows.append(tensor[unknown : unknown + 1])
    return torch.cat(rows)


def _check_keys(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing, left_over = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{key}: expected {expected[key]}, got {found[key]}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key] != found[key]
    ]
    if missing or left_over or wrong:
        raise ValueError(
            f"the checkpoint does not fill the model: missing {missing}, left over {left_over}, of other shapes {wrong}"
        )
