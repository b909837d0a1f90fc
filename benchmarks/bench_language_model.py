"""
What language models know of poses before they are trained on any: whose states tell the named pose of unseen words.

    python benchmarks/bench_language_model.py smollm2_base smollm2_base_new --texts 4 --json FILE

Each model is a ChatPose folder, such as examples/chatpose_smollm2.py writes, with and without `--new-weights`; "words" is TF-IDF in its
place. Hardware: 2 CPU cores and 4 GB of memory. Time: 5 minutes a model of 135 M weights. How to read the numbers: benchmarks/README.md.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from bench_generate import describe_environment, print_table, write_json
from bench_understanding import HERE, estimate, make_points
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from tqdm import trange

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.data.key_poses import KeyPoses
from chatpose_hf.rotations import rot6d_to_rotmat, rotmat_to_rot6d, rotmat_to_rotvec, rotvec_to_rotmat


KINDS = {"situations": "implicit", "descriptions": "human"}
BATCH = 32
PENALTIES = [10.0**power for power in range(-1, 6)]


def load_texts(folder: str, count: int) -> tuple[Tensor, dict[str, tuple[list[str], Tensor]]]:
    """The poses `(N, 24, 3)`; and of train, and of val by kind, the texts and each one's number of pose."""
    source, poses = KeyPoses(folder), []
    texts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), **{kind: ([], []) for kind in KINDS}}
    for split in ("train", "val"):
        parts = [part for part in source.parts() if part.startswith(split)]
        rows = [row for part in parts for row in source.read_part(part) if row["task"] == "spg"]
        by_id: dict[str, list[dict]] = {}
        for row in rows:  # the situations of a pose stand in several
            by_id.setdefault(row["id"].split("/spg")[0], []).append(row)
        poses = [torch.tensor(rows[0]["poses"][0]).reshape(24, 3) for rows in by_id.values()]
        for number, rows in enumerate(by_id.values()):
            for name, kind in KINDS.items():
                captions = [caption for row in rows for caption in row["captions"] if caption["kind"] == kind]
                said = list(dict.fromkeys(caption["text"] for caption in captions))[:count]
                known, owners = texts["train" if split == "train" else name]
                known += said
                owners += [number] * len(said)
    return torch.stack(poses), {name: (known, torch.tensor(owners)) for name, (known, owners) in texts.items()}


@torch.no_grad()
def read_states(folder: str, texts: list[str]) -> Tensor:
    """Of each text the mean of its tokens' last states, as a question in the model's own template: `(N, C)`."""
    processor = ChatPoseProcessor.from_pretrained(folder)
    model = ChatPoseForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    order = sorted(range(len(texts)), key=lambda number: len(prompts[number]))
    states = torch.zeros(len(texts), model.config.text_config.hidden_size)
    for start in trange(0, len(order), BATCH, desc=folder, unit="batch"):
        numbers = order[start : start + BATCH]
        inputs = processor(text=[prompts[number] for number in numbers], padding=True, return_tensors="pt")
        told = model.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        states[numbers] = (told * mask).sum(1) / mask.sum(1)
    return states


def read_words(texts: list[str], train: int) -> Tensor:
    """TF-IDF, of which the first `train` texts say the words that count; as a kernel with them, `(N, train)`."""
    vectors = TfidfVectorizer(sublinear_tf=True).fit(texts[:train]).transform(texts)
    return torch.from_numpy((vectors @ vectors[:train].T).toarray()).float()


def fit(features: Tensor, targets: Tensor, penalties: list[float]) -> list[Tensor]:
    """Ridge regression, `(N, C)` and `(N, K)` to `(C, K)` for each penalty."""
    gram, told = features.T @ features, features.T @ targets
    unit = gram.diagonal().mean() * torch.eye(len(gram))
    return [torch.linalg.solve(gram + penalty * unit, told) for penalty in penalties]


def rank_classes(told: Tensor, owners: Tensor) -> Tensor:
    """Of scores `(N, P)` how many of the poses have a higher one than the right pose."""
    return (told > told.gather(1, owners[:, None])).sum(1)


def rank_rotations(told: Tensor, owners: Tensor, points: Tensor) -> Tensor:
    """Of rotations `(N, 24 * 6)` how many of the poses, by their `points` `(P, 22, 3)`, are nearer than the right one."""
    found = torch.from_numpy(make_points(rotmat_to_rotvec(rot6d_to_rotmat(told.unflatten(-1, (24, 6))))))[:, :22]
    return rank_classes(-(found[:, None] - points[None]).norm(dim=-1).mean(-1), owners)


def probe(name: str, features: Tensor, poses: Tensor, texts: dict) -> list[dict]:
    """How often the right pose is first, or among five: by a classifier, and by a regression of its rotations."""
    sizes = [len(owners) for _, owners in texts.values()]
    mean, scale = features[: sizes[0]].mean(0), features[: sizes[0]].std(0) + 1e-6
    train, *tests = ((features - mean) / scale).split(sizes)
    owners = texts["train"][1]
    # The penalty by a fifth of train, drawn once.
    is_kept = torch.rand(len(owners), generator=torch.Generator().manual_seed(0)) < 0.8
    rot6d = rotmat_to_rot6d(rotvec_to_rotmat(poses)).flatten(1)
    points = torch.from_numpy(make_points(poses))[:, :22]
    results = []
    for what, targets, rank in (
        ("class", torch.eye(len(poses)), rank_classes),
        ("rotations", rot6d, partial(rank_rotations, points=points)),
    ):
        middle = targets.mean(0)
        wanted = targets[owners] - middle
        tried = fit(train[is_kept], wanted[is_kept], PENALTIES)
        ranks = [rank(train[~is_kept] @ weights + middle, owners[~is_kept]) for weights in tried]
        best = max(range(len(PENALTIES)), key=lambda number, ranks=ranks: int((ranks[number] == 0).sum()))
        (weights,) = fit(train, wanted, [PENALTIES[best]])
        for kind, test in zip(KINDS, tests, strict=True):
            placed = rank(test @ weights + middle, texts[kind][1])
            for top in (1, 5):
                row = estimate(f"{kind}, top {top}", (placed < top).tolist())
                results.append({"features": name, "by": what, **row})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="ChatPose folders")
    parser.add_argument("--key-poses", default=str(HERE.parent / "examples" / "key_poses"), metavar="DIR")
    parser.add_argument("--texts", type=int, default=12, help="to learn from, of each pose and kind")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.device = "cpu"
    poses, texts = load_texts(args.key_poses, args.texts)
    said = [text for known, _ in texts.values() for text in known]
    results = probe("words", read_words(said, len(texts["train"][0])), poses, texts)
    for folder in args.models:
        results += probe(Path(folder).name, read_states(folder, said), poses, texts)
    print_table(f"The right one of {len(poses)} poses, from {len(texts['train'][0])} texts", results)
    if args.json:
        settings = {"models": [Path(folder).name for folder in args.models], "texts": args.texts}
        write_json(args.json, {**describe_environment(args), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
