"""What of an optimizer a checkpoint says, moments and the place in the schedule, and what the recipe says, though the checkpoint holds it too."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


# Of a group of parameters, what recipes have a field for; `initial_lr` is the rate that a schedule starts from.
_SETTINGS = ("initial_lr", "weight_decay", "betas")


@contextlib.contextmanager
def keeping_settings(optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> Iterator[None]:
    """Load states of both within the context; learning rates, weight decays and betas are those of before again at its end.

    Args:
        optimizer (`torch.optim.Optimizer`): As the recipe makes it, or accelerate's around it.
        schedule (`LRScheduler`): Made of it, or accelerate's around it.

    Raises:
        ValueError: Rates of a schedule that goes on from the last ones, and not from the first, differ.

    Source:
        Ours: `load_state_dict` of either puts the old values into the new groups, so that a run resumed with another learning rate would learn at
        the old one and record the new one. Where nothing was changed, nothing changes, bit for bit.
    """
    wanted = [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]
    yield
    schedule = getattr(schedule, "scheduler", schedule)
    rates = [values["initial_lr"] for values in wanted]
    if not isinstance(schedule, LambdaLR):
        had = [group["initial_lr"] for group in optimizer.param_groups]
        if rates != had:
            raise ValueError(
                f"--resume: wanted the learning rates {had} that the run had, because {type(schedule).__name__} goes on from the last; got {rates}"
            )
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = rates
        # as LambdaLR computes them
        now = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, now, strict=True):
            group["lr"] = rate
        schedule._last_lr = now


__all__ = ["keeping_settings"]
