"""The model card: a training's record and an evaluation's results, put into the template of `model_card/`."""

import json
import math
import re
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id


NOT_STATED = "not stated"
METHODS = ("lora", "qlora", "full")
_NUMBER = (int, float)
_SOURCE_FIELDS = {"name": str, "split": str, "weight": _NUMBER, "rows": int, "licences": list}
_RUN_FIELDS = {
    "base_model": str,
    "base_revision": str,
    "method": str,
    "data": list,
    "eval_data": list,
    "config": dict,
    "trainable_parameters": dict,
    "versions": dict,
    "hardware": str,
    "seconds": _NUMBER,
    "step": int,
    "epoch": _NUMBER,
    "metrics": dict,
    "body": str,
    "command": str,
    "license": str,
    "license_name": str,
    "license_link": str,
}
_RESULT_FIELDS = {
    "task": str,
    "dataset": str,
    "split": str,
    "protocol": str,
    "body": str,
    "versions": dict,
    "metrics": dict,
}


class _Row(NamedTuple):
    """One metric of one evaluation, for the model (`value`) and, as text, for every system that was compared."""

    task: str
    dataset: str
    split: str | None
    protocol: str | None
    body: str | None
    metric: str
    value: float
    values: list[str]


def make_card(run: dict, results: list[dict] | None = None, *, is_adapter: bool, repo_id: str | None = None) -> str:
    """
    The text of `README.md`: metadata that the Hub reads, then what a reader needs, in plain words.

    What the record does not say, the card says is not stated. Texts of the record cannot become markup or metadata.

    Args:
        run (`dict`):
            The content of a training's `run.json`; every key may be absent.
        results (`list[dict]`, *optional*):
            The evaluations of a `results.json`; the metrics of `model` become the card's `model-index`.
        is_adapter (`bool`):
            Whether the folder holds an adapter, which is loaded onto its base, or a whole model.
        repo_id (`str`, *optional*):
            Where it will lie on the Hub, `NAMESPACE/NAME`; it stands in the code to load it.

    Returns:
        `str`, which [`huggingface_hub.ModelCard`] reads back with the same metadata.

    Raises:
        ValueError: when a field of `run` or `results` has another type or meaning than it should; the text names it.
    """
    _check_run(run)
    rows, systems = _read_results(results or [])
    name = repo_id.split("/")[-1] if repo_id else "chatpose"
    metadata = _make_metadata(run, rows, name, is_adapter)
    text = (
        _environment()
        .get_template("card.md")
        .render(
            metadata=metadata.to_yaml(),
            title=name,
            place=json.dumps(repo_id or "path/to/this/folder"),
            run={**dict.fromkeys(_RUN_FIELDS), **run},
            is_adapter=is_adapter,
            results=_make_tables(rows, systems),
            results_versions={
                key: value for result in results or [] for key, value in (result.get("versions") or {}).items()
            },
        )
    )
    if ModelCard(text).data.to_dict() != metadata.to_dict():
        raise ValueError(f"expected metadata that reads back as written, got {metadata.to_yaml()}")
    return text


def make_eval_results(results: list[dict]) -> str | None:
    """
    The text of `.eval_results/results.yaml`: the model's metrics on data sets that lie on the Hub; None without any.

    Args:
        results (`list[dict]`): as for [`make_card`].
    """
    entries = [
        {
            "dataset": row.dataset,
            "task": f"{_slug(row.task)}_{row.metric}",
            "value": row.value,
            "notes": ", ".join(
                f"{name}: {_plain(value or NOT_STATED)}"
                for name, value in (("split", row.split), ("protocol", _in_short(row.protocol)), ("body", row.body))
            ),
        }
        for row in _read_results(results)[0]
        if is_hub_id(row.dataset)
    ]
    return _environment().get_template("eval_results.yaml").render(entries=entries) if entries else None


def template_folder():
    """Where the files of `model_card/` are: inside an installed package, or at the top of a checkout."""
    packaged = files(__package__) / "model_card"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "model_card"


def is_hub_id(name: str | None) -> bool:
    """Whether it reads as `NAMESPACE/NAME` of the Hub, and is no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and name.count("/") == 1 and not Path(name).exists()


def public_name(name: str) -> str:
    """Of a folder only its own name: cards and results are for others."""
    return Path(name).resolve().name if Path(name).exists() else name


def _make_metadata(run: dict, rows: list[_Row], name: str, is_adapter: bool) -> ModelCardData:
    base = run.get("base_model")
    base = base if is_hub_id(base) else None
    datasets = [source["name"] for source in run.get("data") or [] if is_hub_id(source["name"])]
    licence = {key: _plain(run[key]) for key in ("license", "license_name", "license_link") if run.get(key)}
    if not licence:
        licence = {"license": "other", "license_name": "see-base-model-and-data"}
        if base:
            licence["license_link"] = f"https://huggingface.co/{base}"
    evaluations = [
        EvalResult(
            task_type=_slug(row.task),
            task_name=_plain(row.task),
            dataset_type=row.dataset if is_hub_id(row.dataset) else _slug(row.dataset),
            dataset_name=_plain(row.dataset),
            dataset_split=_plain(row.split) if row.split else None,
            metric_type=_slug(row.metric, "_"),
            metric_name=_plain(row.metric),
            metric_value=row.value,
            metric_args={
                key: _plain(value)
                for key, value in (("protocol", _in_short(row.protocol)), ("body", row.body))
                if value
            }
            or None,
        )
        for row in rows
    ]
    data = ModelCardData(
        **licence,
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["chatpose", "human-pose", "smpl", "text-to-pose", "image-to-pose"]
        + ["lora"] * (run.get("method") in ("lora", "qlora")),
        datasets=datasets or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    if base:
        data["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return data


def _check_fields(values: Any, fields: dict, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"expected an object as {where}, got {type(values).__name__}")
    for name, kind in fields.items():
        value = values.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            wanted = "a number" if kind in (int, _NUMBER) else {str: "a text", list: "a list", dict: "an object"}[kind]
            raise ValueError(f"expected {wanted} as `{name}` of {where}, got {value!r}")


def _check_run(run: dict) -> None:
    _check_fields(run, _RUN_FIELDS, "run.json")
    if run.get("method") not in (None, *METHODS):
        raise ValueError(f"expected one of {', '.join(METHODS)} as `method` of run.json, got {run['method']!r}")
    for key in ("data", "eval_data"):
        for number, source in enumerate(run.get(key) or []):
            where = f"`{key}[{number}]` of run.json"
            _check_fields(source, _SOURCE_FIELDS, where)
            if not source.get("name"):
                raise ValueError(f"expected a text as `name` of {where}, got {source.get('name')!r}")
            if not all(isinstance(licence, str) for licence in source.get("licences") or []):
                raise ValueError(f"expected texts as `licences` of {where}, got {source['licences']!r}")
    for key in ("trainable_parameters", "metrics"):
        for name, value in (run.get(key) or {}).items():
            if not isinstance(value, _NUMBER) or isinstance(value, bool):
                raise ValueError(f"expected a number as `{key}.{name}` of run.json, got {value!r}")


def _read_results(results: list[dict]) -> tuple[list[_Row], list[str]]:
    """A row for each metric of the model, and the names of all systems, the model first."""
    if not isinstance(results, list):
        raise ValueError(f"expected a list of evaluations, got {type(results).__name__}")
    rows, numbers = [], []
    for index, result in enumerate(results):
        where = f"results[{index}]"
        _check_fields(result, _RESULT_FIELDS, where)
        for name in ("task", "dataset", "metrics"):
            if not result.get(name):
                raise ValueError(f"expected `{name}` in {where}, got {result.get(name)!r}")
        if "model" not in result["metrics"]:
            raise ValueError(f"expected `metrics.model` in {where}, got {sorted(result['metrics'])}")
        metrics = {}
        for system, of in result["metrics"].items():
            _check_fields(of, {}, f"`metrics.{system}` of {where}")
            metrics[system] = {
                name: _read_number(value, f"`metrics.{system}.{name}` of {where}") for name, value in of.items()
            }
        for name, (value, _) in metrics["model"].items():
            if name.endswith("_mm") and not result.get("body"):
                raise ValueError(f"expected `body` in {where}: `{name}` is in millimetres of a body that it must name")
            given = [result.get(key) for key in ("task", "dataset", "split", "protocol", "body")]
            rows.append(_Row(*given, name, value, []))
            numbers.append({system: of[name][1] for system, of in metrics.items() if name in of})
    systems = list(dict.fromkeys(["model", *(system for of in numbers for system in of)])) if rows else []
    return [
        row._replace(values=[of.get(system, "") for system in systems]) for row, of in zip(rows, numbers, strict=True)
    ], systems


def _read_number(value: Any, where: str) -> tuple[float, str]:
    """A metric's number, and with its interval as text."""

    def check(number: Any, name: str) -> float:
        if not isinstance(number, _NUMBER) or isinstance(number, bool) or not math.isfinite(number):
            raise ValueError(f"expected a finite number as {name}, got {number!r}")
        return number

    if not isinstance(value, dict):
        return check(value, where), _number(value)
    middle = check(value.get("value"), f"`value` in {where}")
    if value.get("low") is None and value.get("high") is None:
        return middle, _number(middle)
    low, high = (check(value.get(end), f"`{end}` in {where}") for end in ("low", "high"))
    if low > high:
        raise ValueError(f"expected `low` <= `high` in {where}, got {low} and {high}")
    return middle, f"{_number(middle)} [{_number(low)}, {_number(high)}]"


def _make_tables(rows: list[_Row], systems: list[str]) -> list[tuple[list[str], list[_Row]]]:
    """For each evaluation the systems that it has, and its rows, which say alike what was measured."""
    tables = []
    for _, group in groupby(rows, key=lambda row: row[:5]):
        of_group = list(group)
        shown = [number for number in range(len(systems)) if any(row.values[number] for row in of_group)]
        table = [row._replace(values=[row.values[number] for number in shown]) for row in of_group]
        tables.append(([systems[number] for number in shown], table))
    return tables


def _in_short(protocol: str | None) -> str | None:
    """A protocol's first sentence: metadata repeat it for every metric."""
    return protocol and f"{protocol}. ".split(". ")[0]


@cache
def _environment() -> jinja2.Environment:
    # An unfilled field is an error, not an empty space in a card.
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (template_folder() / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "block": _block,
        "code": _code,
        "codes": lambda values: ", ".join(map(_code, values)) if values else NOT_STATED,
        "duration": _duration,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "number": _number,
        "versions": lambda of: ", ".join(f"{_code(k)} {_code(v)}" for k, v in of.items()) if of else NOT_STATED,
    }
    return environment


def _plain(text: Any) -> str:
    """One line of printable characters; those that turn the direction of writing are not."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _code(text: Any) -> str:
    """A code span, in which nothing is markup, or "not stated"; a bar would end a table's cell even there."""
    text = _plain("" if text is None else text).replace("|", "¦")
    if not text:
        return NOT_STATED
    fence = "`" * (_longest_ticks(text) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _block(text: str, language: str) -> str:
    """A fenced block that its content cannot end."""
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _number(value: float | None) -> str:
    if value is None:
        return NOT_STATED
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_STATED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _slug(text: str, joint: str = "-") -> str:
    return re.sub(r"[^a-z0-9]+", joint, text.lower()).strip(joint) or "unnamed"
