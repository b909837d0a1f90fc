"""From a trained folder to a repository on the Hub: a clean release folder, a check of it, one commit."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from tqdm import tqdm

from .card import is_hub_id, make_card, make_eval_results, template_folder


CODE_FILES = (
    "rotations.py",
    "configuration_chatpose.py",
    "tokenization_chatpose.py",
    "modeling_chatpose.py",
    "person_crop.py",
    "processing_chatpose.py",
    "pipeline_chatpose.py",
)
# What is taken from a folder, by name: whatever else a training leaves (optimizer, logs, pickles) stays there.
_TAKEN = re.compile(
    r"(adapter_)?config\.json|generation_config\.json|run\.json|results\.json"
    r"|(adapter_)?model(-\d+-of-\d+)?\.safetensors|(adapter_)?model\.safetensors\.index\.json"
    r"|(pre)?processor_config\.json|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.jinja"
)
_ENDPOINT_FILES = ("handler.py", "requirements.txt")
_CARD_FILES = ("README.md", *_ENDPOINT_FILES, ".eval_results/results.yaml")


class Release(NamedTuple):
    """
    What was, or would be, published.

    Args:
        files (`dict[str, int]`): bytes of each file, by its path in the repository.
        transcript (`str`): what the load check said, one line.
        deleted (`list[str]`): files of an earlier release that the commit removed.
        commit_url (`str`, *optional*): the commit; None where nothing was sent.
    """

    files: dict[str, int]
    transcript: str
    deleted: list[str]
    commit_url: str | None


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    merge: bool = False,
    private: bool = False,
    revision: str | None = None,
    push: bool = False,
    results: Sequence[str | Path] = (),
    output: str | Path | None = None,
    api: HfApi | None = None,
) -> Release:
    """
    Makes a release of a folder, checks that it loads and, with `push`, sends it to the Hub in one commit.

    Args:
        folder (`str` or `Path`):
            What `chatpose train` wrote, one of its checkpoints, or any saved ChatPose.
        repo_id (`str`):
            `NAMESPACE/NAME`; made where it does not exist.
        merge (`bool`, *optional*, defaults to `False`):
            Publish an adapter as a whole model, merged into its base.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private. One that exists and is public is refused.
        revision (`str`, *optional*):
            The branch to commit to, made where it does not exist; the default is the main one.
        push (`bool`, *optional*, defaults to `False`):
            Send. Without it nothing leaves this machine.
        results (`Sequence[str | Path]`, *optional*):
            Every `results.json` for the card, instead of the folder's own.
        output (`str` or `Path`, *optional*):
            Folder to keep the release in; must not exist.
        api ([`huggingface_hub.HfApi`], *optional*):
            The Hub to talk to.

    Returns:
        [`Release`].

    Raises:
        ValueError: when the id, the folder or its records are not what they should be.
        RuntimeError: when the release does not load, or does not answer with a pose.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"expected a repository as NAMESPACE/NAME, got {repo_id!r}")
    folder = Path(folder)
    if _is_adapter(folder) and not merge and not is_hub_id(base := _load_base(folder)["base_model"]):
        raise ValueError(
            f"expected an adapter for a base on the Hub, got one for {base!r}, which nobody else can load; publish the "
            "whole model with `merge`, or the base first, and train on it by its id"
        )
    beside = Path(output or folder).absolute()
    if output is not None and beside.exists():
        raise ValueError(f"expected a folder that does not exist yet, got {output}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in the system's temporary one: that may be small, or memory.
    with tempfile.TemporaryDirectory(prefix=".chatpose_release_", dir=beside.parent) as temporary:
        release = Path(temporary) / "release"
        paths = [
            path.relative_to(release).as_posix()
            for path in make_release(folder, release, merge=merge, repo_id=repo_id, results=results)
        ]
        transcript = check_release(release)
        if output is not None:
            release = release.rename(beside)
        files = {path: (release / path).stat().st_size for path in paths}
        if not push:
            return Release(files, transcript, [], None)
        api = api or HfApi()
        deleted = _prepare_repo(api, repo_id, private, revision, files)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, release / path) for path in paths] + [CommitOperationDelete(p) for p in deleted],
            commit_message=f"Publish with chatpose_hf {version('chatpose_hf')}",
            revision=revision,
        )
    return Release(files, transcript, deleted, str(commit.commit_url))


def make_release(
    folder: str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    repo_id: str | None = None,
    results: Sequence[str | Path] = (),
) -> list[Path]:
    """
    Writes a folder as it would lie on the Hub: weights, settings, tokenizer, records and card; for a whole model the
    code files of this package too. Whatever else the folder holds is left out.

    Args:
        folder (`str` or `Path`): an adapter's folder or a whole model's, with its processor.
        output (`str` or `Path`): folder to write; must not exist. It appears when it is complete.
        merge (`bool`, *optional*, defaults to `False`): merge an adapter into its base.
        repo_id (`str`, *optional*): where it will lie, for the card.
        results (`Sequence[str | Path]`, *optional*): every `results.json`, instead of the folder's own.

    Returns:
        `list[Path]`: the files, sorted.

    Raises:
        ValueError: when `folder` is no ChatPose's, a file of it is missing or malformed, or `output` exists.
    """
    folder, output = Path(folder), Path(output)
    is_adapter = _is_adapter(folder)
    if merge and not is_adapter:
        raise ValueError(f"expected an adapter to merge, got the whole model in {folder}; leave `merge` out")
    if output.exists():
        raise ValueError(f"expected a folder that does not exist yet, got {output}")
    run = _load_json(folder / "run.json") if (folder / "run.json").exists() else {}
    if is_adapter:  # what will be loaded, whatever the record says
        base = _load_base(folder)
        if base["base_revision"] is None and run.get("base_model") == base["base_model"]:
            base["base_revision"] = run.get("base_revision")
        run |= base
    own = [folder / "results.json"] if (folder / "results.json").exists() else []
    contents = [_load_json(Path(file), (dict, list)) for file in results or own]
    evaluations = [one for content in contents for one in (content if isinstance(content, list) else [content])]
    card = make_card(run, evaluations, is_adapter=is_adapter and not merge, repo_id=repo_id)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        staging = Path(temporary) / "release"
        staging.mkdir()
        if merge:
            from .adapters import load_trained  # needs PEFT, which whole models do not

            for part in load_trained(folder):
                part.save_pretrained(staging)
        taken = ("run.json",) if merge else [path.name for path in folder.iterdir() if _TAKEN.fullmatch(path.name)]
        for name in tqdm(sorted(taken), desc="Copying", unit="file", disable=merge):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        if evaluations:
            content = contents[0] if len(contents) == 1 else evaluations
            (staging / "results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
        if scores := make_eval_results(evaluations):
            (staging / ".eval_results").mkdir()
            (staging / ".eval_results" / "results.yaml").write_text(scores, encoding="utf-8")
        if not is_adapter or merge:
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), staging / name)
            for name in _ENDPOINT_FILES:
                (staging / name).write_bytes((template_folder() / name).read_bytes())
        _check_files(staging)
        staging.rename(output)
    return sorted(path for path in output.rglob("*") if path.is_file())


def check_release(folder: str | Path) -> str:
    """
    Loads a release as somebody who downloads it does, and asks it for a pose.

    A whole model is loaded by the Auto classes with `trust_remote_code=True`, offline, by another process in which this
    package cannot be imported. An adapter's files are read; where its base is a folder here, or in the cache, it is
    merged and asked too.

    Args:
        folder (`str` or `Path`): what [`make_release`] wrote.

    Returns:
        `str`: what was loaded and answered, one line.

    Raises:
        RuntimeError: when it does not load, weights are missing or left over, or no proper pose comes out.
    """
    folder = Path(folder).absolute()
    return _check_adapter(folder) if _is_adapter(folder) else _check_whole_model(folder)


def _check_whole_model(folder: Path) -> str:
    # A module that is None cannot be imported: what the code files do not bring themselves is missed here.
    code = ["import sys", 'sys.modules["chatpose_hf"] = None', *map(inspect.getsource, (_load_published, _answer))]
    code.append("print(_answer(*_load_published(sys.argv[1])))")
    bar = tqdm(total=1, desc="Loading in a clean process", unit="model")
    with tempfile.TemporaryDirectory() as temporary, bar:
        run = subprocess.run(
            [sys.executable, "-c", "\n".join(code), str(folder)],
            capture_output=True,
            text=True,
            cwd=temporary,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(temporary) / "modules")},
        )
        bar.update()
    if run.returncode != 0:
        last = "\n".join(run.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"the release does not load in a clean process (exit status {run.returncode}):\n{last}")
    return run.stdout.strip().splitlines()[-1]


def _check_adapter(folder: Path) -> str:
    base = _load_base(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            count = len(file.keys())
    except Exception as error:  # the reader has an error class of its own for each kind of damage
        raise RuntimeError(f"cannot read {folder / 'adapter_model.safetensors'}: {error}") from error
    if not count:
        raise RuntimeError(f"expected weights in {folder / 'adapter_model.safetensors'}, got none")
    said = f"adapter of {count} tensors for {base['base_model']}"
    name, revision = base["base_model"], base["base_revision"]
    if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return f"{said}; the base is not on this machine, so no pose was asked for"
    from .adapters import load_trained  # needs PEFT, which whole models do not

    try:
        return f"{said}; merged: {_answer(*load_trained(folder))}"
    except (ValueError, OSError) as error:
        raise RuntimeError(f"the adapter does not load onto {name}: {error}") from error


def _load_published(folder):
    """Model and processor by the Auto classes. Runs in a process without this package: its source is all that goes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, output_loading_info=True
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"expected exactly the model's weights, got {wrong}")
    return model, processor


def _answer(model, processor):
    """Asks for a pose about a picture; checks it and tells about it. Runs without this package, as `_load_published`."""
    import torch
    import transformers
    from PIL import Image

    question = [
        {"type": "image", "image": Image.new("RGB", (64, 64))},
        {"type": "text", "text": "Give the SMPL pose."},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": question}], **options)
    output = model.eval().generate(
        **inputs.to(model.device, model.dtype),
        max_new_tokens=len(model.config.pose_lead_in_ids or ()) + 8,
        do_sample=False,
        force_pose=True,
        return_dict_in_generate=True,
    )
    rotmats = output.pose_rotmats.float().cpu()
    error = (rotmats @ rotmats.mT - torch.eye(3)).abs().amax().item() if rotmats.numel() else 0.0
    is_proper = len(rotmats) > 0 and rotmats.shape[1:] == (24, 3, 3) and error < 1e-4
    if not (is_proper and (torch.det(rotmats) > 0).all()):
        raise ValueError(f"expected 24 rotations a pose, got shape {tuple(rotmats.shape)}, orthonormal to {error}")
    text = processor.post_process_poses(output)[0]["text"]
    return (
        f"{type(model).__name__}, {sum(weight.numel() for weight in model.parameters()):,} weights, transformers "
        f"{transformers.__version__}, torch {torch.__version__}: {len(rotmats)} x 24 rotations, orthonormal to "
        f"{error:.0e}; answer {text!a}"
    )


def _prepare_repo(api: HfApi, repo_id: str, private: bool, revision: str | None, files: dict[str, int]) -> list[str]:
    """Makes repository and branch; returns what an earlier release left there and this one has not."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"expected a private repository, but {repo_id} exists and is public; change that first")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Old shards, or an adapter beside the merged model, would be loaded in place of what was checked.
    return [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in files and (_TAKEN.fullmatch(name) or name in CODE_FILES or name in _CARD_FILES)
    ]


def _is_adapter(folder: Path) -> bool:
    names = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
    if not names:
        raise ValueError(f"expected a folder with adapter_config.json or config.json, got {folder}")
    return names[0] == "adapter_config.json"


def _load_base(folder: Path) -> dict[str, str | None]:
    """What the adapter will be loaded onto, by the names of `run.json`."""
    config = _load_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"expected `base_model_name_or_path` in {folder / 'adapter_config.json'}, got {base!r}")
    return {"base_model": base, "base_revision": config.get("revision")}


def _load_json(path: Path, kind: type | tuple[type, ...] = dict) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"expected an object in {path}, got {type(content).__name__}")
    return content


def _check_files(staging: Path) -> None:
    """Whether all is there that the Auto classes need, before anything is loaded."""
    if _is_adapter(staging):
        needed = {"adapter_model.safetensors"}
    else:
        needed = {"processor_config.json", "tokenizer_config.json"}
        needed |= {
            "model.safetensors.index.json"
            if (staging / "model.safetensors.index.json").exists()
            else "model.safetensors"
        }
    if missing := sorted(name for name in needed if not (staging / name).is_file()):
        raise ValueError(f"expected {', '.join(missing)} in the folder; save the model and the processor there")
    if _is_adapter(staging):
        return
    for name, entries in (("config.json", ("auto_map", "custom_pipelines")), ("processor_config.json", ("auto_map",))):
        for entry in entries:
            if not _load_json(staging / name).get(entry):
                raise ValueError(
                    f"expected `{entry}` in {name}, which says what the code files are for; load the folder with "
                    "chatpose_hf and save model and processor again"
                )
