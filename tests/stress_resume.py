"""Twenty kills at random moments, and nothing is lost: `python -m pytest -m slow -s tests/stress_resume.py` (four minutes)."""

import random
import time

import pytest
from test_training import assert_same_run, desk, settings, start, wait_for  # noqa: F401 - `desk` is a fixture

from chatpose_hf.checkpoints import find_fault, list_checkpoints
from chatpose_hf.training import train


KILLS = 20
# A checkpoint after every second step, so that many kills meet one that is being written.
STEPS = (
    "--max_steps 400 --per_device_train_batch_size 2 --logging_steps 3 --save_strategy steps --save_steps 2 "
    "--save_total_limit 2 --eval_strategy steps --eval_steps 50 --learning_rate 0.003"
)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(desk, tmp_path):  # noqa: F811
    draw = random.Random(0)
    arguments = [*settings(desk, tmp_path / "whole", STEPS), "--eval_data", str(desk / "rows")]
    assert train(arguments) == 0
    output = tmp_path / "killed"
    while_saving = told = 0
    for kill in range(KILLS):
        process = start(desk, output, f"{STEPS} --resume")
        wait_for(process, "'ce_loss'")
        time.sleep(draw.uniform(0, 0.8))
        is_told = draw.random() < 0.25
        (process.terminate if is_told else process.kill)()
        process.communicate(timeout=100)
        assert process.returncode == (143 if is_told else -9)
        told += is_told
        while_saving += (output / ".saving").exists()
        checkpoints = list_checkpoints(output)
        assert not is_told or find_fault(checkpoints[0]) is None
        assert all(find_fault(folder) is None for folder in checkpoints)
        step = checkpoints[0].name if checkpoints else "none"
        print(f"kill {kill + 1}: {'SIGTERM' if is_told else 'SIGKILL'}, last checkpoint {step}")
    process = start(desk, output, f"{STEPS} --resume")
    rest = process.communicate(timeout=600)[0]
    assert process.returncode == 0, rest[-3000:]
    print(f"{KILLS} kills, {told} by SIGTERM, {while_saving} while a checkpoint was written")
    assert_same_run(output, tmp_path / "whole", last="checkpoint-400")
