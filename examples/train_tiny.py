"""chatpose-tiny from nothing: rows, a vision tower, a base of new weights, the training, a small folder.

    python examples/train_tiny.py tiny --poses cmu_poses

`cmu_poses`: as `chatpose data cmu` reads them. Another call goes on where one stopped. Hours on 2 CPU cores, 13 GB of memory;
`tiny/chatpose-tiny` is the result, `words`, `names` and `run` beside it are the trainings with their logs.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from make_base import load_vision_tower, make_text_model, read_texts

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.atomic_write import write_atomically
from chatpose_hf.cli import main as chatpose


EXAMPLES = Path(__file__).resolve().parent
# Of each folder of rows: the source, its input, options.
ROWS = {
    "key_poses": ("key-poses", EXAMPLES / "key_poses"),
    "instructions": ("instructions", EXAMPLES / "instructions", "--count", "300000"),
    "chats": ("chats", EXAMPLES / "chats"),
    "compositions": ("compositions", "rows/cmu", "--count", "140000"),
    "key_compositions": ("compositions", "rows/key_poses", "--count", "50000"),
    "pose_chats": ("pose-chats", "rows/compositions", "--count", "25000"),
    "pictures": ("synthetic", "rows/cmu", "--count", "16000", "--image-size", "112"),
    "key_pictures": ("synthetic", "rows/key_poses", "--count", "6000", "--image-size", "112"),
}
# What each script leaves and is told. Named poses, which are few, are in a third of the pictures.
TOWER = (
    ("draw_people.py", "people_val.safetensors", "rows/cmu", "--split", "val", "--count", "500"),
    ("draw_people.py", "people.safetensors", "rows/cmu", "rows/cmu", "rows/key_poses"),
    ("train_tower.py", "tower", "people.safetensors", "people_val.safetensors"),
)
TRAIN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "chatpose_hf.cli", "train")


def make_rows(poses: str) -> None:
    for name, (source, folder, *options) in {"cmu": ("cmu", poses), **ROWS}.items():
        command = ["data", source, "--input", str(folder), "--output", f"rows/{name}", *options]
        if not Path(f"rows/{name}/summary.json").exists() and chatpose(command):
            raise SystemExit(f"rows/{name} could not be made")


def make_base() -> None:
    torch.manual_seed(0)
    texts = itertools.chain(*(itertools.islice(read_texts(f"rows/{name}"), 100_000) for name in ("cmu", *ROWS)))
    tokenizer, text_model, template = make_text_model(texts, 8192, 256, layers=4, heads=4, dropout=0.1)
    vision_tower, image_processor = load_vision_tower("tower")
    settings = {"patch_size": 16, "num_additional_image_tokens": 1, "chat_template": template}
    processor = ChatPoseProcessor(image_processor, tokenizer, **settings)
    # A new tower has no reason to leave its last layer out, as CLIP's users do. One token a pose: a wide head costs little.
    fields = {"vision_feature_layer": -1, "pose_head_hidden_size": 1024, "processor": processor}
    model = ChatPoseForConditionalGeneration.from_llava(text_model=text_model, vision_tower=vision_tower, **fields)
    processor.save_pretrained("base")
    model.save_pretrained("base")


def run(result: str, *command: str | Path) -> None:
    if not Path(result).exists():
        subprocess.run([sys.executable, *map(str, command)], check=True)


def write_release() -> None:
    """The weights in half the space; the configuration has them loaded as float32."""
    model = ChatPoseForConditionalGeneration.from_pretrained("run", dtype=torch.float16, attn_implementation="sdpa")
    model.save_pretrained("chatpose-tiny")
    ChatPoseProcessor.from_pretrained("run").save_pretrained("chatpose-tiny")
    file = Path("chatpose-tiny/config.json")
    write_atomically(file, file.read_bytes().replace(b'"float16"', b'"float32"'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder for everything")
    parser.add_argument("--poses", type=os.path.abspath, required=True, metavar="DIR", help="for `chatpose data cmu`")
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)
    os.chdir(options.output)
    make_rows(options.poses)
    for script, result, *arguments in TOWER:
        run(result, EXAMPLES / script, result, *arguments)
    if not Path("base/model.safetensors").exists():
        make_base()
    for part in ("words", "names"):
        run(f"{part}/model.safetensors", *TRAIN, EXAMPLES / f"configs/chatpose_tiny_{part}.yaml", "--resume")
    run("start", EXAMPLES / "train_projector.py", "start", "names", "people.safetensors", "people_val.safetensors")
    run("run/model.safetensors", *TRAIN, EXAMPLES / "configs/chatpose_tiny.yaml", "--resume")
    write_release()


if __name__ == "__main__":
    main()
