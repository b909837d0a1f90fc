"""Muon for matrices, AdamW for the rest, as one optimizer (Jordan et al. 2024; its scale as in Moonlight, Liu et al. 2025)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """
    Steps each group of parameters with [`torch.optim.Muon`] or [`torch.optim.AdamW`], in one list of groups and one state,
    which schedules and checkpoints see. Muon's step has the size that AdamW's has at the same rate (`"match_rms_adamw"`).

    Args:
        muon_groups (`Iterable[dict]`): as PyTorch's groups; their parameters are matrices.
        adamw_groups (`Iterable[dict]`): the others.
        lr (`float`): of groups that name none.
        kwargs: AdamW's own, such as `betas`.
    """

    def __init__(
        self, muon_groups: Iterable[dict[str, Any]], adamw_groups: Iterable[dict[str, Any]], lr: float, **kwargs
    ):
        muon = Muon([dict(group) for group in muon_groups], lr, adjust_lr_fn="match_rms_adamw")
        self._parts: tuple[Optimizer, Optimizer] = (muon, AdamW([dict(group) for group in adamw_groups], lr, **kwargs))
        self._num_muon_groups = len(muon.param_groups)
        super().__init__([*muon.param_groups, *self._parts[1].param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives the parts the groups and the state of the whole, which stay the same objects."""
        muon, adamw = self._parts
        muon.param_groups = self.param_groups[: self._num_muon_groups]
        adamw.param_groups = self.param_groups[self._num_muon_groups :]
        muon.state = adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by `load_state_dict`, which brings new groups and a new state.
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
