"""
Data: rows a second of each reader, pictures a second of synthetic people, what a mixture costs over its bare sources, and
the memory of streaming a million rows.

    python benchmarks/bench_data.py [--cmu cmu_poses] [--json benchmarks/results/data_cpu.json]

The readers' trees are made up in the data sets' own layouts, by what the tests make theirs with; reading is timed, not the
making. Ends in about five minutes on 2 CPU cores.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from bench_generate import describe_environment
from PIL import Image
from tqdm import tqdm

from chatpose_hf.data import find_source
from chatpose_hf.data.mixture import Mixture, MixtureStream
from chatpose_hf.data.prepare import prepare_rows
from chatpose_hf.data.rows import load_rows, write_rows
from chatpose_hf.data.synthetic import SyntheticPeople


sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("tests", "examples")]
import test_data_amass  # noqa: E402
import test_data_bedlam  # noqa: E402
import test_data_llava  # noqa: E402
import test_data_mocap  # noqa: E402
import test_data_posescript  # noqa: E402
import test_data_rpe_refined  # noqa: E402
from test_data_mixture import make_rows  # noqa: E402


datasets.disable_progress_bars()
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # five seconds at the end of each shuffled stream


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG that takes as long to decode as a photo: smooth, with some noise."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(small) + rng.normal(0, 6, (size[1], size[0], 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_posescript(folder: Path) -> None:
    """20,000 poses with four captions in 40 motions."""
    motions = [f"{subset}/s/{number}_poses.npz" for subset in ("ACCAD", "KIT", "CMU", "SFU") for number in range(10)]
    for motion in motions:
        test_data_amass.write_motion(folder / "AMASS" / motion, 2000)
    places = {str(id): ["AMASS", motions[id % 40], id // 40] for id in range(20_000)}
    texts = {id: [f"The left knee of {id} is bent while the arms are raised." for _ in range(3)] for id in places}
    test_data_posescript.write_release(
        folder / "posescript_release",
        places,
        dict.fromkeys(places, "He kneels."),
        texts,
        {"train": list(range(20_000))},
    )


def make_amass(folder: Path) -> None:
    for number in range(40):
        test_data_amass.write_motion(folder / "CMU" / "s" / f"{number}_poses.npz", 6000)


def make_mocap(folder: Path) -> None:
    test_data_mocap.write(folder, "1.asf", test_data_mocap.asf())
    for number in range(4):
        test_data_mocap.write(folder, f"1_{number}.amc", test_data_mocap.amc(*[{"lfemur": [20, 0, 0]}] * 12_000))


def make_bedlam(folder: Path) -> None:
    """100 pictures of 1280 x 720, three people each."""
    names = [f"seq_000000/seq_000000_{number // 3:04d}.png" for number in range(300)]
    centers, scales = np.full((300, 2), 400.0), np.full(300, 1.5)
    test_data_bedlam.write_labels(
        folder, test_data_bedlam.SCENE, test_data_bedlam.labels(names, center=centers, scale=scales)
    )
    image = Image.open(io.BytesIO(photo((1280, 720))))
    for name in dict.fromkeys(names):
        test_data_bedlam.write_image(folder, test_data_bedlam.SCENE, name, image)


def make_llava(folder: Path) -> None:
    """20,000 conversations, one in four about a picture of 640 x 480."""
    names = [f"coco/train2017/{number:012d}.jpg" for number in range(100)]
    for name in names:
        test_data_llava.put(folder, name, photo((640, 480)))
    chat = test_data_llava.chat("<image>\nWhat is the man doing?", "He rides a horse.", "Where?", "On a beach.")
    words = test_data_llava.chat("What is the capital of France? " * 10, "Paris. " * 40)
    test_data_llava.write(
        folder,
        [
            {"id": str(number), "image": names[number % 100], "conversations": chat}
            if number % 4 == 0
            else {"id": str(number), "conversations": words}
            for number in range(20_000)
        ],
    )


def make_rpe_refined(folder: Path) -> None:
    """50 items about a picture of 1080 x 1920."""
    test_data_rpe_refined.put(folder, test_data_rpe_refined.BUS, photo((1080, 1920)))
    test_data_rpe_refined.write(folder, [test_data_rpe_refined.make_item(f"{number:06d}") for number in range(50)])


TREES = {
    "posescript": make_posescript,
    "amass": make_amass,
    "mocap": make_mocap,
    "bedlam": make_bedlam,
    "llava": make_llava,
    "rpe-refined": make_rpe_refined,
}


def bench_readers(cmu: Path | None) -> list[dict]:
    """Rows a second of each reader in one process, the second time over: files are in the system's cache."""
    results = []
    with tempfile.TemporaryDirectory() as root:
        folders = {}
        for name, make in tqdm(TREES.items(), desc="making trees"):
            folders[name] = Path(root) / name
            folders[name].mkdir()
            make(folders[name])
        if cmu:
            folders["cmu"] = cmu
        for name, folder in tqdm(folders.items(), desc="readers"):
            for _ in range(2):
                seconds, count = time_rows(find_source(name)(folder))
            results.append({"name": name, "rows": count, "rows_per_second": count / seconds})
    return results


def time_rows(rows) -> tuple[float, int]:
    """Seconds and rows of one iteration."""
    start = time.perf_counter()
    count = sum(1 for _ in rows)
    return time.perf_counter() - start, count


def bench_mixture(folders: list[Path], weights: list[float], rounds: int) -> list[dict]:
    """A mixture against its own sources read one after the other, the same number of rows of each, taking turns."""
    return [_bench_mixture(name, folders, weights, rounds) for name in ("rows at hand", "stream")]


def _bench_mixture(name: str, folders: list[Path], weights: list[float], rounds: int) -> dict:
    sources = [load_rows(folder, streaming=name == "stream") for folder in folders]
    mixture = (MixtureStream if name == "stream" else Mixture)(sources, weights)
    count = sum(1 for _ in (mixture if name == "stream" else map(mixture.__getitem__, range(len(mixture)))))
    shares = [round(count * weight / sum(weights)) for weight in weights]

    def mixed():
        mixture.set_epoch(0)
        return time_rows(mixture if name == "stream" else map(mixture.__getitem__, range(len(mixture))))

    decoder = datasets.Image()

    def read(source, share):
        """Left to itself, a stream decodes the pictures of a whole batch of which only some rows are taken."""
        for row in islice(source, share):
            if name == "stream" and row["images"]:
                row["images"] = [decoder.decode_example(image) for image in row["images"]]
            yield row

    def bare():
        # Shuffled, as every training reads them.
        undecoded = [source.decode(False) if name == "stream" else source for source in sources]
        shuffled = [source.shuffle(seed=number) for number, source in enumerate(undecoded)]
        return time_rows(chain(*map(read, shuffled, shares)))

    bare()
    pairs = [(mixed(), bare()) for _ in tqdm(range(rounds), desc=f"mixture, {name}", unit="round")]
    ratios = [(a / n) / (b / m) for (a, n), (b, m) in pairs]
    return {
        "name": name,
        "us_per_row": statistics.median(a / n for (a, n), _ in pairs) * 1e6,
        "bare_us_per_row": statistics.median(b / m for _, (b, m) in pairs) * 1e6,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def _make_pictures(folder: Path, size: int, parts: list[str]) -> int:
    """In a process of its own."""
    torch.set_num_threads(1)
    source = SyntheticPeople(folder, image_size=size, count=10_000)
    return sum(1 for part in parts for _ in islice(source.rows(part), 250))


def bench_synthetic(folder: Path, workers: int) -> list[dict]:
    """Whole rows: poses sampled, captions written, pictures drawn and encoded; nine of ten show one person."""
    results = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(partial(_make_pictures, folder, 64), [["train/000000"]] * workers))  # imports, and what is kept
        for size in (128, 224, 336):
            start = time.perf_counter()
            parts = [[f"train/{number:06}"] for number in range(1, workers + 1)]
            count = sum(pool.map(partial(_make_pictures, folder, size), parts))
            seconds = time.perf_counter() - start
            results.append({"pixels": size, "processes": workers, "pictures_per_second": count / seconds})
    return results


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def bench_memory(files: list[Path], target: int) -> list[dict]:
    """Resident memory while a stream gives a million rows."""
    stream = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=True)
    mixture = MixtureStream([stream, stream, stream], [1, 1, 2])
    results, count, start = [], 0, time.perf_counter()
    with tqdm(total=target, desc="memory", unit="row") as bar:
        while count < target:
            mixture.set_epoch(count)
            for _ in mixture:
                count += 1
                if count % (target // 10) == 0:
                    results.append({"rows": count, "resident_mb": resident_bytes() / 1e6})
                    bar.update(target // 10)
                if count == target:
                    break
    results[-1]["rows_per_second"] = target / (time.perf_counter() - start)
    return results


def print_table(title: str, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        print(f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cmu", type=Path, metavar="DIR", help="also the poses of CMU, and everything from them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1_000_000, help="streamed for the memory")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    options.device = "cpu"

    results = {"readers": bench_readers(options.cmu)}
    print_table("Readers", results["readers"])
    with tempfile.TemporaryDirectory() as root:
        texts, pictures, chats = (Path(root) / name for name in ("texts", "pictures", "chats"))
        if options.cmu:
            prepare_rows(find_source("cmu")(options.cmu), texts)
        else:
            (texts / "train").mkdir(parents=True)
            write_rows(texts / "train" / "0.parquet", make_rows("texts", 3000))
        results["synthetic"] = bench_synthetic(texts, options.workers)
        print_table("Synthetic people", results["synthetic"])
        prepare_rows(SyntheticPeople(texts, count=2000), pictures, workers=options.workers)
        make_llava(Path(root))
        prepare_rows(find_source("llava")(Path(root)), chats, limit=2000)
        results["mixture"] = bench_mixture([texts, chats, pictures], [1, 1, 2], options.rounds)
        print_table("Mixture 1 : 1 : 2 of texts with poses, chats, pictures", results["mixture"])
        results["mixture_of_texts"] = bench_mixture([texts, texts, texts], [1, 1, 2], options.rounds)
        print_table("The same of texts alone, whose rows are read fastest", results["mixture_of_texts"])
        parts = sorted((texts / "train").glob("*.parquet"))
        results["memory"] = bench_memory(parts * 40, options.rows)
        print_table("Memory", results["memory"])
    if options.json:
        Path(options.json).write_text(
            json.dumps({**describe_environment(options), "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
