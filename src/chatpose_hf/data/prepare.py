"""A data set as downloaded in, a folder of rows out: in parts, by several processes, going on where a run stopped."""

import json
import multiprocessing
import random
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path

import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from ..atomic_write import atomic_file, write_atomically
from ..body import BodyModel
from ..render import contact_sheet, render_bodies
from .rows import FEATURES, write_rows
from .source import Source


_SHEET_ROWS = 16
_SHEET_BACKGROUND = "#f4f6fa"
_RETRIED = ("missing", "damaged")  # what begins a reason to skip that other files would mend


@dataclass(frozen=True)
class PartRecord:
    """
    What became of a part: how many rows of each task and poses, what was left out, by reason, and the first few names of
    each; whether the limit cut it short; or why it could not be read.
    """

    part: str
    tasks: dict[str, int]
    poses: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    is_cut: bool = False
    error: str | None = None

    @property
    def rows(self) -> int:
        return sum(self.tasks.values())

    @property
    def is_done(self) -> bool:
        """Whether another run over the same files would give the same."""
        return self.error is None and not self.is_cut and not any(name.startswith(_RETRIED) for name in self.skipped)


def prepare_rows(
    source: Source,
    output: str | Path,
    limit: int | None = None,
    workers: int = 1,
    body: BodyModel | None = None,
) -> list[PartRecord]:
    """
    Writes the rows of a source as a folder that `rows.load_rows`, `datasets.load_dataset` and the Hub open:
    `SPLIT/PART.parquet`, `README.md` (a dataset card), `summary.json`, `sheet.png` (16 random rows), `parts.jsonl`.

    Each part is written whole or not at all. Parts that a former run finished are kept; those in which files were missing
    or damaged are read again.

    Args:
        source ([`Source`]): what to read.
        output (`str` or `Path`): the folder; made where it is absent.
        limit (`int`, *optional*): stop after this many rows.
        workers (`int`, *optional*, defaults to 1): processes.
        body ([`BodyModel`], *optional*): for the sheet; the default body where none is given.

    Returns:
        `list[PartRecord]`: of each part that was looked at, in order; those that could not be read have an `error`.

    Raises:
        ValueError: where the folder holds rows of another source, input or seed, or is being written to.
    """
    if workers < 1 or (limit is not None and limit < 1):
        raise ValueError(f"expected at least 1 worker and a limit of at least 1 row, got {workers} and {limit}")
    parts = source.parts()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            _check_settings(output / "settings.json", source)
            records = _read_parts(source, parts, output, limit, workers)
            _remove_strays(output, records)
            _write_summary(output, source, records)
            if any(record.rows for record in records):
                write_sheet(output, records, source.seed, body or BodyModel.load("default"))
    except Timeout as error:
        raise ValueError(f"another run is writing to {output}; wait for it or name another folder") from error
    return records


def _part_path(output: Path, part: str) -> Path:
    return output / f"{part}.parquet"


def _check_settings(path: Path, source: Source) -> None:
    settings = source.settings()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != settings:
            raise ValueError(f"{path.parent} holds rows made from {before}, and now {settings}; name another folder")
    elif any(path.parent.glob("*/*.parquet")):
        raise ValueError(f"{path.parent} holds Parquet files that are not of ours; name another folder")
    else:
        write_atomically(path, json.dumps(settings, indent=2).encode())


def _load_records(path: Path) -> dict[str, PartRecord]:
    """The last word on each part; a line that a kill tore is as good as none."""
    records: dict[str, PartRecord] = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                record = PartRecord(**json.loads(line))
            except (ValueError, TypeError):
                continue
            records[record.part] = record
    return records


def _read_parts(source: Source, parts: list[str], output: Path, limit: int | None, workers: int) -> list[PartRecord]:
    """Reads the parts in order until the limit is reached, some ahead in other processes."""
    log = output / "parts.jsonl"
    known = {
        part: record
        for part, record in _load_records(log).items()
        if record.is_done and (not record.rows or _part_path(output, part).is_file())
    }
    records: list[PartRecord] = []
    count = 0
    with (
        _Pool(source, output, workers) as pool,
        open(log, "ab") as file,
        tqdm(total=len(parts), unit="part", postfix={"rows": 0}) as bar,
    ):
        if log.stat().st_size:
            file.write(b"\n")  # after a line that a kill may have torn
        todo = [part for part in parts if part not in known]
        for part in parts:
            left = None if limit is None else limit - count
            if left == 0:
                break
            record = known.get(part) or pool.result(part, left, todo)
            if left is not None and record.rows > left:
                record = _read_part(source, part, output, left)
            if part not in known or record is not known[part]:
                file.write(json.dumps(asdict(record)).encode() + b"\n")
                file.flush()
            records.append(record)
            count += record.rows
            bar.update()
            bar.set_postfix(rows=count)
    return records


class _Pool:
    """Reads parts in this process or, with more workers, in others, a few parts ahead of what is asked for."""

    def __init__(self, source: Source, output: Path, workers: int):
        self._source, self._output, self._workers = source, output, workers
        self._futures: dict[str, Future] = {}

    def __enter__(self) -> "_Pool":
        # A forked child of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._workers, context, _one_thread) if self._workers > 1 else None
        return self

    def __exit__(self, *exception) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def result(self, part: str, limit: int | None, todo: list[str]) -> PartRecord:
        if self._pool is None:
            return _read_part(self._source, part, self._output, limit)
        first = todo.index(part)
        for ahead in todo[first : first + 2 * self._workers]:
            if ahead not in self._futures:
                self._futures[ahead] = self._pool.submit(_read_part, self._source, ahead, self._output, limit)
        return self._futures.pop(part).result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _read_part(source: Source, part: str, output: Path, limit: int | None) -> PartRecord:
    source.skipped, source.skipped_examples = {}, {}
    tasks: dict[str, int] = {}
    poses = 0

    def counted(rows: Iterator[dict]) -> Iterator[dict]:
        nonlocal poses
        for row in rows:
            tasks[row["task"]] = tasks.get(row["task"], 0) + 1
            poses += len(row["poses"])
            yield row

    path = _part_path(output, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = source.rows(part)
    try:
        write_rows(path, counted(islice(rows, limit)))
        is_cut = limit is not None and sum(tasks.values()) == limit and next(rows, None) is not None
    except (ValueError, OSError) as error:
        path.unlink(missing_ok=True)  # of a former run, in which files were missing
        return PartRecord(part, {}, error=str(error)[:1000])
    if not tasks:
        path.unlink()
    return PartRecord(part, tasks, poses, source.skipped, source.skipped_examples, is_cut)


def _remove_strays(output: Path, records: list[PartRecord]) -> None:
    """Parts read ahead of the limit."""
    wanted = {_part_path(output, record.part) for record in records if record.rows}
    for path in output.glob("*/*.parquet"):
        if path not in wanted:
            path.unlink()


def merge_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """The sums, the largest first."""
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _write_summary(output: Path, source: Source, records: list[PartRecord]) -> None:
    splits: dict[str, list[PartRecord]] = {}
    for record in records:
        splits.setdefault(record.part.split("/")[0], []).append(record)
    examples: dict[str, list[str]] = {}
    for record in records:
        for reason, names in record.examples.items():
            examples[reason] = (examples.get(reason, []) + names)[:5]
    summary = {
        "source": source.name,
        "licence": source.licence,
        "splits": {
            split: {
                "rows": sum(record.rows for record in of_split),
                "poses": sum(record.poses for record in of_split),
                "tasks": merge_counts([record.tasks for record in of_split]),
            }
            for split, of_split in splits.items()
        },
        "skipped": {
            reason: {"count": count, "examples": examples.get(reason, [])}
            for reason, count in merge_counts([record.skipped for record in records]).items()
        },
        "errors": {record.part: record.error for record in records if record.error},
    }
    write_atomically(output / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_atomically(output / "README.md", _make_card(summary).encode())


def _make_card(summary: dict) -> str:
    """A dataset card: its YAML tells `datasets` and the Hub's viewer which files are which split."""
    files = "".join(
        f"  - split: {split}\n    path: {split}/*.parquet\n"
        for split, counts in summary["splits"].items()
        if counts["rows"]
    )
    table = "".join(
        f"| {split} | {counts['rows']} | {counts['poses']} | "
        f"{', '.join(f'{task} {count}' for task, count in counts['tasks'].items())} |\n"
        for split, counts in summary["splits"].items()
    )
    configs = f"configs:\n- config_name: default\n  data_files:\n{files}" if files else ""
    return f"""---
license: other
tags: [human-pose, smpl, chatpose]
{configs}---

# Rows of {summary["source"]} for ChatPose

{summary["licence"]}

| split | rows | poses | tasks |
|---|---|---|---|
{table}
Columns: {", ".join(f"`{name}`" for name in FEATURES)}. Poses are SMPL's 24 joint rotations, axis-angle in radians, relative
to the parent joint, `poses[..., 0, :]` in the camera frame (x right, y down, z away from the viewer); `pose_mask` says which
joints are known. Made by `chatpose data {summary["source"]}`.

![rows](sheet.png)
"""


def write_sheet(output: Path, records: list[PartRecord], seed: int, body: BodyModel) -> None:
    """
    `sheet.png`: 16 random rows, each by its picture or its bodies, or both, over what was asked.

    Args:
        output (`Path`): the folder of rows.
        records (`list[PartRecord]`): its parts.
        seed (`int`): of the choice.
        body ([`BodyModel`]): whose shape.
    """
    ends = list(accumulate(record.rows for record in records))
    chosen = sorted(random.Random(seed).sample(range(ends[-1]), min(_SHEET_ROWS, ends[-1])))
    pictures, texts = [], []
    for number in chosen:
        index = bisect_right(ends, number)
        record = records[index]
        row = _read_row(_part_path(output, record.part), number - ends[index] + record.rows)
        pictures.append(_draw_row(row, body))
        texts.append(" ".join(part["text"] for part in row["messages"][0]["content"] if part["text"]))
    sheet = contact_sheet(pictures, texts, max_lines=8)
    with atomic_file(output / "sheet.png") as path:
        sheet.save(path, "PNG")


def _read_row(path: Path, number: int) -> dict:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if number < size:
            return FEATURES.decode_example(file.read_row_group(group).slice(number, 1).to_pylist()[0])
        number -= size
    raise ValueError(f"expected row {number} in {path}, got fewer")


def _draw_row(row: dict, body: BodyModel) -> Image.Image:
    parts = [image.convert("RGB") for image in row["images"][:1]]
    known = [pose for pose, mask in zip(row["poses"], row["pose_mask"], strict=True) if any(mask)]
    if known:
        vertices = body.vertices(torch.tensor(known))
        parts += [
            render_bodies(pose_vertices, body.faces, size=256, view="three_quarter", background=_SHEET_BACKGROUND)
            for pose_vertices in vertices[:4]
        ]
    if not parts:
        return Image.new("RGB", (256, 256), _SHEET_BACKGROUND)
    return contact_sheet(parts, columns=2 if len(parts) > 1 else 1) if len(parts) > 1 else parts[0]
