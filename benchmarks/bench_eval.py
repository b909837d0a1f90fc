"""
`chatpose eval`'s answers against plain `LlavaForConditionalGeneration.generate` on the same questions: what batching rows,
decoding poses and keeping every answer costs.

    python benchmarks/bench_eval.py --model smollm2-base --data rows/cmu --json benchmarks/results/eval_cpu.json
    python benchmarks/bench_eval.py --model chatpose-13b --data rows/posescript --device cuda --dtype bfloat16 --limit 512 \\
        --batch-size 32 --json benchmarks/results/eval_cuda.json

Hardware: 2 CPU cores and 4 GB of memory for the first, whose model examples/make_base.py makes: some six minutes. How to
read the numbers: benchmarks/README.md.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import PartialState
from bench_generate import describe_environment
from transformers import LlavaConfig, LlavaForConditionalGeneration

from chatpose_hf import answers
from chatpose_hf.adapters import load_trained
from chatpose_hf.answers import Generation, ask_model, find_revision
from chatpose_hf.data.rows import load_rows
from chatpose_hf.questions import Questions


def make_plain(model) -> LlavaForConditionalGeneration:
    """A plain LLaVA that holds the same modules."""
    config = model.config
    fields = {"image_token_index": config.image_token_index, "image_seq_length": config.image_seq_length}
    with torch.device("meta"):
        plain = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=config.vision_config, text_config=config.text_config, **fields)
        ).eval()
    plain.model, plain.lm_head, plain.generation_config = model.model, model.lm_head, model.generation_config
    return plain


def answer_plainly(plain, processor, questions: Questions, batches: list[list[int]], new_tokens: int) -> list[str]:
    """What one would write without us: template, batch, generate, decode."""
    texts = {}
    for indices in batches:
        batch = processor.apply_chat_template(
            questions.make_chats(indices),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(plain.device, dtype=plain.dtype)
        with torch.inference_mode():
            output = plain.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        replies = processor.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.update(zip(indices, replies, strict=True))
    return [texts[index].strip() for index in range(len(texts))]


def timed(work: Callable[[], list[str]], device: torch.device) -> tuple[float, list[str]]:
    start = time.perf_counter()
    texts = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", required=True, help="folder or Hub id of a ChatPose")
    parser.add_argument("--data", required=True, help="folder or Hub id of rows")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=128, help="questions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    model, processor = load_trained(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device)
    # The same work in every round and on both sides: so many tokens, the last of them `<POSE>`.
    model.generation_config.min_new_tokens = args.new_tokens
    model.generation_config.forced_eos_token_id = model.config.pose_token_id
    plain = make_plain(model)
    answers.load_trained = lambda *_, **__: (model, processor)  # loading is not what is compared
    questions = Questions(load_rows(args.data, args.split, decode=False), "text-to-pose", limit=args.limit)
    generation = Generation(args.batch_size, args.new_tokens, False, args.dtype)
    state = PartialState(cpu=args.device == "cpu")
    in_order = list(range(len(questions.items)))
    orders = {
        "plain": questions.make_batches(args.batch_size),
        "plain, in the rows' order": [
            in_order[start : start + args.batch_size] for start in range(0, len(in_order), args.batch_size)
        ],
    }

    with tempfile.TemporaryDirectory() as folder:

        def answer(side: str, number: int) -> list[str]:
            if side == "ours":
                where = f"{folder}/{number}"
                weights = find_revision(args.model, None)
                records = ask_model(questions, args.model, None, weights, where, generation, state, model.device)
                return [record["text"] for record in records]
            return answer_plainly(plain, processor, questions, orders[side], args.new_tokens)

        sides = ["ours", *orders]
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-1, args.rounds):
            texts = {}
            for side in sides:
                taken, texts[side] = timed(partial(answer, side, number), model.device)
                if number >= 0:  # the first warms up
                    seconds[side].append(taken)
            if texts["ours"] != texts["plain"]:
                raise SystemExit("the sides answer differently: nothing is compared")
        if not all("<POSE>" in text for text in texts["ours"]):
            raise SystemExit("an answer has no pose: ours did less than it should")

    results = []
    for side in orders:
        ratios = [ours / other for ours, other in zip(seconds["ours"], seconds[side], strict=True)]
        results.append(
            {
                "name": f"ours / {side}",
                "questions_per_second": len(in_order) / median(seconds["ours"]),
                "other_questions_per_second": len(in_order) / median(seconds[side]),
                "ratio_time": median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
        print(
            f"{results[-1]['name']:36} {median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]   "
            f"{results[-1]['questions_per_second']:.2f} and {results[-1]['other_questions_per_second']:.2f} questions/s"
        )
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {**describe_environment(args), "settings": settings, "results": results}
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
