"""`chatpose train --fsdp` on two CPU processes: really sharded, and the same training as in one process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_training import (  # noqa: F401 - the first two are fixtures
    ONE_STEP,
    PLAIN,
    assert_same_step,
    desk,
    history,
    run_in_processes,
    settings,
    whole_batch,
)
from torch.distributed.checkpoint import FileSystemReader

from chatpose_hf.adapters import load_trained
from chatpose_hf.checkpoints import find_fault
from chatpose_hf.training import train


FSDP = json.dumps(
    {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """Flags without blanks in them."""
    file = tmp_path_factory.mktemp("fsdp") / "fsdp.json"
    file.write_text(FSDP)
    return f"--fsdp --fsdp_config {file}"


def test_two_shards_give_the_gradient_of_one_process(desk, whole_batch, fsdp, tmp_path):  # noqa: F811
    """With one row each, one of the two has no pose, or no picture, in most steps."""
    text = f"{ONE_STEP} {fsdp} --per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    run = run_in_processes(desk, tmp_path / "out", text, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_step(tmp_path / "out", whole_batch)
    load_trained(tmp_path / "out")


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_another_number_of_processes(desk, fsdp, tmp_path):  # noqa: F811
    text = (
        f"--method full --max_steps 4 --learning_rate 0.01 {PLAIN} --eval_data {desk / 'rows'} --eval_strategy steps "
        f"--eval_steps 4 --per_device_eval_batch_size 2 --save_strategy steps --save_steps 2"
    )
    assert train(settings(desk, tmp_path / "one", f"{text} --per_device_train_batch_size 8")) == 0
    # `--multi_gpu` is how accelerate starts several processes with torch's own means; for the CPU alone it wants MPI.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launcher.split(), *["--dynamo_backend", "no", "--main_process_port", "0"], "-m"]
    command += [
        "chatpose_hf.cli",
        "train",
        *settings(desk, tmp_path / "two", f"{text} {fsdp} --per_device_train_batch_size 4"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]

    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert find_fault(checkpoint) is None
    shards = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert len(shards) >= len(whole)
    for name, shard in shards.items():
        assert len(shard.chunks) == 2, name
        assert shard.chunks[0].sizes[0] == (shard.size[0] + 1) // 2, name

    # On one process, which has all rows of a step.
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    text = text.replace("--method", "--resume --method")
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "chatpose_hf.cli",
        "train",
    ]
    again = settings(desk, tmp_path / "again", f"{text} {fsdp} --per_device_train_batch_size 8")
    run = subprocess.run([sys.executable, *launcher, *again], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "going on from" in run.stdout

    for output in ("two", "again"):
        for got, want in zip(history(tmp_path / output), history(tmp_path / "one"), strict=True):
            assert got == pytest.approx(want, rel=1e-4)
        weights = load_file(tmp_path / output / "model.safetensors")
        assert weights.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))
