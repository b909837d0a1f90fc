"""Checkpoints of a training: whole or not there, and known to be whole before anything goes on from them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from .atomic_write import write_atomically


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
_STAGING = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")


class SealedCheckpoints:
    """
    Of a [`~transformers.Trainer`], named before it among the bases: all of a checkpoint or none. It is written aside,
    sealed, then named; those before it stay until then. What is saved holds no pickle of the settings.
    """

    _is_staging = False

    def checkpoint_record(self) -> dict[str, str]:
        """Texts to keep in a checkpoint, by file name. Every process is asked, before anything is written."""
        return {}

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle that nothing reads.
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / _STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = output_dir / _STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        record = self.checkpoint_record()
        try:
            self._is_staging = True
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"cannot write {output_dir / name}: {error}. Nothing of it was kept, and the checkpoints before it are "
                "whole; make room and go on from the last one"
            ) from error
        finally:
            self._is_staging = False
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            # Not where it is now, and on every process: each loads the best model from there.
            self.state.best_model_checkpoint = str(output_dir / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            for file, text in record.items():
                (staging / name / file).write_text(text, encoding="utf-8")
            seal(staging / name, name)
            staging.rmdir()
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a training, the latest first; whole or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The latest whole checkpoint. Those after it, which are damaged, are named in a warning and moved out of the way, to
    `damaged-checkpoint-N`.
    """
    for folder in list_checkpoints(output_dir):
        fault = find_fault(folder)
        if fault is None:
            return folder
        logger.warning(f"{folder} is damaged ({fault}); going on from the checkpoint before it, if there is one")
        shutil.rmtree(aside := folder.with_name(f"damaged-{folder.name}"), ignore_errors=True)
        folder.rename(aside)
    return None


def find_fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint: a file that its manifest lists is missing or has other bytes. None if whole."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"] or _digest(path) != wanted["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"it cannot be read: {error}"
    return None


def seal(folder: str | Path, name: str) -> Path:
    """
    Writes the manifest of a finished checkpoint, brings all of it to the disk, and only then gives it its name beside
    the folder's parent.

    Args:
        folder (`str` or `Path`): what was written, in a folder of its own.
        name (`str`): such as `"checkpoint-500"`; one of this name is replaced.

    Returns:
        `Path`: the checkpoint.
    """
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(_walk(folder))
        if path != folder / MANIFEST
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())
    for path in _walk(folder):
        _sync(path)
    final = folder.parent.parent / name
    old = final.with_name(f".old-{name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        os.replace(folder, final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
