"""The 24 prompts of this folder, answered by a model and drawn: sentences, situations, pictures above their answers.

    python examples/sheet/draw.py MODEL sheet.png

They were chosen before chatpose-tiny was trained; none is left out, whatever comes.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from chatpose_hf import ChatPosePipeline
from chatpose_hf.adapters import load_trained
from chatpose_hf.body import BodyModel
from chatpose_hf.render import contact_sheet, render_bodies


HERE, SIZE = Path(__file__).parent, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a ChatPose")
    parser.add_argument("output", help="PNG to write")
    options = parser.parse_args()
    model, processor = load_trained(options.model, dtype=torch.float32)
    pipe = ChatPosePipeline(model=model, processor=processor, device=torch.device("cpu"))
    body = BodyModel.load("default")
    drawn: dict[str, list] = {"explicit": [], "implicit": [], "given": [], "picture": []}
    for line in (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        kind, question = item["id"].split("-")[0], {"text": item["prompt"]}
        if "image" in item:
            picture = Image.open(HERE / item["image"]).convert("RGB")
            drawn["given"].append((picture.resize((SIZE, SIZE)), f"{item['id']}, given"))
            question["images"] = picture
        (reply,) = pipe([question], max_new_tokens=64, do_sample=False)
        answer = Image.new("RGB", (SIZE, SIZE), "white")
        if reply["poses"]:
            pose = reply["poses"][0]["theta"].reshape(24, 3)
            # A picture's pose as its camera sees it; others from the side, which shows more.
            view = 0 if "image" in item else 30
            answer = render_bodies(body.vertices(pose), body.faces, size=SIZE, view=view)
        drawn[kind].append((answer, f"{item['id']}: {item['prompt']}"))
        print(f"{item['id']}: {item['prompt']} -> {reply['text']}")
    pictures, captions = zip(*(tile for tiles in drawn.values() for tile in tiles), strict=True)
    contact_sheet(pictures, captions, columns=8, max_lines=4).save(options.output)


if __name__ == "__main__":
    main()
