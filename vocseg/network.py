"""Calling a network: colours normalised, any image size in, logits of that size out, and the encoder set apart.

Not here: what architectures there are (`plugins/`), their pretrained weights (`vocseg/data/weights.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB = tuple[float, float, float]
IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation, of 0…1

DEFAULT_STRIDE = 32
AUXILIARY_WEIGHT = 0.4  # on the loss of auxiliary logits, as in PSPNet (Zhao et al. 2017, arXiv:1612.01105)


class Logits(NamedTuple):
    """What a network says of images, as large as it says it: full-size, or a whole fraction of that.

    Attributes:
        raw: (b, c, h', w') of a floating type, for the padded images.
        padded: height and width of the images as the network saw them.
        size: their own height and width, before the padding at the right and bottom.
    """

    raw: Tensor
    padded: tuple[int, int]
    size: tuple[int, int]

    def full(self) -> Tensor:
        """(b, c, h, w) float32 of the images' own size: upsampled bilinearly, and the padding cropped away."""
        height, width = self.size
        small = self.raw.shape[-2], self.raw.shape[-1]
        if small == self.padded:
            return (self.raw if small == self.size else self.raw[..., :height, :width]).float()
        if factor := enlargement(small, self.padded):
            # F.interpolate with its second half left out: no pixel of the padding is computed, or copied by a loss.
            scale = float(factor)
            return torch.ops.aten.upsample_bilinear2d(self.raw.float(), self.size, False, scale, scale)
        return F.interpolate(self.raw.float(), self.padded, mode="bilinear")[..., :height, :width]


def raw_outputs(network: Callable[[Tensor], Any], images: Tensor, stride: int) -> dict[str, Logits]:
    """Runs a network on images of any size.

    The images are padded at the right and bottom with zeros (the mean colour, once normalised) to a multiple
    of `stride`.

    Args:
        images: (b, 3, h, w) normalised.

    Returns:
        Logits by name: `out`, and auxiliary ones where the network has them.

    Raises:
        ValueError: the network gives no logits, or `out` is neither of the padded images' size nor a whole fraction.
    """
    height, width = images.shape[-2:]
    right, below = -width % stride, -height % stride
    padded = F.pad(images, (0, right, 0, below)) if right or below else images
    size = padded.shape[-2], padded.shape[-1]
    raw = network(padded)
    named = dict(raw) if isinstance(raw, Mapping) else {"out": raw}
    if "out" not in named:
        raise ValueError(f"the network returned a mapping with {sorted(named)}, and no 'out' among them")
    for name, logits in named.items():
        if not isinstance(logits, Tensor):
            found = f"{type(logits).__name__} for '{name}'" if isinstance(raw, Mapping) else type(raw).__name__
            raise ValueError(f"the network returned {found}; expected logits, or a mapping of them with 'out'")
    if not enlargement(named["out"].shape[-2:], size):
        raise ValueError(
            f"the network returned logits of {tuple(named['out'].shape[-2:])} for images of {size}; "
            "return them at the images' size, or at the same whole fraction of height and width"
        )
    return {name: Logits(logits, size, (height, width)) for name, logits in named.items()}


def outputs(network: Callable[[Tensor], Any], images: Tensor, stride: int) -> dict[str, Tensor]:
    """Runs a network on images of any size, as `raw_outputs` does.

    Returns:
        Float32 logits by name, (b, c, h, w) of the images' own size.
    """
    return {name: logits.full() for name, logits in raw_outputs(network, images, stride).items()}


def enlargement(small: Sequence[int], large: Sequence[int]) -> int:
    """The whole number that height and width of `small` are multiplied by to give `large`; 0 where there is none."""
    factor = large[0] // small[0] if small[0] else 0
    return factor if (small[0] * factor, small[1] * factor) == tuple(large) else 0


def stride_of(network: nn.Module) -> int:
    """What the sides of an image must be a multiple of: the network's `stride`, or 32 if it says nothing."""
    return int(getattr(network, "stride", DEFAULT_STRIDE))


def backbone_of(network: nn.Module, attribute: str) -> nn.Module | None:
    """The pretrained part of a network, by the name its architecture declares; None where it declares none."""
    return network.get_submodule(attribute) if attribute else None


def set_training(network: nn.Module, backbone: nn.Module | None, frozen: bool) -> None:
    """Puts a network into training mode, its encoder frozen or not.

    A frozen encoder gets no gradients and stays in eval mode, so that its batch norms keep their statistics.
    """
    network.train()
    if backbone is not None:
        backbone.requires_grad_(not frozen)
        backbone.train(not frozen)


def parameter_groups(network: nn.Module, backbone: nn.Module | None) -> list[dict]:
    """Parameter groups for the optimizer: the encoder's, where there is one, and before it the others'."""
    inside = {id(p) for p in backbone.parameters()} if backbone is not None else set()
    rest = [p for p in network.parameters() if id(p) not in inside]
    encoder = [p for p in network.parameters() if id(p) in inside]
    return [{"params": group, "name": name} for name, group in (("decoder", rest), ("encoder", encoder)) if group]


@dataclass
class Kept:
    """Bytes that autograd kept; known when `kept_for_backward` ends."""

    bytes: int = 0


@contextmanager
def kept_for_backward(network: nn.Module, *given: Tensor) -> Iterator[Kept]:
    """Counts what autograd keeps, of all that runs inside, for the backward pass: the activations.

    The network's weights and buffers are left out, and so are the tensors `given` to it.
    """
    kept = Kept()
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that none takes the place of another that is counted

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
    own = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers(), *given)}
    kept.bytes = sum(storage.nbytes() for at, storage in storages.items() if at not in own)


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@dataclass(frozen=True, eq=False)
class Normalization:
    """From pixels to what a network takes: (pixel - mean) / std, channel by channel.

    Attributes:
        mean, std: (3,) float32 of 0…255, in the network's order of channels.
        bgr: the network's channels are blue, green, red.
    """

    mean: Tensor
    std: Tensor
    bgr: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """(b, h, w, 3) uint8 RGB to (b, 3, h, w) float32, in memory channels_last, which is how pixels lie already."""
        b, h, w, c = pixels.shape
        ordered = pixels.flip(-1) if self.bgr else pixels
        # By whole rows: what is written for three channels is done three at a time, and takes four times as long.
        rows = ordered.reshape(b * h, w * c).to(torch.float32, copy=True)
        rows.sub_(self.mean.repeat(w)).div_(self.std.repeat(w))
        return rows.view(b, h, w, c).permute(0, 3, 1, 2)

    def to(self, device: torch.device) -> "Normalization":
        return Normalization(self.mean.to(device), self.std.to(device), self.bgr)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The RGB colour that comes nearest to zero, which is what padding inside a network is made of."""
        first, green, last = (round(value) for value in self.mean.tolist())
        return (last, green, first) if self.bgr else (first, green, last)


def choose_normalization(name: str, pretrained: tuple[RGB, RGB]) -> Normalization:
    """The normalisation that `data.normalize` names, on the CPU.

    Args:
        pretrained: mean and deviation of RGB in 0…1 that the encoder knows, which is what "auto" takes.
    """
    if name == "bgr_mean":  # Caffe's VGG, in 0…255 and not scaled (report 003)
        return Normalization(torch.tensor([104.008, 116.669, 122.675]), torch.ones(3), bgr=True)
    mean, std = {
        "auto": pretrained,
        "imagenet": IMAGENET,
        "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }[name]
    return Normalization(torch.tensor(mean) * 255, torch.tensor(std) * 255)
