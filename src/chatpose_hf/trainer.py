"""The HF `Trainer` for rows with poses: exact over accumulated and distributed batches, exact when it goes on after a stop."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
from accelerate import DistributedType, PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .adapters import count_parameters
from .atomic_write import write_atomically
from .body import JOINT_NAMES, BodyModel, placed_joints
from .card import make_card
from .checkpoints import SealedCheckpoints
from .collator import ON_BAD_ROW, ChatPoseCollator, read_report
from .data.mixture import Mixture
from .muon import MuonAdamW
from .processing_chatpose import ChatPoseProcessor
from .rotations import geodesic_distance


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
BAD_LOSS_FILE = "bad_loss.json"
SKIPPED_FILE = "skipped_rows.jsonl"
_SUMS_FILE = "log_sums.json"
# Among how many batches' rows those of like length are looked for.
_BATCHES_TO_SORT = 100
# What is summed up between two logs, on the device.
_SUMS = ("ce_loss", "pose_loss", "angle", "joints", "poses", "tokens", "places", "skipped", "truncated")


@dataclass
class ChatPoseTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with other defaults and these fields.

    Args:
        max_length (`int`, *optional*): most tokens of a row; see [`ChatPoseCollator`].
        on_bad_row (`str`, *optional*, defaults to `"stop"`): `"stop"` or `"skip"`; see [`ChatPoseCollator`].
        vision_learning_rate (`float`, *optional*): of the vision tower, where it is trained; `learning_rate` by default.
        muon_learning_rate (`float`, *optional*):
            Steps the matrices of the language model's layers by Muon ([`MuonAdamW`]), at this rate; all else by AdamW.
        body (`str`, *optional*, defaults to `"default"`): the body whose joints the evaluation measures.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "the highest learning rate"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps from log to log"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must be false: rows are made in the collator"}
    )
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "needless: every step uses all that is trained"}
    )
    max_length: int | None = field(default=None, metadata={"help": "most tokens of a row, image tokens included"})
    on_bad_row: str = field(default="stop", metadata={"help": "stop or skip: rows that cannot be trained on"})
    vision_learning_rate: float | None = field(default=None, metadata={"help": "of the vision tower"})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "of the language model's matrices, by Muon (default: AdamW for all)"}
    )
    body: str = field(default="default", metadata={"help": "body of the evaluation's millimetres"})

    def __post_init__(self):
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn
        if self.remove_unused_columns:
            raise ValueError("expected `remove_unused_columns=False`: the collator needs all columns of a row")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"expected `on_bad_row` of {', '.join(ON_BAD_ROW)}, got {self.on_bad_row!r}")
        if self.muon_learning_rate is not None and (self.fsdp or self.deepspeed):
            raise ValueError("expected no `muon_learning_rate` with FSDP or DeepSpeed: Muon needs whole matrices")
        # Ours stops at the first loss that is not finite; the Trainer's would hide it.
        self.logging_nan_inf_filter = False


class BadLossError(ValueError):
    """A loss that is not finite. `rows` are the ids of its batch, `file` the record that was written."""

    def __init__(self, step: int, rows: list[str], file: Path):
        super().__init__(
            f"the loss of step {step} is not finite; the weights were not changed by it. Its rows are {', '.join(rows)}; "
            f"{file} keeps them. Mend or remove them, or lower the learning rate, and go on from the last checkpoint"
        )
        self.rows = rows
        self.file = file


class EpochSampler(torch.utils.data.Sampler):
    """
    A new order for each epoch, by seed and epoch alone; with lengths, rows of like length side by side.

    Args:
        dataset: has a length.
        seed (`int`): of all orders.
        lengths (`Callable`, *optional*): called once an epoch for the rows' lengths.
        batch_size (`int`, *optional*, defaults to 1): rows that go into one step.
    """

    def __init__(self, dataset, seed: int, lengths: Callable[[], np.ndarray] | None = None, batch_size: int = 1):
        self._dataset = dataset
        self._seed = seed
        self._lengths = lengths
        self._batch_size = batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        if self._lengths is None:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        return iter(_group_by_length(self._lengths(), self._batch_size, generator))


def _group_by_length(lengths: np.ndarray, batch_size: int, generator: torch.Generator) -> list[int]:
    """
    All rows in batches of like length, in a new order: the batch with the longest first, which shows at once whether it fits into
    memory; the one that is not whole last. (transformers' own order sorts among fewer rows, and leaves long batches beside long
    ones.)
    """
    order = torch.randperm(len(lengths), generator=generator).numpy()
    reach = _BATCHES_TO_SORT * batch_size
    parts = [order[start : start + reach] for start in range(0, len(order), reach)]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    whole = len(order) // batch_size * batch_size
    batches = order[:whole].reshape(-1, batch_size)
    batches = batches[torch.randperm(len(batches), generator=generator).numpy()]
    if whole:
        longest = int(lengths[batches].max(1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
    return [*batches.flatten().tolist(), *order[whole:].tolist()]


class _RunCallback(TrainerCallback):
    """Tells the data of the epoch, and ends the run in order when the process is told to end."""

    def __init__(self, trainer: "ChatPoseTrainer"):
        self._trainer = trainer
        self._old_handler = None
        self.is_terminated = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.restart_sums()

        def handle(number, frame):
            logger.warning("told to end: saving a checkpoint after this step")
            self.is_terminated = True

        try:
            self._old_handler = signal.signal(signal.SIGTERM, handle)
        except ValueError:  # not in the main thread
            self._old_handler = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        # Every process has to leave after the same step.
        if self._trainer.is_any(self.is_terminated):
            control.should_save = control.should_training_stop = True


class ChatPoseTrainer(SealedCheckpoints, Trainer):
    """
    Trains a [`ChatPoseForConditionalGeneration`], bare or wrapped in PEFT, on rows.

    - Both terms of the loss are divided by what the whole accumulated batch of all processes holds, so how it is split
      changes nothing.
    - Logs `ce_loss`, `pose_loss`, `pose_angle_deg` (mean geodesic error of the supervised joints), `tokens_per_second`,
      `poses_per_second`, `padding_percent` (of the batches' places) beside the Trainer's own.
    - `evaluate` gives the exact means over all tokens and poses, teacher-forced: `eval_loss`, `eval_ce_loss`,
      `eval_pose_loss`, `eval_pose_angle_deg`, and `eval_mpjpe_mm` on the body `args.body`, pelvis at its place, global
      orientation included, over the joints whose ancestors are all supervised.
    - Checkpoints are whole or not there ([`SealedCheckpoints`]) and hold adapter or model, processor and card.
    - SIGTERM saves a checkpoint after the step; a loss that is not finite stops before the step, with the rows' ids.

    Args:
        model: to train; see [`adapters.prepare_model`].
        args ([`ChatPoseTrainingArguments`]): settings.
        processing_class ([`ChatPoseProcessor`]): the model's.
        train_dataset, eval_dataset:
            Rows: a `datasets.Dataset`, a [`Mixture`], or a stream of rows; see [`data.rows.load_rows`].
        run (`dict`, *optional*): what the card and `run.json` say of this run beside what the trainer knows.
        kwargs: as in [`~transformers.Trainer`].

    Raises:
        BadLossError: from `train`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: ChatPoseTrainingArguments,
        processing_class: ChatPoseProcessor,
        train_dataset=None,
        eval_dataset=None,
        run: dict | None = None,
        **kwargs,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"expected one process for each device, got one for {args.n_gpu}; start it with `torchrun "
                "--nproc-per-node N` or `accelerate launch`, or show it one device (CUDA_VISIBLE_DEVICES=0)"
            )
        # Batches are cut from rows, not from tensors, whose first dimensions differ.
        args.accelerator_config.dispatch_batches = False
        if args.dataloader_persistent_workers and hasattr(train_dataset, "set_epoch"):
            raise ValueError("expected no `dataloader_persistent_workers`: they would draw every epoch like the first")
        collator = ChatPoseCollator(processing_class, args.max_length, args.on_bad_row, report_rows=True)
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._summarise,
            **kwargs,
        )
        self._run_callback = _RunCallback(self)
        self.add_callback(self._run_callback)
        self._run = run or {}
        self._body: BodyModel | None = None
        self._sampler: EpochSampler | None = None
        self.restart_sums()
        self._skipped_names: set[str] = set()

    @property
    def was_terminated(self) -> bool:
        """Whether training ended because the process was told to end."""
        return self._run_callback.is_terminated

    def is_any(self, value: bool) -> bool:
        """Whether it is so on any process."""
        if self.args.world_size == 1:
            return value
        return bool(self.accelerator.reduce(torch.tensor(float(value), device=self.args.device), "sum") > 0)

    def create_accelerator_and_postprocess(self):
        """With FSDP where it is asked for: accelerate 1.15 would take DDP on the CPU, and say nothing."""
        if self.args.fsdp and PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    # -- data --

    def set_epoch(self, epoch: int) -> None:
        """
        For sampler and rows. (accelerate 1.15 reaches only one of the two, and on several processes not the rows.)
        """
        for part in (self._sampler, self.train_dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        lengths = None
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = partial(self._count_tokens, dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = EpochSampler(
            dataset, self.args.seed if self.args.data_seed is None else self.args.data_seed, lengths, batch_size
        )
        return self._sampler

    def _get_eval_sampler(self, eval_dataset):
        # In their order: to group them, the Trainer would look for lengths among the rows' columns.
        return torch.utils.data.SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    def _count_tokens(self, dataset) -> np.ndarray:
        """Lengths of the epoch's conversations in tokens, but for a system prompt."""
        processor = self.processing_class
        tokenizer, per_image = processor.tokenizer, processor.num_image_tokens
        turn = [{"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant")]
        one, two = (len(tokenizer(processor.apply_chat_template(turn * turns)).input_ids) for turns in (1, 2))
        rows = dataset.messages() if isinstance(dataset, Mixture) else dataset["messages"]
        lengths = []
        for start in range(0, len(rows), 1000):
            some = rows[start : start + 1000]
            parts = [part for row in some for message in row for part in message["content"]]
            ids = tokenizer([part["text"] or "" for part in parts], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            sizes = {"image": per_image, "pose": 1, "text": 0}
            tokens = iter([len(own) + sizes[part["type"]] for own, part in zip(ids, parts, strict=True)])
            for row in some:
                count = sum(len(message["content"]) for message in row)
                lengths.append(sum(islice(tokens, count)) + len(row) // 2 * (two - one))
        return np.array(lengths)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts the supervised poses where the Trainer counts the label tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_poses = sum(((batch["pose_mask"] > 0).any(-1).sum() for batch in batches), torch.tensor(0)).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_poses = self.accelerator.gather(num_poses).sum()
        for batch in batches:
            batch["num_poses_in_batch"] = num_poses.clamp(min=1)
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    # -- training --

    def create_optimizer(self, model=None):
        """With the rates that the vision tower and Muon's matrices have of their own."""
        super().create_optimizer(model)
        named = dict((self.model if model is None else model).named_parameters())
        if self.args.vision_learning_rate is not None:
            vision = self._take({id(weight) for name, weight in named.items() if ".vision_tower." in name})
            for group in vision:
                self.optimizer.add_param_group({**group, "lr": self.args.vision_learning_rate})
        if self.args.muon_learning_rate is not None:
            layers = {id(w) for name, w in named.items() if ".language_model.layers." in name and w.ndim == 2}
            rate = self.args.muon_learning_rate
            matrices = [
                {"params": group["params"], "lr": rate, "weight_decay": group["weight_decay"]}
                for group in self._take(layers)
            ]
            rest = [group for group in self.optimizer.param_groups if group["params"]]
            self.optimizer = MuonAdamW(matrices, rest, self.args.learning_rate)
        return self.optimizer

    def _take(self, ids: set[int]) -> list[dict]:
        """Takes weights out of the optimizer's groups, and returns them in groups of the same settings."""
        taken = []
        for group in self.optimizer.param_groups:
            own = [weight for weight in group["params"] if id(weight) in ids]
            if own:
                group["params"] = [weight for weight in group["params"] if id(weight) not in ids]
                taken.append({**group, "params": own})
        return taken

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; keeps what `log` reports."""
        inputs = dict(inputs)
        report = read_report(inputs.pop("row_report"))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._check_loss(loss, outputs, report)
        self._add_to_sums(inputs, outputs, report)
        return (loss, outputs) if return_outputs else loss

    def _check_loss(self, loss: Tensor, outputs, report: dict) -> None:
        if math.isfinite(loss.item()):
            return
        file = Path(self.args.output_dir) / BAD_LOSS_FILE
        step = self.state.global_step + 1
        terms = {name: str(outputs[name].item()) for name in ("ce_loss", "pose_loss")}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"step": step, "rows": report["rows"], **terms}, indent=1).encode())
        raise BadLossError(step, report["rows"], file)

    @torch.no_grad()
    def _add_to_sums(self, inputs: dict, outputs, report: dict) -> None:
        _, _, mask, angles = _match_poses(inputs, outputs)
        values = (
            outputs["ce_loss"],
            outputs["pose_loss"],
            angles.sum(),
            mask.sum(),
            mask.any(-1).sum(),
            inputs["attention_mask"].sum(),
            torch.tensor(inputs["attention_mask"].numel()),
            torch.tensor(len(report["skipped"])),
            torch.tensor(len(report["truncated"])),
        )
        self._sums += torch.stack([value.to(self._sums) for value in values])
        self._note_skipped(report)

    def _note_skipped(self, report: dict) -> None:
        new = {name: reason for name, reason in report["skipped"] if name not in self._skipped_names}
        if new:
            self._skipped_names |= new.keys()
            path = Path(self.args.output_dir) / SKIPPED_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                for name, reason in new.items():
                    logger.warning(f"left out row {name!r}: {reason}")
                    file.write(f"{json.dumps({'id': name, 'reason': reason}, ensure_ascii=False)}\n")

    def restart_sums(self, values: list[float] | None = None, steps: int = 0, seconds: float = 0.0) -> None:
        self._sums = torch.zeros(len(_SUMS), device=self.args.device)
        if values is not None:
            self._sums += torch.tensor(values, device=self.args.device)
        self._first_step = self.state.global_step - steps
        self._interval_start = time.monotonic() - seconds

    def _total(self, values: Tensor) -> list[float]:
        return (self.accelerator.reduce(values.clone(), "sum") if self.args.world_size > 1 else values).tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss and the speeds to what the Trainer logs of training steps."""
        if "loss" in logs:
            seconds = time.monotonic() - self._interval_start
            steps = self.state.global_step - self._first_step
            sums = dict(zip(_SUMS, self._total(self._sums), strict=True))
            ce_loss, pose_loss = sums["ce_loss"] / steps, sums["pose_loss"] / steps
            config = self._bare_model().config
            # From the sums, which a checkpoint keeps: the Trainer's own begins anew after a stop.
            logs["loss"] = config.ce_loss_weight * ce_loss + config.pose_loss_weight * pose_loss
            logs["ce_loss"], logs["pose_loss"] = ce_loss, pose_loss
            if sums["joints"]:
                logs["pose_angle_deg"] = math.degrees(sums["angle"] / sums["joints"])
            logs["tokens_per_second"], logs["poses_per_second"] = sums["tokens"] / seconds, sums["poses"] / seconds
            logs["padding_percent"] = 100 * (1 - sums["tokens"] / sums["places"])
            for name in ("skipped", "truncated"):
                if sums[name]:
                    logs[f"{name}_rows"] = int(sums[name])
            self.restart_sums()
        super().log(logs, start_time)

    def _bare_model(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # -- evaluation --

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the Trainer's; its time does not count in the speeds."""
        start = time.monotonic()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._interval_start += time.monotonic() - start

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sums over tokens and poses for each row, which the Trainer gathers as if they were logits."""
        inputs = self._prepare_inputs(inputs)
        report = read_report(inputs.pop("row_report"))
        self._note_skipped(report)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            sums = self._sum_rows(inputs, outputs)
        # As many rows as the sampler gave: processes exchange tensors of one size.
        sums = nn.functional.pad(sums[: len(report["rows"])], (0, 0, 0, len(report["skipped"])))
        return None, sums, torch.zeros(len(sums), device=sums.device)

    def _sum_rows(self, inputs: dict, outputs) -> Tensor:
        """`(B, 7)`: CE, tokens; pose loss, poses; angles, joints; distances, joints with a known place."""
        labels = inputs["labels"][:, 1:]
        ce = nn.functional.cross_entropy(outputs["logits"][:, :-1].float().transpose(1, 2), labels, reduction="none")
        row_of_pose = (labels == self._bare_model().config.pose_token_id).nonzero()[:, 0]
        rotmats, targets, mask, angles = _match_poses(inputs, outputs)
        losses = self._bare_model().pose_loss_function(rotmats, targets, mask)
        if self._body is None:
            self._body = BodyModel.load(self.args.body)
        body = self._body.to(rotmats.device)
        is_placed = placed_joints(mask)
        # Not SMPL-X's jaw, which stands where SMPL has a hand.
        shared = [joint for joint, name in enumerate(JOINT_NAMES) if body.joint_names[joint] == name]
        distances = (body.joints(rotmats) - body.joints(targets)).norm(dim=-1)[:, shared]
        is_placed = is_placed[:, shared]
        of_poses = torch.stack(
            [
                losses,
                mask.any(-1),
                angles.sum(-1),
                mask.sum(-1),
                torch.where(is_placed, distances, 0.0).sum(-1),
                is_placed.sum(-1),
            ],
            dim=1,
        )
        of_tokens = torch.stack([ce.sum(-1), (labels != -100).sum(-1)], dim=1)
        zeros = torch.zeros(len(labels), of_poses.shape[1], device=labels.device)
        return torch.cat([of_tokens, zeros.index_add(0, row_of_pose, of_poses)], dim=1)

    def _summarise(self, prediction: EvalPrediction) -> dict[str, float]:
        ce, tokens, pose, poses, angle, joints, distance, placed = prediction.predictions.astype(np.float64).sum(0)
        config = self._bare_model().config
        metrics = {"ce_loss": ce / max(tokens, 1), "loss": config.ce_loss_weight * ce / max(tokens, 1)}
        if poses:
            metrics["loss"] += config.pose_loss_weight * pose / poses
            metrics["pose_loss"] = pose / poses
            metrics["pose_angle_deg"] = math.degrees(angle / joints)
            metrics["mpjpe_mm"] = 1000 * distance / placed
        return {name: float(value) for name, value in metrics.items()}

    # -- files --

    def checkpoint_record(self) -> dict[str, str]:
        record = {
            "sums": self._total(self._sums),
            "steps": self.state.global_step - self._first_step,
            "seconds": time.monotonic() - self._interval_start,
        }
        return {_SUMS_FILE: json.dumps(record)}

    def _save_checkpoint(self, model, trial):
        start = time.monotonic()
        super()._save_checkpoint(model, trial)
        self._interval_start += time.monotonic() - start

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_whole_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_whole_model(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_whole_model(self, checkpoint: str) -> bool:
        """
        Loads a model that is trained in full; whether there is one. Its files have LLaVA's old names of weights, which
        `from_pretrained` knows: the Trainer itself would find none of them, warn, and go on with what is there.
        """
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())
        return True

    def _load_rng_state(self, checkpoint):
        # The last that is restored of a checkpoint, before the first step.
        super()._load_rng_state(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / _SUMS_FILE
        if file is not None and file.is_file():
            record = json.loads(file.read_text(encoding="utf-8"))
            # The sums are those of all processes: one of them goes on with them.
            sums = record["sums"] if self.is_world_process_zero() else None
            self.restart_sums(sums, record["steps"], record["seconds"])

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        run = self._describe_run()
        write_atomically(folder / RUN_FILE, json.dumps(run, indent=1, ensure_ascii=False).encode())
        is_adapter = (folder / "adapter_config.json").is_file()
        write_atomically(folder / "README.md", make_card(run, is_adapter=is_adapter).encode())

    def _describe_run(self) -> dict:
        model = self.accelerator.unwrap_model(self.model)
        is_adapter = isinstance(model, PeftModel)
        base = model.peft_config["default"] if is_adapter else None
        figures = [logs for logs in self.state.log_history if "eval_loss" in logs]
        devices = "CPU" if self.args.device.type == "cpu" else torch.cuda.get_device_name(self.args.device)
        return {
            "base_model": base.base_model_name_or_path if base else None,
            "base_revision": base.revision if base else None,
            "method": "lora" if is_adapter else "full",
            "trainable_parameters": {part: trained for part, (trained, _) in count_parameters(model).items()},
            "versions": {name: _version(name) for name in ("chatpose_hf", "transformers", "torch", "peft")},
            "hardware": f"{self.args.world_size} x {devices}",
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "metrics": {
                name: value
                for name, value in (figures[-1] if figures else {}).items()
                if name.startswith("eval_") and "per_second" not in name and "time" not in name
            },
            "body": self.args.body,
            **self._run,
        }


def _match_poses(inputs: dict, outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Of a batch's `P` poses, without padding: predictions and targets `(P, J, 3, 3)`, which joints are supervised, and the
    angle between the two there, radians, zero elsewhere, both `(P, J)`.
    """
    rotmats = outputs["pose_rotmats"].float()
    targets, mask = inputs["pose_labels"][: len(rotmats)].float(), inputs["pose_mask"][: len(rotmats)] > 0
    return rotmats, targets, mask, torch.where(mask, geodesic_distance(rotmats, targets), 0.0)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
