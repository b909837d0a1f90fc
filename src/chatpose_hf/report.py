"""An evaluation as a page to look at: the figures of all systems with their intervals, and answers beside the truth."""

import base64
import io
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from .body import BodyModel
from .render import COLORS, render_bodies


PAGE_TEMPLATE = Path(__file__).parent / "assets" / "report.html"
RANKS = ("best", "median", "worst", "unanswered")
_UNITS = {"_mm": "mm", "_deg": "degrees", "_x100": "\u00d7 100", "_percent": "%"}
_LOWER_IS_BETTER = ("_mm", "_deg", "_x100", "fid", "loss")
_ACRONYMS = {"auc", "fid", "mpjpe", "mpjre", "mpvpe", "p2t", "pa", "pck", "pve", "t2p"}
_BOUND = "true_pose"
_FIRST = {"truth": 0, "model": 1}  # the others follow as they come
_VIEWS = ("front", "side")
_PICTURE_SIZE = 320  # pixels of the longer side
_BODY_SIZE = 256  # pixels of a view's height
_FRAMING_STEP = 16  # of a body's vertices, one in so many says well enough where it ends


class Case(NamedTuple):
    """
    One item of an evaluation, to look at.

    Args:
        rank (`str`): the heading it comes under, `"best"`, `"median"`, `"worst"` or `"unanswered"`.
        id (`str`): the item's.
        question (`str`), reply (`str`): what was asked, and what the model said.
        picture (`PIL.Image.Image`, *optional*): what the question shows.
        poses (`dict[str, torch.Tensor]`):
            Name to pose, `(24, 3)` axis-angle, camera frame: `"truth"` first if known, then `"model"`, then others.
        figures (`dict[str, float]`): metric to the value of this item, of the model.
    """

    rank: str
    id: str
    question: str
    reply: str
    picture: Image.Image | None
    poses: dict[str, Tensor]
    figures: dict[str, float]


class _Value(NamedTuple):
    """One metric of one system."""

    value: float
    low: float | None
    high: float | None


class _Bar(NamedTuple):
    """A system's part of a metric's chart: where zero, the value and the interval's ends are, in percent of the width."""

    system: str
    value: _Value
    zero: float
    end: float | None
    low: float | None
    high: float | None


class _Row(NamedTuple):
    metric: str
    better: str | None
    values: dict[str, _Value]
    best: set[str]
    bars: list[_Bar]


def make_report(results: dict, cases: Sequence[Case], body: BodyModel | None) -> str:
    """
    A page of an evaluation: one HTML file that loads nothing and needs no script.

    Texts of the results and the cases cannot become markup; characters that do not print are shown by their number.

    Args:
        results (`dict`):
            The content of a `results.json`; only `task`, `dataset` and `metrics` must be there. `metrics` maps systems,
            the model first, to metrics, each a number or `{"value", "low", "high"}`.
        cases (`Sequence[Case]`): what to show below the figures.
        body ([`BodyModel`], *optional*): whose shape; None where nobody was asked for poses.

    Returns:
        `str`: the HTML.

    Raises:
        ValueError: when `results` lacks what it must hold, or a metric is no number; the text names it.
    """
    for name in ("task", "dataset", "metrics"):
        if name not in results:
            raise ValueError(f"expected `{name}` in the results, got {sorted(results)}")
    systems = list(results["metrics"])
    pictures = _draw_cases(cases, body)
    shown = [
        (case, case.picture and _data_uri(_fit(case.picture)), of_case)
        for case, of_case in zip(cases, pictures, strict=True)
    ]
    ranks = dict.fromkeys([*RANKS, *(case.rank for case in cases)])
    optional = ("split", "protocol", "body", "model", "revision", "seed", "counts", "settings", "notes", "versions")
    return _template().render(
        results={**dict.fromkeys(optional), **results},
        systems=systems,
        rows=_read_rows(results["metrics"]),
        groups=[(rank, of_rank) for rank in ranks if (of_rank := [item for item in shown if item[0].rank == rank])],
        colors=_name_colors(cases),
    )


def better(metric: str) -> str | None:
    """Which values of a metric are better, `"lower"` or `"higher"`, as its name tells; None where it does not."""
    if "diversity" in metric:
        return None
    if "failure" in metric or metric.endswith(_LOWER_IS_BETTER):
        return "lower"
    return "higher" if metric.endswith("_percent") else None


def _read_rows(metrics: dict[str, dict]) -> list[_Row]:
    """A row for each metric of any system, in the order in which they come."""
    rows = []
    for metric in dict.fromkeys(metric for of_system in metrics.values() for metric in of_system):
        read = {
            system: _read_value(of_system.get(metric), f"`metrics.{system}.{metric}`")
            for system, of_system in metrics.items()
        }
        values = {system: of for system, of in read.items() if of}
        # The truth's own figure is a bound, not a competitor.
        compared = [of.value for system, of in values.items() if system != _BOUND and math.isfinite(of.value)]
        direction, best = better(metric), set()
        if direction and len(compared) > 1:
            target = min(compared) if direction == "lower" else max(compared)
            best = {system for system, of in values.items() if system != _BOUND and of.value == target}
        rows.append(_Row(metric, direction, values, best, _make_bars(values)))
    return rows


def _read_value(value: Any, where: str) -> _Value | None:
    """None for a metric that was not measured; an interval needs both its ends."""
    parts = value if isinstance(value, dict) else {"value": value}
    numbers = _Value(*(parts.get(name) for name in _Value._fields))
    for name, number in zip(_Value._fields, numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ValueError(f"expected a number as `{name}` of {where}, got {number!r}")
    if numbers.value is None:
        return None
    return numbers if None not in numbers else _Value(numbers.value, None, None)


def _make_bars(values: dict[str, _Value]) -> list[_Bar]:
    """Bars from zero, on one scale; what is not finite is not drawn."""
    ends = [0, *(end for of in values.values() for end in of if end is not None and math.isfinite(end))]
    span = (max(ends) - min(ends)) or 1

    def place(value: float | None) -> float | None:
        return 100 * (value - min(ends)) / span if value is not None and math.isfinite(value) else None

    return [_Bar(system, of, place(0), *map(place, of)) for system, of in values.items()]


def _draw_cases(cases: Sequence[Case], body: BodyModel | None) -> list[dict[str, str | None]]:
    """Of each case, name to picture; None where there is nothing to draw: no pose, or numbers that are not finite."""
    if body is None:
        return [{} for _ in cases]
    drawable = [{name: pose for name, pose in case.poses.items() if torch.isfinite(pose).all()} for case in cases]
    poses = [pose.detach().to(body.rest_joints) for of_case in drawable for pose in of_case.values()]
    if poses:
        with torch.no_grad():
            vertices = body.vertices(torch.stack(poses)).cpu()
        # On one floor (y points down); the pelvis stays over the same place.
        vertices[..., 1] -= vertices[..., 1].amax(-1, keepdim=True)
    faces, colors = body.faces.cpu(), _name_colors(cases)
    drawn, start = [], 0
    for case, of_case in zip(cases, drawable, strict=True):
        # Where the model gave no pose, its place stays empty.
        names = sorted([*case.poses, *({"model"} - case.poses.keys())], key=lambda name: _FIRST.get(name, len(_FIRST)))
        pictures: dict[str, str | None] = dict.fromkeys(names)
        if of_case:
            strips = _draw_alike(vertices[start : start + len(of_case)], faces, [colors[name] for name in of_case])
            pictures.update(zip(of_case, map(_data_uri, strips), strict=True))
        start += len(of_case)
        drawn.append(pictures)
    return drawn


def _draw_alike(vertices: Tensor, faces: Tensor, colors: Sequence[str]) -> list[Image.Image]:
    """A strip of views for each body `(N, V, 3)`, all in the same scale and around the same place."""
    # Vertices of no face are not drawn, but the camera makes room for them.
    room = vertices[:, ::_FRAMING_STEP].flatten(0, 1)
    strips: list[list[Image.Image]] = [[] for _ in vertices]
    for view in _VIEWS:
        pictures = [
            render_bodies(torch.cat([one, room]), faces, _BODY_SIZE, view, colors=[color])
            for one, color in zip(vertices, colors, strict=True)
        ]
        boxes = [picture.getbbox() or (0, 0, _BODY_SIZE, _BODY_SIZE) for picture in pictures]
        left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
        for strip, picture in zip(strips, pictures, strict=True):
            strip.append(picture.crop((left, 0, right, _BODY_SIZE)))
    return [_join(strip) for strip in strips]


def _join(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    joined = Image.new("RGBA", (sum(picture.width + gap for picture in pictures) - gap, pictures[0].height))
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    return joined


def _name_colors(cases: Sequence[Case]) -> dict[str, str]:
    """One colour for each name, the same in all cases."""
    names = dict.fromkeys(["model", "truth", *(name for case in cases for name in case.poses)])
    # The model has the colour of bodies in answers, the truth green.
    order = [COLORS[0], COLORS[2], COLORS[1], *COLORS[3:]]
    return {name: order[number % len(order)] for number, name in enumerate(names)}


def _fit(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    small.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    return small


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _template() -> jinja2.Template:
    # An unfilled field is an error, not an empty space in a page.
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_make_harmless,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "better": better,
        "label": _label,
        "number": _number,
        "say": _say,
        "stated": _stated,
        "unit": _unit,
    }
    return environment.from_string(PAGE_TEMPLATE.read_text(encoding="utf-8"))


def _make_harmless(value: Any) -> Any:
    """
    Characters that do not print are spelt: those that turn the direction of writing, controls, half characters.

    Jinja calls it for every field before it escapes the markup.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = "\n".join(value.splitlines())
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else " " if letter.isspace() else f"\\u{ord(letter):04x}"
        for letter in text
    )


def _label(name: str) -> str:
    """A metric's name without its unit, or a system's, in words."""
    for ending in _UNITS:
        name = name.removesuffix(ending)
    return " ".join(word.upper() if word in _ACRONYMS else word for word in name.split("_"))


def _unit(metric: str) -> str:
    return next((unit for ending, unit in _UNITS.items() if metric.endswith(ending)), "")


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)  # of NumPy or torch too
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def _say(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _stated(entries: dict) -> dict:
    return {name: value for name, value in entries.items() if value is not None}
