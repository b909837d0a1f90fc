"""`chatpose train`: settings in, a trained adapter or model out."""

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
import torch.utils.data
import yaml
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, HfArgumentParser, set_seed
from transformers.utils import logging

from .adapters import TuningArguments, count_parameters, format_parameters, load_base, prepare_model
from .atomic_write import write_atomically
from .card import public_name
from .checkpoints import find_last_checkpoint, list_checkpoints
from .data.mixture import Mixture, MixtureStream
from .data.rows import load_rows
from .modeling_chatpose import ChatPoseForConditionalGeneration
from .pose_losses import PoseLoss
from .processes import leave_group
from .processing_chatpose import ChatPoseProcessor
from .settings_file import parse_settings
from .trainer import ChatPoseTrainer, ChatPoseTrainingArguments


logger = logging.get_logger(__name__)

CONFIG_FILE = "config.yaml"
# Set by other settings.
_DERIVED = ("accelerator_config", "dataloader_pin_memory", "ddp_backend", "do_eval", "logging_nan_inf_filter")
# Of a run that was told to end and saved: what a shell reports for SIGTERM.
TERMINATED = 128 + 15


@dataclass
class ModelArguments:
    """
    What training starts from.

    Args:
        model (`str`): folder or Hub id of a ChatPose, or of a LLaVA-1.5 in transformers' layout.
        revision (`str`, *optional*): its branch, tag or commit on the Hub.
        dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"` or `"float16"`, of the weights in memory; by default that of `--bf16` or `--fp16`
            for LoRA, whose updates are float32, and float32 otherwise.
        attn_implementation (`str`, *optional*): such as `"sdpa"` or `"flash_attention_2"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            QLoRA: the language model in 4 bits, by bitsandbytes.
    """

    model: str = field(metadata={"help": "folder or Hub id of a ChatPose or a LLaVA-1.5"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16 or float16, of the weights in memory"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "such as sdpa or flash_attention_2"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the language model in 4 bits (bitsandbytes)"})

    def __post_init__(self):
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"expected `dtype` of float32, bfloat16, float16, got {self.dtype!r}")


@dataclass
class DataArguments:
    """
    What is trained and evaluated on.

    Args:
        train_data (`list[str]`):
            Folders, Parquet files or Hub ids of rows; `NAME=WEIGHT` each for a mixture in other shares than equal ones. In
            YAML also a mapping of names to weights.
        eval_data (`list[str]`, *optional*): of the same form, without weights; all of their rows are evaluated.
        train_split (`str`, *optional*, defaults to `"train"`), eval_split (`str`, *optional*, defaults to `"val"`):
            Splits.
        streaming (`bool`, *optional*, defaults to `False`):
            Read while training, without a copy; needs `max_steps`.
    """

    train_data: list[str] = field(metadata={"help": "folders, files or Hub ids of rows; NAME=WEIGHT for a mixture"})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "rows to evaluate on"})
    train_split: str = field(default="train", metadata={"help": "split of train_data"})
    eval_split: str = field(default="val", metadata={"help": "split of eval_data"})
    streaming: bool = field(default=False, metadata={"help": "read while training, without a copy; needs max_steps"})


@dataclass
class LossArguments:
    """
    The loss, `ce_loss_weight * CE + pose_loss_weight * pose`; the original's by default.

    Args:
        ce_loss_weight (`float`, *optional*), pose_loss_weight (`float`, *optional*),
        rot6d_norm_weight (`float`, *optional*): the model's own by default.
        joint_error (`str`, *optional*, defaults to `"rotmat_l1"`),
        joint_weights (`list[str]`, *optional*): as `NAME=WEIGHT`,
        joint_position_weight (`float`, *optional*, defaults to 0):
            See [`PoseLoss`]. Positions are those of the default body.
    """

    ce_loss_weight: float | None = field(default=None, metadata={"help": "of the words (default: the model's, 1.0)"})
    pose_loss_weight: float | None = field(default=None, metadata={"help": "of the poses (default: the model's, 0.1)"})
    rot6d_norm_weight: float | None = field(
        default=None, metadata={"help": "of the lengths of the head's vectors (default: the model's, 0)"}
    )
    joint_error: str = field(default="rotmat_l1", metadata={"help": "rotmat_l1, rotmat_mse, rot6d_l1 or geodesic"})
    joint_weights: list[str] = field(default_factory=list, metadata={"help": "NAME=WEIGHT, such as l_wrist=2"})
    joint_position_weight: float = field(default=0.0, metadata={"help": "of the joints' distances, in metres"})


@dataclass
class RunArguments:
    """
    How this run begins and ends.

    Args:
        resume (`bool`, *optional*, defaults to `False`):
            Go on from the last whole checkpoint of `output_dir`; from the start where there is none.
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations without a better `metric_for_best_model`.
    """

    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint of output_dir"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations that are not better"}
    )


ARGUMENTS = (ModelArguments, DataArguments, TuningArguments, LossArguments, RunArguments, ChatPoseTrainingArguments)


def parse_arguments(arguments: Sequence[str]) -> tuple:
    """
    Settings from flags and, if the first argument is a file, from YAML; flags win.

    Args:
        arguments (`Sequence[str]`): such as `["config.yaml", "--learning_rate", "1e-4"]`.

    Returns:
        `tuple` of instances of `ARGUMENTS`.

    Raises:
        ValueError: for a file that holds no settings, and for settings that do not exist.
    """
    parser = HfArgumentParser(
        ARGUMENTS, prog="chatpose train", usage="chatpose train [FILE.yaml] [--SETTING VALUE ...]"
    )
    return parse_settings(parser, arguments, lists=("train_data", "eval_data", "joint_weights"))


def train(arguments: Sequence[str]) -> int:
    """
    Trains. `output_dir` then holds the adapter (or the model), the processor, `README.md` (the card), `run.json`, and
    `config.yaml`, the settings.

    Args:
        arguments (`Sequence[str]`): as for [`parse_arguments`].

    Returns:
        `int`: 0; 143 if the process was told to end and saved a checkpoint.

    Raises:
        ValueError: for settings, a base or data that cannot be trained with.
        BadLossError: see [`ChatPoseTrainer`].
    """
    parsed = parse_arguments(arguments)
    *_, run_args, args = parsed
    output_dir = Path(args.output_dir)
    _check(parsed)
    settings = describe_settings(parsed)
    if is_main := args.process_index == 0:
        print(f"settings that are not transformers' own defaults:\n{settings}", flush=True)
        _say_what_changed(output_dir / CONFIG_FILE, settings)

    start = time.monotonic()
    run = {"config": yaml.safe_load(settings), "command": shlex.join(["chatpose", "train", *arguments])}
    trainer = _make_trainer(parsed, run)
    checkpoint = None
    if run_args.resume:
        with args.main_process_first(desc="looking for the last whole checkpoint"):
            checkpoint = find_last_checkpoint(output_dir)
    if is_main:
        print(format_parameters(count_parameters(trainer.model)), flush=True)
        if run_args.resume:
            print(f"going on from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting", flush=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / CONFIG_FILE, settings.encode())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.was_terminated:
        if is_main:
            print(f"told to end: saved after step {trainer.state.global_step}; `--resume` goes on", flush=True)
    else:
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        run["seconds"] = round(time.monotonic() - start, 1)
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
        trainer.save_state()
        if is_main:
            print(f"wrote {output_dir}", flush=True)
    status = TERMINATED if trainer.was_terminated else 0
    trainer.accelerator.wait_for_everyone()
    leave_group(args.distributed_state, status)
    return status


def _check(parsed: tuple) -> None:
    """What no part of the settings can know by itself."""
    _, data_args, _, _, run_args, args = parsed
    if list_checkpoints(args.output_dir) and not run_args.resume:
        raise ValueError(
            f"{args.output_dir} holds the checkpoints of a training: `--resume` goes on with it; or name another "
            "`output_dir`"
        )
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("expected `max_steps` with `streaming`: a stream does not say how long an epoch is")
    if args.eval_strategy != "no" and not data_args.eval_data:
        raise ValueError(f"expected `eval_data` with `eval_strategy={args.eval_strategy.value}`")


def _make_trainer(parsed: tuple, run: dict) -> ChatPoseTrainer:
    """Model, data and trainer; writes into `run` what they are."""
    model_args, data_args, tuning, loss_args, run_args, args = parsed
    set_seed(args.seed)
    processor = ChatPoseProcessor.from_pretrained(model_args.model, revision=model_args.revision)
    model = _load_model(model_args, tuning, args, processor)
    set_losses(model, loss_args)
    revision = getattr(model.config, "_commit_hash", None) or model_args.revision
    base = str(Path(model_args.model).resolve()) if Path(model_args.model).is_dir() else model_args.model
    model = prepare_model(model, tuning, base, revision)
    train_data, train_record = _load_train_data(data_args, args)
    eval_data, eval_record = _load_eval_data(data_args)
    run |= {
        "base_model": base,
        "base_revision": revision,
        "method": "qlora" if model_args.load_in_4bit else tuning.method,
        "data": train_record,
        "eval_data": eval_record,
    }
    callbacks = []
    if run_args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run_args.early_stopping_patience))
    return ChatPoseTrainer(model, args, processor, train_data, eval_data, run=run, callbacks=callbacks)


def describe_settings(parsed: tuple) -> str:
    """As YAML, what `chatpose train` takes: ours in full, transformers' where they are not its defaults."""
    *ours, args = parsed
    settings = {name: value for part in ours for name, value in dataclasses.asdict(part).items()}
    for item in dataclasses.fields(args):
        value, default = getattr(args, item.name, None), item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        is_ours = item.name in ChatPoseTrainingArguments.__annotations__
        # transformers turns None into False, and an empty text into an empty list.
        if is_ours or (item.init and item.name not in _DERIVED and value != default and (value or default)):
            settings[item.name] = value
    return yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False, allow_unicode=True)


def _say_what_changed(file: Path, settings: str) -> None:
    if not file.is_file():
        return
    old, new = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(settings)
    for name in sorted(old.keys() | new.keys()):
        if name != "resume" and old.get(name) != new.get(name):
            logger.warning(f"`{name}` is {new.get(name)!r}; it was {old.get(name)!r} in the run that {file} tells of")


def _load_model(model_args: ModelArguments, tuning: TuningArguments, args: ChatPoseTrainingArguments, processor):
    options = {}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    compute_dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    if model_args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
            llm_int8_skip_modules=["pose_head", "lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
    # Weights that an optimizer changes by little stay float32: bfloat16 would round the changes away.
    dtype = model_args.dtype or (compute_dtype if tuning.method == "lora" else "float32")
    return load_base(model_args.model, processor, model_args.revision, dtype=getattr(torch, dtype), **options)


def set_losses(model: ChatPoseForConditionalGeneration, loss_args: LossArguments) -> None:
    """Gives a model the loss of the settings; weights that they leave open stay its own."""
    for name in ("ce_loss_weight", "pose_loss_weight", "rot6d_norm_weight"):
        if getattr(loss_args, name) is not None:
            setattr(model.config, name, getattr(loss_args, name))
    model.pose_loss_function = PoseLoss(
        loss_args.joint_error, parse_weights(loss_args.joint_weights), loss_args.joint_position_weight
    )


def parse_weights(items: Sequence[str]) -> dict[str, float]:
    """`NAME=WEIGHT` items."""
    weights = {}
    for item in items:
        name, is_weighted, weight = item.rpartition("=")
        try:
            weights[name if is_weighted else item] = float(weight) if is_weighted else 1.0
        except ValueError:
            raise ValueError(f"expected NAME=WEIGHT, got {item!r}") from None
    return weights


def _load_train_data(data_args: DataArguments, args: ChatPoseTrainingArguments):
    weights = parse_weights(data_args.train_data)
    sources = [load_rows(name, data_args.train_split, data_args.streaming, decode=False) for name in weights]
    record = [
        {"name": public_name(name), "split": data_args.train_split, "weight": weight, **_count_rows(source)}
        for (name, weight), source in zip(weights.items(), sources, strict=True)
    ]
    kind = MixtureStream if data_args.streaming else Mixture
    mixture = kind(sources, list(weights.values()), seed=args.seed if args.data_seed is None else args.data_seed)
    return _Endless(mixture) if data_args.streaming else mixture, record


class _Endless(torch.utils.data.IterableDataset):
    """
    A stream's epochs one after the other. The Trainer, which takes the number of steps for an epoch's length, could not
    find the place again in a later one.
    """

    def __init__(self, stream: MixtureStream):
        self._stream = stream

    def __iter__(self) -> Iterator[dict]:
        for epoch in count():
            self._stream.set_epoch(epoch)
            yield from self._stream


def _load_eval_data(data_args: DataArguments):
    from datasets import concatenate_datasets

    sources = [load_rows(name, data_args.eval_split, decode=False) for name in data_args.eval_data]
    record = [
        {"name": public_name(name), "split": data_args.eval_split, **_count_rows(source)}
        for name, source in zip(data_args.eval_data, sources, strict=True)
    ]
    return concatenate_datasets(sources) if sources else None, record


def _count_rows(source) -> dict:
    if not hasattr(source, "__len__"):
        return {}
    return {"rows": len(source), "licences": sorted(filter(None, source.unique("licence")))}
