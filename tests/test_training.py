"""`chatpose train` on tiny models: the same gradients however a batch is split, the same run however it is interrupted."""

import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from make_rows import make_row, make_rows, write_splits
from make_tiny_checkpoint import make_model, make_processor
from safetensors.torch import load_file

from chatpose_hf import ChatPoseForConditionalGeneration
from chatpose_hf.adapters import TuningArguments, count_parameters, load_trained, prepare_model
from chatpose_hf.body import PARENTS, BodyModel
from chatpose_hf.checkpoints import list_checkpoints
from chatpose_hf.cli import main
from chatpose_hf.collator import ChatPoseCollator, read_report
from chatpose_hf.data.mixture import Mixture, MixtureStream
from chatpose_hf.data.rows import load_rows
from chatpose_hf.pose_losses import PoseLoss
from chatpose_hf.rotations import geodesic_distance
from chatpose_hf.trainer import BadLossError, ChatPoseTrainer, ChatPoseTrainingArguments, EpochSampler
from chatpose_hf.training import _Endless, _load_model, describe_settings, parse_arguments, train


PLAIN = "--optim sgd --lr_scheduler_type constant --max_grad_norm 0 --lora_dropout 0"
# One step, a thousand gradients long, so that the weights after it are the gradient.
ONE_STEP = f"--max_steps 1 --learning_rate 1000 {PLAIN}"


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
        *[
            "--use_cpu",
            "--report_to",
            "none",
            "--lora_r",
            "4",
            "--logging_steps",
            "1",
            "--save_strategy",
            "no",
            "--disable_tqdm",
            "true",
        ],
        *text.split(),
    ]


def run_in_processes(desk, output, text, processes=1, **options):
    """The command, started as a user starts it on several devices."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "chatpose_hf.cli", "train", *settings(desk, output, text)]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, **options)


def raw_history(output):
    return json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]


def history(output):
    """What was logged of each step, but for the speeds and the padding, which depend on how batches are split."""
    return [
        {name: value for name, value in log.items() if not any(word in name for word in _OF_SPLITS)}
        for log in raw_history(output)
        if "ce_loss" in log or "eval_loss" in log
    ]


_OF_SPLITS = ("per_second", "runtime", "padding")


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
    largest = max(float(weight.abs().max()) for weight in weights.values())
    for name, weight in weights.items():
        # The vision tower's key biases have no gradient but rounding.
        atol = 1e-5 * float(weight.abs().max()) + 1e-9 * largest
        torch.testing.assert_close(got[name], weight, rtol=0, atol=atol)
    for name in ("loss", "ce_loss", "pose_loss", "pose_angle_deg", "grad_norm"):
        assert history(output)[0][name] == pytest.approx(logs[0][name], rel=1e-5)


@pytest.mark.parametrize(("rows", "accumulated"), [(1, 8), (2, 4), (4, 2)])
def test_splitting_a_batch_changes_nothing(desk, whole_batch, tmp_path, rows, accumulated):
    text = f"{ONE_STEP} --per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulated}"
    assert train(settings(desk, tmp_path / "out", text)) == 0
    assert_same_step(tmp_path / "out", whole_batch)
    padding = [raw_history(folder)[0]["padding_percent"] for folder in (tmp_path / "out", desk / "whole")]
    assert 0 <= padding[0] < padding[1] < 100
    assert (padding[0] == 0) == (rows == 1)


@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_give_the_gradient_of_one(desk, whole_batch, tmp_path, rows):
    """With one row each, one of the two has no pose, or no picture, in most steps."""
    text = f"{ONE_STEP} --per_device_train_batch_size {rows} --gradient_accumulation_steps {4 // rows}"
    run = run_in_processes(desk, tmp_path / "out", text, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_step(tmp_path / "out", whole_batch)


def test_two_processes_see_what_one_sees(desk, tmp_path):
    """Over the end of an epoch, and in an evaluation of seven rows, which two processes cannot halve."""
    text = (
        f"--max_steps 5 --learning_rate 0.01 {PLAIN} --eval_data {desk / 'rows'} --eval_strategy steps --eval_steps 5 "
        "--per_device_eval_batch_size 2"
    )
    assert train(settings(desk, tmp_path / "one", f"{text} --per_device_train_batch_size 8")) == 0
    run = run_in_processes(desk, tmp_path / "two", f"{text} --per_device_train_batch_size 4", processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert len(one) == len(two) == 7
    for of_one, of_two in zip(one, two, strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4)


# -- interrupted runs --

# Logs, evaluations and checkpoints at different steps, with dropout, over the end of an epoch (after step 6).
TEN_STEPS = (
    "--max_steps 10 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --logging_steps 3 --save_strategy steps "
    "--save_steps 2 --eval_strategy steps --eval_steps 5 --learning_rate 0.01"
)


@pytest.fixture(scope="module")
def uninterrupted(desk):
    output = desk / "uninterrupted"
    assert train([*settings(desk, output, TEN_STEPS), "--eval_data", str(desk / "rows")]) == 0
    return output


def start(desk, output, text):
    command = [sys.executable, "-u", "-m", "chatpose_hf.cli", "train", *settings(desk, output, text)]
    command += ["--eval_data", str(desk / "rows")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines)[-3000:])


def assert_same_run(output, uninterrupted, last="checkpoint-10"):
    assert history(output) == history(uninterrupted)
    for name in ("adapter_model.safetensors", f"{last}/adapter_model.safetensors"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()
    optimizers = [torch.load(folder / last / "optimizer.pt") for folder in (output, uninterrupted)]
    for number, state in optimizers[0]["state"].items():
        assert all(torch.equal(value, optimizers[1]["state"][number][name]) for name, value in state.items())


def test_a_killed_run_goes_on_bit_for_bit(desk, uninterrupted, tmp_path):
    process = start(desk, tmp_path / "out", TEN_STEPS)
    wait_for(process, "eval_mpjpe_mm")  # after step 5, between a log and a checkpoint
    process.kill()
    process.wait()
    assert {path.name for path in list_checkpoints(tmp_path / "out")} >= {"checkpoint-4"}
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert train([*settings(desk, tmp_path / "out", TEN_STEPS), "--eval_data", str(desk / "rows"), "--resume"]) == 0
    assert_same_run(tmp_path / "out", uninterrupted)


def test_a_run_that_is_told_to_end_saves_and_goes_on_bit_for_bit(desk, uninterrupted, tmp_path):
    text = TEN_STEPS.replace("--save_steps 2", "--save_steps 10")
    process = start(desk, tmp_path / "out", text)
    wait_for(process, "eval_mpjpe_mm")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=100)[0]
    assert process.returncode == 143, rest
    assert "`--resume` goes on" in rest
    saved = list_checkpoints(tmp_path / "out")
    assert len(saved) == 1
    assert saved[0].name in {f"checkpoint-{step}" for step in (5, 6, 7, 8, 9)}
    assert train([*settings(desk, tmp_path / "out", text), "--eval_data", str(desk / "rows"), "--resume"]) == 0
    assert_same_run(tmp_path / "out", uninterrupted)


def test_a_model_trained_in_full_goes_on_bit_for_bit_and_ends_with_its_best(desk, tmp_path):
    """Its files have other names of weights than the model, so the Trainer's own loading would find none."""
    text = f"{TEN_STEPS} --method full --learning_rate 0.001 --muon_learning_rate 0.003 --vision_layers 1"
    text = text.replace("--eval_steps 5", "--eval_steps 2")
    arguments = [*settings(desk, tmp_path / "whole", text), "--eval_data", str(desk / "rows")]
    # The largest loss, so that the best is an early one.
    wanted = "--load_best_model_at_end true --metric_for_best_model loss --greater_is_better true"
    assert train([*arguments, *wanted.split()]) == 0
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 10
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    for name, weight in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weight, best[name]), name

    shutil.copytree(tmp_path / "whole", stopped := tmp_path / "stopped")
    for step in (6, 8, 10):
        shutil.rmtree(stopped / f"checkpoint-{step}")
    assert train([*settings(desk, stopped, text), "--eval_data", str(desk / "rows"), "--resume"]) == 0
    last = Path("checkpoint-10") / "model.safetensors"
    assert (stopped / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


# -- faults --


def test_a_damaged_checkpoint_is_passed_over(desk, uninterrupted, tmp_path, caplog):
    shutil.copytree(uninterrupted, output := tmp_path / "out")
    for file in output.glob("*.safetensors"):
        file.unlink()
    damaged = output / "checkpoint-10" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (output / "checkpoint-8" / "adapter_model.safetensors").unlink()
    assert train([*settings(desk, output, TEN_STEPS), "--eval_data", str(desk / "rows"), "--resume"]) == 0
    assert "optimizer.pt is not as it was written" in caplog.text
    assert "adapter_model.safetensors is missing" in caplog.text
    assert_same_run(output, uninterrupted)


def test_a_full_disk_leaves_whole_checkpoints(desk, uninterrupted, tmp_path):
    """No file may grow beyond the adapter's size, which stops the optimizer's in the middle."""
    shutil.copytree(uninterrupted, output := tmp_path / "out")
    for step in (6, 8, 10):
        shutil.rmtree(output / f"checkpoint-{step}")
    limit = (output / "adapter_model.safetensors").stat().st_size + 1000
    command = [sys.executable, "-m", "chatpose_hf.cli", "train", *settings(desk, output, TEN_STEPS)]
    run = subprocess.run(
        [*command, "--eval_data", str(desk / "rows"), "--resume"],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 1
    assert f"cannot write {output / 'checkpoint-6'}" in run.stderr
    assert "make room" in run.stderr
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (output / ".saving").exists()
    assert train([*settings(desk, output, TEN_STEPS), "--eval_data", str(desk / "rows"), "--resume"]) == 0
    assert_same_run(output, uninterrupted)


def test_a_loss_that_is_not_finite_stops_before_the_step(desk, uninterrupted, tmp_path, monkeypatch):
    class Breaks(PoseLoss):
        calls = 0

        def __call__(self, *tensors):
            Breaks.calls += 1
            return super().__call__(*tensors) * (torch.nan if Breaks.calls == 7 else 1.0)

    monkeypatch.setattr("chatpose_hf.training.PoseLoss", Breaks)
    arguments = [*settings(desk, tmp_path / "out", TEN_STEPS), "--eval_data", str(desk / "rows")]
    with pytest.raises(BadLossError, match="step 5 is not finite") as caught:
        train(arguments)
    record = json.loads((tmp_path / "out" / "bad_loss.json").read_text())
    assert record["rows"] == caught.value.rows
    assert len(record["rows"]) == 2
    assert set(record["rows"]) <= {row["id"] for row in make_rows()}
    assert record["pose_loss"] == "nan"
    assert record["step"] == 5
    monkeypatch.setattr("chatpose_hf.training.PoseLoss", PoseLoss)
    assert train([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.fixture(scope="module")
def bad_rows(tmp_path_factory):
    """One with a damaged picture, one that is too long and ends with its pose, among good ones."""
    rows = make_rows(8)
    rows[3]["images"] = [{"bytes": b"no picture", "path": None}]
    rows[2]["messages"][0]["content"][-1]["text"] = "a long story " * 40
    return write_splits(tmp_path_factory.mktemp("bad") / "rows", rows, rows)


def test_a_bad_row_stops_or_is_counted(desk, bad_rows, tmp_path):
    text = f"--train_data {bad_rows} --max_length 400 --per_device_train_batch_size 1 --num_train_epochs 2 --logging_steps 16"
    with pytest.raises(ValueError, match=r"cannot train on row 'row_[23]': .*(no picture|would cut a pose)"):
        train(settings(desk, tmp_path / "stop", text))
    text += f" --on_bad_row skip --eval_strategy epoch --eval_data {bad_rows} --per_device_eval_batch_size 4"
    assert train(settings(desk, tmp_path / "skip", text)) == 0
    logs = json.loads((tmp_path / "skip" / "trainer_state.json").read_text())["log_history"]
    assert sum(log.get("skipped_rows", 0) for log in logs) == 4  # two rows, two epochs
    skipped = [json.loads(line) for line in (tmp_path / "skip" / "skipped_rows.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in skipped) == ["row_2", "row_3"]
    # The figures are those of the good rows, whatever the batches.
    good = write_splits(tmp_path / "good", [], [row for n, row in enumerate(make_rows(8)) if n not in (2, 3)])
    text = text.replace(f"--eval_data {bad_rows}", f"--eval_data {good}").replace(
        "eval_batch_size 4", "eval_batch_size 1"
    )
    assert train(settings(desk, tmp_path / "good_out", text)) == 0
    with_bad, without = (
        [log for log in history(tmp_path / out) if "eval_loss" in log] for out in ("skip", "good_out")
    )
    for got, want in zip(with_bad, without, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_bad_rows_on_two_processes(desk, bad_rows, tmp_path):
    """One process leaves out more rows than the other, or has none left."""
    text = f"--train_data {bad_rows} --max_length 400 --per_device_train_batch_size 1 --num_train_epochs 1 --on_bad_row skip"
    text += (
        f" --learning_rate 0.01 {PLAIN} --eval_strategy epoch --eval_data {bad_rows} --per_device_eval_batch_size 2"
    )
    assert train(settings(desk, tmp_path / "one", f"{text} --gradient_accumulation_steps 2")) == 0
    run = run_in_processes(desk, tmp_path / "two", text, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    for one, two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_evaluation_by_hand(desk, tmp_path):
    """Token by token and pose by pose, with one model call a row."""
    text = f"--max_steps 1 --learning_rate 0 --eval_strategy steps --eval_steps 1 --eval_data {desk / 'rows'}"
    assert train(settings(desk, tmp_path / "out", text)) == 0
    model, processor = load_trained(desk / "base")
    collator, body = ChatPoseCollator(processor), BodyModel.load("default")
    ce, pose_losses, angles, distances = [], [], [], []
    for row in make_rows(7):
        batch = collator([row])
        with torch.no_grad():
            output = model(**batch)
        labels = batch["labels"][0, 1:]
        ce += [-output.logits[0, t].log_softmax(-1)[label] for t, label in enumerate(labels) if label != -100]
        for pose, rotmats in enumerate(output.pose_rotmats):
            target, mask = batch["pose_labels"][pose], batch["pose_mask"][pose].bool()
            error = (rotmats - target).abs().mean((-2, -1))
            pose_losses.append(error[1:][mask[1:]].mean() + (error[0] if mask[0] else 0))
            angles += [geodesic_distance(rotmats[j], target[j]) for j in range(24) if mask[j]]
            apart = (body.joints(rotmats) - body.joints(target)).norm(dim=-1)
            for joint in range(24):
                above, is_known = PARENTS[joint], True
                while above >= 0:
                    is_known &= bool(mask[above])
                    above = PARENTS[above]
                distances += [apart[joint]] if is_known else []
    want = {
        "eval_ce_loss": torch.stack(ce).mean(),
        "eval_pose_loss": torch.stack(pose_losses).mean(),
        "eval_pose_angle_deg": torch.stack(angles).mean().rad2deg(),
        "eval_mpjpe_mm": 1000 * torch.stack(distances).mean(),
    }
    want["eval_loss"] = want["eval_ce_loss"] + 0.1 * want["eval_pose_loss"]
    got = history(tmp_path / "out")[-1]
    for name, value in want.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4), name


# -- settings --


def test_streams_are_cut_and_found_again(desk, tmp_path, monkeypatch):
    """Over the end of the stream; two processes see what one does, and a stopped run goes on."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    text = f"--max_steps 5 --learning_rate 0.01 {PLAIN} --streaming --per_device_train_batch_size 8"
    assert train(settings(desk, tmp_path / "one", text)) == 0
    assert len(history(tmp_path / "one")) == 5
    halves = text.replace("size 8", "size 4").replace("max_steps 5", "max_steps 2")
    run = run_in_processes(desk, tmp_path / "two", halves, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    for one, two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=False):
        assert two == pytest.approx({**one, "epoch": two["epoch"]}, rel=1e-4)
    assert len(history(tmp_path / "two")) == 2
    saves = f"{text} --save_strategy steps --save_steps 4"
    assert train(settings(desk, tmp_path / "stopped", saves)) == 0
    (tmp_path / "stopped" / "adapter_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-5", ignore_errors=True)
    assert train([*settings(desk, tmp_path / "stopped", saves), "--resume"]) == 0
    assert history(tmp_path / "stopped") == history(tmp_path / "one")
    with pytest.raises(ValueError, match="expected `max_steps` with `streaming`"):
        train(settings(desk, tmp_path / "endless", "--streaming"))


def test_each_epoch_has_an_order_of_its_own(desk, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    stream = _Endless(MixtureStream([load_rows(desk / "rows", streaming=True)], [1.0]))
    ids = [row["id"] for row in islice(stream, 48)]
    assert sorted(ids[:24]) == sorted(ids[24:])
    assert ids[:24] != ids[24:]
    sampler = EpochSampler(range(24), seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(24))
    assert list(EpochSampler(range(24), seed=2)) != orders[0]


def test_rows_of_like_length_share_batches(tmp_path):
    processor = make_processor()
    rows = [make_row(n, num_poses=n % 4, turns=1 + n % 7) for n in range(160)]
    folder = write_splits(tmp_path / "rows", rows[:120], rows[120:])
    mixture = Mixture([load_rows(folder), load_rows(folder, "val")], [3.0, 1.0])
    waste = {}
    for strategy in ("random", "group_by_length"):
        args = ChatPoseTrainingArguments(
            str(tmp_path),
            use_cpu=True,
            train_sampling_strategy=strategy,
            per_device_train_batch_size=4,
            report_to="none",
        )
        trainer = ChatPoseTrainer(make_model(processor), args, processor, mixture)
        orders = []
        for epoch in (0, 1, 0):
            trainer.set_epoch(epoch)
            orders.append([trainer.data_collator([mixture[n] for n in batch]) for batch in sampled(trainer)])
        assert [len(batch["input_ids"]) for batch in orders[0]] == [4] * 40
        ids = [[read_report(batch["row_report"])["rows"] for batch in order] for order in orders]
        assert ids[0] == ids[2]
        assert ids[0] != ids[1]
        masks = [batch["attention_mask"] for order in orders[:2] for batch in order]
        waste[strategy] = 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)
    assert waste["group_by_length"] < 0.5 * waste["random"]


def sampled(trainer):
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(order)))
    return [order[start : start + 4] for start in range(0, len(order), 4)]


def test_settings_come_from_yaml_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: org/base\ntrain_data:\n  rows/a: 1\n  org/b: 2.5\neval_data: rows/a\noutput_dir: out\nlearning_rate: 1e-4\n"
        "lora_targets: [q_proj, k_proj]\nbf16: false\njoint_weights: {l_wrist: 2}\nmax_length: 1024\nuse_cpu: true\n"
        "report_to: none\n"
    )
    model, data, tuning, loss, run, args = parse_arguments(
        [str(file), "--learning_rate", "3e-4", "--resume", "--use_dora", "true"]
    )
    assert (model.model, data.train_data, data.eval_data) == ("org/base", ["rows/a=1", "org/b=2.5"], ["rows/a"])
    assert (args.learning_rate, args.max_length, args.output_dir) == (3e-4, 1024, "out")
    assert (tuning.lora_targets, tuning.use_dora, run.resume) == (["q_proj", "k_proj"], True, True)
    assert loss.joint_weights == ["l_wrist=2"]
    # What is shown and kept is what another run takes.
    again = tmp_path / "again.yaml"
    again.write_text(describe_settings((model, data, tuning, loss, run, args)))
    assert describe_settings(parse_arguments([str(again)])) == again.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is no YAML file"),
        ("- model", "expected settings as `name: value`"),
        ("model: a\nlearning_rat: 1", "got learning_rat"),
        ("model: a\ntrain_data: b\noutput_dir: c\nmethod: loar", "expected `method` of lora, full, got 'loar'"),
        (
            "model: a\ntrain_data: b\noutput_dir: c\non_bad_row: drop",
            "expected `on_bad_row` of stop, skip, got 'drop'",
        ),
        ("model: a\ntrain_data: b\noutput_dir: c\ndtype: half", "expected `dtype` of float32"),
        ("model: a\ntrain_data: b=much\noutput_dir: c", "expected NAME=WEIGHT, got 'b=much'"),
        ("model: a\ntrain_data: b\noutput_dir: c\njoint_weights: [knee=2]", "got 'knee'"),
        (
            "model: a\ntrain_data: b\noutput_dir: c\neval_strategy: steps",
            "expected `eval_data` with `eval_strategy=steps`",
        ),
    ],
)
def test_settings_without_meaning_are_refused(desk, tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(
        content.replace("model: a", f"model: {desk / 'base'}").replace(
            "output_dir: c", f"output_dir: {tmp_path / 'c'}"
        )
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train([str(file), "--use_cpu", "true"])
    assert not (tmp_path / "c").exists()


def test_a_folder_with_checkpoints_is_not_trained_into_by_accident(desk, uninterrupted, caplog):
    with pytest.raises(ValueError, match="`--resume` goes on with it"):
        train(settings(desk, uninterrupted, TEN_STEPS))


# -- what comes out --


def test_the_command_trains_reloads_answers_and_publishes(desk, uninterrupted, tmp_path, capsys):
    """An adapter as the other commands take it."""
    question = ["generate", "The left arm raises. Give the SMPL pose.", "--force-pose", "--max-new-tokens", "8"]
    assert main([*question, "--model", str(uninterrupted), "--output", str(tmp_path / "reply")]) == 0
    assert "24 joint rotations" in capsys.readouterr().out
    assert (tmp_path / "reply" / "picture.png").is_file()
    release = ["publish", str(uninterrupted), "--repo", "me/poses", "--output", str(tmp_path / "release")]
    assert main(release) == 1
    assert "nobody else can load" in capsys.readouterr().err
    assert main([*release, "--merge"]) == 0
    out = capsys.readouterr().out
    assert "dry run: nothing was sent" in out
    assert "orthonormal" in out
    merged, _ = load_trained(tmp_path / "release")
    adapted, processor = load_trained(uninterrupted)
    batch = ChatPoseCollator(processor)([make_row(2, 3)])
    torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits)
    card = (uninterrupted / "README.md").read_text()
    assert "Method | `lora`" in card
    assert json.loads((uninterrupted / "run.json").read_text())["step"] == 10
    assert not list(uninterrupted.rglob("*.bin"))


@pytest.mark.parametrize(
    "text",
    [
        "--bf16 true",
        "--gradient_checkpointing true",
        "--method full --train_sampling_strategy group_by_length",
        "--vision_layers 1 --vision_learning_rate 1e-5 --train_projector true",
        "--vision_layers -1 --method full --joint_error geodesic --joint_position_weight 0.5",
        "--use_dora true --use_rslora true --lora_targets q_proj up_proj --joint_error rot6d_l1 --joint_weights pelvis=2",
        "--early_stopping_patience 1 --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2 "
        "--load_best_model_at_end true --metric_for_best_model loss",
    ],
)
def test_ways_of_training(desk, tmp_path, text):
    arguments = settings(
        desk, tmp_path / "out", f"{text} --max_steps 12 --learning_rate 0.01 --per_device_train_batch_size 4"
    )
    assert train([*arguments, "--eval_data", str(desk / "rows")]) == 0
    logs = history(tmp_path / "out")
    losses = [log["loss"] for log in logs if "loss" in log]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(math.isfinite(log.get("grad_norm", 0)) for log in logs)
    model, processor = load_trained(tmp_path / "out")
    batch = ChatPoseCollator(processor)(make_rows(7))
    with torch.no_grad():
        loss = model(**batch).ce_loss
    # What was evaluated last is what was saved.
    assert float(loss) == pytest.approx(logs[-1]["eval_ce_loss"], rel=0.02 if "bf16" in text else 1e-4)
    assert model.pose_head.linear_1.weight.dtype == torch.float32


def test_qlora_keeps_what_it_must_out_of_the_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    processor = make_processor()
    config = make_model(processor).config
    config.text_config.hidden_size = 64  # 32 is too narrow for its kernels
    config.text_config.head_dim, config.text_config.intermediate_size = 16, 128
    model = ChatPoseForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_splits(tmp_path / "rows", make_rows(), make_rows(7))
    text = "--load_in_4bit true --bf16 true --max_steps 12 --learning_rate 0.01 --per_device_train_batch_size 4"
    arguments = [*settings(tmp_path, tmp_path / "out", text), "--model", str(tmp_path)]
    assert train([*arguments, "--eval_data", str(tmp_path / "rows")]) == 0
    losses = [log["loss"] for log in history(tmp_path / "out") if "loss" in log]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["method"] == "qlora"
    model_args, _, tuning, _, _, args = parse_arguments(arguments)
    base = _load_model(model_args, tuning, args, processor)
    packed = {name for name, weight in base.named_parameters() if weight.dtype == torch.uint8}
    assert len(packed) == 14  # seven matrices in each of two layers
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    counts = count_parameters(base)
    assert counts["language model"][1] == count_parameters(model)["language model"][1]


def test_the_vision_tower_has_its_own_learning_rate(desk, tmp_path):
    processor = make_processor()
    model = prepare_model(make_model(processor), TuningArguments(lora_r=4, vision_layers=2))
    args = ChatPoseTrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=1e-3, vision_learning_rate=1e-5, report_to="none"
    )
    trainer = ChatPoseTrainer(model, args, processor, Mixture([load_rows(desk / "rows")], [1.0]))
    rates = {
        id(weight): group["lr"] for group in trainer.create_optimizer().param_groups for weight in group["params"]
    }
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(rates) == len(trained)
    for name, weight in trained.items():
        assert rates[id(weight)] == (1e-5 if "vision_tower" in name else 1e-3)


def test_muon_steps_the_language_models_matrices(desk, tmp_path):
    processor = make_processor()
    model = prepare_model(make_model(processor), TuningArguments(method="full", vision_layers=1))
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 1e-2, "vision_learning_rate": 1e-5}
    args = ChatPoseTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **rates)
    trainer = ChatPoseTrainer(model, args, processor, Mixture([load_rows(desk / "rows")], [1.0]))
    groups = {id(w): group for group in trainer.create_optimizer().param_groups for w in group["params"]}
    model(**ChatPoseCollator(processor)(make_rows(7))).loss.backward()
    matrices = [(n, w) for n, w in model.named_parameters() if "language_model.layers." in n and w.ndim == 2]
    alone = [w.detach().clone() for _, w in matrices]
    for copy, (_, weight) in zip(alone, matrices, strict=True):
        copy.grad = weight.grad.clone()
    torch.optim.Muon(alone, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    trainer.optimizer.step()
    for copy, (name, weight) in zip(alone, matrices, strict=True):
        assert groups[id(weight)]["lr"] == 1e-2
        assert torch.equal(weight, copy), name
    is_muon = {id(weight) for _, weight in matrices}
    others = [group for key, group in groups.items() if key not in is_muon]
    assert {group["lr"] for group in others} == {1e-3, 1e-5}
    assert all("betas" in group for group in others)


def test_muon_on_shards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        ChatPoseTrainingArguments(str(tmp_path), use_cpu=True, fsdp="full_shard", muon_learning_rate=1e-3)


def test_a_trained_vision_tower_on_processes_without_pictures(desk, whole_batch, tmp_path):
    """One process has only words in most steps; it must not keep the other waiting."""
    text = f"{ONE_STEP} --vision_layers -1 --train_projector true --per_device_train_batch_size"
    assert train(settings(desk, tmp_path / "one", f"{text} 8")) == 0
    run = run_in_processes(desk, tmp_path / "two", f"{text} 1 --gradient_accumulation_steps 4", processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_step(
        tmp_path / "two", (load_file(tmp_path / "one" / "adapter_model.safetensors"), history(tmp_path / "one"))
    )
