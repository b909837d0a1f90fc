"""A model's answers to an evaluation's questions, in batches, on one process or several, kept as they come."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from transformers.utils import find_adapter_config_file

from . import ChatPosePipeline
from .adapters import load_trained
from .batch_log import map_batches
from .card import public_name
from .collator import ChatPoseCollator
from .questions import Questions


_WEIGHTS = (".safetensors", ".bin")
_SETTINGS = (
    "adapter_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Generation:
    """How answers are generated, greedily: `batch_size` questions at once, at most `max_new_tokens`, a pose in each answer
    if `force_pose`, by weights of `dtype`."""

    batch_size: int
    max_new_tokens: int
    force_pose: bool
    dtype: str


def ask_model(
    questions: Questions,
    model: str,
    revision: str | None,
    weights: str | None,
    folder: str | Path,
    generation: Generation,
    state: PartialState,
    device: torch.device,
) -> list[dict]:
    """
    Answers; those that the folder holds are kept. The model is loaded where one is missing.

    Args:
        questions ([`Questions`]): what is asked.
        model (`str`), revision (`str`, *optional*): as for [`load_trained`].
        weights (`str`, *optional*): as from [`find_revision`]; the main process's is kept beside the answers.
        folder (`str` or `Path`): see [`map_batches`].
        generation ([`Generation`]): how.
        state ([`accelerate.PartialState`]): the processes.
        device (`torch.device`): of this one's model.

    Returns:
        `list[dict]`: of each item `text` and `poses`, each 72 numbers, axis-angle in radians, camera frame; of the first
        turn of a chat also `ce` and `tokens`, the summed cross-entropy and the number of the conversation's answer tokens.

    Raises:
        ValueError: where the folder holds answers to other questions, by another model or made in another way.
    """
    pipe: ChatPosePipeline | None = None

    def answer(indices: Sequence[int]) -> list[dict]:
        nonlocal pipe
        if pipe is None:
            loaded, processor = load_trained(model, revision, dtype=generation.dtype)
            pipe = ChatPosePipeline(model=loaded, processor=processor, device=device)
        try:
            return _answer(pipe, questions, indices, generation)
        except ValueError as error:
            ids = ", ".join(questions.items[index].id for index in indices)
            raise ValueError(f"{error} (among the answers about {ids:.500})") from error

    settings = {}
    if state.is_main_process:
        settings = {
            "task": questions.task,
            "questions": questions.digest,
            "model": public_name(model),
            "revision": weights,
            **asdict(generation),
        }
    batches = questions.make_batches(generation.batch_size)
    records = map_batches(answer, batches, folder, settings, state, "question")
    return [records[index] for index in range(len(questions.items))]


def _answer(
    pipe: ChatPosePipeline, questions: Questions, indices: Sequence[int], generation: Generation
) -> list[dict]:
    replies = pipe.forward(
        {"chat": questions.make_chats(indices)},
        max_new_tokens=generation.max_new_tokens,
        force_pose=generation.force_pose,
        do_sample=False,
        num_beams=1,
    )["reply"]
    records = [
        {"text": reply["text"], "poses": [pose["theta"].tolist() for pose in reply["poses"]]} for reply in replies
    ]
    for index, record in zip(indices, records, strict=True):
        if not all(math.isfinite(number) for pose in record["poses"] for number in pose):
            raise ValueError(
                f"expected finite numbers as the pose of {questions.items[index].id!r}, got NaN or infinity from the model; "
                "another dtype, such as float32, may help"
            )
    if questions.task == "chat":
        first = [place for place, index in enumerate(indices) if questions.items[index].turn == 0]
        rows = questions.load_rows([indices[place] for place in first])
        for place, row in zip(first, rows, strict=True):
            records[place] |= _score_answers(pipe, row)
    return records


@torch.inference_mode()
def _score_answers(pipe: ChatPosePipeline, row: dict) -> dict[str, float | int]:
    batch = {name: value.to(pipe.device) for name, value in ChatPoseCollator(pipe.processor)([row]).items()}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(pipe.model.dtype)
    labels = batch["labels"][:, 1:]
    logits = pipe.model(**batch)["logits"][:, :-1]
    ce = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="sum")
    return {"ce": ce.item(), "tokens": int((labels != -100).sum())}


def find_revision(model: str, revision: str | None) -> str:
    """
    The commit on the Hub, or of a folder the digest of what answers depend on; of an adapter also that of its base.

    Raises:
        ValueError: for a folder without weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        name = "adapter_config.json" if find_adapter_config_file(model, revision=revision) else "config.json"
        return Path(hf_hub_download(model, name, revision=revision)).parent.name
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS or path.name in _SETTINGS]
    if not any(path.suffix in _WEIGHTS for path in files):
        raise ValueError(f"expected weights ({', '.join(_WEIGHTS)}) in {folder}, found none")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    own = f"sha256:{digest.hexdigest()[:16]}"
    if not (folder / "adapter_config.json").is_file():
        return own
    config = PeftConfig.from_pretrained(model)
    return f"{own} on {find_revision(config.base_model_name_or_path, config.revision)}"
