"""The examples that train, and the settings in examples/configs."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from make_rows import make_rows, write_splits

from chatpose_hf.adapters import load_trained
from chatpose_hf.training import parse_arguments


EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_taken_as_written(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = f"chatpose_hf.cli train examples/configs/{path.name}", f"chatpose train examples/configs/{path.name}"
    assert any(line in path.read_text(encoding="utf-8") for line in command)
    zero = settings.pop("deepspeed", None)
    if zero:  # transformers takes it only where deepspeed is installed
        assert json.loads((ROOT / zero).read_text())["zero_optimization"]["stage"] in (2, 3)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**settings, "use_cpu": True, "report_to": "none"}, sort_keys=False))
    parsed = parse_arguments([str(file)])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in settings.items():
        if name == "train_data" and isinstance(value, dict):
            value = [f"{key}={weight}" for key, weight in value.items()]
        if name in ("train_data", "eval_data") and isinstance(value, str):
            value = [value]
        if name not in ("fsdp", "fsdp_config", "report_to"):
            assert values[name] == value, name


def test_scripts_are_short():
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 100, script


def test_a_base_from_nothing_is_fine_tuned_and_answers(tmp_path):
    rows = write_splits(tmp_path / "rows", make_rows(), make_rows(7))
    assert "weights; wrote" in run("make_base.py", tmp_path / "base", "--rows", rows)
    base, _ = load_trained(tmp_path / "base")
    assert base.num_parameters() > 1e6
    out = run("finetune_lora.py", tmp_path / "base", rows, tmp_path / "out", "--steps", "4")
    assert "eval_mpjpe_mm" in out
    assert "<POSE>" in out.splitlines()[-1]
    assert "torch.Size([72])" in out.splitlines()[-1]
    assert (tmp_path / "out" / "merged" / "modeling_chatpose.py").is_file()
