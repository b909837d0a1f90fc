"""From a data set as downloaded to a folder of rows: parts, limits, several processes, and going on after a stop."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import load_dataset
from filelock import FileLock
from PIL import Image

from chatpose_hf.body import BodyModel
from chatpose_hf.cli import main
from chatpose_hf.data import SOURCES, find_source, prepare
from chatpose_hf.data.rows import load_rows, validate_row
from chatpose_hf.data.source import Source, inside, load_json, load_jsonl
from chatpose_hf.data.synthetic import decimate


SMALL = decimate(BodyModel.load("default"))  # for sheets that are drawn quickly


def prepare_rows(source, output, **options):
    return prepare.prepare_rows(source, output, body=SMALL, **options)


class Numbers(Source):
    """A text file a part, `split_name.txt`, with a number on each line: a pose of that number, "skip", "nan" or "twice"."""

    name = "numbers"
    licence = "CC0"

    def parts(self):
        return sorted(path.stem.replace("_", "/") for path in self.folder.glob("*.txt"))

    def read_part(self, part):
        path = self.folder / f"{part.replace('/', '_')}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").split()):
            if line == "skip":
                self.skip("no body pose", f"{part}:{number}")
            elif line == "absent":
                self.skip("missing image", f"{part}:{number}")
            else:
                pose = np.full((24, 3), float(line if line != "twice" else 0), dtype=np.float32)
                id = f"{part}:{number if line != 'twice' else 0}"
                yield self.make_row(id, "text_to_pose", [pose], [("human", f"Number {line}.")])


def write_parts(folder, **parts):
    folder.mkdir(exist_ok=True)
    for name, lines in parts.items():
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def numbers(tmp_path):
    lines = {f"train_{n}": " ".join(str(n * 10 + k) for k in range(5)) for n in range(4)}
    return write_parts(tmp_path / "in", val_0="7 skip nan twice skip", **lines)


def values(output, split="train"):
    return [row["poses"][0][0][0] for row in load_rows(output, split)]


EVERYTHING = [float(n * 10 + k) for n in range(4) for k in range(5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_when_run_then_writes_every_row_once_and_says_what_was_left_out(tmp_path, numbers, workers):
    records = prepare_rows(Numbers(numbers), tmp_path / "out", workers=workers)
    assert values(tmp_path / "out") == EVERYTHING
    assert values(tmp_path / "out", "val") == [7.0]
    assert sum(record.rows for record in records) == 21
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["splits"]["train"] == {"rows": 20, "poses": 20, "tasks": {"text_to_pose": 20}}
    assert summary["skipped"] == {
        "no body pose": {"count": 2, "examples": ["val/0:1", "val/0:4"]},
        "`poses`: expected finite numbers": {"count": 1, "examples": ["val/0:2"]},
        "`id`: came before": {"count": 1, "examples": ["val/0:0"]},
    }
    assert summary["errors"] == {}
    for row in load_rows(tmp_path / "out"):
        validate_row(row)


def test_prepare_when_run_then_the_folder_loads_as_any_data_set_does(tmp_path, numbers):
    prepare_rows(Numbers(numbers), tmp_path / "out")
    loaded = load_dataset(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 20, "val": 1}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "path: train/*.parquet" in card
    assert "CC0" in card


def test_prepare_when_run_then_the_sheet_shows_sixteen_rows(tmp_path, numbers):
    prepare_rows(Numbers(numbers), tmp_path / "out")
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"), dtype=int)
    tile = pixels.shape[1] // 4
    # Poses that differ give tiles that differ, and each has a body in it.
    assert all(pixels[:200, n * tile : (n + 1) * tile].std() > 10 for n in range(4))
    assert pixels.shape[0] > 4 * tile


@pytest.mark.parametrize(("limit", "workers"), [(1, 1), (5, 1), (7, 1), (100, 1), (7, 2)])
def test_prepare_when_limited_then_writes_the_first_rows(tmp_path, numbers, limit, workers):
    records = prepare_rows(Numbers(numbers), tmp_path / "out", limit=limit, workers=workers)
    assert values(tmp_path / "out") == EVERYTHING[:limit]
    assert sum(record.rows for record in records) == min(limit, 21)


def test_prepare_when_the_limit_is_raised_then_the_rest_comes(tmp_path, numbers):
    prepare_rows(Numbers(numbers), tmp_path / "out", limit=7)
    prepare_rows(Numbers(numbers), tmp_path / "out", limit=12)
    assert values(tmp_path / "out") == EVERYTHING[:12]
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert values(tmp_path / "out") == EVERYTHING


def test_prepare_when_run_again_then_reads_nothing_twice(tmp_path, numbers):
    prepare_rows(Numbers(numbers), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.parquet")}
    os.truncate(numbers / "train_1.txt", 0)  # would give no rows if it were read
    records = prepare_rows(Numbers(numbers), tmp_path / "out")
    assert sum(record.rows for record in records) == 21
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.parquet")} == before


def test_prepare_when_a_run_was_killed_then_goes_on(tmp_path, numbers):
    class Killed(Numbers):
        def read_part(self, part):
            for row in super().read_part(part):
                if row["id"] == "train/2:3":
                    raise KeyboardInterrupt
                yield row

    with pytest.raises(KeyboardInterrupt):
        prepare_rows(Killed(numbers), tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert written == ["0.parquet", "1.parquet"]
    with open(tmp_path / "out" / "parts.jsonl", "ab") as file:
        file.write(b'{"part": "train/2", "tas')  # as a kill may leave it
    os.truncate(numbers / "train_0.txt", 0)
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert values(tmp_path / "out") == EVERYTHING
    os.truncate(numbers / "train_2.txt", 0)
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert values(tmp_path / "out") == EVERYTHING


def test_prepare_when_files_were_missing_then_the_next_run_looks_again(tmp_path, numbers):
    write_parts(numbers, train_0="0 absent 2")
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert len(values(tmp_path / "out")) == 17
    write_parts(numbers, train_0="0 1 2")
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert values(tmp_path / "out")[:3] == [0.0, 1.0, 2.0]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"].keys() >= {"no body pose"}
    assert "missing image" not in (tmp_path / "out" / "summary.json").read_text()


def test_prepare_when_a_part_cannot_be_read_then_the_others_are_and_the_next_run_tries_again(tmp_path, numbers):
    write_parts(numbers, train_1="10 eleven")
    records = prepare_rows(Numbers(numbers), tmp_path / "out")
    assert [record.part for record in records if record.error] == ["train/1"]
    assert values(tmp_path / "out") == EVERYTHING[:5] + EVERYTHING[10:]
    assert "eleven" in json.loads((tmp_path / "out" / "summary.json").read_text())["errors"]["train/1"]
    write_parts(numbers, train_1="10 11 12 13 14")
    prepare_rows(Numbers(numbers), tmp_path / "out")
    assert values(tmp_path / "out") == EVERYTHING


def test_prepare_when_the_folder_holds_other_rows_then_refuses_and_leaves_them(tmp_path, numbers):
    prepare_rows(Numbers(numbers), tmp_path / "out")
    with pytest.raises(ValueError, match="name another folder"):
        prepare_rows(Numbers(numbers, seed=1), tmp_path / "out")
    assert values(tmp_path / "out") == EVERYTHING
    foreign = tmp_path / "foreign" / "train"
    foreign.mkdir(parents=True)
    (foreign / "x.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="Parquet files that are not of ours"):
        prepare_rows(Numbers(numbers), tmp_path / "foreign")
    assert (foreign / "x.parquet").read_bytes() == b"mine"


def test_prepare_when_another_run_writes_there_then_says_so(tmp_path, numbers):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        prepare_rows(Numbers(numbers), tmp_path / "out")


@pytest.mark.parametrize("options", [{"limit": 0}, {"workers": 0}])
def test_prepare_when_numbers_are_wrong_then_says_so(tmp_path, numbers, options):
    with pytest.raises(ValueError, match="at least 1 worker"):
        prepare_rows(Numbers(numbers), tmp_path / "out", **options)


def test_source_when_the_folder_is_none_then_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder of numbers"):
        Numbers(tmp_path / "nowhere")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_a_reader_with_a_name_and_a_licence(name):
    cls = find_source(name)
    assert issubclass(cls, Source)
    assert cls.name == name
    assert cls.licence


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\0b", None, "..\\x"])
def test_inside_when_a_name_leads_out_then_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a file name|refused the path"):
        inside(tmp_path, name)


def test_inside_when_a_name_is_plain_then_is_under_the_folder(tmp_path):
    assert inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"a": ', b"[" * 100_000])
def test_json_when_it_is_damaged_then_the_file_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_json(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_jsonl(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_json(tmp_path / "nowhere.json")


def test_command_when_the_input_is_absent_then_exits_with_1_and_writes_nothing(tmp_path, capsys):
    assert main(["data", "cmu", "--input", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "expected the folder of cmu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_when_the_source_is_unknown_then_lists_the_known(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "coco", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "posescript" in capsys.readouterr().err


def test_command_when_an_option_is_not_the_sources_then_says_so(tmp_path, capsys):
    arguments = ["data", "cmu", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--image-size", "64"]) == 1
    assert "expected no `--image-size` for cmu" in capsys.readouterr().err
    assert main([*arguments, "--endpoint-model", "x"]) == 1
    assert "`--endpoint` and `--endpoint-model` together" in capsys.readouterr().err


def test_command_when_datasets_is_not_installed_then_names_the_extra(tmp_path):
    code = "import sys; sys.modules['datasets'] = None; from chatpose_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["data", "cmu", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install 'chatpose_hf[data]'" in run.stderr
