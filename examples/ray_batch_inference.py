"""Poses of any number of pictures on a Ray cluster, or on this machine; a run that was stopped goes on.

    pip install "ray[data]"
    python examples/ray_batch_inference.py PICTURES OUT --model chatpose-13b --workers 8 --gpus 1

PICTURES and OUT: folders that all machines see. OUT gets a `part-NNNNNN.parquet` for each `--part` pictures, when they are done:
`image`, `reply`, `poses` (each 72 numbers, axis-angle in radians, camera frame) and `error`, what was wrong with a picture.
"""

import argparse
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from chatpose_hf import CHATPOSE_TINY, ChatPosePipeline
from chatpose_hf.adapters import load_trained
from chatpose_hf.atomic_write import write_atomically
from chatpose_hf.batch_log import check_settings
from chatpose_hf.data.prompts import IMAGE_QUESTIONS
from chatpose_hf.image_files import open_image


POSES = pa.list_(pa.list_(pa.float32()))
SCHEMA = pa.schema({"image": pa.string(), "reply": pa.string(), "poses": POSES, "error": pa.string()})
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Answerer:
    """A worker: a model that stays, and answers part after part."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        model, processor = load_trained(options.model, dtype="auto")
        device = "cuda" if options.gpus else "cpu"
        self.pipe = ChatPosePipeline(model=model, processor=processor, device=device)
        self.readers = ThreadPoolExecutor(8)

    def __call__(self, parts: dict) -> dict:
        """The one part that a call has: its file and its pictures, to how many were none."""
        names, size, buffer = parts["images"][0].tolist(), self.options.batch_size, io.BytesIO()
        rows = [row for start in range(0, len(names), size) for row in self._answer(names[start : start + size])]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
        write_atomically(Path(parts["file"][0]), buffer.getvalue())
        return {"failed": [sum(row["error"] is not None for row in rows)]}

    def _answer(self, names: list[str]) -> Iterator[dict]:
        pictures = list(self.readers.map(_read, [Path(self.options.pictures, name) for name in names]))
        asked = [{"text": self.options.question, "images": [image]} for image, _ in pictures if image]
        chats = {"chat": [self.pipe.preprocess(question)["chat"] for question in asked]}
        replies = iter(self.pipe.forward(chats, max_new_tokens=64, force_pose=True)["reply"] if asked else [])
        for name, (image, error) in zip(names, pictures, strict=True):
            reply = next(replies) if image else {"text": None, "poses": []}
            poses = [pose["theta"].tolist() for pose in reply["poses"]]
            yield {"image": name, "reply": reply["text"], "poses": poses, "error": error}


def _read(path: Path) -> tuple:
    try:
        return open_image(path), None
    except (OSError, ValueError) as error:
        return None, str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=os.path.abspath, help="folder of pictures, with the folders in it")
    parser.add_argument("output", type=os.path.abspath, help="folder to write")
    parser.add_argument("--model", default=CHATPOSE_TINY, help="folder or Hub id")
    parser.add_argument("--question", default=IMAGE_QUESTIONS[0])
    parser.add_argument("--workers", type=int, default=1, help="models at work")
    parser.add_argument("--gpus", type=float, default=0, help="of each")
    parser.add_argument("--part", type=int, default=2000, help="pictures of a file")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    folder, output = Path(options.pictures), Path(options.output)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"part-{number:06}.parquet" for number in range(-(-len(names) // options.part))]
    parts = [{"file": str(f), "images": names[n * options.part :][: options.part]} for n, f in enumerate(files)]
    left = [part for part, file in zip(parts, files, strict=True) if not file.exists()]
    settings = {"model": options.model, "question": options.question, "part": options.part}
    settings["pictures"] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    check_settings(output / "_settings.json", settings, len(left) < len(parts))
    print(f"{len(names)} pictures in {len(parts)} parts, {len(parts) - len(left)} of them done")
    if left:
        work = ray.data.from_items(left, override_num_blocks=len(left))
        told = {"concurrency": options.workers, "num_gpus": options.gpus, "fn_constructor_args": [options]}
        failed = work.map_batches(Answerer, batch_size=1, **told).sum("failed")
        print(f"wrote {len(left)} parts; {failed} files were no pictures")


if __name__ == "__main__":
    main()
