"""`chatpose train` on tiny models: the same gradients however a batch is split, the same run however it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from make_rows import make_rows, write_splits
from make_tiny_checkpoint import make_model, make_processor
from safetensors.torch import load_file

from chatpose_hf.checkpoints import list_checkpoints
from chatpose_hf.training import train


# One plain step, a thousand gradients long, so that the weights after it are the gradient; no dropout.
ONE_STEP = (
    "--max_steps 1 --optim sgd --learning_rate 1000 --lr_scheduler_type constant --max_grad_norm 0 --lora_dropout 0"
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory with a base and rows."""
    desk = tmp_path_factory.mktemp("training")
    processor = make_processor()
    make_model(processor).save_pretrained(desk / "base")
    processor.save_pretrained(desk / "base")
    write_splits(desk / "rows", make_rows(), make_rows(7))
    return desk


def settings(desk, output, text=""):
    return [
        *("--model", str(desk / "base"), "--train_data", str(desk / "rows"), "--output_dir", str(output)),
        *"--use_cpu --report_to none --lora_r 4 --logging_steps 1 --save_strategy no --disable_tqdm true".split(),
        *text.split(),
    ]


def run_in_processes(desk, output, text, processes=1, **options):
    """The command, started as a user starts it on several devices."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "chatpose_hf.cli", "train", *settings(desk, output, text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=100, **options
    )


def history(output):
    """What was logged of each step, but for the speeds."""
    logs = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in log.items() if "per_second" not in name and "runtime" not in name}
        for log in logs
        if "ce_loss" in log or "eval_loss" in log
    ]


# -- one gradient --


@pytest.fixture(scope="module")
def whole_batch(desk):
    """All eight rows in one batch: the adapter after one step, and what was logged."""
    output = desk / "whole"
    assert train(settings(desk, output, f"{ONE_STEP} --per_device_train_batch_size 8")) == 0
    return load_file(output / "adapter_model.safetensors"), history(output)


def assert_same_step(output, whole_batch):
    weights, logs = whole_batch
    got = load_file(output / "adapter_model.safetensors")
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))
    for name in ("loss", "ce_loss", "pose_loss", "pose_angle_deg", "grad_norm"):
        assert history(output)[0][name] == pytest.approx(logs[0][name], rel=1e-5)


@pytest.mark.parametrize(("rows", "accumulated"), [(1, 8), (2, 4), (4, 2)])
def test_splitting_a_batch_changes_nothing(desk, whole_batch, tmp_path, rows, accumulated):
    text = f"{ONE_STEP} --per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulated}"
    assert train(settings(desk, tmp_path / "out", text)) == 0
    assert_same_step(tmp_path / "out", whole_batch)


@pytest.mark.parametrize("rows", [1, 4])
def test_two_processes_give_the_gradient_of_one(desk, whole_batch, tmp_path, rows):
    """With one row each, one of the two has no pose, or no picture, in most steps."""
    text = f"{ONE_STEP} --per_device_train_batch_size {rows} --gradient_accumulation_steps {4 // rows}"
    run = run_in_processes(desk, tmp_path / "out", text, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_step(tmp_path / "out", whole_batch)
