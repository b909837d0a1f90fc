"""
A training step of ChatPose with LoRA against plain LLaVA with the same LoRA on the same batches: seconds and memory.

    python benchmarks/bench_train.py --quick                                               # 2 CPU cores, under a minute
    python benchmarks/bench_train.py --rounds 3 --json benchmarks/results/train_cpu.json
    python benchmarks/bench_train.py --device cuda --dtype bfloat16 --json benchmarks/results/train_cuda.json

Hardware: any Linux machine; 2 CPU cores and 6 GB of memory do. Time: about 10 minutes on 2 idle cores for the second command.
Weights are random (SmolLM2-135M's shape with a vocabulary of 32,064, a small CLIP tower). How to read the numbers:
benchmarks/README.md.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch
import transformers
from bench_generate import (
    SHAPES,
    ask_memory_child,
    describe_environment,
    make_configs,
    measure_peak,
    print_table,
    profile_calls,
    summarize,
    time_alternating,
    time_call,
    write_json,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration

from chatpose_hf import ChatPoseConfig, ChatPoseForConditionalGeneration
from chatpose_hf.adapters import TuningArguments, prepare_model


SIDES = ("ours", "plain")
VOCABULARY, IMAGE, POSE = 32_064, 32_000, 32_001
# Rows, text tokens of a row, whether it has a picture, which part of the text is labels, as answers are, and whether activations are
# computed again in the backward pass (gradient checkpointing), as for large models.
WORKLOADS = {
    "8 x 128, text, a quarter labels": (8, 128, False, 0.25, False),
    "8 x 128, text, all labels": (8, 128, False, 1.0, False),
    "2 x 1,024, text, a quarter labels": (2, 1024, False, 0.25, False),
    "2 x 1,024, text, all labels, checkpointed": (2, 1024, False, 1.0, True),
    "4 x 128, image, a quarter labels": (4, 128, True, 0.25, False),
}


def make_model(side: str, args: argparse.Namespace):
    """One side with LoRA, ready to train, and its optimizer."""
    torch.manual_seed(0)
    fields = make_configs(args, VOCABULARY, tie_word_embeddings=False) | {"image_token_index": IMAGE}
    dtype = getattr(torch, args.dtype)
    if side == "ours":
        model = ChatPoseForConditionalGeneration(ChatPoseConfig(**fields, pose_token_id=POSE)).to(dtype)
        model.pose_head.float()
        model = prepare_model(model.to(args.device), TuningArguments(lora_dropout=0.0))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**fields)).to(args.device, dtype)
        targets = r"model\.language_model\..*\.(q_proj|v_proj)"
        model = get_peft_model(model, LoraConfig(r=128, lora_alpha=256, target_modules=targets))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return model.train(), torch.optim.AdamW(trained, 2e-4)


def make_batch(name: str, side: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """The same tokens for both sides; ours has a pose in each row."""
    rows, length, has_image, share, _ = WORKLOADS[name]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, IMAGE, (rows, length), generator=generator)
    input_ids[:, -3] = POSE
    labels = input_ids.clone()
    labels[:, : length - int(share * length)] = -100
    batch = {}
    if has_image:
        images = torch.full((rows, (args.image_size // 14) ** 2), IMAGE)
        input_ids = torch.cat([input_ids[:, :4], images, input_ids[:, 4:]], dim=1)
        labels = torch.cat([labels[:, :4], torch.full_like(images, -100), labels[:, 4:]], dim=1)
        size = (rows, 3, args.image_size, args.image_size)
        batch["pixel_values"] = torch.randn(size, generator=generator).to(getattr(torch, args.dtype))
    batch |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    if side == "ours":
        batch["pose_labels"] = torch.eye(3).expand(rows, 24, 3, 3)
    return {key: value.to(args.device) for key, value in batch.items()}


def make_step(name: str, model, optimizer, batch: dict[str, Tensor]):
    def step() -> float:
        if WORKLOADS[name][-1]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_time(args: argparse.Namespace, bar: tqdm) -> tuple[list[dict], list[dict]]:
    """Seconds of each workload; and, where asked for, where they go."""
    peak = measure_peak_operations(args)
    models = {side: make_model(side, args) for side in SIDES}
    results, profiles = [], []
    for name in args.workloads:
        bar.set_description(f"time: {name}")
        batches = {side: make_batch(name, side, args) for side in SIDES}
        steps = {side: make_step(name, *models[side], batches[side]) for side in SIDES}
        for side in SIDES:  # the warm-up is also a check
            if not 0 < steps[side]() < float("inf"):
                raise RuntimeError(f"{name}: the loss of {side} is not a finite number")
            bar.update()
        seconds = time_alternating(steps, args.rounds, args.device, bar)
        medians = {f"seconds_{side}": median(seconds[side]) for side in SIDES}
        done = count_operations(models["ours"][0], batches["ours"]) / medians["seconds_ours"]
        row = {"workload": name, **medians, "percent_of_peak": 100 * done / peak}
        results.append(row | summarize(seconds["ours"], seconds["plain"]))
        if args.profile:
            profiles += [{"workload": name, **row} for row in profile_calls(steps, args.device)]
    return results, profiles


def count_operations(model, batch: dict[str, Tensor]) -> float:
    """
    What a step of LoRA must do: two for each weight of the language model's matrices and token forward, two backward, for the
    gradient of what went in; the same of the output layer for each label. Attention, LoRA and the tower are left out.
    """
    matrices = [w for name, w in model.named_parameters() if ".layers." in name and "language_model" in name]
    weights = sum(w.numel() for w in matrices if w.dim() == 2 and not w.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    labels = (batch["labels"][:, 1:] != -100).sum().item()
    return 4.0 * (weights * batch["input_ids"].numel() + head * labels)


def measure_peak_operations(args: argparse.Namespace) -> float:
    """Operations a second of a large product of matrices."""
    size = 8192 if args.device == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=args.device).to(getattr(torch, args.dtype))
    return 2.0 * size**3 / median(time_call(lambda: left @ right, args.device) for _ in range(9))


def run_memory_child(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a step of one side, the second one in this fresh process."""
    side, name = args.memory_child
    step = make_step(name, *make_model(side, args), make_batch(name, side, args))
    step()
    return measure_peak(step, args.device)


def measure_memory(args: argparse.Namespace, bar: tqdm) -> list[dict]:
    results = []
    for name in args.workloads:
        bar.set_description(f"memory: {name}")
        measured = {}
        for side in SIDES:
            measured[side] = ask_memory_child(__file__, side, name)
            bar.update()
        sizes = {f"{key}_mib_{side}": measured[side][key] for key in ("peak", "growth") for side in SIDES}
        results.append({"workload": name, **sizes, "ratio": measured["ours"]["peak"] / measured["plain"]["peak"]})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one workload, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the language model")
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help="default: all; with --quick the first"
    )
    parser.add_argument("--rounds", type=int, help="timed rounds of each workload, default 7; with --quick 3")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by operator")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--memory-child", nargs=2, metavar=("SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.image_size = 112 if args.quick else 336
    args.workloads = args.workloads or (list(WORKLOADS)[:1] if args.quick else list(WORKLOADS))
    transformers.logging.set_verbosity_error()
    if args.memory_child:
        print(json.dumps(run_memory_child(args)))
        return
    results = describe_environment(args)
    results["settings"] = {key: value for key, value in vars(args).items() if key not in ("json", "memory_child")}
    with tqdm(total=len(args.workloads) * (4 + 2 * args.rounds), unit="run") as bar:
        # The children come first: beside a large parent they would share its caches and memory.
        results["memory"] = measure_memory(args, bar)
        results["time"], profiles = measure_time(args, bar)
    if profiles:
        results["profile"] = profiles
        print_table("Percent of a step's time by operator", profiles)
    results["ratio_time"], results["ratio_memory"] = (
        max(row["ratio"] for row in results[part]) for part in ("time", "memory")
    )
    print_table("Seconds of a step, ratio ours / plain", results["time"])
    print_table("Peak memory of a step, ratio ours / plain", results["memory"])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
