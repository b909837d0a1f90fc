"""`chatpose train-retrieval`: rows with captions in, a retrieval model out, which evaluation measures texts and poses with."""

import json
import os
import random
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.utils.data
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .atomic_write import write_atomically
from .card import public_name
from .checkpoints import SealedCheckpoints, find_last_checkpoint, list_checkpoints
from .data.prompts import DESCRIBING_KINDS
from .data.rows import caption_texts, load_rows
from .metrics import recall_percent, retrieval_ranks
from .processes import leave_group
from .retrieval import HANDS, NUM_JOINTS, RetrievalConfig, RetrievalModel, to_retrieval_frame
from .rotations import rotvec_to_rotmat
from .settings_file import parse_settings
from .trainer import EpochSampler


RECORD_FILE = "retrieval.json"
RECALL_AT = (1, 5, 10)
_VOCABULARY_SIZE = 4000


@dataclass
class RetrievalArguments:
    """
    What is trained, and on what.

    Args:
        train_data (`list[str]`): folders, Parquet files or Hub ids of rows.
        eval_data (`list[str]`, *optional*): the same, to evaluate on.
        train_split (`str`, *optional*, defaults to `"train"`), eval_split (`str`, *optional*, defaults to `"val"`):
            Splits.
        text_model (`str`, *optional*):
            Folder or Hub id of a text encoder with its tokenizer; by default a small BERT from nothing, with a tokenizer
            trained on the captions.
        freeze_text (`bool`, *optional*, defaults to `False`): leave its weights as they are.
        caption_kinds (`list[str]`, *optional*, defaults to `["human", "automatic", "geometry"]`): captions to take.
        resume (`bool`, *optional*, defaults to `False`):
            Go on from the last whole checkpoint of `output_dir`; from the start where there is none.
    """

    train_data: list[str] = field(metadata={"help": "folders, files or Hub ids of rows"})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "rows to evaluate on"})
    train_split: str = field(default="train", metadata={"help": "split of train_data"})
    eval_split: str = field(default="val", metadata={"help": "split of eval_data"})
    text_model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a text encoder (default: a small one from nothing)"}
    )
    freeze_text: bool = field(default=False, metadata={"help": "leave the text encoder's weights as they are"})
    caption_kinds: list[str] = field(
        default_factory=lambda: list(DESCRIBING_KINDS), metadata={"help": "kinds of captions to take"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint of output_dir"})

    def __post_init__(self):
        for name in ("train_data", "caption_kinds"):
            if not getattr(self, name):
                raise ValueError(f"expected at least one of `{name}`, got none")
        if self.freeze_text and self.text_model is None:
            raise ValueError("expected `text_model` with `freeze_text`: a text encoder from nothing has to be trained")


@dataclass
class RetrievalTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with other defaults."""

    output_dir: str = field(metadata={"help": "folder to write"})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "pairs that are told apart in a step"})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "pairs at a time"})
    learning_rate: float = field(default=2e-3, metadata={"help": "the highest learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "how the learning rate falls"})
    warmup_steps: float = field(default=0.05, metadata={"help": "share of the steps, or steps, in which it rises"})
    num_train_epochs: float = field(default=40, metadata={"help": "passes over the rows"})
    logging_steps: float = field(default=20, metadata={"help": "optimizer steps from log to log"})
    save_strategy: str = field(default="no", metadata={"help": "checkpoints to go on from: no, steps or epoch"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false: pairs are made on the fly"})

    def __post_init__(self):
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn
        if self.dataloader_drop_last:
            raise ValueError("expected no `dataloader_drop_last`: the Trainer would drop pairs of the evaluation too")
        if self.dataloader_persistent_workers:
            raise ValueError("expected no `dataloader_persistent_workers`: they would draw every epoch like the first")


class _Pairs(torch.utils.data.Dataset):
    """
    Poses with a caption each: in training drawn anew in every epoch, by seed, epoch and row alone; else the first.

    Args:
        texts (`list[list[str]]`): captions of each of N poses.
        rotmats (`torch.Tensor` of shape `(N, 24, 3, 3)`): see [`to_retrieval_frame`].
        known_joints (`list[int]`): joints that at least one row knows.
        seed (`int`, *optional*): of the draw; without one, no draw.
    """

    def __init__(self, texts: list[list[str]], rotmats: Tensor, known_joints: list[int], seed: int | None = None):
        self.texts = texts
        self.rotmats = rotmats
        self.known_joints = known_joints
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        text = self.texts[index][0]
        if self._seed is not None:
            text = random.Random(f"{self._seed}/{self._epoch}/{index}").choice(self.texts[index])
        return {"text": text, "pose_rotmats": self.rotmats[index]}


@dataclass
class _Collator:
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, pairs: list[dict]) -> dict[str, Tensor]:
        texts = self.tokenizer([pair["text"] for pair in pairs], padding=True, truncation=True, return_tensors="pt")
        return {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "pose_rotmats": torch.stack([pair["pose_rotmats"] for pair in pairs]),
        }


class _EpochCallback(TrainerCallback):
    """Tells order and captions the epoch, also of a run that goes on. (accelerate 1.15 reaches only one of the two.)"""

    def __init__(self, trainer: "RetrievalTrainer"):
        self._trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer.sampler.set_epoch(int(state.epoch or 0))
        self._trainer.train_dataset.set_epoch(int(state.epoch or 0))


class RetrievalTrainer(SealedCheckpoints, Trainer):
    """
    Trains a [`RetrievalModel`] on pairs. `evaluate` ranks the whole split, in both directions (PoseScript's protocol).

    Candidates are those of one device's batch: accumulated steps and more devices do not make the task harder. Each
    checkpoint is whole or not there ([`SealedCheckpoints`]), and goes on bit for bit.
    """

    def __init__(self, model: RetrievalModel, args, tokenizer, train_dataset: _Pairs, eval_dataset: _Pairs | None):
        super().__init__(
            model,
            args,
            data_collator=_Collator(tokenizer),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_recalls,
        )
        self.sampler = EpochSampler(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        self.add_callback(_EpochCallback(self))

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, embeds, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # transformers 5.24 computes no metrics where there are no labels.
        return loss, embeds, torch.zeros(len(inputs["input_ids"]), device=self.args.device)


def compute_recalls(prediction: EvalPrediction) -> dict[str, float]:
    """
    Percentages of texts whose pose is among the first 1, 5, 10 of all (`t2p_r1` ...), of poses whose text is (`p2t_r1`
    ...), and the mean of the six, `mrecall`; from the vectors, two arrays of shape `(N, D)`.
    """
    text_embeds, pose_embeds = (torch.from_numpy(array).double() for array in prediction.predictions)
    recalls = {}
    for direction, queries, gallery in (("t2p", text_embeds, pose_embeds), ("p2t", pose_embeds, text_embeds)):
        ranks = retrieval_ranks(queries, gallery)
        recalls |= {f"{direction}_r{k}": recall_percent(ranks, k).mean().item() for k in RECALL_AT}
    return {**recalls, "mrecall": sum(recalls.values()) / len(recalls)}


def train_retrieval(arguments: Sequence[str]) -> int:
    """
    Trains. `output_dir` then holds the model, its tokenizer and `retrieval.json`: data, versions, seed, recalls.

    Args:
        arguments (`Sequence[str]`):
            Flags, after the name of a YAML file if there is one, such as `["config.yaml", "--learning_rate", "1e-4"]`;
            flags win.

    Returns:
        `int`: 0.

    Raises:
        ValueError: for settings or data that cannot be trained with.
    """
    start = time.monotonic()
    data_args, args = _parse_arguments(arguments)
    output_dir = Path(args.output_dir)
    if list_checkpoints(output_dir) and not data_args.resume:
        raise ValueError(
            f"{output_dir} holds the checkpoints of a training: `--resume` goes on with it; or name another `output_dir`"
        )
    if args.eval_strategy != "no" and not data_args.eval_data:
        raise ValueError(f"expected `eval_data` with `eval_strategy={args.eval_strategy.value}`")
    set_seed(args.seed)
    seed = args.seed if args.data_seed is None else args.data_seed
    train_pairs, train_record = _load_pairs(data_args.train_data, data_args.train_split, data_args.caption_kinds, seed)
    eval_pairs, eval_record = None, None
    if data_args.eval_data:
        eval_pairs, eval_record = _load_pairs(data_args.eval_data, data_args.eval_split, data_args.caption_kinds)
    model, tokenizer = _make_model(data_args, train_pairs)
    trainer = RetrievalTrainer(model, args, tokenizer, train_pairs, eval_pairs)
    checkpoint = find_last_checkpoint(output_dir) if data_args.resume else None
    if args.process_index == 0:
        print(f"{model.num_parameters():,} weights, {model.num_parameters(only_trainable=True):,} trained", flush=True)
        if data_args.resume:
            print(f"going on from {checkpoint}" if checkpoint else "no whole checkpoint yet: starting", flush=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.evaluate() if eval_pairs is not None else {}
    if args.process_index == 0:
        record = {
            "command": shlex.join(["chatpose", "train-retrieval", *arguments]),
            "train_data": train_record,
            "eval_data": eval_record,
            "caption_kinds": data_args.caption_kinds,
            "text_model": data_args.text_model and public_name(data_args.text_model),
            "freeze_text": data_args.freeze_text,
            "seed": args.seed,
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - start, 1),
            "hardware": f"{args.world_size} x {_device_name(args.device)}",
            "versions": {name: version(name) for name in ("chatpose_hf", "transformers", "torch")},
            "metrics": {
                name.removeprefix("eval_"): value
                for name, value in metrics.items()
                if name.startswith(("eval_t2p_", "eval_p2t_", "eval_mrecall"))
            },
        }
        _write(output_dir, trainer.accelerator.unwrap_model(trainer.model), tokenizer, record)
        print(f"{json.dumps(record['metrics'])}\nwrote {output_dir}", flush=True)
    trainer.accelerator.wait_for_everyone()
    leave_group(args.distributed_state, 0)
    return 0


def _parse_arguments(arguments: Sequence[str]) -> tuple[RetrievalArguments, RetrievalTrainingArguments]:
    parser = HfArgumentParser(
        (RetrievalArguments, RetrievalTrainingArguments),
        prog="chatpose train-retrieval",
        usage="chatpose train-retrieval [FILE.yaml] [--SETTING VALUE ...]",
    )
    return parse_settings(parser, arguments, lists=("train_data", "eval_data", "caption_kinds"))


def _load_pairs(
    names: list[str], split: str, kinds: list[str], seed: int | None = None
) -> tuple[_Pairs, dict[str, object]]:
    """The pairs of some data sets, and what to record of them."""
    texts, poses, left_out, seen = [], [], Counter(), set()
    known = torch.zeros(NUM_JOINTS, dtype=torch.bool)
    for name in names:
        rows = load_rows(name, split, decode=False).select_columns(["poses", "pose_mask", "captions"])
        for row in rows:
            captions = caption_texts(row, kinds)
            if len(row["poses"]) != 1:
                left_out["not one pose"] += 1
            elif not captions:
                left_out[f"no caption of kind {', '.join(kinds)}"] += 1
            else:
                pose = torch.tensor(row["poses"][0])
                # Two rows of one pose would each be the wrong answer to the other.
                if (key := pose.numpy().tobytes()) in seen:
                    left_out["the pose of a row before"] += 1
                    continue
                seen.add(key)
                texts.append(captions)
                poses.append(pose)
                known |= torch.tensor(row["pose_mask"][0])
    count = ", ".join(f"{count} rows left out: {reason}" for reason, count in left_out.items())
    print(f"{split}: {len(texts)} pairs of {', '.join(names)}{'; ' if count else ''}{count}", flush=True)
    if len(texts) < 2:
        raise ValueError(
            f"expected at least two rows with one pose and a caption of kind {', '.join(kinds)} in the split {split} of "
            f"{', '.join(names)}, got {len(texts)}; see `caption_kinds`"
        )
    rotmats = rotvec_to_rotmat(to_retrieval_frame(torch.stack(poses))).float()
    record = {
        "names": [public_name(name) for name in names],
        "split": split,
        "pairs": len(texts),
        "left_out": dict(left_out),
    }
    return _Pairs(texts, rotmats, known.nonzero().flatten().tolist(), seed), record


def _make_model(data_args: RetrievalArguments, pairs: _Pairs) -> tuple[RetrievalModel, PreTrainedTokenizerBase]:
    # What no row knows is the same in all of them: weights on it would stay as they were drawn.
    ignored = sorted(set(range(NUM_JOINTS)) - set(pairs.known_joints) | set(HANDS))
    if data_args.text_model is None:
        tokenizer = make_tokenizer([text for texts in pairs.texts for text in texts])
        config = RetrievalConfig(ignored_joints=ignored)
        config.text_config.vocab_size = len(tokenizer)
        model = RetrievalModel(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(data_args.text_model)
        text_encoder = AutoModel.from_pretrained(data_args.text_model, dtype=torch.float32)
        model = RetrievalModel(RetrievalConfig(text_config=text_encoder.config, ignored_joints=ignored))
        model.text_encoder.load_state_dict(
            {k: v for k, v in text_encoder.state_dict().items() if not k.startswith("pooler.")}
        )
        if tokenizer.pad_token is None:
            raise ValueError(
                f"expected a text encoder whose tokenizer has a padding token, got none of {data_args.text_model}"
            )
        longest = getattr(text_encoder.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
        model.text_encoder.requires_grad_(not data_args.freeze_text)
    return model, tokenizer


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 4,000 pieces, lower case, for a BERT from nothing; the same texts give the same one."""
    # Not WordPiece: its trainer in tokenizers 0.23 gives other pieces in each process.
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )


def _write(output_dir: Path, model: RetrievalModel, tokenizer: PreTrainedTokenizerBase, record: dict) -> None:
    """Aside first: an interrupted write leaves `output_dir` as it was."""
    staging = output_dir / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    write_atomically(staging / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    for path in staging.iterdir():
        os.replace(path, output_dir / path.name)
    staging.rmdir()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
