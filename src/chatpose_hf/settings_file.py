"""Settings of a command from flags and, if a file is named, from YAML."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_settings(
    parser: HfArgumentParser, arguments: Sequence[str], lists: Sequence[str] = (), file_place: int = 0
) -> tuple:
    """
    Args:
        parser ([`~transformers.HfArgumentParser`]): of the command's settings.
        arguments (`Sequence[str]`): such as `["config.yaml", "--learning_rate", "1e-4"]`; flags win over the file.
        lists (`Sequence[str]`, *optional*):
            Settings that are lists of `NAME` or `NAME=WEIGHT`; in YAML also a single text, or a mapping to weights.
        file_place (`int`, *optional*, defaults to 0): which argument the file is, where it is no flag.

    Returns:
        `tuple`, as from the parser.

    Raises:
        ValueError: for a file that holds no settings, and for settings that do not exist.
    """
    arguments = list(arguments)
    if len(arguments) > file_place and not arguments[file_place].startswith("-"):
        settings = _load_settings(arguments.pop(file_place))
        actions = {action.dest: action for action in parser._actions if action.option_strings}
        if unknown := settings.keys() - actions.keys():
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"expected settings of `{parser.prog} --help`, got {names}")
        for name in lists:
            value = settings.get(name)
            if isinstance(value, dict):
                settings[name] = [f"{key}={weight}" for key, weight in value.items()]
            elif isinstance(value, str):
                settings[name] = [value]
        for name in settings:
            actions[name].required = False
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(arguments)


def _load_settings(path: str) -> dict:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"expected settings as `name: value` in {path}, got {type(settings).__name__}")
    return settings
