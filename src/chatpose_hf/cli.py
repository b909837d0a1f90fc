"""The command `chatpose`: reads arguments, calls the library, prints."""

import argparse
import os
import platform
import re
import sys
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import CHATPOSE_TINY
from .data import SOURCES


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 for a failure that is explained on stderr, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="chatpose", description="Words and pictures in, words and SMPL poses out.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer prompts", description=_generate.__doc__)
    generate.add_argument("prompt", nargs="?", help="the question")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    generate.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="pixels of the picture around the person asked about (default: all of it)",
    )
    generate.add_argument("--prompts", metavar="FILE", help='many questions: {"prompt", "image", "id"} on each line')
    generate.add_argument("--batch-size", type=int, default=8, metavar="N", help="with --prompts (default: 8)")
    generate.add_argument("--output", metavar="DIR", help="folder for the files (default: print only)")
    _add_model_arguments(generate)
    _add_body_argument(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to the model", description=_chat.__doc__)
    chat.add_argument("--output", metavar="DIR", help="folder for each turn's files")
    _add_model_arguments(chat)
    _add_body_argument(chat)
    chat.set_defaults(run=_chat)

    render = commands.add_parser("render", help="poses to pictures, meshes, motion", description=_render.__doc__)
    render.add_argument("file", metavar="FILE", help="pose.npz, reply.json, replies.jsonl, or an AMASS npz")
    render.add_argument("--output", metavar="FILE", help="its ending says what it is (default: FILE's name with .png)")
    render.add_argument(
        "--view", type=_view, help="front, three_quarter, side, back, or degrees (default: two of them)"
    )
    render.add_argument("--frame", help="of a file that does not say: camera, y-up, z-up")
    render.add_argument(
        "--limit", type=int, default=16, metavar="N", help="poses to draw, evenly chosen (default: 16)"
    )
    render.add_argument("--photo", metavar="FILE", help="draw the body over this photo")
    render.add_argument(
        "--box", type=float, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="pixels of the photo to fill"
    )
    _add_body_argument(render)
    render.set_defaults(run=_render)

    app = commands.add_parser("app", help="chat in the browser", description=_app.__doc__)
    app.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    app.add_argument("--port", type=int, choices=range(1, 2**16), metavar="N", default=7860, help="(default: 7860)")
    _add_model_arguments(app)
    _add_body_argument(app)
    app.set_defaults(run=_app)

    data = commands.add_parser("data", help="data sets to rows", description=_data.__doc__)
    data.add_argument("source", choices=SOURCES, metavar="SOURCE", help=f"what it is: {', '.join(SOURCES)}")
    data.add_argument("--input", required=True, metavar="DIR", help="as downloaded (docs/data.md)")
    data.add_argument("--output", required=True, metavar="DIR", help="folder for the rows")
    data.add_argument("--limit", type=int, metavar="N", help="stop after N rows")
    data.add_argument("--count", type=int, metavar="N", help="rows to make, of a source that makes as many as wanted")
    data.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn (default: 0)")
    data.add_argument(
        "--image-size", type=int, metavar="N", help="pixels of crops and renders (default: the source's)"
    )
    data.add_argument("--frame", help="of motions that do not say: camera, y-up, z-up")
    data.add_argument("--endpoint", metavar="URL", help="a language model for spg and rpe; its key: OPENAI_API_KEY")
    data.add_argument("--endpoint-model", metavar="NAME", help="the model's name there")
    data.set_defaults(run=_data)

    train = commands.add_parser("train", help="train on rows", description=_train.__doc__, add_help=False)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="measure on rows", description=_eval.__doc__, add_help=False)
    evaluate.set_defaults(run=_eval)

    train_retrieval = commands.add_parser(
        "train-retrieval",
        help="train a judge of texts and poses",
        description=_train_retrieval.__doc__,
        add_help=False,
    )
    train_retrieval.set_defaults(run=_train_retrieval)

    publish = commands.add_parser("publish", help="trained folder to the Hub", description=_publish.__doc__)
    publish.add_argument("folder", metavar="DIR", help="what train wrote, one of its checkpoints, or a saved ChatPose")
    publish.add_argument(
        "--repo", required=True, metavar="NAMESPACE/NAME", help="on the Hub; made if it does not exist"
    )
    publish.add_argument("--merge", action="store_true", help="an adapter as a whole model, merged into its base")
    publish.add_argument("--push", action="store_true", help="send it (default: a dry run, nothing is sent)")
    publish.add_argument("--private", action="store_true", help="make it private; one that is public is refused")
    publish.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it does not exist")
    publish.add_argument(
        "--results",
        nargs="+",
        default=(),
        metavar="FILE",
        help="every results.json of `chatpose eval` for the card (default: the folder's own)",
    )
    publish.add_argument("--output", metavar="DIR", help="keep the release folder here; must not exist")
    publish.set_defaults(run=_publish)

    convert_smpl = commands.add_parser(
        "convert-smpl", help="SMPL .pkl to clean .npz", description=_convert_smpl.__doc__
    )
    convert_smpl.add_argument("source", metavar="IN", help="an official .pkl or .npz of SMPL, SMPL-H or SMPL-X")
    convert_smpl.add_argument("output", metavar="OUT", help="the .npz to write")
    convert_smpl.set_defaults(run=_convert_smpl)

    convert = commands.add_parser("convert", help="convert an original checkpoint", description=_convert.__doc__)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the original layout")
    convert.add_argument("output", metavar="OUT", help="folder to write; must not hold anything yet")
    convert.add_argument(
        "--vision-tower", metavar="DIR_OR_ID", help="default: what the checkpoint's config.json names"
    )
    convert.set_defaults(run=_convert)

    env = commands.add_parser("env", help="print versions and devices", description=_env.__doc__)
    env.set_defaults(run=_env)

    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.run not in (_train, _eval, _train_retrieval):
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"chatpose: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        default=CHATPOSE_TINY,
        help="folder or Hub id of a ChatPose checkpoint (default: chatpose-tiny, which comes with the package)",
    )
    parser.add_argument("--force-pose", action="store_true", help="make every answer contain a pose")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length limit (default: 512)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")


def _view(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _add_body_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--body",
        metavar="BODY",
        help="default, smpl, smplh, smplx, or a model file (default: what SMPL_MODEL_DIR holds, else default)",
    )


def _load_pipeline(options):
    import torch
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    from . import ChatPoseConfig, ChatPoseForConditionalGeneration, ChatPosePipeline, ChatPoseProcessor

    try:
        torch.empty(0, device=options.device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {options.device!r} here: {str(error).splitlines()[0]}") from error
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if find_adapter_config_file(options.model):
            with _names_extra("train"):
                from .adapters import load_trained

            model, processor = load_trained(options.model, dtype="auto")
            return ChatPosePipeline(model=model, processor=processor, device=device)
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
        device=device,
    )


def _describe(reply: dict) -> str:
    lines = [reply["text"]]
    for number, pose in enumerate(reply["poses"], start=1):
        root = ", ".join(f"{value:.3f}" for value in pose["theta"][:3].tolist())
        lines.append(f"pose {number}: 24 joint rotations, global_orient [{root}] (axis-angle, camera frame)")
    return "\n".join(lines)


def _check_output(folder: str) -> None:
    """Before the model is asked: its answer must not meet a bad folder."""
    existing = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"expected a folder as `--output`, got the file {existing}")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"cannot write to {existing}; name another folder as `--output`")


def _load_body(options):
    """The body for the files of --output; None without it."""
    from .body import BodyModel

    if not options.output:
        return None
    _check_output(options.output)
    return BodyModel.load(options.body)


def _save(folder: Path, turns: list, body) -> None:
    from .export import save_reply

    for path in save_reply(folder, turns, body):
        print(f"wrote {path}")


def _generate(options) -> None:
    """
    Answers one prompt: prints the reply and, with --output, writes reply.json, pose.npz, body.glb, picture.png and
    page.html. Or answers a file of prompts into replies.jsonl, going on where a former run stopped, on all processes of
    `accelerate launch`.
    """
    from .batch_generate import generate_replies, load_prompts
    from .export import Turn
    from .image_files import open_image
    from .processes import find_processes, leave_group

    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("expected either a prompt or `--prompts FILE`")
    generate_kwargs = {"max_new_tokens": options.max_new_tokens, "force_pose": options.force_pose}
    if options.prompts is not None:
        if options.image or options.box or not options.output:
            raise ValueError("`--prompts` needs `--output DIR`, and names pictures in its lines, not by `--image`")
        _check_output(options.output)
        prompts = load_prompts(options.prompts)
        state = find_processes()
        if state.num_processes > 1:
            if options.device not in (None, state.device.type):
                raise ValueError(f"expected no `--device` for {state.num_processes} processes, which have one each")
            options.device = str(state.device)
        settings = {"model": options.model, **generate_kwargs}
        load_pipe = partial(_load_pipeline, options)
        path = generate_replies(
            load_pipe, prompts, options.output, settings, state, options.batch_size, **generate_kwargs
        )
        if state.is_main_process:
            print(f"{len(prompts)} replies; wrote {path}", flush=True)
        leave_group(state, 0)
        return
    images = [(path, open_image(path)) for path in options.image]
    if not options.prompt.strip():
        raise ValueError("expected a question, got an empty prompt")
    if options.box and len(images) != 1:
        raise ValueError(f"expected one `--image` for `--box`, got {len(images)}")
    body = _load_body(options)
    pipe = _load_pipeline(options)
    if options.box:
        images = [(path, pipe.processor.crop_person(image, options.box)) for path, image in images]
    reply = pipe({"text": options.prompt, "images": [image for _, image in images]}, **generate_kwargs)
    print(_describe(reply))
    if options.output:
        _save(Path(options.output), [Turn(options.prompt, images, reply)], body)


def _chat(options) -> None:
    """A conversation. Lines are questions; "/image FILE" shows a picture with the next one, "/new" starts afresh, "/quit" ends."""
    from .export import Turn, make_messages
    from .image_files import open_image

    body = _load_body(options)
    pipe = _load_pipeline(options)
    turns: list[Turn] = []
    pending: list[tuple] = []  # file name and picture
    count = 0
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
            turns, pending = [], []
        elif line.startswith("/image"):
            path = line.removeprefix("/image").strip()
            try:
                pending.append((path, open_image(path)))
            except (ValueError, OSError) as error:
                print(f"chatpose: {error}", file=sys.stderr)
        elif line:
            turn = Turn(line, pending, {"text": "", "poses": []})
            messages = make_messages([*turns, turn], pipe.processor.image_token)
            try:
                limits = {"max_new_tokens": options.max_new_tokens, "force_pose": options.force_pose}
                reply = pipe(messages, reuse_prefix=True, **limits)
            except ValueError as error:  # such as a literal `<image>`: the conversation goes on without the question
                print(f"chatpose: {error}", file=sys.stderr)
                continue
            turns.append(turn._replace(reply=reply))
            count += 1
            print(f"chatpose: {_describe(reply)}")
            if options.output:
                _save(Path(options.output) / f"turn_{count:03d}", turns, body)
            pending = []


def _render(options) -> None:
    """
    Draws poses (.png), or writes them as a mesh (.glb, .obj, .ply), motion (.bvh, .npz in AMASS's layout), numbers
    (.json) or a page with 3D bodies (.html).
    """
    from .atomic_write import write_atomically
    from .body import BodyModel
    from .export import overlay_picture, png_bytes, save_poses
    from .image_files import open_image
    from .pose_files import load_poses

    source = Path(options.file)
    output = Path(options.output) if options.output else Path(f"{source.stem}.png")
    if output.exists() and output.samefile(source):
        raise ValueError(f"expected another file as `--output`, got the input itself, {output}")
    if options.box and not options.photo:
        raise ValueError("`--box` needs `--photo`")
    body = BodyModel.load(options.body)
    poses, names = load_poses(source, options.frame)
    if options.photo:
        if output.suffix.lower() != ".png" or len(poses) != 1:
            raise ValueError(f"`--photo` takes one pose and writes a .png, got {len(poses)} poses and {output}")
        write_atomically(output, png_bytes(overlay_picture(open_image(options.photo), poses[0], body, options.box)))
    else:
        drawn = save_poses(output, poses, names, body, view=options.view, limit=options.limit)
        if drawn < len(poses):
            print(f"{drawn} of {len(poses)} poses, evenly chosen; `--limit` takes more")
    print(f"wrote {output} ({body.name} body)")


def _app(options) -> None:
    """Serves the chat app: words and pictures in, words and 3D bodies out, in a browser, offline."""
    from .app import launch_app
    from .body import BodyModel

    body = BodyModel.load(options.body)
    launch_app(
        _load_pipeline(options), body, host=options.host, port=options.port, max_new_tokens=options.max_new_tokens
    )


def _source_options(options) -> dict:
    """What was given beside input and seed, and the source takes."""
    from inspect import signature

    from .data import find_source

    given = {
        "image_size": options.image_size,
        "count": options.count,
        "frame": options.frame,
        "endpoint": options.endpoint,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - signature(find_source(options.source)).parameters:
        raise ValueError(f"expected no `--{name.replace('_', '-')}` for {options.source}")
    if (options.endpoint is None) != (options.endpoint_model is None):
        raise ValueError("expected `--endpoint` and `--endpoint-model` together")
    if options.endpoint:
        from .data.endpoint import Endpoint

        given["endpoint"] = Endpoint(
            options.endpoint, options.endpoint_model, cache=Path(options.output) / "answers.jsonl"
        )
    return given


def _data(options) -> int:
    """
    Reads a data set as downloaded and writes it as rows: Parquet files, a card, counts, a sheet of 16 of them. Goes on
    where a former run stopped.
    """
    from .data import find_source

    _check_output(options.output)
    source = find_source(options.source)(options.input, seed=options.seed, **_source_options(options))
    from .data.prepare import merge_counts, prepare_rows  # after `find_source`, which says what is not installed

    records = prepare_rows(source, options.output, options.limit, options.workers)
    errors = [record for record in records if record.error]
    print(f"{'split':<12}{'rows':>10}{'poses':>10}  tasks")
    for split in dict.fromkeys(record.part.split("/")[0] for record in records):
        of_split = [record for record in records if record.part.split("/")[0] == split]
        tasks = ", ".join(f"{task} {count}" for task, count in merge_counts([r.tasks for r in of_split]).items())
        print(f"{split:<12}{sum(r.rows for r in of_split):>10}{sum(r.poses for r in of_split):>10}  {tasks}")
    for reason, count in merge_counts([record.skipped for record in records]).items():
        names = next(record.examples[reason] for record in records if reason in record.examples)
        print(f"{'skipped':<12}{count:>10}            {reason} ({names[0]}{', ...' if count > 1 else ''})")
    if options.source == "rpe":
        from .data.rpe import write_review_folder

        print(f"to review: {write_review_folder(options.output, options.input)}")
    print(f"wrote {options.output}")
    for record in errors:
        print(f"chatpose: {record.part} was not read: {record.error}", file=sys.stderr)
    if errors:
        print("chatpose: mend the files and run again; the other parts are kept", file=sys.stderr)
    elif not any(record.rows for record in records):
        raise ValueError(f"found nothing of {options.source} to make rows of in {options.input}")
    return 1 if errors else 0


def _train(options) -> int:
    """Trains on rows, by flags or a YAML file of settings; `chatpose train --help` lists them."""
    with _names_extra("train"):
        from .training import train

    return train(options.rest)


def _eval(options) -> int:
    """Asks a model about rows and measures its answers beside baselines; `chatpose eval --help` lists the settings."""
    with _names_extra("eval"):
        from .evaluation import main

    return main(options.rest)


def _train_retrieval(options) -> int:
    """Trains the model that says how well texts and poses fit; `chatpose train-retrieval --help` lists the settings."""
    with _names_extra("train"):
        from .train_retrieval import train_retrieval

    return train_retrieval(options.rest)


def _publish(options) -> None:
    """
    Makes a release folder with the model card, checks that it loads in a clean process and gives a pose, and sends it to
    the Hub in one commit.
    """
    from .hub import publish

    try:
        with _names_extra("train"):
            release = publish(
                options.folder,
                options.repo,
                merge=options.merge,
                private=options.private,
                revision=options.revision,
                push=options.push,
                results=options.results,
                output=options.output,
            )
    except RuntimeError as error:  # the check of the release failed
        raise ValueError(str(error)) from error
    for path, size in release.files.items():
        print(f"{size:>14,} bytes  {path}")
    for path in release.deleted:
        print(f"{'deleted':>20}  {path}")
    print(release.transcript)
    print(f"sent: {release.commit_url}" if options.push else "dry run: nothing was sent; `--push` sends it")


@contextmanager
def _names_extra(extra: str):
    """Says which extra brings the package that is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"this needs more packages: pip install 'chatpose_hf[{extra}]' ({error})") from error


def _convert_smpl(options) -> None:
    """Reads a body model file without running any code in it and writes its numbers as .npz; prints the arrays."""
    from .smpl_files import convert_smpl_file

    for name, shape in convert_smpl_file(options.source, options.output).items():
        print(f"{name:24} {'x'.join(map(str, shape))}")
    print(f"wrote {options.output}")


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
        "smplx",
        "trimesh",
        "gradio",
    ]:
        try:
            print(f"{name:16} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:16} not installed")
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"{'devices':16} {', '.join(devices) if devices else 'cpu'}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(main())
