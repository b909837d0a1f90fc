"""
ChatPose's `generate` against plain `LlavaForConditionalGeneration.generate` on the same weights: seconds, memory, and
whether every way of generating decodes the poses that a teacher-forced forward decodes.

    python benchmarks/bench_generate.py --quick                       # 2 CPU cores, under a minute
    python benchmarks/bench_generate.py --original --poses --paths --rounds 3 --memory-rounds 1 --json benchmarks/results/generate_cpu.json
    python benchmarks/bench_generate.py --device cuda --json benchmarks/results/generate_cuda.json

Hardware: any Linux machine; 2 CPU cores and 4 GB of memory do. Time: about 20 minutes on 2 idle cores for the second
command. Weights are random (SmolLM2-135M's shape, a small CLIP tower), nothing is downloaded. How to read the numbers:
benchmarks/README.md.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    StoppingCriteria,
)

import chatpose_hf
from chatpose_hf import ChatPoseConfig, ChatPoseForConditionalGeneration
from chatpose_hf.rotations import rot6d_to_rotmat


PAD, EOS = 0, 2
MIB = 2**20
SIDES = ("ours", "plain")
ORIGINAL_BATCH_SIZES = (1, 16)
POSE_COUNTS = (1, 4, 16, 64, 256, 1024)
# Width, width between, layers, heads, heads of keys and values.
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4),
    "llava-7b": (4096, 11008, 32, 32, 32),
    "llava-13b": (5120, 13824, 40, 40, 40),
}


class PosesAtSteps(LogitsProcessor):
    """Makes random weights say `<POSE>` at known steps and nowhere else; both sides pay for it alike."""

    def __init__(self, pose_token_id: int, prompt_length: int, steps: set[int]):
        self.pose_token_id = pose_token_id
        self.prompt_length = prompt_length
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] - self.prompt_length in self.steps:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.pose_token_id] = 0
        else:
            scores[:, self.pose_token_id] = -torch.inf
        return scores


class PassCounter(StoppingCriteria):
    """Stops nothing; `generate` asks it once after each forward pass, compiled or not, of the model, not the draft."""

    def __init__(self):
        self.passes = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.passes += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def make_configs(
    args: argparse.Namespace, vocab_size: int, tie_word_embeddings: bool, has_whole_tower: bool = False
) -> dict:
    """A LLaVA's fields: a language model of `args.shape`, and LLaVA-1.5's tower, for its own shapes always, or a small one."""
    hidden_size, intermediate_size, layers, heads, key_value_heads = SHAPES[args.shape]
    text_config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4 if args.quick else layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=8192,
    )
    has_whole_tower = has_whole_tower or args.shape.startswith("llava")
    # Four layers: a full tower's prefill, the same work on both sides, would hide what is compared.
    width, vision_layers, vision_heads = (1024, 24, 16) if has_whole_tower else (256, 4, 4)
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=args.image_size,
        patch_size=14,
    )
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_seq_length": (args.image_size // 14) ** 2,
        "tie_word_embeddings": tie_word_embeddings,
    }


def make_models(args: argparse.Namespace, has_whole_tower: bool = False) -> dict[str, LlavaForConditionalGeneration]:
    """ChatPose with random weights, and a plain LLaVA that holds the same modules."""
    torch.manual_seed(args.seed)
    # LLaVA-1.5's output layer is its own, SmolLM2's its embeddings.
    fields = make_configs(
        args, vocab_size=49216, tie_word_embeddings=not args.shape.startswith("llava"), has_whole_tower=has_whole_tower
    )
    fields["image_token_index"] = 49152
    config = ChatPoseConfig(pose_token_id=49153, **fields)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        ours = ChatPoseForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    ours.pose_head.float()
    with torch.device("meta"):
        plain = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    plain.model, plain.lm_head = ours.model, ours.lm_head
    return {"ours": ours, "plain": plain}


def make_inputs(args: argparse.Namespace, config: LlavaConfig, batch_size: int, has_image: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    input_ids = torch.randint(3, 49152, (batch_size, args.prompt_tokens), generator=generator)
    inputs = {}
    if has_image:
        images = torch.full((batch_size, config.image_seq_length), config.image_token_index)
        input_ids = torch.cat([input_ids[:, :4], images, input_ids[:, 4:]], dim=1)
        size = (batch_size, 3, args.image_size, args.image_size)
        inputs["pixel_values"] = torch.randn(size, generator=generator).to(getattr(torch, args.dtype))
    inputs |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return {name: tensor.to(args.device) for name, tensor in inputs.items()}


def pose_steps(new_tokens: int) -> set[int]:
    return {new_tokens // 4, new_tokens // 2, new_tokens - 1}


def run_generate(model, inputs: dict[str, Tensor], config: ChatPoseConfig, new_tokens: int, **kwargs):
    """One greedy `generate` of exactly `new_tokens` tokens, three of them `<POSE>`, the last one included."""
    prompt_length = inputs["input_ids"].shape[1]
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        logits_processor=[PosesAtSteps(config.pose_token_id, prompt_length, pose_steps(new_tokens))],
        **kwargs,
    )


@torch.no_grad()
def run_original(model, pose_head, inputs: dict[str, Tensor], config: ChatPoseConfig, new_tokens: int):
    """
    The original's way, re-implemented: no KV cache, so that tower and language model read picture and prompt again for every
    token, and every layer's states of every step are kept; the poses are read from the last step's. Two details are in its
    favour: the output layer sees one position, and the pose head is ours.
    """
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    process = PosesAtSteps(config.pose_token_id, input_ids.shape[1], pose_steps(new_tokens))
    kept = []
    for _ in range(new_tokens):
        output = model(
            input_ids=input_ids,
            pixel_values=inputs["pixel_values"],
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        kept.append(output.hidden_states)
        token = process(input_ids, output.logits[:, -1].float()).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
    is_pose = input_ids[:, 1:] == config.pose_token_id
    return input_ids, rot6d_to_rotmat(pose_head(kept[-1][-1][is_pose]))


def time_call(call: Callable[[], object], device: str) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_alternating(calls: dict[str, Callable[[], object]], rounds: int, device: str, bar: tqdm) -> dict[str, list]:
    """Seconds of each call in each round, A B A B ...: what slows the machine down meets both."""
    seconds = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            seconds[side].append(time_call(call, device))
            bar.update()
    return seconds


def profile_calls(calls: dict[str, Callable[[], object]], device: str, operators: int = 8) -> list[dict]:
    """
    Percent of each call's time by operator, as torch's profiler sees it, those that take most first, and how often each is called.
    What is in no operator is Python, or on a GPU waiting for it.
    """
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    percents, counts = {}, {}
    for side, call in calls.items():
        call()
        with torch.profiler.profile(acc_events=True) as profiler:
            seconds = time_call(call, device)
        events = profiler.key_averages()
        percents[side] = {event.key: 1e-4 * getattr(event, time_of) / seconds for event in events}
        percents[side]["(in no operator)"] = 100 - sum(percents[side].values())
        counts[side] = {event.key: event.count for event in events}
    largest = {
        key: max(side.get(key, 0.0) for side in percents.values()) for each in percents.values() for key in each
    }
    return [
        {
            "operator": key,
            **{f"percent_{side}": percents[side].get(key, 0.0) for side in calls},
            **{f"calls_{side}": counts[side].get(key, 0) for side in calls},
        }
        for key in sorted(largest, key=largest.get, reverse=True)[:operators]
    ]


def summarize(numerator: list[float], denominator: list[float]) -> dict[str, float | list[float]]:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "ratios": ratios}


def make_workloads(args: argparse.Namespace) -> dict[str, tuple[int, bool]]:
    """Name to batch size and whether each row has an image."""
    return {
        f"batch {batch_size}, {'image' if has_image else 'text'}": (batch_size, has_image)
        for has_image in (False, True)
        for batch_size in args.batch_sizes
    }


def measure_time(args: argparse.Namespace, models: dict, bar: tqdm) -> list[dict]:
    config = models["ours"].config
    rows = []
    for name, workload in make_workloads(args).items():
        bar.set_description(f"time: {name}")
        inputs = make_inputs(args, config, *workload)
        outputs = {}
        for side in SIDES:  # the warm-up is also the check that both sides do the same work
            outputs[side] = run_generate(models[side], inputs, config, args.new_tokens)
            bar.update()
        if not torch.equal(outputs["ours"].sequences, outputs["plain"].sequences):
            raise RuntimeError(f"{name}: the two sides generated different tokens")
        num_poses = outputs["ours"].pose_rotmats.shape[0]
        if num_poses != 3 * workload[0]:
            raise RuntimeError(f"{name}: expected {3 * workload[0]} poses, three a row, got {num_poses}")
        del outputs
        calls = {side: lambda s=side, i=inputs: run_generate(models[s], i, config, args.new_tokens) for side in SIDES}
        seconds = time_alternating(calls, args.rounds, args.device, bar)
        rows.append(
            {
                "workload": name,
                "prompt_tokens": inputs["input_ids"].shape[1],
                "new_tokens": args.new_tokens,
                "poses": num_poses,
                "seconds_ours": median(seconds["ours"]),
                "seconds_plain": median(seconds["plain"]),
                **summarize(seconds["ours"], seconds["plain"]),
            }
        )
    return rows


def profile_workloads(args: argparse.Namespace, models: dict, bar: tqdm) -> list[dict]:
    rows = []
    for name, workload in make_workloads(args).items():
        bar.set_description(f"profile: {name}")
        inputs = make_inputs(args, models["ours"].config, *workload)
        calls = {
            side: lambda s=side, i=inputs: run_generate(models[s], i, models["ours"].config, args.new_tokens)
            for side in SIDES
        }
        rows += [{"workload": name, **row} for row in profile_calls(calls, args.device)]
    return rows


def measure_original(args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """
    The original's algorithm, which takes one prompt at a time, against ours with one and with many, an image each and LLaVA-1.5's
    tower: the original runs it again for every token. Ratios are those of prompts a second. Fewer rounds, for one takes long.
    """
    bar.set_description("original's algorithm")
    models = make_models(args, has_whole_tower=True)
    ours, plain = models["ours"], models["plain"]
    inputs = {count: make_inputs(args, ours.config, count, has_image=True) for count in ORIGINAL_BATCH_SIZES}
    new_tokens = min(32, args.new_tokens)
    calls = {count: lambda c=count: run_generate(ours, inputs[c], ours.config, new_tokens) for count in inputs}
    calls["original"] = lambda: run_original(plain, ours.pose_head, inputs[1], ours.config, new_tokens)
    output, (sequences, pose_rotmats) = calls[1](), calls["original"]()
    if not torch.equal(output.sequences, sequences):
        raise RuntimeError("the original's algorithm generated different tokens")
    difference = (output.pose_rotmats - pose_rotmats).abs().max().item()
    seconds = time_alternating(calls, min(args.rounds, 3), args.device, bar)
    return [
        {
            "workload": f"batch {count}, image",
            "prompt_tokens": inputs[1]["input_ids"].shape[1],
            "new_tokens": new_tokens,
            "seconds_original": median(seconds["original"]),
            "seconds_ours": median(seconds[count]),
            "largest_pose_difference": difference,
            **summarize([count * each for each in seconds["original"]], seconds[count]),
        }
        for count in inputs
    ]


def read_memory(device: str) -> dict[str, float]:
    """MiB in use now and at the peak: this process's resident set, or what torch has allocated on the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return {"now": torch.cuda.memory_allocated() / MIB, "peak": torch.cuda.max_memory_allocated() / MIB}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Not getrusage's ru_maxrss: it cannot be reset, so it says the peak of building the model, and a child of a large
    # parent starts with the parent's.
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def measure_peak(call: Callable[[], object], device: str) -> dict[str, float]:
    """MiB at the peak of a call, and how much more that is than before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = read_memory(device)["now"]
    call()
    peak = read_memory(device)["peak"]
    return {"peak": peak, "growth": peak - before}


def ask_memory_child(script: str, side: str, name: str) -> dict[str, float]:
    """[`measure_peak`] of a side and a workload, by the script with its own arguments in a fresh process."""
    # Blocks of 1 MiB and more go back to the system when freed, so that the peak is what was needed, not what the
    # allocator happened to hoard.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    command = [sys.executable, script, *sys.argv[1:], "--memory-child", side, name]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def run_memory_child(args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of one `generate` of one side in this fresh process."""
    side, name = args.memory_child
    models = make_models(args)
    config, model = models["ours"].config, models[side]
    del models  # the plain side must not pay for the pose head
    inputs = make_inputs(args, config, *make_workloads(args)[name])
    # The first call pays for threads and lazy imports, which are no part of what grows with the workload.
    run_generate(model, make_inputs(args, config, 1, has_image=True), config, 4)
    return measure_peak(lambda: run_generate(model, inputs, config, args.new_tokens), args.device)


def measure_memory(args: argparse.Namespace, bar: tqdm) -> list[dict]:
    rows = []
    for name in args.memory_workloads:
        bar.set_description(f"memory: {name}")
        measured = {side: [] for side in SIDES}
        for _ in range(args.memory_rounds):
            for side in SIDES:
                measured[side].append(ask_memory_child(__file__, side, name))
                bar.update()
        row = {"workload": name}
        for side in SIDES:
            row |= {f"{key}_mib_{side}": median(m[key] for m in measured[side]) for key in ("peak", "growth")}
        rows.append(row | summarize(*([m["peak"] for m in measured[side]] for side in SIDES)))
    return rows


def make_path_models(args: argparse.Namespace) -> tuple[ChatPoseForConditionalGeneration, LlamaForCausalLM]:
    """A small ChatPose whose weights spread the states far apart and often say `<POSE>`, and a draft model for it."""
    torch.manual_seed(args.seed)
    text = {"vocab_size": 320, "num_key_value_heads": 2, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 1}
    text |= {"initializer_range": 0.2, "num_attention_heads": 4, "tie_word_embeddings": False}
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = ChatPoseConfig(
        vision_config=vision_config,
        text_config=LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, **text),
        image_token_index=300,
        pose_token_id=301,
        pose_lead_in_ids=[7, 8],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = ChatPoseForConditionalGeneration(config).eval().to(args.device)
    draft_config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, **text)
    draft = LlamaForCausalLM(draft_config).eval().to(args.device)
    with torch.no_grad():
        for lm_head in (model.lm_head, draft.lm_head):
            # A long row of the output layer wins wherever it points along the state: nearly every other step.
            lm_head.weight[config.pose_token_id] *= 6
            # An `<image>` in an answer would ask the teacher-forced forward for a picture.
            lm_head.weight[config.image_token_index] = 0
        # The head starts near the rest pose; far from it a state that belongs elsewhere cannot pass for the right one.
        model.pose_head.linear_2.weight.normal_(std=0.03)
    return model, draft


def make_path_inputs(args: argparse.Namespace, config: ChatPoseConfig, lengths: list[int], image_rows: tuple = ()):
    """Left-padded prompts of the given numbers of text tokens; the image rows have a picture more."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator)
        image = torch.full((config.image_seq_length * (row in image_rows),), config.image_token_index)
        rows.append(torch.cat([ids[:2], image, ids[2:]]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    if image_rows:
        inputs["pixel_values"] = torch.randn(len(image_rows), 3, 32, 32, generator=generator)
    return {name: tensor.to(args.device) for name, tensor in inputs.items()}


def compare_paths(args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """The poses of every way of generating against those of one teacher-forced forward over the same tokens."""
    model, draft = make_path_models(args)
    config = model.config
    texts = make_path_inputs(args, config, [12] * 4)
    padded = make_path_inputs(args, config, [12, 5, 9, 20])
    mixed = make_path_inputs(args, config, [12, 5, 9, 20], image_rows=(0, 2))
    one = make_path_inputs(args, config, [12])
    no_pose = {"suppress_tokens": [config.pose_token_id]}
    paths = {
        "greedy": (texts, {}),
        "greedy, left-padded batch": (padded, {}),
        "greedy, images in some rows": (mixed, {}),
        "sampling": (mixed, {"do_sample": True}),
        "sampling, num_return_sequences=3": (mixed, {"do_sample": True, "num_return_sequences": 3}),
        "4 beams": (mixed, {"num_beams": 4}),
        "4 beams, num_return_sequences=3": (mixed, {"num_beams": 4, "num_return_sequences": 3}),
        "beam sampling": (mixed, {"num_beams": 4, "do_sample": True}),
        "static cache": (mixed, {"cache_implementation": "static"}),
        "use_cache=False": (mixed, {"use_cache": False}),
        "prompt lookup": (one, {"prompt_lookup_num_tokens": 4}),
        "assisted decoding": (one, {"assistant_model": draft}),
        "assisted sampling": (one, {"assistant_model": draft, "do_sample": True}),
        "force_pose=True": (mixed, {"force_pose": True, **no_pose}),
        "force_pose=True, 4 beams": (mixed, {"force_pose": True, "num_beams": 4, **no_pose}),
    }
    bar.total += len(paths)
    rows = []
    for name, (inputs, kwargs) in paths.items():
        bar.set_description(f"path: {name}")
        counter = PassCounter()
        torch.manual_seed(args.seed)
        output = model.generate(
            **inputs,
            max_new_tokens=args.path_tokens,
            **{"do_sample": False, **kwargs},
            return_dict_in_generate=True,
            stopping_criteria=[counter],
        )
        copies = output.sequences.shape[0] // inputs["input_ids"].shape[0]
        prompt = {key: tensor.repeat_interleave(copies, dim=0) for key, tensor in inputs.items()}
        answers = output.sequences[:, output.prompt_length :]
        attention_mask = torch.cat([prompt.pop("attention_mask"), torch.ones_like(answers)], dim=1)
        labels = torch.cat([torch.full_like(prompt.pop("input_ids"), -100), answers], dim=1)
        with torch.no_grad():
            expected = model(
                input_ids=output.sequences, labels=labels, attention_mask=attention_mask, **prompt
            ).pose_rotmats
        if output.pose_rotmats.shape != expected.shape or expected.shape[0] < 2:
            raise RuntimeError(f"{name}: {output.pose_rotmats.shape[0]} poses for {expected.shape[0]} tokens")
        if inputs is one and counter.passes >= answers.shape[1]:
            raise RuntimeError(f"{name}: no candidate was accepted, so nothing was tested; try another --seed")
        rows.append(
            {
                "path": name,
                "sequences": answers.shape[0],
                "new_tokens": answers.shape[1],
                "forward_passes": counter.passes,
                "poses": expected.shape[0],
                "largest_difference": (output.pose_rotmats - expected).abs().max().item(),
                "between_neighbours": (expected[1:] - expected[:-1]).abs().amax((1, 2, 3)).median().item(),
            }
        )
        bar.update()
    return rows


def measure_pose_slope(args: argparse.Namespace, models: dict, bar: tqdm) -> list[dict]:
    """
    What one more pose costs, the slope of the decoding's seconds over the number of poses, against one more token of one row;
    and that against reading the weights once.
    """
    bar.set_description("poses")
    ours = models["ours"]
    hidden_size = ours.config.text_config.hidden_size
    seconds: dict[int, float] = {}
    with torch.no_grad():
        for count in POSE_COUNTS:
            states = torch.randn(count, hidden_size, device=args.device)
            calls = [time_call(lambda s=states: rot6d_to_rotmat(ours.pose_head(s)), args.device) for _ in range(30)]
            seconds[count] = median(calls[5:])
    slope, constant = np.polyfit(list(seconds), list(seconds.values()), 1)
    inputs = make_inputs(args, ours.config, 1, has_image=False)
    long, short = args.new_tokens, 4
    tokens = {count: lambda n=count: run_generate(ours, inputs, ours.config, n) for count in (short, long)}
    measured = time_alternating(tokens, max(args.rounds, 3), args.device, bar)
    token = (median(measured[long]) - median(measured[short])) / (long - short)
    row = {
        "microseconds_a_pose": slope * 1e6,
        "microseconds_for_any": constant * 1e6,
        "milliseconds_a_token": token * 1e3,
        "percent_of_a_token": 100 * slope / token,
    }
    weights = (*ours.model.language_model.layers.parameters(), *ours.lm_head.parameters())
    floor = sum(weight.nbytes for weight in weights) / measure_bandwidth(args.device)
    # What a token's matrix products take with nothing around them.
    rows = {weight.shape[1]: weight.new_ones(1, weight.shape[1]) for weight in weights if weight.dim() == 2}
    with torch.no_grad():
        products = median(
            time_call(lambda: [linear(rows[w.shape[1]], w) for w in weights if w.dim() == 2], args.device)
            for _ in range(9)
        )
    row |= {"products_of_a_token_ms": products * 1e3, "floor_of_a_token_ms": floor * 1e3}
    row["floor_percent"] = 100 * floor / token
    return [row | {"seconds_by_poses": list(seconds.items())}]


def measure_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(time_call(lambda: target.copy_(source), device) for _ in range(9))


def measure_leak(args: argparse.Namespace, bar: tqdm) -> list[dict]:
    """Memory after each tenth of many calls of `generate` on a small model, pictures and poses included."""
    model, _ = make_path_models(args)
    inputs = make_path_inputs(args, model.config, [12, 5], image_rows=(0,))
    bar.total += args.leak
    bar.set_description("leak")
    resident = []
    for call in range(args.leak):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        bar.update()
        if (call + 1) % (args.leak // 10) == 0:
            resident.append(read_memory(args.device)["now"])
    growth = 1024 * (resident[-1] - resident[0]) / (0.9 * args.leak)
    poses = len(output.pose_rotmats)
    return [{"calls": args.leak, "poses_a_call": poses, "kib_a_call_after_the_first_tenth": growth, "mib": resident}]


def describe_environment(args: argparse.Namespace) -> dict:
    folder = Path(__file__).parent
    describe = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    revision = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "git_revision": revision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "chatpose_hf": chatpose_hf.__version__,
        },
        "hardware": {
            "cpu": next((line.split(":", 1)[1].strip() for line in cpu_lines if "model name" in line), "unknown"),
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        },
    }


def print_table(title: str, rows: list[dict]) -> None:
    """A markdown table of the rows' fields; the lists of single rounds stay in the JSON."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    print(f"\n### {title}\n\n| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|---" * len(names) + "|")
    for row in rows:
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in names]
        print("| " + " | ".join(cells) + " |")


def write_json(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a small tower, few tokens and rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of the language model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, help="default 64; with --quick 16; at least 4")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="text tokens of a prompt")
    parser.add_argument("--rounds", type=int, help="timed rounds of each workload, default 7; with --quick 3; 0: none")
    parser.add_argument("--memory-rounds", type=int, help="processes a side, default 3; with --quick 1; 0: none")
    parser.add_argument("--original", action="store_true", help="also time the original's algorithm")
    parser.add_argument("--paths", action="store_true", help="also compare every path with a teacher-forced forward")
    parser.add_argument("--path-tokens", type=int, default=48, help="new tokens of each path")
    parser.add_argument("--poses", action="store_true", help="also what one more pose costs, against one more token")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by operator")
    parser.add_argument("--leak", type=int, metavar="N", default=0, help="also memory over N calls, at least 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--memory-child", nargs=2, metavar=("SIDE", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, quick, full in (("new_tokens", 16, 64), ("rounds", 3, 7), ("memory_rounds", 1, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if args.new_tokens < 4:
        parser.error(f"--new-tokens must be at least 4, to hold three poses, got {args.new_tokens}")
    args.image_size = 112 if args.quick else 336
    workloads = list(make_workloads(args))
    # A process takes seconds to start: the quick run measures the largest workload's memory alone.
    args.memory_workloads = workloads[-1:] if args.quick else workloads
    return args


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    # As matrix products have it by default: float32 that is float32, so that differences are the library's.
    torch.backends.cudnn.allow_tf32 = False
    if args.memory_child:
        print(json.dumps(run_memory_child(args)))
        return
    results = describe_environment(args) | {"ratio_time": None, "ratio_memory": None}
    results["settings"] = {name: value for name, value in vars(args).items() if name not in ("json", "memory_child")}
    total = 2 * args.memory_rounds * len(args.memory_workloads)
    if args.rounds:
        total += (
            2 * max(args.rounds, 3) * args.poses
            + (2 + 2 * args.rounds) * len(make_workloads(args))
            + (1 + len(ORIGINAL_BATCH_SIZES)) * min(args.rounds, 3) * args.original
        )
    with tqdm(total=total, unit="run") as bar:
        # The children come first: beside a large parent they would share its caches and memory.
        if args.memory_rounds:
            results["memory"] = measure_memory(args, bar)
            results["ratio_memory"] = max(row["ratio"] for row in results["memory"])
        if args.rounds:
            models = make_models(args)
            results["time"] = measure_time(args, models, bar)
            results["ratio_time"] = max(row["ratio"] for row in results["time"])
            if args.poses:
                results["poses"] = measure_pose_slope(args, models, bar)
            if args.profile:
                results["profile"] = profile_workloads(args, models, bar)
            del models
            if args.original:
                results["original"] = measure_original(args, bar)
        if args.paths:
            results["paths"] = compare_paths(args, bar)
        if args.leak:
            results["leak"] = measure_leak(args, bar)
    print(f"\nchatpose_hf {results['git_revision']}, {results['versions']}, {results['hardware']}, {results['date']}")
    titles = {
        "time": "Seconds, ratio ours / plain",
        "memory": "Peak memory, ratio ours / plain",
        "original": "Prompts a second, ratio ours / the original's algorithm",
        "poses": "One more pose",
        "profile": "Percent of the time by operator",
        "paths": "Largest difference of a pose to the teacher-forced forward",
        "leak": "Memory over many calls",
    }
    for name, title in titles.items():
        if name in results:
            print_table(title, results[name])
    print(f"\nworst median ratios: time {results['ratio_time']}, memory {results['ratio_memory']}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
