"""A network as it predicts fastest: a copy of it, changed where that leaves what it computes but for rounding.

Autocast converts every weight to bf16 for every image; here that is done once. And a batch norm that takes all that one
convolution gives, and nothing else, is put into that convolution's weights (Jacob et al. 2018, arXiv:1712.05877,
section 3.2). Which weights and batch norms these are is seen while the first image goes through the unchanged copy.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from vocseg.errors import one_line

Say = Callable[[str], object]

# Exactly these: what a subclass does with its weights is not known. Autocast runs all of them in bf16.
_CONVERTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def silent(text: str) -> None:
    """Says nothing."""


class InferenceCopy(nn.Module):
    """A network with the weights that it has now, for inference under bf16 autocast.

    A network that cannot be copied is called as it is.

    Args:
        compiled: compile the copy too, its weights as constants. That takes up to a minute, for the first two sizes of
            image each; where it fails, the copy is called uncompiled.
        say: gets what could not be done, and why.
    """

    def __init__(self, network: nn.Module, *, compiled: bool = False, say: Say = silent):
        super().__init__()
        self._say = say
        self._fresh = True
        try:
            self.network = copy.deepcopy(network).eval().requires_grad_(False)
        except Exception:  # it holds something that cannot be copied, such as a lock
            self.network, self._fresh = network, False
        self._compiled = torch.compile(self.network) if compiled else None

    def forward(self, images: Tensor) -> Any:
        if self._fresh:
            self._fresh = False
            with _Watched(self.network) as watched:
                found = self.network(images)
            watched.change(found)
        if self._compiled is not None:
            try:
                with torch._inductor.config.patch(freezing=True):
                    return self._compiled(images)
            except Exception as error:  # no C++ compiler, or a network that cannot be compiled
                self._say(f"the network runs uncompiled: {type(error).__name__}: {one_line(error, 200)}")
                self._compiled = None
        return self.network(images)


class _Watched(TorchDispatchMode):
    """While it is entered, sees which layer's output goes where in a network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.calls: Counter[nn.Module] = Counter()  # of batch norms
        self.in_bf16: set[nn.Module] = set()
        self.gave = WeakTensorKeyDictionary()  # from what a convolution gave to the convolution
        self.uses: Counter[nn.Module] = Counter()  # operations that took it
        self.before: dict[nn.Module, nn.Module] = {}  # from a batch norm to the convolution it took it from
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Watched":
        # Hooks of their own may change what layers get and give: those layers are left alone.
        for module in self.network.modules():
            if not (module._forward_hooks or module._forward_pre_hooks):
                if type(module) in _CONVERTED:
                    self.hooks.append(module.register_forward_hook(self._after_layer))
                elif type(module) in _batch_norms():
                    self.hooks.append(module.register_forward_pre_hook(self._before_norm))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._use((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _use(self, things: Any) -> None:
        for thing in tree_leaves(things):
            if isinstance(thing, Tensor) and thing in self.gave:
                self.uses[self.gave[thing]] += 1

    def _after_layer(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        self.gave[output] = layer
        if torch.is_autocast_enabled(output.device.type) and output.dtype == torch.bfloat16:
            self.in_bf16.add(layer)

    def _before_norm(self, norm: nn.Module, given: tuple[Tensor]) -> None:
        self.calls[norm] += 1
        if given[0] in self.gave:
            self.before[norm] = self.gave[given[0]]

    def change(self, found: Any) -> None:
        """Changes the network, which gave `found`, into one that computes the same faster."""
        self._use(found)
        for norm, conv in self.before.items():
            alone = self.calls[norm] == self.uses[conv] == 1
            if alone and conv in self.in_bf16 and _can_fold(conv, norm):
                _fold(conv, norm)
        # A weight that something else has too may be needed as it is.
        others = (module for module in self.network.modules() if module not in self.in_bf16)
        elsewhere = {id(weight) for module in others for weight in module.parameters(recurse=False)}
        for layer in self.in_bf16:
            if not any(id(weight) in elsewhere for weight in layer.parameters()):
                layer.to(torch.bfloat16)


class _Folded(nn.Module):
    """Takes the place of a batch norm that its convolution does already; what timm puts behind one it still does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x)) if hasattr(self, "act") else x  # type: ignore[operator]


def _can_fold(conv: Any, norm: Any) -> bool:
    grouped_transpose = type(conv) is nn.ConvTranspose2d and conv.groups > 1  # its weights lie in another order
    return type(conv) is not nn.Linear and not grouped_transpose and norm.running_mean is not None and not norm.training


def _fold(conv: Any, norm: Any) -> None:
    """Both stay the objects they are, for networks that have them in lists of their own as well."""
    transpose = type(conv) is nn.ConvTranspose2d
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, transpose)
    norm.__class__ = _Folded


def _batch_norms() -> tuple[type[nn.Module], ...]:
    timm = sys.modules.get("timm.layers")  # loaded where a network has any of its layers
    return (nn.BatchNorm2d, timm.BatchNormAct2d) if timm else (nn.BatchNorm2d,)
