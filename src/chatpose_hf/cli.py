"""The command `chatpose`: reads arguments, calls the library, prints."""

import argparse
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


NO_MODEL = (
    "no model named: this version ships no checkpoint of its own. Pass `--model`, a folder or Hub id of a ChatPose "
    "checkpoint, for instance one made by `chatpose convert`"
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 for a failure that is explained on stderr, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="chatpose", description="Words and pictures in, words and SMPL poses out.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer one prompt", description=_generate.__doc__)
    generate.add_argument("prompt", help="the question")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    generate.add_argument("--output", metavar="DIR", help="folder for reply.json and pose.npz (default: print only)")
    _add_model_arguments(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to the model", description=_chat.__doc__)
    chat.add_argument("--output", metavar="DIR", help="folder for each turn's reply.json and pose.npz")
    _add_model_arguments(chat)
    chat.set_defaults(run=_chat)

    convert = commands.add_parser("convert", help="convert an original checkpoint", description=_convert.__doc__)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the original layout")
    convert.add_argument("output", metavar="OUT", help="folder to write; must not hold anything yet")
    convert.add_argument(
        "--vision-tower", metavar="DIR_OR_ID", help="default: what the checkpoint's config.json names"
    )
    convert.set_defaults(run=_convert)

    env = commands.add_parser("env", help="print versions and devices", description=_env.__doc__)
    env.set_defaults(run=_env)

    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"chatpose: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR_OR_ID", help="folder or Hub id of a ChatPose checkpoint")
    parser.add_argument("--force-pose", action="store_true", help="make every answer contain a pose")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length limit (default: 512)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")


def _load_pipeline(options):
    import torch
    from transformers import AutoConfig

    from . import ChatPoseConfig, ChatPoseForConditionalGeneration, ChatPosePipeline, ChatPoseProcessor

    if options.model is None:
        raise ValueError(NO_MODEL)
    try:
        config = AutoConfig.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a ChatPose checkpoint from {options.model!r}: {error}") from error
    if not isinstance(config, ChatPoseConfig):
        raise ValueError(
            f"expected a ChatPose checkpoint, got one of model type {config.model_type!r} in {options.model!r}; "
            "convert original checkpoints with `chatpose convert`"
        )
    return ChatPosePipeline(
        model=ChatPoseForConditionalGeneration.from_pretrained(options.model, dtype="auto"),
        processor=ChatPoseProcessor.from_pretrained(options.model),
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _open_image(path: str):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"`{path}` is not a picture that can be read (PNG, JPEG, WebP, ...)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"`{path}` has more pixels than are read for safety: {error}") from error


def _describe(reply: dict) -> str:
    lines = [reply["text"]]
    for number, pose in enumerate(reply["poses"], start=1):
        root = ", ".join(f"{value:.3f}" for value in pose["theta"][:3].tolist())
        lines.append(f"pose {number}: 24 joint rotations, global_orient [{root}] (axis-angle, camera frame)")
    return "\n".join(lines)


def _save(folder: Path, reply: dict, prompt: str, images: list[str]) -> None:
    from .export import save_reply

    for path in save_reply(folder, reply, prompt, images):
        print(f"wrote {path}")


def _generate(options) -> None:
    """Answers one prompt: prints the reply and, with --output, writes reply.json and pose.npz."""
    images = [_open_image(path) for path in options.image]
    pipe = _load_pipeline(options)
    reply = pipe(
        {"text": options.prompt, "images": images},
        max_new_tokens=options.max_new_tokens,
        force_pose=options.force_pose,
    )
    print(_describe(reply))
    if options.output:
        _save(Path(options.output), reply, options.prompt, options.image)


def _chat(options) -> None:
    """A conversation. Lines are questions; "/image FILE" shows a picture with the next one, "/new" starts afresh, "/quit" ends."""
    pipe = _load_pipeline(options)
    messages: list[dict] = []
    pending: list[tuple] = []  # file name and picture
    turn = 0
    print('Ask for a pose. "/image FILE" adds a picture to the next question, "/new" starts afresh, "/quit" ends.')
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            messages, pending = [], []
        elif line.startswith("/image"):
            path = line.removeprefix("/image").strip()
            try:
                pending.append((path, _open_image(path)))
            except (ValueError, OSError) as error:
                print(f"chatpose: {error}", file=sys.stderr)
        elif line:
            turn += 1
            images = [{"type": "image", "image": image} for _, image in pending]
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": line}]})
            reply = pipe(messages, max_new_tokens=options.max_new_tokens, force_pose=options.force_pose)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply["text"]}]})
            print(f"chatpose: {_describe(reply)}")
            if options.output:
                _save(Path(options.output) / f"turn_{turn:03d}", reply, line, [path for path, _ in pending])
            pending = []


def _convert(options) -> None:
    """Converts an original ChatPose or LLaVA-1.5 checkpoint; prints what became of every weight."""
    from .convert_chatpose_weights_to_hf import convert_checkpoint

    table = convert_checkpoint(options.checkpoint, options.output, options.vision_tower)
    # Layers differ by their number only: one line for all of them.
    lines: dict[tuple, int] = {}
    for key in table:
        line = tuple(re.sub(r"\.layers\.\d+\.", ".layers.N.", name or "(left out)") for name in (key.old, key.new))
        lines[*line, key.shape] = lines.get((*line, key.shape), 0) + 1
    for (old, new, shape), count in lines.items():
        print(f"{old:52} -> {new:62} {'x'.join(map(str, shape)):14} {count if count > 1 else ''}".rstrip())
    print(f"{len(table)} weights; wrote {options.output}")


def _env(options) -> None:
    """Prints what a bug report needs."""
    import torch

    print(f"{'python':16} {platform.python_version()} on {platform.platform()}")
    for name in [
        "chatpose_hf",
        "transformers",
        "torch",
        "tokenizers",
        "huggingface_hub",
        "peft",
        "accelerate",
        "datasets",
    ]:
        try:
            print(f"{name:16} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:16} not installed")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"{'devices':16} {', '.join(devices) if devices else 'cpu'}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(main())
