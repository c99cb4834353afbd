"""Optimizers: torch's own, in one fused kernel a step where the device has it.

Each takes a list of parameter groups as torch does. A group's own `lr` or `weight_decay` comes before the recipe's.
"""

from typing import Annotated, Any

import torch
from annotated_types import Gt, Interval

from vocseg import optimizer
from vocseg.errors import Problem, UsageError

LearningRate = Annotated[float, Interval(gt=0, le=10)]
Decay = Annotated[float, Interval(ge=0, le=1)]
Beta = Annotated[float, Interval(ge=0, lt=1)]


@optimizer
def sgd(
    params: list[dict[str, Any]],
    *,
    lr: LearningRate = 0.01,
    momentum: Beta = 0.9,
    weight_decay: Decay = 1e-4,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013).

    Args:
        weight_decay: L2 penalty, added to the gradient.

    Raises:
        UsageError: `nesterov` without momentum.
    """
    if nesterov and momentum == 0:
        raise UsageError(Problem("sgd.nesterov", "needs a momentum above 0, found 0; set momentum or drop nesterov"))
    return torch.optim.SGD(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=_fused(params)
    )


@optimizer
def adam(
    params: list[dict[str, Any]],
    *,
    lr: LearningRate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Decay = 0.0,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), of reports 001, 003 and 004.

    Args:
        weight_decay: L2 penalty, added to the gradient; `adamw` takes it off the weights instead.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237; report 003).
    """
    return torch.optim.Adam(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=_fused(params)
    )


@optimizer
def adamw(
    params: list[dict[str, Any]],
    *,
    lr: LearningRate = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Decay = 0.01,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), of report 002.

    Args:
        weight_decay: share of each weight taken off a step, times the learning rate.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018, arXiv:1904.09237).
    """
    return torch.optim.AdamW(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=_fused(params)
    )


def _fused(params: list[dict[str, Any]]) -> bool | None:
    """True where every parameter can be stepped by a fused kernel; None leaves the choice to torch."""
    parameters = [p for group in params for p in group["params"]]
    fits = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters)
    return True if fits else None
