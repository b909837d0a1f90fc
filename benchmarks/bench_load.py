"""
What it costs to import, to load and to convert, against transformers: seconds and memory of fresh processes.

    python benchmarks/bench_load.py --json benchmarks/results/load_cpu.json
    python benchmarks/bench_load.py --convert CHECKPOINT VISION_TOWER --json benchmarks/results/load_cpu.json

CHECKPOINT: a small one in the original's layout, whose configuration and tokenizer a generated one of 6 GB gets; VISION_TOWER:
what that is converted with, a CLIP. Hardware: any Linux machine; 2 CPU cores, 8 GB of memory and 14 GB of disk do. Time: about 6
minutes. How to read the numbers: benchmarks/README.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from bench_generate import MIB, describe_environment, make_configs, print_table, summarize, write_json
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from chatpose_hf import ChatPoseConfig, ChatPoseForConditionalGeneration


# In a fresh process: what was imported before is not measured.
CHILD = """import json, sys, time
from pathlib import Path
{before}
def read(key):
    return int(dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())[key].split()[0]) / 1024
Path("/proc/self/clear_refs").write_text("5")
resident, start = read("VmRSS"), time.perf_counter()
{code}
print(json.dumps({{"seconds": time.perf_counter() - start, "peak": read("VmHWM"), "growth": read("VmHWM") - resident}}))"""
OURS, PLAIN = (
    "from chatpose_hf import ChatPoseForConditionalGeneration as Model",
    "from transformers import LlavaForConditionalGeneration as Model",
)
SHARD_LAYERS = 5  # of 202 M weights each, 2 GB in half precision


def measure(code: str, before: str = "") -> dict[str, float]:
    """Seconds, and MiB at the peak and more than before, of Python code in a fresh process."""
    command = [sys.executable, "-c", CHILD.format(code=code, before=before)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save_models(folder: Path) -> dict[str, str]:
    """Side to a folder with its model: the same language model and tower."""
    options = argparse.Namespace(shape="smollm2-135m", quick=False, image_size=336)
    fields = make_configs(options, vocab_size=49216, tie_word_embeddings=True) | {"image_token_index": 49152}
    models = {
        "ours": ChatPoseForConditionalGeneration(ChatPoseConfig(pose_token_id=49153, **fields)),
        "plain": LlavaForConditionalGeneration(LlavaConfig(**fields)),
    }
    for side, model in models.items():
        model.save_pretrained(folder / side)
    return {side: str(folder / side) for side in models}


def compare(name: str, code: dict[str, tuple[str, str]], rounds: int, bar: tqdm) -> dict:
    """A row of the table: the sides take turns, what is before each is not measured."""
    bar.set_description(name)
    measured: dict[str, list[dict]] = {side: [] for side in code}
    for _ in range(rounds + 1):  # the first warms the disk's cache
        for side, (text, before) in code.items():
            measured[side].append(measure(text, before))
            bar.update()
    row: dict = {"what": name}
    for side, values in measured.items():
        row |= {f"{key}_{side}": median(value[key] for value in values[1:]) for key in ("seconds", "peak")}
    ratios = summarize(*([value["seconds"] for value in measured[side][1:]] for side in ("ours", "plain")))
    return row | ratios | {"ratio_peak": row["peak_ours"] / row["peak_plain"]}


def make_checkpoint(small: Path, folder: Path, num_shards: int) -> None:
    """A LLaMA of 4096 x 11008 in the original's layout, in shards, with a small checkpoint's tokenizer."""
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    old, new = settings["hidden_size"], 4096
    layers = SHARD_LAYERS * num_shards
    settings |= {"hidden_size": new, "intermediate_size": 11008, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": 32, "num_key_value_heads": 32, "torch_dtype": "float16"}
    settings["mm_hidden_size"] = 1024
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = torch.load(small / "pytorch_model.bin", weights_only=True)
    shapes = {name: tuple(new if size == old else size for size in tensor.shape) for name, tensor in tensors.items()}
    shapes["model.mm_projector.0.weight"] = (new, 1024)
    shared = {name: shape for name, shape in shapes.items() if ".layers." not in name and "vision_tower" not in name}
    square, wide = (new, new), (11008, new)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    layer |= {"input_layernorm": (new,), "post_attention_layernorm": (new,)}
    weight_map = {}
    for shard in range(num_shards):
        names = dict(shared) if shard == 0 else {}
        for number in range(shard * SHARD_LAYERS, (shard + 1) * SHARD_LAYERS):
            names |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        file = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        torch.save(
            {name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in names.items()}, folder / file
        )
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure_convert(small: Path, pictures: Path, folder: Path) -> dict:
    """Peak memory of `chatpose convert` on a checkpoint of 6 GB with a tower of CLIP-L/14-336's shape."""
    make_checkpoint(small, folder / "original", num_shards=3)
    shutil.copytree(pictures, folder / "tower", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **shape)).save_pretrained(folder / "tower")
    shards = [path.stat().st_size / MIB for path in (folder / "original").glob("*.bin")]
    paths = ", ".join(repr(str(folder / name)) for name in ("original", "converted", "tower"))
    before = "from chatpose_hf.convert_chatpose_weights_to_hf import convert_checkpoint"
    measured = measure(f"convert_checkpoint({paths})", before)
    row = {"what": "convert", "checkpoint_mib": sum(shards), "largest_shard_mib": max(shards), **measured}
    return row | {"beside_a_shard_mib": measured["growth"] - max(shards)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each side")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("CHECKPOINT", "VISION_TOWER"))
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    args.device = "cpu"
    results = describe_environment(args)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=6 * (args.rounds + 1), unit="run") as bar:
        folders = save_models(Path(temporary))
        code = {
            "import": {"ours": ("import chatpose_hf", ""), "plain": ("import transformers", "")},
            "import of the model's class": {"ours": (OURS, ""), "plain": (PLAIN, "")},
            "from_pretrained": {
                side: (f"Model.from_pretrained({folders[side]!r})", before)
                for side, before in (("ours", OURS), ("plain", PLAIN))
            },
        }
        results["load"] = [compare(name, sides, args.rounds, bar) for name, sides in code.items()]
        print_table("Seconds and peak MiB, ratio ours / plain", results["load"])
        if args.convert:
            results["convert"] = [measure_convert(*args.convert, Path(temporary))]
            print_table("Memory of the converter", results["convert"])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
