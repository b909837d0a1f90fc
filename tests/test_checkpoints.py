"""Checkpoints: whole under their name or not there; a damaged one is found, named and passed over."""

import hashlib
import json
import logging
import os
import re
import shutil

import pytest

from chatpose_hf import checkpoints
from chatpose_hf.checkpoints import MANIFEST, find_fault, find_last_checkpoint, list_checkpoints, seal


FILES = {"weights.bin": b"\x00\x01\x02\x03" * 300, "state.json": b"{}", "rng/0.pt": b"a", "rng/deep/1.pt": b"bc"}


def write_unsealed(output_dir, files=FILES):
    """As the trainer leaves a checkpoint before it has its name: in a folder of a folder."""
    folder = output_dir / ".unsealed" / "checkpoint"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make_checkpoint(output_dir, step, files=FILES):
    return seal(write_unsealed(output_dir, files), f"checkpoint-{step}")


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- seal --


def test_seal_when_it_is_done_then_the_manifest_lists_every_file(tmp_path):
    sealed = make_checkpoint(tmp_path, 500)
    assert sealed == tmp_path / "checkpoint-500"
    files = read_files(sealed)
    manifest = json.loads(files.pop(MANIFEST))
    assert files == FILES
    assert manifest == {
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in FILES.items()
        }
    }
    assert find_fault(sealed) is None
    assert not (tmp_path / ".unsealed" / "checkpoint").exists()


def test_seal_when_it_is_at_work_then_no_folder_has_the_name_before_all_is_on_the_disk(tmp_path, monkeypatch):
    folder = write_unsealed(tmp_path)
    synced, sync = [], checkpoints._sync

    def watch(path):
        # Everything but the folder's own name is settled before there is a checkpoint.
        assert (tmp_path / "checkpoint-7").exists() == (path == tmp_path)
        synced.append(path)
        sync(path)

    monkeypatch.setattr(checkpoints, "_sync", watch)
    seal(folder, "checkpoint-7")
    assert set(synced) == {folder / name for name in (*FILES, MANIFEST)} | {tmp_path}
    assert synced[-1] == tmp_path


def test_seal_when_one_of_the_name_is_there_then_it_is_replaced_whole(tmp_path):
    make_checkpoint(tmp_path, 3, {**FILES, "old.bin": b"old"})
    sealed = make_checkpoint(tmp_path, 3)
    assert read_files(sealed).keys() == {*FILES, MANIFEST}
    assert find_fault(sealed) is None


def test_seal_when_it_is_done_twice_to_a_folder_then_the_manifest_is_of_the_second(tmp_path):
    """A save that was cut off after the manifest begins again in the same folder."""
    folder = write_unsealed(tmp_path)
    (folder / MANIFEST).write_text("from before")
    assert find_fault(seal(folder, "checkpoint-1")) is None


def test_seal_when_a_nested_file_is_called_as_the_manifest_then_it_is_listed_too(tmp_path):
    sealed = make_checkpoint(tmp_path, 1, {"state.json": b"{}", "shards/manifest.json": b"theirs"})
    (sealed / "shards" / "manifest.json").unlink()
    assert find_fault(sealed) == "shards/manifest.json is missing"


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["manifest", "sync", "rename"])
def test_seal_when_it_is_killed_then_no_checkpoint_of_the_name_is_there(tmp_path, monkeypatch, moment):
    make_checkpoint(tmp_path, 1)
    folder = write_unsealed(tmp_path)
    kill_at(monkeypatch, moment)
    with pytest.raises(KilledError):
        seal(folder, "checkpoint-2")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-2").exists()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert find_fault(seal(folder, "checkpoint-2")) is None  # and what was written can still be sealed


@pytest.mark.parametrize("moment", ["manifest", "sync", "rename"])
def test_seal_when_it_is_killed_then_the_old_checkpoint_of_the_name_is_intact(tmp_path, monkeypatch, moment):
    old = make_checkpoint(tmp_path, 2, {"old.bin": b"old"})
    folder = write_unsealed(tmp_path)
    kill_at(monkeypatch, moment)
    with pytest.raises(KilledError):
        seal(folder, "checkpoint-2")
    monkeypatch.undo()
    assert find_last_checkpoint(tmp_path) == old
    assert read_files(old).keys() == {"old.bin", MANIFEST}


def kill_at(monkeypatch, moment):
    def killed(*args):
        raise KilledError

    if moment == "manifest":
        monkeypatch.setattr(checkpoints, "write_atomically", killed)
    elif moment == "sync":
        monkeypatch.setattr(checkpoints, "_sync", killed)
    else:
        replace = os.replace
        # The manifest's own replacing of its temporary file goes through.
        monkeypatch.setattr(os, "replace", lambda old, new: killed() if os.path.isdir(old) else replace(old, new))


# -- find_fault --


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


FAULTS = {
    "missing file": (lambda c: (c / "state.json").unlink(), r"state\.json is missing"),
    "missing nested file": (lambda c: (c / "rng/deep/1.pt").unlink(), r"rng/deep/1\.pt is missing"),
    "missing folder": (lambda c: shutil.rmtree(c / "rng"), r"rng/0\.pt is missing"),
    "folder for a file": (
        lambda c: [(c / "state.json").unlink(), (c / "state.json").mkdir()],
        r"state\.json is missing",
    ),
    "truncated": (lambda c: os.truncate(c / "weights.bin", 1199), r"weights\.bin is not as it was written"),
    "emptied": (lambda c: os.truncate(c / "rng/0.pt", 0), r"rng/0\.pt is not as it was written"),
    "longer": (lambda c: (c / "state.json").write_bytes(b"{}\n"), r"state\.json is not as it was written"),
    "flipped byte": (lambda c: flip_a_byte(c / "weights.bin"), r"weights\.bin is not as it was written"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), r"manifest\.json is missing"),
    "empty manifest": (lambda c: (c / MANIFEST).write_bytes(b""), "it cannot be read: "),
    "half a manifest": (lambda c: os.truncate(c / MANIFEST, 100), "it cannot be read: "),
    "manifest of bytes": (lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe\x00"), "it cannot be read: "),
    "folder for the manifest": (lambda c: [(c / MANIFEST).unlink(), (c / MANIFEST).mkdir()], "it cannot be read: "),
    **{
        f"manifest {content}": (
            lambda c, content=content: (c / MANIFEST).write_text(content),
            "it cannot be read: ",
        )
        for content in (
            "[]",
            "{}",
            "null",
            "3",
            '{"files": ["state.json"]}',
            '{"files": null}',
            '{"files": {"state.json": 2}}',
            '{"files": {"state.json": {"bytes": 2}}}',
        )
    },
}


@pytest.mark.parametrize("kind", FAULTS)
def test_find_fault_when_a_checkpoint_is_damaged_then_says_what_is_wrong(tmp_path, kind):
    damage, message = FAULTS[kind]
    sealed = make_checkpoint(tmp_path, 1)
    damage(sealed)
    fault = find_fault(sealed)
    assert fault is not None
    assert re.match(message, fault), fault


def test_find_fault_when_it_is_no_checkpoint_then_says_so(tmp_path):
    assert find_fault(tmp_path) == "manifest.json is missing"
    assert find_fault(tmp_path / "absent") == "manifest.json is missing"


def test_find_fault_when_a_file_was_added_then_is_silent(tmp_path):
    """What a user puts beside the weights harms nothing."""
    sealed = make_checkpoint(tmp_path, 1)
    (sealed / "notes.txt").write_text("best so far")
    assert find_fault(str(sealed)) is None


# -- which is the last --


@pytest.mark.parametrize("steps", [(9, 10), (100, 20, 3), (1, 1000, 250)])
def test_find_last_checkpoint_when_all_are_whole_then_gives_the_highest_step(tmp_path, caplog, steps):
    for step in steps:
        make_checkpoint(tmp_path, step)
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)] == sorted(steps, reverse=True)
    assert find_last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{max(steps)}"
    assert find_last_checkpoint(str(tmp_path)) == tmp_path / f"checkpoint-{max(steps)}"
    assert not caplog.records


def test_find_last_checkpoint_when_later_ones_are_damaged_then_falls_back_warns_and_moves_them_aside(tmp_path, caplog):
    for step in (5, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    flip_a_byte(tmp_path / "checkpoint-11" / "weights.bin")
    (tmp_path / "checkpoint-10" / "state.json").unlink()
    (tmp_path / "checkpoint-5" / MANIFEST).unlink()  # never looked at
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(caplog.records) == 2
    assert "checkpoint-11 is damaged (weights.bin is not as it was written)" in warnings[0]
    assert "checkpoint-10 is damaged (state.json is missing)" in warnings[1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".unsealed"} == {
        "checkpoint-5",
        "checkpoint-9",
        "damaged-checkpoint-10",
        "damaged-checkpoint-11",
    }
    assert (tmp_path / "damaged-checkpoint-11" / "weights.bin").is_file()
    caplog.clear()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert not caplog.records


def test_find_last_checkpoint_when_none_is_whole_then_none_is_left(tmp_path, caplog):
    for step in (1, 2):
        (make_checkpoint(tmp_path, step) / MANIFEST).unlink()
    assert find_last_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
    assert len(caplog.records) == 2


def test_find_last_checkpoint_when_one_of_its_number_was_damaged_before_then_the_later_takes_its_place(tmp_path):
    for content in (b"first", b"second"):
        sealed = make_checkpoint(tmp_path, 4, {"weights.bin": content})
        os.truncate(sealed / "weights.bin", len(content) - 1)
        assert find_last_checkpoint(tmp_path) is None
    assert (tmp_path / "damaged-checkpoint-4" / "weights.bin").read_bytes() == b"secon"


def test_find_last_checkpoint_when_other_things_have_such_names_then_leaves_them(tmp_path, caplog):
    make_checkpoint(tmp_path, 7)
    (tmp_path / "checkpoint-99").write_text("a file")
    for name in ("checkpoint-best", "checkpoint-8-old", "checkpoint-", "checkpoint--9", "my-checkpoint-12"):
        (tmp_path / name).mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-7"]
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-7"
    assert {path.name for path in tmp_path.iterdir()} == before
    assert not caplog.records


def test_find_last_checkpoint_when_there_is_none_then_gives_none(tmp_path):
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "absent") is None
    assert list_checkpoints(tmp_path / "absent") == []
