"""Work in batches, on one process or several; each batch is kept when it is done, so a run that was killed goes on."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from tqdm import tqdm

from .atomic_write import write_atomically


if TYPE_CHECKING:
    from accelerate import PartialState

SETTINGS_FILE = "settings.json"
_FILES = "process-*.jsonl"


def map_batches(
    work: Callable[[Sequence[int]], list[dict]],
    batches: Sequence[Sequence[int]],
    folder: str | Path,
    settings: dict,
    state: "PartialState",
    unit: str,
) -> dict[int, dict]:
    """
    What `work` makes of every item. The batches are the same for any number of processes and after any stop, so the
    records are too.

    Args:
        work (`Callable`): a batch's items to a record for each, which JSON can hold.
        batches (`Sequence[Sequence[int]]`): items by number, each in one batch.
        folder (`str` or `Path`):
            Kept: `settings.json`, and for each process `process-N.jsonl`, a line for each batch. All processes see it.
        settings (`dict`): what the records depend on; JSON.
        state ([`accelerate.PartialState`]): the processes.
        unit (`str`): what an item is called beside the progress bar.

    Returns:
        `dict[int, dict]`: the record of each item, on every process.

    Raises:
        ValueError: where the folder holds records made with other settings.
    """
    folder = Path(folder)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {path: path.read_bytes().rfind(b"\n") + 1 for path in folder.glob(_FILES)}
        check_settings(folder / SETTINGS_FILE, settings, any(whole.values()))
        for path, size in whole.items():
            os.truncate(path, size)  # a line that a kill cut off
    state.wait_for_everyone()
    done = _load_records(folder, batches)
    state.wait_for_everyone()  # nobody writes before everybody has read
    rest = [number for number in range(len(batches)) if number not in done]
    total = sum(map(len, batches))
    with (
        open(folder / f"process-{state.process_index}.jsonl", "ab") as file,
        tqdm(
            total=total,
            initial=sum(len(batches[number]) for number in done),
            unit=unit,
            disable=not state.is_main_process,
        ) as bar,
    ):
        for place, number in enumerate(rest):
            # Not a share of its own for each process: a later run may have more or fewer of them.
            if place % state.num_processes == state.process_index:
                line = {"batch": number, "records": work(batches[number])}
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
            bar.update(len(batches[number]))
        os.fsync(file.fileno())
    state.wait_for_everyone()
    done = _load_records(folder, batches)
    return {item: record for number in done for item, record in zip(batches[number], done[number], strict=True)}


@contextmanager
def hold_folder(folder: Path, state: "PartialState") -> Iterator[None]:
    """
    Makes a folder and keeps other runs out of it; the main process does so for all.

    Raises:
        ValueError: where another run is in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        yield
    except Timeout as error:
        raise ValueError(f"another run is writing to {folder}; wait for it or name another folder") from error
    finally:
        lock.release()


def make_batches(lengths: Sequence[tuple[int, ...]], size: int) -> list[list[int]]:
    """
    Items by number, the longest first: what does not fit into memory fails at once. Those of a batch are of one length as far
    as may be, so that little of it is padding.

    Args:
        lengths (`Sequence[tuple[int, ...]]`): of each item, what counts most first.
        size (`int`): items of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda item: (*(-length for length in lengths[item]), item))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _load_records(folder: Path, batches: Sequence[Sequence[int]]) -> dict[int, list[dict]]:
    done = {}
    for path in sorted(folder.glob(_FILES)):
        for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                record = json.loads(line)
                number, records = record["batch"], record["records"]
                is_whole = len(records) == len(batches[number])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"line {line_number} of {path} is no batch of ours; name another folder") from error
            if not is_whole:
                raise ValueError(f"line {line_number} of {path} is a batch of another size; name another folder")
            done[number] = records
    return done


def check_settings(path: str | Path, settings: dict, has_answers: bool) -> None:
    """
    Keeps what the answers of a folder depend on; refuses others.

    Args:
        path (`str` or `Path`): the file in that folder.
        settings (`dict`): JSON.
        has_answers (`bool`): whether there are any yet.

    Raises:
        ValueError: where there are answers, made with other settings or nobody knows which.
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings))
    if has_answers:
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path.parent} holds answers, but its {path.name}, which says how they were made, cannot be read "
                f"({error}); name another folder"
            ) from error
        different = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if different:
            changes = ", ".join(f"{name} {before.get(name)!r} and now {settings.get(name)!r}" for name in different)
            raise ValueError(f"{path.parent} holds answers made with other settings: {changes}; name another folder")
    write_atomically(path, json.dumps(settings, indent=2).encode())
