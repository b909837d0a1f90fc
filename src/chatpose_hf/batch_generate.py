"""A file of prompts in, a file of replies out, in batches; a run that was killed goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from .batch_log import SETTINGS_FILE, check_settings
from .export import reply_record
from .image_files import open_image
from .pipeline_chatpose import ChatPosePipeline


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
    pipe: ChatPosePipeline,
    prompts: list[Prompt],
    folder: str | Path,
    settings: dict[str, str | int | bool | None],
    batch_size: int = 8,
    **generate_kwargs,
) -> Path:
    """
    Answers prompts into `replies.jsonl`, one line each, in their order. Replies that are there already are kept.

    Args:
        pipe ([`ChatPosePipeline`]): the model.
        prompts (`list[Prompt]`): as from [`load_prompts`].
        folder (`str` or `Path`): created if absent.
        settings (`dict`):
            What the replies depend on beside the prompts, such as the model's name; kept in `settings.json`.
        batch_size (`int`, *optional*, defaults to 8): prompts answered at once.
        generate_kwargs: for `generate`.

    Returns:
        `Path`: of `replies.jsonl`: `id`, `prompt`, `images`, `reply` and `poses`, a list of `{"theta": [72 numbers]}`,
        axis-angle in radians, camera frame.

    Raises:
        ValueError: where the folder holds replies to other prompts or with other settings, or is in use.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    for prompt in prompts:
        if pipe.processor.image_token in prompt.prompt:
            raise ValueError(
                f"expected a prompt without `{pipe.processor.image_token}`, got one with id {prompt.id!r}; name pictures "
                "in `image`"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "replies.jsonl"
    try:
        with FileLock(folder / ".lock", timeout=0):
            check_settings(folder / SETTINGS_FILE, settings, has_answers=path.exists() and path.stat().st_size > 0)
            done = _keep_whole_batches(path, prompts, batch_size)
            # Some versions choke on no inputs at all.
            replies = (
                pipe(_Questions(prompts[done:]), batch_size=batch_size, **generate_kwargs) if prompts[done:] else []
            )
            with open(path, "ab") as file, tqdm(total=len(prompts), initial=done, unit="prompt") as bar:
                for prompt, reply in zip(prompts[done:], replies, strict=True):
                    record = {"id": prompt.id, **reply_record(prompt.prompt, prompt.image_names, reply)}
                    file.write(json.dumps(record).encode() + b"\n")
                    file.flush()
                    bar.update()
                os.fsync(file.fileno())
    except Timeout as error:
        raise ValueError(f"another run is writing to {folder}; wait for it or name another folder") from error
    return path


class _Questions(Dataset):
    """
    The pipeline's inputs; pictures are opened when their turn comes, not all at once. A data set, because transformers
    5.10 makes a list of a generator, and returns only when all is answered.
    """

    def __init__(self, prompts: list[Prompt]):
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        prompt = self.prompts[index]
        try:
            images = [open_image(path) for path in prompt.image_paths]
        except ValueError as error:
            raise ValueError(f"{error} (the prompt with id {prompt.id!r})") from error
        return {"text": prompt.prompt, "images": images}


def _keep_whole_batches(path: Path, prompts: list[Prompt], batch_size: int) -> int:
    """
    How many replies a former run left. Its last batch is cut off where it is not whole, for the next run then makes
    the same batches as one that nothing had stopped, and so, bit for bit, the same replies.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            asked = (record["id"], record["prompt"], record["images"])
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"line {number + 1} of {path} is no reply of ours; name another folder") from error
        if number >= len(prompts) or asked != (
            prompts[number].id,
            prompts[number].prompt,
            prompts[number].image_names,
        ):
            raise ValueError(f"line {number + 1} of {path} answers another prompt, {asked[1]!r}; name another folder")
    done = len(lines) if len(lines) == len(prompts) else len(lines) // batch_size * batch_size
    os.truncate(path, sum(map(len, lines[:done])))
    return done
