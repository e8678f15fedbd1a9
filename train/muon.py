"""Muon for the weights of linear layers, AdamW for everything else, as one optimizer.

Both step at one learning rate: Muon's updates are scaled to the size that AdamW's have.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn


OPTIMIZERS = ("adamw", "muon")
IS_MUON = "muon"


def linear_weights(model: nn.Module) -> set[int]:
    """Which parameters are weights of linear layers; those that are word embeddings too are not.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `set[int]`: their `id`.

    Source:
        Upstream: KellerJordan/Muon (for hidden matrices; embeddings, heads, gains and biases go to AdamW). Ours: tables of learned tokens are
        matrices too, but none of a linear layer.
    """
    modules = list(model.modules())
    embedded = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    return {id(module.weight) for module in modules if isinstance(module, nn.Linear)} - embedded


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of two kinds of groups.

    Args:
        groups (`Iterable[dict]`): As optimizers take them; `"muon": True` in those of matrices that Muon steps.
        momentum (`float`): Muon's.
        **settings: AdamW's: `lr`, `betas`, `eps`, `weight_decay`; `lr` and `weight_decay` are Muon's too. A group's own count before them.

    Raises:
        ValueError: No group, or a group of Muon holds something else than matrices.

    Source:
        Upstream: `torch.optim.Muon`, with `adjust_lr_fn="match_rms_adamw"`. Ours: one optimizer, because a Trainer has one.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.95, **settings: Any):
        super().__init__([{IS_MUON: False, **group} for group in groups], settings)
        muon, others = ([group for group in self.param_groups if group[IS_MUON] is which] for which in (True, False))
        # Each adds to its groups what it knows of besides.
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        if muon:
            shared = {name: settings[name] for name in ("lr", "weight_decay") if name in settings}
            stepped = torch.optim.Muon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw", **shared)
            self._parts.append((True, stepped))
        if others:
            self._parts.append((False, torch.optim.AdamW(others, **settings)))
        self._link()

    def _link(self) -> None:
        """Groups and states of both parts are this one's: a schedule changes learning rates here, a checkpoint holds one state."""
        for which, part in self._parts:
            part.param_groups = [group for group in self.param_groups if group[IS_MUON] is which]
            part.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step both.

        Args:
            closure (callable, *optional*): Computes the loss again.

        Returns:
            `float`, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state_dict (`dict`): Of an optimizer with the same groups.

        Raises:
            ValueError: The groups are others.
        """
        super().load_state_dict(state_dict)
        if any(IS_MUON not in group for group in self.param_groups):
            raise ValueError("optimizer: wanted the state of Muon with AdamW; got that of another optimizer")
        self._link()


__all__ = ["IS_MUON", "OPTIMIZERS", "MuonWithAdamW", "linear_weights"]
