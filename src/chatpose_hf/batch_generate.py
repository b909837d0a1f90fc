"""A file of prompts in, a file of replies out, in batches, on one process or several; a run that was killed goes on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, UnidentifiedImageError

from .atomic_write import write_atomically
from .batch_log import hold_folder, make_batches, map_batches
from .export import reply_record
from .image_files import open_image
from .pipeline_chatpose import ChatPosePipeline


if TYPE_CHECKING:
    from accelerate import PartialState


class Prompt(NamedTuple):
    """One line of a prompts file: `id` (its own or the line's number), `prompt`, and the pictures' names and paths."""

    id: str | int
    prompt: str
    image_names: list[str]
    image_paths: list[Path]


def load_prompts(path: str | Path) -> list[Prompt]:
    """
    Reads a prompts file: on each line an object of `prompt`, optionally `image` (a file name or a list of them, from
    the folder of the prompts file or the working directory) and optionally `id`.

    Raises:
        ValueError: for a line that is something else, an id that comes twice, an image that is absent or none. All
            lines and the pictures' headers are checked before the first is answered.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}: {error}") from error
    prompts: list[Prompt] = []
    line_of: dict[str | int, int] = {}
    # Not `splitlines`, which also cuts at characters that JSON has inside strings, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"expected a JSON object in {place}: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            raise ValueError(
                f'expected {{"prompt": "...", "image": optional, "id": optional}} in {place}, got {line[:200]}'
            )
        try:
            record["prompt"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"expected text that UTF-8 can write as `prompt` in {place}: {error}") from error
        if unknown := sorted(set(record) - {"prompt", "image", "id"}):
            raise ValueError(f"expected `prompt`, `image` and `id` in {place}, got also {', '.join(unknown)}")
        prompt_id = record.get("id", number)
        if not isinstance(prompt_id, str | int):
            raise ValueError(f"expected a text or a number as `id` in {place}, got {prompt_id!r}")
        if prompt_id in line_of:
            raise ValueError(f"expected ids that differ, got {prompt_id!r} in lines {line_of[prompt_id]} and {number}")
        line_of[prompt_id] = number
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a file name or a list of them as `image` in {place}, got {names!r}")
        prompts.append(
            Prompt(prompt_id, record["prompt"], names, [_find_image(path.parent, name, place) for name in names])
        )
    if not prompts:
        raise ValueError(f"expected at least one prompt in {path}, got an empty file")
    return prompts


def _find_image(folder: Path, name: str, place: str) -> Path:
    for candidate in (folder / name, Path(name)):
        if candidate.is_file():
            try:
                Image.open(candidate).close()  # reads the header only
            except (UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise ValueError(f"{error} (`image` in {place})") from error
            return candidate
    raise ValueError(
        f"no file `{name}` (`image` in {place}), neither in {folder.absolute()} nor in the working directory"
    )


def generate_replies(
    load_pipe: Callable[[], ChatPosePipeline],
    prompts: list[Prompt],
    folder: str | Path,
    settings: dict[str, str | int | bool | None],
    state: "PartialState",
    batch_size: int = 8,
    **generate_kwargs,
) -> Path:
    """
    Answers prompts into `replies.jsonl`, one line each, in their order. Batches are of prompts of one length, and are kept as
    they are answered: the same call goes on after a stop, and with another number of processes.

    Args:
        load_pipe (`Callable`): loads the model, a [`ChatPosePipeline`]; called where a prompt is not answered yet.
        prompts (`list[Prompt]`): as from [`load_prompts`].
        folder (`str` or `Path`): created if absent; all processes see it.
        settings (`dict`):
            What the replies depend on beside the prompts, such as the model's name; kept in `settings.json`.
        state ([`accelerate.PartialState`]): the processes, as from [`find_processes`].
        batch_size (`int`, *optional*, defaults to 8): prompts answered at once.
        generate_kwargs: for `generate`.

    Returns:
        `Path`: of `replies.jsonl`, which the main process writes at the end: `id`, `prompt`, `images`, `reply` and `poses`, a
        list of `{"theta": [72 numbers]}`, axis-angle in radians, camera frame.

    Raises:
        ValueError: where the folder holds replies to other prompts or with other settings, or is in use.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    folder = Path(folder)
    pipe: ChatPosePipeline | None = None

    def answer(indices: Sequence[int]) -> list[dict]:
        nonlocal pipe
        if pipe is None:
            pipe = load_pipe()
            _check_prompts(prompts, pipe.processor.image_token)
        asked = [prompts[index] for index in indices]
        replies = pipe.forward({"chat": [_make_chat(pipe, prompt) for prompt in asked]}, **generate_kwargs)["reply"]
        return [
            {"id": prompt.id, **reply_record(prompt.prompt, prompt.image_names, reply)}
            for prompt, reply in zip(asked, replies, strict=True)
        ]

    digest = hashlib.sha256(json.dumps([prompt[:3] for prompt in prompts]).encode()).hexdigest()[:16]
    settings = settings | {"batch_size": batch_size, "prompts": f"{len(prompts)}, sha256:{digest}"}
    batches = make_batches([(len(prompt.image_paths), len(prompt.prompt)) for prompt in prompts], batch_size)
    path = folder / "replies.jsonl"
    with hold_folder(folder, state):
        records = map_batches(answer, batches, folder, settings, state, "prompt")
        if state.is_main_process:
            lines = [json.dumps(records[index]).encode() + b"\n" for index in range(len(prompts))]
            write_atomically(path, b"".join(lines))
    return path


def _check_prompts(prompts: Sequence[Prompt], image_token: str) -> None:
    for prompt in prompts:
        if image_token in prompt.prompt:
            raise ValueError(
                f"expected a prompt without `{image_token}`, got one with id {prompt.id!r}; name pictures in `image`"
            )


def _make_chat(pipe: ChatPosePipeline, prompt: Prompt) -> list[dict]:
    """Pictures are opened when their turn comes, not all at once."""
    try:
        images = [open_image(path) for path in prompt.image_paths]
    except ValueError as error:
        raise ValueError(f"{error} (the prompt with id {prompt.id!r})") from error
    return pipe.preprocess({"text": prompt.prompt, "images": images})["chat"]
