"""Work in batches that is kept: order, what a stop leaves, how many processes there were, what is refused."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from chatpose_hf import batch_log
from chatpose_hf.batch_log import check_settings, map_batches


SETTINGS = {"model": "tiny", "sizes": (1, 2)}


def make_state(index=0, count=1):
    return SimpleNamespace(
        is_main_process=index == 0, process_index=index, num_processes=count, wait_for_everyone=lambda: None
    )


def make_batches(count=11, size=3):
    """Items in no order, the last batch smaller."""
    items = [item * 7 % count for item in range(count)]
    return [items[start : start + size] for start in range(0, count, size)]


class Work:
    """Says what it was asked, and stops at will."""

    def __init__(self, fails_at=None):
        self.asked = []
        self.fails_at = fails_at

    def __call__(self, items):
        if len(self.asked) == self.fails_at:
            raise RuntimeError("no memory")
        self.asked.append(list(items))
        return [{"item": item, "text": f"é\u2028\r\n{item}"} for item in items]


def run(folder, work=None, batches=None, settings=SETTINGS, state=None):
    batches = make_batches() if batches is None else batches
    return map_batches(work or Work(), batches, folder, settings, state or make_state(), "item")


WANTED = {item: {"item": item, "text": f"é\u2028\r\n{item}"} for item in range(11)}


def lines_of(folder, process=0):
    return (folder / f"process-{process}.jsonl").read_bytes().splitlines(keepends=True)


# -- one process --


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 20])
def test_each_item_has_its_record(tmp_path, size):
    batches = make_batches(size=size)
    work = Work()
    assert run(tmp_path / "a" / "b", work, batches) == WANTED
    assert work.asked == batches
    again = Work()
    assert run(tmp_path / "a" / "b", again, batches) == WANTED
    assert again.asked == []
    assert len(lines_of(tmp_path / "a" / "b")) == len(batches)


def test_nothing_to_do_is_no_fault(tmp_path):
    assert run(tmp_path, batches=[]) == {}


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_run_that_stopped_goes_on_with_what_is_missing(tmp_path, fails_at):
    batches = make_batches()
    with pytest.raises(RuntimeError, match="no memory"):
        run(tmp_path, Work(fails_at))
    # what was done is in the file, whatever happens to the process
    assert [json.loads(line)["batch"] for line in lines_of(tmp_path)] == list(range(fails_at))
    work = Work()
    assert run(tmp_path, work) == WANTED
    assert work.asked == batches[fails_at:]


def test_each_batch_is_in_the_file_when_the_next_begins(tmp_path):
    counts = []
    work = Work()
    run(tmp_path, lambda items: counts.append(len(lines_of(tmp_path))) or work(items))
    assert counts == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", [1, 2, 30, None])
def test_a_torn_last_line_is_done_again(tmp_path, cut):
    batches = make_batches()
    run(tmp_path)
    path = tmp_path / "process-0.jsonl"
    lines = lines_of(tmp_path)
    # `None`: all of the line but its end, which alone says that it is whole
    path.write_bytes(b"".join(lines[:2]) + lines[2][: -1 if cut is None else cut])
    work = Work()
    assert run(tmp_path, work) == WANTED
    assert work.asked == batches[2:]
    assert lines_of(tmp_path) == lines


def test_floats_are_the_same_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, math.pi, math.inf, -math.inf, math.nan]
    values += [struct.unpack("f", struct.pack("f", value))[0] for value in (0.1, 1e-40, math.pi)]
    wanted = [struct.pack("d", value) for value in values]
    for work in (lambda items: [{"values": values} for _ in items], Work()):  # made, then only read
        records = run(tmp_path, work, [[0], [1]])
        for item in (0, 1):
            assert [struct.pack("d", value) for value in records[item]["values"]] == wanted


def test_what_json_changes_is_the_same_before_and_after_a_stop(tmp_path):
    first = run(tmp_path, lambda items: [{"pair": (1, 2), 3: item} for item in items])
    assert first == run(tmp_path)
    assert first[4] == {"pair": [1, 2], "3": 4}


# -- settings --


def test_other_settings_are_refused_and_nothing_is_changed(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, Work(2))
    with open(tmp_path / "process-0.jsonl", "ab") as file:
        file.write(b'{"batch": 2, "rec')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    work = Work()
    with pytest.raises(
        ValueError,
        match=r"made with other settings: model 'tiny' and now 'big', seed None and now 1; name another folder",
    ):
        run(tmp_path, work, settings={**SETTINGS, "model": "big", "seed": 1})
    with pytest.raises(ValueError, match=r"other settings: sizes \[1, 2\] and now None; name another folder"):
        run(tmp_path, work, settings={"model": "tiny"})
    assert work.asked == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(tmp_path, work) == WANTED


@pytest.mark.parametrize("left", [None, b"", b'{"batch": 0, "rec'])
def test_other_settings_are_taken_when_there_are_no_records_yet(tmp_path, left):
    check_settings(tmp_path / "settings.json", SETTINGS, has_answers=False)
    if left is not None:
        (tmp_path / "process-0.jsonl").write_bytes(left)
    assert run(tmp_path, settings={"model": "big"}) == WANTED
    assert json.loads((tmp_path / "settings.json").read_text()) == {"model": "big"}
    with pytest.raises(ValueError, match="model 'big' and now 'tiny'"):
        run(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"7", b"\xff", b'{"model": '])
def test_records_when_nobody_knows_their_settings_then_they_are_refused(tmp_path, content):
    run(tmp_path)
    (tmp_path / "settings.json").unlink()
    if content is not None:
        (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds answers, but its settings\.json, .*cannot be read.*another folder"):
        run(tmp_path)


# -- what is not ours --


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"hello", "no batch of ours"),
        (b"", "no batch of ours"),
        (b"\xff", "no batch of ours"),
        (b"[1]", "no batch of ours"),
        (b'{"batch": 1}', "no batch of ours"),
        (b'{"batch": "1", "records": []}', "no batch of ours"),
        (b'{"batch": 4, "records": [{}]}', "no batch of ours"),
        (b'{"batch": 1, "records": null}', "no batch of ours"),
        (b'{"batch": 1, "records": [{}, {}]}', "a batch of another size"),
        (b'{"batch": 3, "records": [{}, {}, {}]}', "a batch of another size"),
    ],
)
def test_a_foreign_line_is_refused_by_name(tmp_path, line, match):
    with pytest.raises(RuntimeError):
        run(tmp_path, Work(1))
    with open(tmp_path / "process-0.jsonl", "ab") as file:
        file.write(line + b"\n")
    before = (tmp_path / "process-0.jsonl").read_bytes()
    work = Work()
    with pytest.raises(ValueError, match=rf"line 2 of .*process-0\.jsonl is {match}; name another folder"):
        run(tmp_path, work)
    assert work.asked == []
    assert (tmp_path / "process-0.jsonl").read_bytes() == before


# -- several processes --


def run_in_threads(folder, works, batches=None):
    """As many processes as works. What each got, or why it stopped."""
    barrier = threading.Barrier(len(works), timeout=20)
    results = [None] * len(works)

    def run_one(index):
        state = make_state(index, len(works))
        state.wait_for_everyone = barrier.wait
        try:
            results[index] = run(folder, works[index], batches, state=state)
        except (Exception, threading.BrokenBarrierError) as error:
            results[index] = error
            barrier.abort()  # as a launcher ends the others

    threads = [threading.Thread(target=run_one, args=(index,), name=f"process {index}") for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def asked_in_all(works):
    return sorted(items for work in works for items in work.asked)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_the_batches_and_all_have_all_records(tmp_path, count):
    batches = make_batches()
    works = [Work() for _ in range(count)]
    assert run_in_threads(tmp_path, works) == [WANTED] * count
    assert [work.asked for work in works] == [batches[index::count] for index in range(count)]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2), (2, 5)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    batches = make_batches(40, 3)
    wanted = run(tmp_path / "whole", batches=batches)
    stopped = [Work(fails_at=2 + index) for index in range(before)]
    errors = run_in_threads(tmp_path / "cut", stopped, batches)
    assert all(isinstance(error, Exception) for error in errors)
    works = [Work() for _ in range(after)]
    assert run_in_threads(tmp_path / "cut", works, batches) == [wanted] * after
    assert asked_in_all([*stopped, *works]) == sorted(batches)
    assert max(len(work.asked) for work in works) - min(len(work.asked) for work in works) <= 1


def test_processes_when_one_alone_was_slow_then_all_take_from_what_it_left(tmp_path):
    batches = make_batches()
    run(tmp_path)
    (tmp_path / "process-0.jsonl").write_bytes(b"".join(lines_of(tmp_path)[::2]))
    works = [Work(), Work()]
    assert run_in_threads(tmp_path, works) == [WANTED, WANTED]
    assert [work.asked for work in works] == [[batches[1]], [batches[3]]]


def test_what_a_former_larger_group_left_is_read_and_its_torn_line_done_again(tmp_path):
    batches = make_batches()
    run_in_threads(tmp_path, [Work(), Work(), Work()])
    with open(tmp_path / "process-2.jsonl", "r+b") as file:
        file.truncate(10)
    work = Work()
    assert run(tmp_path, work) == WANTED
    assert work.asked == [batches[2]]
    assert (tmp_path / "process-2.jsonl").read_bytes() == b""
    with pytest.raises(ValueError, match="model 'tiny' and now 'big'"):
        run(tmp_path, settings={"model": "big"})


def slow(monkeypatch, name, thread):
    """That function of the module takes a while in that thread."""
    function = getattr(batch_log, name)

    def wait_first(*args):
        if threading.current_thread().name == thread:
            time.sleep(0.2)
        return function(*args)

    monkeypatch.setattr(batch_log, name, wait_first)


def test_a_process_when_it_reads_late_then_it_sees_no_batch_of_this_run(tmp_path, monkeypatch):
    slow(monkeypatch, "_load_records", "process 1")
    works = [Work(), Work()]
    assert run_in_threads(tmp_path, works) == [WANTED, WANTED]
    assert asked_in_all(works) == sorted(make_batches())


def test_a_process_when_the_main_one_tidies_late_then_it_waits(tmp_path, monkeypatch):
    run(tmp_path)
    with open(tmp_path / "process-0.jsonl", "ab") as file:
        file.write(b'{"batch": 1, "rec')
    slow(monkeypatch, "check_settings", "process 0")
    assert run_in_threads(tmp_path, [Work(), Work()]) == [WANTED, WANTED]


def test_a_process_when_another_works_longer_then_it_waits_for_its_records(tmp_path):
    work = Work()
    works = [Work(), lambda items: time.sleep(0.1) or work(items)]
    assert run_in_threads(tmp_path, works) == [WANTED, WANTED]


SCRIPT = """
import math, os, sys, time
from pathlib import Path

from accelerate import PartialState

from chatpose_hf import batch_log
from chatpose_hf.batch_log import map_batches

state = PartialState(cpu=True)
assert state.num_processes == 2
folder = Path(sys.argv[1])
(folder.parent / f"pid-{state.process_index}").write_text(str(os.getpid()))


def work(items):
    time.sleep(0.05)
    return [{"value": math.sin(item)} for item in items]


batches = [list(range(start, start + 4)) for start in range(0, 800, 4)]
map_batches(work, batches, folder, {"model": "tiny"}, state, "item")
"""


def test_two_processes_when_they_are_killed_then_one_goes_on_to_the_same_records(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "log"
    paths = [folder / f"process-{index}.jsonl" for index in range(2)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(tmp_path / "output", "wb") as output:
        launched = subprocess.Popen(
            [*launcher, str(tmp_path / "script.py"), str(folder)], stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and launched.poll() is None:
        if all(path.is_file() and path.read_bytes().count(b"\n") >= 2 for path in paths):
            break
        time.sleep(0.01)
    # By their own numbers: the launcher puts them into sessions of their own.
    workers = [int(path.read_text()) for path in tmp_path.glob("pid-*")] if launched.poll() is None else []
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    launched.kill()
    launched.wait()
    assert len(workers) == 2, (tmp_path / "output").read_text()

    batches = [list(range(start, start + 4)) for start in range(0, 800, 4)]
    done = {json.loads(line)["batch"] for path in paths for line in path.read_bytes().split(b"\n")[:-1]}
    assert 4 <= len(done) < 200, "the test must stop the run in its middle"
    asked = []

    def work(items):
        asked.append(items)
        return [{"value": math.sin(item)} for item in items]

    records = map_batches(work, batches, folder, {"model": "tiny"}, make_state(), "item")
    assert records == {item: {"value": math.sin(item)} for item in range(800)}
    assert asked == [batch for number, batch in enumerate(batches) if number not in done]
