"""Several data sets as one to train on: drawn in given proportions, anew in every epoch, the same in every run."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch.utils.data
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from .prompts import redraw_messages


_DECODER = Image()


class Mixture(torch.utils.data.Dataset):
    """
    Rows of data sets at hand, by number: for samplers, which shuffle, shard and resume by numbers.

    An epoch ends before any source would repeat a row, and goes on in each source where the epoch before stopped, so the
    rows of large sources all have their turn. Its conversations are drawn for the epoch. Everything depends on `seed`
    and epoch alone.

    Args:
        sources (`Sequence[datasets.Dataset]`): rows (`rows.FEATURES`).
        weights (`Sequence[float]`): the share of each; the paper's are 1 : 1 : 2 for texts with poses, chats, photos.
        seed (`int`, *optional*, defaults to 0): for the order and the conversations.
    """

    def __init__(self, sources: Sequence[Dataset], weights: Sequence[float], seed: int = 0):
        shares = _shares(sources, weights)
        self._sources = list(sources)
        self._seed = seed
        smallest = min(len(source) / share for source, share in zip(sources, shares, strict=True))
        self._counts = [int(smallest * share + 1e-9) for share in shares]  # the ulp that 3 / 0.6 * 0.6 may lack
        if not all(self._counts):
            raise ValueError(
                f"expected sources that give a row an epoch each, got {self._counts} rows for the weights {list(weights)}; "
                "one source is too small for its weight"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Makes the order and the conversations those of an epoch. The HF `Trainer` calls it."""
        self._epoch = epoch
        self._source_of_row = np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)
        np.random.default_rng([self._seed, epoch]).shuffle(self._source_of_row)
        self._row_in_source = np.empty(len(self), dtype=np.int64)
        for number, (source, count) in enumerate(zip(self._sources, self._counts, strict=True)):
            drawn = self._draws(number, len(source), epoch * count, count)
            self._row_in_source[self._source_of_row == number] = drawn

    def _draws(self, number: int, size: int, first: int, count: int) -> np.ndarray:
        """Some of an endless sequence of permutations, one after the other."""
        permutations = [
            np.random.default_rng([self._seed, number, turn]).permutation(size)
            for turn in range(first // size, (first + count - 1) // size + 1)
        ]
        start = first % size
        return np.concatenate(permutations)[start : start + count]

    def messages(self) -> list[list[dict]]:
        """The conversations of the epoch's rows, in their order; no picture is read for them."""
        drawn: list[list[dict]] = [[] for _ in range(len(self))]
        for number, source in enumerate(self._sources):
            indices = np.flatnonzero(self._source_of_row == number)
            rows = source.select_columns(["id", "task", "messages", "captions", "poses"]).select(
                self._row_in_source[indices]
            )
            for index, row in zip(indices, rows, strict=True):
                images = [
                    part for message in row["messages"] for part in message["content"] if part["type"] == "image"
                ]
                drawn[index] = redraw_messages({**row, "images": images}, self._seed, self._epoch)["messages"]
        return drawn

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> dict:
        row = self._sources[self._source_of_row[index]][int(self._row_in_source[index])]
        return redraw_messages(row, self._seed, self._epoch)


class MixtureStream(torch.utils.data.IterableDataset):
    """
    Rows of streams, for data too large to copy: `datasets`' own shuffling and sharding, with conversations
    drawn for the epoch. An epoch ends when a source does.

    Args:
        sources (`Sequence[datasets.IterableDataset]`): rows (`rows.FEATURES`), as `load_rows(..., streaming=True)` gives.
        weights (`Sequence[float]`): the share of each.
        seed (`int`, *optional*, defaults to 0): for the order and the conversations.
        buffer_size (`int`, *optional*, defaults to 1000): rows of each source that are shuffled at a time.
        rank (`int`, *optional*, defaults to 0), world_size (`int`, *optional*, defaults to 1):
            Which of how many processes; no row goes to two.
    """

    def __init__(
        self,
        sources: Sequence[IterableDataset],
        weights: Sequence[float],
        seed: int = 0,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._shares = _shares(sources, weights)
        # Pictures are decoded when a row leaves, not while rows that were seen already are passed over.
        self._decodes = [source.features["images"].feature.decode for source in sources]
        self._sources = [source.decode(False) for source in sources]
        self._seed = seed
        self._buffer_size = buffer_size
        self._rank, self._world_size = rank, world_size
        self._epoch = self._seen = self._resume_at = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the order and the conversations those of an epoch. The HF `Trainer` calls it."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._seen = self._resume_at = 0

    def state_dict(self) -> dict:
        """Where an iteration is: the epoch, and how many of its rows it has given."""
        return {"epoch": self._epoch, "rows": self._seen}

    def load_state_dict(self, state: dict) -> None:
        """The next iteration goes on exactly there."""
        self._epoch, self._seen, self._resume_at = state["epoch"], state["rows"], state["rows"]

    def __iter__(self) -> Iterator[dict]:
        first, self._resume_at = self._resume_at, 0
        self._seen = first
        # `IterableDataset.state_dict` would forget what lies in the shuffle buffers, so rows are counted here.
        for number, row in islice(self._stream(), first, None):
            self._seen += 1
            if row["images"] and self._decodes[number]:
                row["images"] = [_DECODER.decode_example(image) for image in row["images"]]
            yield redraw_messages(row, self._seed, self._epoch)

    def _stream(self) -> Iterator[tuple[int, dict]]:
        """
        Each row and the number of its source.

        Not by `interleave_datasets`, which hands every single row through a thread: five times the time of the bare
        streams, with datasets 5.2; picking in this loop costs little; reading ahead in runs of each stream took twice as long.
        """
        streams = [
            iter(
                split_dataset_by_node(
                    source.shuffle(seed=self._seed_of(number), buffer_size=self._buffer_size),
                    self._rank,
                    self._world_size,
                )
            )
            for number, source in enumerate(self._sources)
        ]
        rng = np.random.default_rng([self._seed, self._epoch, self._rank])
        while True:
            for number in rng.choice(len(streams), size=1000, p=self._shares).tolist():
                row = next(streams[number], None)
                if row is None:
                    return
                yield number, row

    def _seed_of(self, number: int) -> int:
        """The same on every rank, so that ranks cut one and the same order."""
        return int(np.random.SeedSequence([self._seed, self._epoch, number]).generate_state(1)[0])


def _shares(sources: Sequence, weights: Sequence[float]) -> list[float]:
    if not sources or len(sources) != len(weights) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"expected a positive weight for each of the sources, got {len(sources)} sources and the weights {list(weights)}"
        )
    return [weight / sum(weights) for weight in weights]
