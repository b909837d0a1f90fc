"""The figures of an evaluation as they come in: of systems by metric, for every item and over all."""

import torch
from torch import Tensor

from .metrics import Estimate, bootstrap


class Figures:
    """
    Collects.

    Args:
        seed (`int`): of the intervals.
        units (`torch.Tensor` of shape `(N,)`, *optional*):
            What the items belong to, by number: conversations, pictures. Intervals are over these; over items by default.

    Attributes:
        metrics (`dict[str, dict[str, Estimate | float]]`): system to metric to its value over all items.
        of_items (`dict[str, dict[str, torch.Tensor]]`): system to metric to the values of the items, `(N,)`.
        counts (`dict[str, int]`), notes (`list[str]`): what else a reader has to know.
    """

    def __init__(self, seed: int, units: Tensor | None = None):
        self._seed = seed
        self._units = units
        self.metrics: dict[str, dict[str, Estimate | float]] = {}
        self.of_items: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []

    def add(self, system: str, values: dict[str, Tensor]) -> None:
        """Metrics of every item; over all of them their mean, with its interval."""
        self.of_items.setdefault(system, {}).update(values)
        self.add_means(system, values)

    def add_means(
        self, system: str, values: dict[str, Tensor], items: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """The mean alone, of some `items` `(M,)`, weighted or not."""
        for name, of in values.items():
            groups = torch.arange(len(of)) if self._units is None else self._units
            if items is not None:
                of, groups = of[items], groups[items]
            estimate = bootstrap(of, seed=self._seed, weights=weights, groups=groups)
            # One unit says nothing about others.
            is_alone = len(groups.unique()) == 1
            self.metrics.setdefault(system, {})[name] = estimate.value if is_alone else estimate

    def add_number(self, system: str, name: str, value: float) -> None:
        """A metric of all items together, without an interval."""
        self.metrics.setdefault(system, {})[name] = value

    def note(self, text: str) -> None:
        """Once, however many systems it is about."""
        if text not in self.notes:
            self.notes.append(text)

    def as_results(self) -> dict[str, dict[str, dict[str, float] | float]]:
        """As JSON has them: a number, or `value`, `low` and `high`."""
        return {
            system: {
                name: value._asdict() if isinstance(value, Estimate) else value for name, value in of_system.items()
            }
            for system, of_system in self.metrics.items()
        }

    def as_columns(self) -> dict[str, list[float]]:
        """`SYSTEM.METRIC` to the values of the items."""
        return {
            f"{system}.{name}": of.tolist()
            for system, of_system in self.of_items.items()
            for name, of in of_system.items()
        }


def format_results(results: dict) -> str:
    """
    Results as text: the protocol, counts and notes, and a table of metrics by systems.

    Args:
        results (`dict`): the content of a `results.json`.
    """
    systems = list(results["metrics"])
    names = list(dict.fromkeys(name for of_system in results["metrics"].values() for name in of_system))
    rows = [["", *systems]]
    rows += [[name, *(_format_value(results["metrics"][system].get(name)) for system in systems)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    counts = ", ".join(f"{count} {name}" for name, count in results["counts"].items())
    return "\n".join([results["protocol"], f"{counts}.", *results["notes"], "", *lines, ""])


def _format_value(value: float | dict | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.4g}"
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
