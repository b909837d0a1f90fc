"""What answers are worth, beside baselines: of poses, of chats, of captions."""

import math
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .baselines import (
    TrainingPoses,
    draw_random_poses,
    find_nearest_by_sentence,
    find_nearest_by_words,
    make_mean_pose,
)
from .data.rows import NUM_JOINTS, caption_texts
from .data.rpe import ATTRIBUTES
from .figures import Figures
from .metrics import diversity, failure_percent, frechet_distance, pool_ranks, recall_percent, retrieval_ranks
from .pose_protocols import PoseRuler, Targets
from .questions import Questions
from .report import Case
from .retrieval import Retrieval
from .rotations import rotmat_to_rotvec, rotvec_to_rotmat


# What an answer without a pose counts as: arms spread, upright, facing the camera.
REST_POSE = torch.tensor([[math.pi, 0.0, 0.0], *[[0.0, 0.0, 0.0]] * (NUM_JOINTS - 1)])
_RECALLS = (1, 5, 10, 20)
_MEAN_RECALLS = (1, 5, 10)  # PoseScript's mRecall is the mean of these, both ways
_POOL_RECALLS = (1, 2, 3, 5, 10)  # the first three are R-precision's
_CASES = 4  # of each rank in the report
_CASE_SYSTEMS = ("model", "nearest_caption", "mean_pose")  # the first two that there are, drawn beside the truth


class Judge(NamedTuple):
    """
    A retrieval model, and how it ranks.

    Args:
        retrieval ([`Retrieval`]): the model.
        pool_size (`int`), pool_draws (`int`): of random pools, the true one included.
        seed (`int`): of the pools, and of the pairs whose distance is the diversity.
    """

    retrieval: Retrieval
    pool_size: int
    pool_draws: int
    seed: int

    def measure_recalls(self, directions: dict[str, tuple[Tensor, Tensor]], figures: Figures) -> dict[str, Tensor]:
        """
        Args:
            directions (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
                Name to queries and gallery, vectors `(N, D)`, row by row of the same items; two, or one.
            figures ([`Figures`]): takes notes.

        Returns:
            `dict[str, torch.Tensor]` of shape `(N,)`: percent, of every item.
        """
        values, means = {}, []
        for name, (queries, gallery) in directions.items():
            ranks = retrieval_ranks(queries, gallery)
            values |= {f"{name}_recall{k}_percent": recall_percent(ranks, k) for k in _RECALLS if k < len(gallery)}
            means += [recall_percent(ranks, k) for k in _MEAN_RECALLS]
        if len(directions) == 2 and max(_MEAN_RECALLS) < len(gallery):
            values["mrecall_percent"] = torch.stack(means).mean(0)
        for name, (queries, gallery) in directions.items():
            if self.pool_size > len(gallery):
                figures.note(f"Fewer than {self.pool_size} items: no pools.")
                break
            ranks = pool_ranks(queries, gallery, self.pool_size, self.pool_draws, self.seed)
            values |= {
                f"{name}_pool{self.pool_size}_recall{k}_percent": recall_percent(ranks, k).mean(0)
                for k in _POOL_RECALLS
                if k < self.pool_size
            }
        return values

    def describe(self, count: int, both_ways: bool) -> str:
        """What it measures among so many items, for results.json."""
        directions = "t2p: texts look for poses, p2t: poses for texts" if both_ways else "t2p: texts look for poses"
        mean = " mrecall: the mean of recall at 1, 5, 10 over the full gallery, both ways." if both_ways else ""
        return (
            f"Retrieval by {self.retrieval.name}. {directions}; recall at k: the true partner is among the first k of all "
            f"{count} (full gallery), or of {self.pool_size}, itself and others drawn at random (pool; {self.pool_draws} "
            f"draws; at 1, 2, 3 this is R-precision). Ties are in random order.{mean}"
        )


def make_baselines(
    training: TrainingPoses | None,
    captions: Sequence[str],
    sentence_encoder: str | None,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """
    Args:
        training ([`TrainingPoses`], *optional*): what baselines know.
        captions (`Sequence[str]`): what is asked, of each of `N` items; empty where nothing is said.
        sentence_encoder (`str`, *optional*): as from [`find_sentence_encoder`]; without it one baseline less.
        seed (`int`): of random poses.
        device (`torch.device`): of the encoder.

    Returns:
        `dict[str, torch.Tensor]`: system to poses `(N, 24, 3, 3)`, camera frame.
    """
    predictions = {}
    if training is not None:
        predictions["mean_pose"] = make_mean_pose(training).expand(len(captions), -1, -1, -1)
        predictions["random_pose"] = draw_random_poses(training, len(captions), seed)
    if training is not None and training.captions and all(captions):
        predictions["nearest_caption"] = find_nearest_by_words(training, captions)
        if sentence_encoder is not None:
            predictions["nearest_sentence"] = find_nearest_by_sentence(training, captions, sentence_encoder, device)
    predictions["rest_pose"] = rotvec_to_rotmat(REST_POSE).expand(len(captions), -1, -1, -1)
    return predictions


def measure_poses(
    questions: Questions,
    records: list[dict],
    targets: Targets,
    ruler: PoseRuler,
    judge: Judge | None,
    baselines: dict[str, Tensor],
    figures: Figures,
) -> tuple[dict[str, list], list[Case]]:
    """
    Distances, angles and, with a judge, recalls and FID, of the model's answers and the baselines'.

    Args:
        questions ([`Questions`]), records (`list[dict]`): what was asked, and the answers, as from [`ask_model`].
        targets ([`Targets`]), ruler ([`PoseRuler`]): the truth, and how it is measured.
        judge ([`Judge`], *optional*): where texts were asked by.
        baselines (`dict[str, torch.Tensor]`): see [`make_baselines`].
        figures ([`Figures`]): takes the figures.

    Returns:
        Columns for the table of predictions, and cases to look at.
    """
    answered = torch.tensor([bool(record["poses"]) for record in records])
    figures.counts |= {
        "answers without a pose": int((~answered).sum()),
        "answers with several poses": sum(len(record["poses"]) > 1 for record in records),
    }
    first = [torch.tensor(record["poses"][0]) if record["poses"] else REST_POSE for record in records]
    predictions = {"model": rotvec_to_rotmat(torch.stack([pose.view(NUM_JOINTS, 3) for pose in first])), **baselines}
    figures.add("model", {"failure_percent": failure_percent(answered)})
    if judge is not None:
        _measure_retrieval(questions, predictions, targets, judge, figures)
    for system, rotmats in predictions.items():
        figures.add(system, ruler.measure(rotmats, targets))
    if questions.task == "rpe":
        _add_groups(_attributes(questions), figures)
    columns = {
        "num_poses": [len(record["poses"]) for record in records],
        "theta": [record["poses"][0] if record["poses"] else None for record in records],
        "true_theta": rotmat_to_rotvec(targets.rotmats).flatten(1).tolist(),
    }
    return columns, _pick_pose_cases(questions, records, answered, predictions, targets, figures)


def _measure_retrieval(
    questions: Questions, predictions: dict[str, Tensor], targets: Targets, judge: Judge, figures: Figures
) -> None:
    texts = judge.retrieval.embed_texts([item.caption for item in questions.items])
    known = targets.mask[..., None, None]
    features = {
        # What nobody knows is unturned on both sides.
        system: judge.retrieval.embed_poses(rotmat_to_rotvec(torch.where(known, rotmats, torch.eye(3))))
        for system, rotmats in {**predictions, "true_pose": targets.rotmats}.items()
    }
    for system, of_system in features.items():
        figures.add(system, judge.measure_recalls({"t2p": (texts, of_system), "p2t": (of_system, texts)}, figures))
        figures.add_number(system, "fid", frechet_distance(of_system, features["true_pose"]))
        figures.add_number(system, "diversity", diversity(of_system, seed=judge.seed))


def _add_groups(groups: Sequence[str], figures: Figures) -> None:
    """Every metric once more for each group of items, under its name."""
    for group in dict.fromkeys(groups):
        chosen = torch.tensor([number for number, other in enumerate(groups) if other == group])
        figures.counts[f"items of {group}"] = len(chosen)
        for system, values in figures.of_items.items():
            figures.add_means(system, {f"{group}_{name}": of for name, of in values.items()}, items=chosen)


def _attributes(questions: Questions) -> list[str]:
    """Of RPE's rows: RPE-Refined's ids begin with it, ours end with it."""
    found = []
    for row in questions.select_rows(["id", "source"]):
        parts = row["id"].split("/")
        part = parts[0] if row["source"] == "rpe-refined" else parts[-1]
        found.append(part if part in ATTRIBUTES else "other")
    return found


def measure_captions(
    questions: Questions, records: list[dict] | None, caption_kind: str | None, judge: Judge, figures: Figures
) -> dict[str, list]:
    """
    How well the rows' captions of each kind, and what the model says, tell their poses.

    Args:
        questions ([`Questions`]): about the rows.
        records (`list[dict]`, *optional*): the model's answers.
        caption_kind (`str`, *optional*): look at this kind alone.
        judge ([`Judge`]): who tells.
        figures ([`Figures`]): takes the figures; not a number for an item without a text.

    Returns:
        Columns for the table of predictions.
    """
    rows = list(questions.select_rows(["captions", "poses"]))
    poses = torch.tensor(np.array([row["poses"] for row in rows], dtype=np.float32)).view(-1, NUM_JOINTS, 3)
    features = judge.retrieval.embed_poses(poses)
    texts: dict[str, list[str | None]] = {}
    if records is not None:
        texts["model"] = [record["text"] for record in records]
    kinds = dict.fromkeys(caption["kind"] for row in rows for caption in row["captions"])
    for kind in kinds if caption_kind is None else [caption_kind]:
        texts[f"{kind}_caption"] = [next(iter(caption_texts(row, [kind])), None) for row in rows]
    for system, of_system in texts.items():
        indices = [index for index, text in enumerate(of_system) if text is not None]
        if not indices:
            raise ValueError(f"expected a {system}, got none in {len(rows)} rows")
        figures.counts[f"texts of {system}"] = len(indices)
        # Every text looks among all poses, whether they have such a text or not: kinds are comparable.
        vectors = torch.zeros_like(features)
        vectors[indices] = judge.retrieval.embed_texts([of_system[index] for index in indices])
        recalls = judge.measure_recalls({"t2p": (vectors, features)}, figures)
        figures.add_means(system, recalls, items=torch.tensor(indices))
        is_absent = torch.tensor([text is None for text in of_system])
        figures.of_items[system] = {name: of.masked_fill(is_absent, math.nan) for name, of in recalls.items()}
    return {f"text_{system}": of_system for system, of_system in texts.items()}


def measure_chat(
    questions: Questions, answers: dict[str, list[dict]], figures: Figures
) -> tuple[dict[str, list], list[Case]]:
    """
    Exact matches, the loss of the true answers, and poses that nobody asked for.

    Args:
        questions ([`Questions`]): every turn of conversations.
        answers (`dict[str, list[dict]]`): system, the model first, to its answers, as from [`ask_model`].
        figures ([`Figures`]): takes the figures.

    Returns:
        Columns for the table of predictions, and cases to look at.
    """
    wanted = questions.true_answers()
    for system, records in answers.items():
        matches = [
            normalise_answer(record["text"]) == normalise_answer(answer)
            for record, answer in zip(records, wanted, strict=True)
        ]
        figures.add(
            system,
            {
                "exact_match_percent": 100.0 * torch.tensor(matches).double(),
                "pose_answer_percent": torch.tensor([100.0 * bool(record["poses"]) for record in records]).double(),
            },
        )
        # The first turn has the conversation's sums: the mean over tokens weighs it by its own.
        tokens = torch.tensor([record.get("tokens", 0) for record in records], dtype=torch.float64)
        losses = torch.tensor([record.get("ce", 0.0) for record in records], dtype=torch.float64) / tokens
        scored = tokens.nonzero()[:, 0]
        figures.add_means(system, {"loss": losses}, items=scored, weights=tokens[scored])
    columns = {"answer": wanted}
    if "before" in answers:
        columns["reply_before"] = [record["text"] for record in answers["before"]]
    return columns, _pick_chat_cases(questions, answers["model"], wanted, figures)


def normalise_answer(text: str) -> str:
    """
    As answers to questions about pictures are compared: lower case, without punctuation, articles and extra spaces; of an
    answer that is nothing else, such as the letter of a choice, what is there.
    """
    lower = " ".join(text.lower().split())
    words = lower.translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split()) or words.strip() or lower


def _pick_pose_cases(
    questions: Questions,
    records: list[dict],
    answered: Tensor,
    predictions: dict[str, Tensor],
    targets: Targets,
    figures: Figures,
) -> list[Case]:
    chosen = _pick_ranks(figures.of_items["model"]["pa_mpjpe_mm"], answered)
    chosen += [("unanswered", index) for index in (~answered).nonzero()[:, 0].tolist()[:_CASES]]
    shown = [system for system in _CASE_SYSTEMS if system in predictions][:2]
    cases = []
    for rank, index in chosen:
        poses = {"truth": targets.rotmats[index]} if targets.mask[index, 0] else {}
        poses |= {system: predictions[system][index] for system in shown if system != "model" or answered[index]}
        case = _make_case(questions, rank, index, records[index]["text"], figures)
        cases.append(case._replace(poses={name: rotmat_to_rotvec(rotmats) for name, rotmats in poses.items()}))
    return cases


def _pick_ranks(errors: Tensor, answered: Tensor) -> list[tuple[str, int]]:
    """Items of the smallest, the middle and the largest errors, each once."""
    order = [index for index in errors.argsort(stable=True).tolist() if answered[index]]
    count = min(_CASES, len(order) // 3) or min(1, len(order))
    middle = (len(order) - count) // 2
    places = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:][::-1]}
    picked: dict[int, str] = {}
    for rank, indices in places.items():
        for index in indices:
            picked.setdefault(index, rank)
    return [(rank, index) for index, rank in picked.items()]


def _pick_chat_cases(questions: Questions, records: list[dict], wanted: list[str], figures: Figures) -> list[Case]:
    is_match = figures.of_items["model"]["exact_match_percent"] > 0
    chosen = [("best", index) for index in is_match.nonzero()[:, 0].tolist()[:_CASES]]
    chosen += [("worst", index) for index in (~is_match).nonzero()[:, 0].tolist()[:_CASES]]
    return [
        _make_case(questions, rank, index, f"{records[index]['text']}\n(expected: {wanted[index]})", figures)
        for rank, index in chosen
    ]


def _make_case(questions: Questions, rank: str, index: int, reply: str, figures: Figures) -> Case:
    item = questions.items[index]
    # Not whether it is among the first so many: of one item that is yes or no, twenty times.
    of_item = {name: of[index].item() for name, of in figures.of_items["model"].items() if "recall" not in name}
    return Case(rank, item.id, item.question, reply, questions.open_picture(index), {}, of_item)
