"""Mixtures: proportions, epochs, shards, and going on where an iteration stopped."""

import io
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from chatpose_hf.data.mixture import Mixture, MixtureStream
from chatpose_hf.data.prompts import draw_messages
from chatpose_hf.data.rows import load_rows, validate_row, write_rows


def make_rows(source, count, with_image=False):
    texts = [{"kind": "human", "text": text} for text in ("He stands.", "He sits.", "He lies.")]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    for number in range(count):
        id = f"{source}_{number}"
        task = "pose_estimation" if with_image else "text_to_pose"
        yield {
            "id": id,
            "source": source,
            "task": task,
            "messages": draw_messages(task, texts, int(with_image), 1, seed=0, id=id),
            "images": [{"bytes": buffer.getvalue(), "path": None}] * with_image,
            "poses": [np.full((24, 3), number, dtype=np.float32)],
            "pose_mask": [[True] * 24],
            "captions": texts,
            "licence": "CC0",
        }


SIZES = {"posescript": 150, "vqa": 400, "image": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each source in four files."""
    root = tmp_path_factory.mktemp("sources")
    for source, size in SIZES.items():
        rows = list(make_rows(source, size, with_image=source == "image"))
        (root / source / "train").mkdir(parents=True)
        for part in range(4):
            write_rows(root / source / "train" / f"{part}.parquet", rows[part::4])
    return root


@pytest.fixture(scope="module")
def at_hand(folder):
    return [load_rows(folder / source) for source in SIZES]


@pytest.fixture
def streams(folder, monkeypatch):
    # `datasets` waits five seconds for threads of Arrow where a shuffled stream ends.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    return [load_rows(folder / source, streaming=True) for source in SIZES]


def ids(rows):
    return [row["id"] for row in rows]


def test_mixture_when_weighted_then_has_exactly_the_shares_and_no_row_twice(at_hand):
    mixture = Mixture(at_hand, [1, 1, 2])
    rows = [mixture[n] for n in range(len(mixture))]
    # "posescript" is the first to run out: its 150 rows are a quarter.
    assert Counter(row["source"] for row in rows) == {"posescript": 150, "vqa": 150, "image": 300}
    assert len(set(ids(rows))) == len(rows)
    for row in rows[:20]:
        validate_row(row)


def test_mixture_when_epochs_pass_then_every_row_has_its_turn_before_any_comes_again(at_hand):
    mixture = Mixture(at_hand, [1, 1, 2])
    seen = Counter()
    for epoch in range(4):
        mixture.set_epoch(epoch)
        seen.update(mixture[n]["id"] for n in range(len(mixture)))
    for source, size in SIZES.items():
        counts = [seen[f"{source}_{number}"] for number in range(size)]
        assert min(counts) == sum(counts) // size
        assert max(counts) - min(counts) <= 1


def test_mixture_when_seed_and_epoch_are_the_same_then_is_the_same(at_hand):
    def run(seed, epoch):
        mixture = Mixture(at_hand, [1, 1, 2], seed)
        mixture.set_epoch(epoch)
        return [(row["id"], str(row["messages"])) for row in (mixture[n] for n in range(100))]

    assert run(3, 2) == run(3, 2)
    assert run(3, 2) != run(4, 2)
    assert run(3, 2) != run(3, 1)


def test_mixture_when_a_row_comes_in_two_epochs_then_its_words_differ(at_hand):
    mixture = Mixture(at_hand[:1], [1])
    words = []
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        rows = (mixture[n] for n in range(len(mixture)))
        words.append({row["id"]: str(row["messages"]) for row in rows})
    assert words[0].keys() == words[1].keys()
    assert sum(words[0][id] != words[1][id] for id in words[0]) > 120  # of 150


def test_mixture_when_conversations_alone_are_asked_for_then_they_are_the_rows_own(at_hand):
    mixture = Mixture(at_hand, [1, 1, 2])
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        assert mixture.messages() == [mixture[index]["messages"] for index in range(len(mixture))]


def test_mixture_when_sharded_by_a_sampler_then_ranks_share_no_row(at_hand):
    mixture = Mixture(at_hand, [1, 1, 2])
    of_rank = [
        {
            mixture[n]["id"]
            for n in torch.utils.data.DistributedSampler(mixture, num_replicas=3, rank=rank, drop_last=True)
        }
        for rank in range(3)
    ]
    assert not of_rank[0] & of_rank[1] | of_rank[1] & of_rank[2] | of_rank[0] & of_rank[2]


def test_mixture_when_a_source_is_too_small_then_says_so(at_hand):
    with pytest.raises(ValueError, match="one source is too small for its weight"):
        Mixture([at_hand[0].select([0]), at_hand[1]], [100, 1])


@pytest.mark.parametrize("weights", [[1], [1, 0, 1], [1, -1, 1], [1, float("inf"), 1], []])
@pytest.mark.parametrize("kind", [Mixture, MixtureStream])
def test_mixture_when_weights_are_wrong_then_says_so(at_hand, weights, kind):
    with pytest.raises(ValueError, match="expected a positive weight for each"):
        kind(at_hand, weights)


def test_stream_when_weighted_then_is_near_the_shares_and_ends_with_the_first_source(streams):
    rows = list(MixtureStream(streams, [1, 1, 2], buffer_size=50))
    counts = Counter(row["source"] for row in rows)
    assert 500 < len(rows) < 700
    assert abs(counts["image"] / len(rows) - 0.5) < 0.08  # four standard deviations
    assert abs(counts["vqa"] / len(rows) - 0.25) < 0.07
    assert counts["posescript"] == 150 or counts["image"] == 400
    assert len(set(ids(rows))) == len(rows)
    for row in rows[:20]:
        validate_row(row)
        assert all(image.size == (8, 8) for image in row["images"])


def test_stream_when_seed_and_epoch_are_the_same_then_is_the_same(streams):
    def run(seed, epoch):
        stream = MixtureStream(streams, [1, 1, 2], seed, buffer_size=50)
        stream.set_epoch(epoch)
        return [(row["id"], str(row["messages"])) for row, _ in zip(stream, range(100), strict=False)]

    assert run(3, 2) == run(3, 2)
    assert run(3, 2) != run(4, 2)
    assert run(3, 2) != run(3, 1)


@pytest.mark.parametrize("stop", [0, 1, 123, 400])
def test_stream_when_stopped_and_resumed_then_goes_on_exactly_there(streams, stop):
    def make():
        return MixtureStream(streams, [1, 1, 2], seed=1, buffer_size=50)

    whole = make()
    whole.set_epoch(1)
    rows = [(row["id"], str(row["messages"])) for row in whole]
    stopped = make()
    stopped.set_epoch(1)
    iterator = iter(stopped)
    for _ in range(stop):
        next(iterator)
    state = stopped.state_dict()
    assert state == {"epoch": 1, "rows": stop}
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(1)  # as the Trainer does at the start of an epoch
    assert [(row["id"], str(row["messages"])) for row in resumed] == rows[stop:]
    # The epoch after is a whole one.
    resumed.set_epoch(2)
    assert len(list(resumed)) > 450


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_stream_when_sharded_then_ranks_share_no_row_and_leave_none_out(streams, world_size):
    """By files where their number allows (2 and 4 of 4), by rows where not (3)."""
    of_rank = [
        ids(MixtureStream(streams[:1], [1], buffer_size=20, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    together = [id for some in of_rank for id in some]
    assert len(together) == len(set(together)) == SIZES["posescript"]
    assert all(len(some) > 30 for some in of_rank)


def test_stream_when_read_by_workers_of_a_loader_then_no_row_comes_twice(streams):
    stream = MixtureStream(streams, [1, 1, 2], buffer_size=20)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    rows = ids(loader)
    assert len(rows) == len(set(rows))
    assert len(rows) > 300
