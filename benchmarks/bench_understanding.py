"""
What a checkpoint understands of plain words, measured by geometry; how often it gives a pose; what a first answer costs.

    python benchmarks/bench_understanding.py MODEL --rows rows/key_poses rows/cmu --json understanding.json --sheet sheet.png

Hardware: 2 CPU cores. Time: 40 seconds with a model of 1.3 M weights. The prompts are drawn from the grammar in
instructions.json and judged by pose_conditions.py; unrelated.json holds questions that want no pose. How to read the
numbers: benchmarks/README.md.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from bench_generate import describe_environment
from PIL import Image
from pose_conditions import find_held, make_points, mirror

from chatpose_hf import ChatPosePipeline
from chatpose_hf.adapters import load_trained
from chatpose_hf.body import BodyModel
from chatpose_hf.data.key_poses import KeyPoses
from chatpose_hf.data.prompts import PHRASE_QUESTION, fill_template
from chatpose_hf.data.rows import caption_texts, load_rows
from chatpose_hf.metrics import bootstrap
from chatpose_hf.render import contact_sheet, render_bodies


HERE = Path(__file__).parent
QUESTIONS = {"bare": "{sent}", "phrase": PHRASE_QUESTION}
SIZES = (1, 2, 1, 3, 1, 2)  # of the prompts in turn, in conditions
ROLLS = range(1, 11)  # by how many places answers are moved for the figure of chance
POSE_TOKENS, WORD_TOKENS = 32, 48
# A process of its own starts what is measured: until a child runs, the kernel counts its parent's memory as the child's.
LAUNCHER = """import json, os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(); print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss / 1024]))"""


class Prompt(NamedTuple):
    """What is asked, and what must hold: of each condition a name and a side, `"left"`, `"right"` or `""`, both or none."""

    text: str
    parts: tuple[tuple[str, str], ...]


def keep_letters(text: str) -> str:
    """A text as it is compared with what a model was trained on."""
    return re.sub(r"[^a-z]", "", text.lower())


def make_prompts(count: int, trained_on: Iterable[str] = (), seed: int = 0) -> tuple[list[Prompt], int]:
    """
    Prompts drawn from the grammar, no two alike, whose conditions one body can fulfil.

    Args:
        count (`int`): how many.
        trained_on (`Iterable[str]`, *optional*): texts in none of which a prompt may occur, but for case and punctuation.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Returns:
        `(list[Prompt], int)`: the prompts; how many others were dropped for a text that was trained on.
    """
    grammar = json.loads((HERE / "instructions.json").read_text())
    rng = random.Random(seed)
    known = "\n".join(map(keep_letters, trained_on))
    # Of single conditions each comes in its turn, so that none is rare.
    singles: list[dict] = []
    prompts: dict[str, Prompt] = {}
    dropped: set[str] = set()
    while len(prompts) < count:
        size = SIZES[len(prompts) % len(SIZES)]
        singles = singles or rng.sample(grammar["items"], len(grammar["items"]))
        items = [singles.pop()] if size == 1 else rng.sample(grammar["items"], size)
        items.sort(key=grammar["items"].index)  # postures are said first
        acts = [_draw_act(rng, item) for item in items]
        if not all(_are_compatible(*pair) for pair in combinations(acts, 2)):
            continue
        frame = rng.choice(grammar["frames"])
        said = [_inflect(words, frame["form"], frame["your"]) for _, _, words in acts]
        act = said[0] if size == 1 else rng.choice(grammar["joins"][str(size)]).format(*said)
        text = frame["text"].format(act=act)
        if (key := keep_letters(text)) in known:
            dropped.add(key)
        elif key not in prompts:
            prompts[key] = Prompt(text[0].upper() + text[1:], tuple((item["name"], side) for item, side, _ in acts))
    return list(prompts.values()), len(dropped)


def _draw_act(rng: random.Random, item: dict) -> tuple[dict, str, str]:
    """An item, a side, and words for it."""
    has_side = any("{side}" in words for words in item["says"])
    sides = ["left", "right"] * has_side + [""] * (not has_side or "says_both" in item)
    side = rng.choice(sides)
    words = rng.choice(item["says"] if side or not has_side else item["says_both"])
    other = {"left": "right", "right": "left", "": ""}[side]
    return item, side, words.replace("{side}", side).replace("{other}", other)


def _inflect(words: str, form: int, your: str) -> str:
    return re.sub(r"\[(.*?)\]", lambda match: match[1].split("|")[form], words).replace("{your}", your)


def _are_compatible(first: tuple[dict, str, str], second: tuple[dict, str, str]) -> bool:
    """Whether no limb is wanted twice, and what is told by directions in the room is told of an upright trunk."""
    wanted: list[set[str]] = []
    for item, side, _ in (first, second):
        arms = {f"{each} arm" for each in ([side] if side and "arm" in item["uses"] else ["left", "right"])}
        wanted.append(set().union(*(arms if use.startswith("arm") else {use} for use in item["uses"])))
    return not wanted[0] & wanted[1] and {first[0].get("trunk"), second[0].get("trunk")} != {"upright", "turned"}


def load_texts(folders: Sequence[str]) -> list[str]:
    """Every caption and message of rows, of all their splits."""
    texts: dict[str, None] = {}
    for folder in folders:
        for split in sorted({path.parent.name for path in Path(folder).glob("*/*.parquet")}) or ["train"]:
            for row in load_rows(folder, split, decode=False).select_columns(["captions", "messages"]):
                said = [part["text"] for message in row["messages"] for part in message["content"]]
                texts.update(dict.fromkeys(text for text in said if text))
                texts.update(dict.fromkeys(caption["text"] for caption in row["captions"]))
    return list(texts)


def ask(pipe: ChatPosePipeline, texts: Sequence[str], max_new_tokens: int, batch_size: int) -> list[dict]:
    """Greedy answers in the texts' order: `text`, and `pose`, `(24, 3)`, the first, or `None`."""
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    answers: dict[int, dict] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        chats = [[{"role": "user", "content": [{"type": "text", "text": texts[index]}]}] for index in indices]
        replies = pipe.forward({"chat": chats}, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)["reply"]
        for index, reply in zip(indices, replies, strict=True):
            pose = reply["poses"][0]["theta"].detach().float().cpu().reshape(24, 3) if reply["poses"] else None
            if pose is not None and not pose.isfinite().all():
                raise SystemExit(f"expected finite numbers as the pose of {texts[index]!r}, got NaN or infinity")
            answers[index] = {"text": reply["text"], "pose": pose}
    return [answers[index] for index in range(len(texts))]


def place_answers(answers: Sequence[dict]) -> list[np.ndarray | None]:
    """Of each answer the points of its body, as from [`make_points`]; `None` where it has none."""
    poses = [answer["pose"] for answer in answers if answer["pose"] is not None]
    placed = iter(make_points(torch.stack(poses)) if poses else ())
    return [None if answer["pose"] is None else next(placed) for answer in answers]


def estimate(name: str, values: Sequence[float]) -> dict:
    """A mean of percentages and its interval, or nothing where there are no values."""
    if not len(values):
        return {"name": name, "percent": None, "low": None, "high": None, "count": 0}
    found = bootstrap(torch.tensor([float(value) for value in values]) * 100)
    return {"name": name, "percent": found[0], "low": found[1], "high": found[2], "count": len(values)}


def judge_instructions(prompts: Sequence[Prompt], answers: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """
    How many prompts the answers' poses fulfil, by the number of their conditions and by condition.

    Returns:
        `(list[dict], list[dict])`: figures; and each prompt with its answer, its conditions and those that failed.
    """
    bodies = place_answers(answers)
    held = [find_held(body, prompt.parts) for prompt, body in zip(prompts, bodies, strict=True)]
    satisfied = [all(each) for each in held]
    mistaken = [
        not done and body is not None and all(find_held(mirror(body), prompt.parts))
        for prompt, body, done in zip(prompts, bodies, satisfied, strict=True)
    ]
    by_chance = [
        np.mean([all(find_held(bodies[(number + roll) % len(bodies)], prompt.parts)) for roll in ROLLS])
        for number, prompt in enumerate(prompts)
    ]
    sided = [number for number, prompt in enumerate(prompts) if any(side for _, side in prompt.parts)]
    results = [
        estimate("satisfied", satisfied),
        estimate("satisfied by the answers to other prompts", by_chance),
        estimate("satisfied, a side named", [satisfied[number] for number in sided]),
        estimate("left and right confused", [mistaken[number] for number in sided]),
    ]
    for size in sorted(set(SIZES)):
        done = [done for done, each in zip(satisfied, held, strict=True) if len(each) == size]
        results.append(estimate(f"satisfied, of {size} conditions", done))
    by_name: dict[str, list[bool]] = {}
    for prompt, each in zip(prompts, held, strict=True):
        for (name, _), holds in zip(prompt.parts, each, strict=True):
            by_name.setdefault(name, []).append(holds)
    results += [estimate(f"condition {name}", by_name[name]) for name in sorted(by_name)]
    records = []
    for prompt, answer, each in zip(prompts, answers, held, strict=True):
        names = [" ".join(part).strip() for part in prompt.parts]
        failed = [name for name, holds in zip(names, each, strict=True) if not holds]
        records.append({"prompt": prompt.text, "conditions": names, "failed": failed, "text": answer["text"]})
    return results, records


def judge_named(kind: str, answers: Sequence[dict], numbers: Sequence[int], poses: torch.Tensor) -> list[dict]:
    """How many answers are nearest to the pose that was asked for, `numbers` of all `poses`, by 22 joints' distances."""
    joints = make_points(poses)[:, :22]
    ranks = []
    for number, body in zip(numbers, place_answers(answers), strict=True):
        if body is None:
            ranks.append(math.inf)
            continue
        distances = np.linalg.norm(joints - body[:22], axis=-1).mean(-1)
        ranks.append(int((distances < distances[number]).sum()))
    return [estimate(f"{kind}, top {top}", [rank < top for rank in ranks]) for top in (1, 5)]


def measure_start(model: str, device: str) -> list[dict]:
    """Seconds and peak memory of fresh processes, the median of three: one answer with its files, and the import alone."""
    run = "import sys; from chatpose_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        answer = ["generate", "Stand on one leg.", "--model", model, "--output", folder, "--device", device]
        for name, command in (
            ("one answer", ["-c", run, *answer, "--max-new-tokens", str(POSE_TOKENS)]),
            ("import", ["-c", "from chatpose_hf import ChatPosePipeline"]),
        ):
            rounds = []
            for _ in range(3):
                arguments = [sys.executable, "-c", LAUNCHER, sys.executable, *command]
                done = subprocess.run(arguments, capture_output=True, text=True, check=True)
                status, *numbers = json.loads(done.stdout.splitlines()[-1])
                if status:
                    raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
                rounds.append(numbers)
            seconds, memory = zip(*rounds, strict=True)
            results.append({"name": name, "seconds": median(seconds), "peak_mib": median(memory), "rounds": rounds})
    return results


def draw_sheet(records: Sequence[dict], answers: Sequence[dict], count: int = 30) -> Image.Image:
    """Some of the prompts, each with whether it is fulfilled and the answer's pose."""
    body = BodyModel.load("default")
    pictures, captions = [], []
    for index in sorted(random.Random(0).sample(range(len(records)), min(count, len(records)))):
        pose, failed = answers[index]["pose"], records[index]["failed"]
        blank = Image.new("RGB", (256, 256), "white")
        pictures.append(blank if pose is None else render_bodies(body.vertices(pose), body.faces, size=256, view=30))
        captions.append(f"{'FAILS ' + ', '.join(failed) if failed else 'HOLDS'}: {records[index]['prompt']}")
    return contact_sheet(pictures, captions, columns=6, max_lines=4)


def pick_evenly(total: int, limit: int | None) -> Collection[int]:
    count = min(limit or total, total)
    return [number * total // count for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("model", help="folder or Hub id of a ChatPose")
    parser.add_argument("--rows", nargs="+", default=[], metavar="DIR", help="trained on: nothing of them is asked")
    parser.add_argument("--key-poses", default=str(HERE.parent / "examples" / "key_poses"), metavar="DIR")
    parser.add_argument("--ask", choices=QUESTIONS, default="bare", help="the prompt alone, or ChatPose's question")
    parser.add_argument("--limit", type=int, metavar="N", help="of each part's questions")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--sheet", metavar="FILE.png")
    args = parser.parse_args()

    prompts, dropped = make_prompts(min(args.limit or 300, 300), load_texts(args.rows))
    unrelated = json.loads((HERE / "unrelated.json").read_text())
    unrelated = [unrelated[number] for number in pick_evenly(len(unrelated), args.limit)]
    source = KeyPoses(args.key_poses)
    rows = [row for part in source.parts() if part.startswith("val/") for row in source.read_part(part)]
    poses = torch.stack([torch.tensor(row["poses"][0]) for row in rows if row["task"] == "spg"]).reshape(-1, 24, 3)
    named = pick_evenly(len(poses), args.limit)

    results = {"cold start": measure_start(args.model, args.device)}
    model, processor = load_trained(args.model, dtype=getattr(torch, args.dtype))
    pipe = ChatPosePipeline(model=model, processor=processor, device=torch.device(args.device))

    def ask_for_poses(texts: Iterable[str]) -> list[dict]:
        asked = [fill_template(QUESTIONS[args.ask], text) for text in texts]
        return ask(pipe, asked, POSE_TOKENS, args.batch_size)

    answers = ask_for_poses(prompt.text for prompt in prompts)
    results["instructions"], records = judge_instructions(prompts, answers)
    requested, results["named poses"] = list(answers), []
    told = [row for row in rows if row["task"] == "spg"]
    for name, kind in (("implicit", "implicit"), ("explicit", "human")):
        replies = ask_for_poses(caption_texts(told[number], [kind])[0] for number in named)
        results["named poses"] += judge_named(name, replies, named, poses)
        requested += replies
    remarks = ask(pipe, unrelated, WORD_TOKENS, args.batch_size)
    results["pose token"] = [
        estimate(name, [answer["pose"] is not None for answer in given])
        for name, given in (("asked for a pose", requested), ("asked for something else", remarks))
    ]

    for part, figures in results.items():
        print(f"\n### {part}\n")
        for row in figures:
            name, low, high = row["name"], row.get("low"), row.get("high")
            if part == "cold start":
                print(f"{name:44} {row['seconds']:.2f} s, {row['peak_mib']:.0f} MiB")
            elif row["count"]:
                print(f"{name:44} {row['percent']:5.1f} % [{low:.1f}, {high:.1f}] of {row['count']}")
    print(f"\n{dropped} prompts were dropped for a sentence that was trained on")
    if args.sheet:
        draw_sheet(records, answers).save(args.sheet)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "sheet")}
        said = [{"prompt": text, "text": answer["text"]} for text, answer in zip(unrelated, remarks, strict=True)]
        record = {"settings": settings, "dropped_prompts": dropped, "results": results}
        record |= {"answers": records, "answers to something else": said}
        Path(args.json).write_text(json.dumps({**describe_environment(args), **record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
