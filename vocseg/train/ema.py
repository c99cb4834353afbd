"""An exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class Ema:
    """Keeps an average of a network's weights and batch-norm statistics.

    The decay grows towards its final value over the first steps, so that the average does not drag the
    random start along: after n updates it is min(decay, (1 + n) / (10 + n)).

    Attributes:
        network: a copy of the network that holds the average; always in eval mode, without gradients.
        updates: how often `update` was called.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = self.network.state_dict(), network.state_dict()
        floating = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[n] for n in floating], [values[n] for n in floating], 1 - decay)
        counters = [name for name, value in values.items() if not value.is_floating_point()]  # batch norm's, of steps
        if counters:
            torch._foreach_copy_([averages[n] for n in counters], [values[n] for n in counters])
