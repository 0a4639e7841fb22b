import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine"]


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Split trainable parameters into one group with weight decay and one without.

    Norm scales, biases and gates (fewer than two dimensions) do not decay, nor does a parameter that carries
    ``no_weight_decay = True``.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
            (free if exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_schedule(
    optimizer: Optimizer, schedule: Schedule, warmup_steps: int, total_steps: float
) -> LambdaLR:
    """Rise linearly over ``warmup_steps``, then stay, or fall as half a cosine to zero at ``total_steps``.

    Raises:
        ValueError: a cosine over a training of unknown length.
    """
    if schedule == "cosine" and not math.isfinite(total_steps):
        raise ValueError("schedule='cosine' needs an end: set trainer.max_epochs or trainer.max_steps")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
