"""One architecture under trial: building it, running it, and what each of the checks has need of.

Little is computed. FLOPs and memory are asked of a network on torch's meta device, which holds no numbers, and so are
the shapes of a large one; what needs numbers is asked of a small image.
"""

import contextlib
import math
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from vocseg.errors import VocsegError, shown_path
from vocseg.network import backbone_of, count_parameters, enlargement, set_training, stride_of
from vocseg.testing.subject import Subject

CLASSES = 21
SMALL = 32  # pixels; the least side that architectures are expected to take
SEED = 20_011
OTHER_SEED = 40_009
LARGEST = 512  # pixels; the largest side that is tried in search of one that works
LARGE = 25_000_000  # parameters; networks from here on are asked for shapes without numbers
LIKE_IMAGENET = 224  # pixels; the side that figures are given for

Size = tuple[int, ...]

GLOBAL: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "random seed": (torch.initial_seed, torch.manual_seed),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type in ("cpu", "meta") else device),
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "matrix precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cuDNN benchmark mode": (
        lambda: torch.backends.cudnn.benchmark,
        lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    ),
}


class ConnectionTried(BaseException):
    """Raised where a connection would be opened. Not an Exception: what retries on those must not retry on this."""


class NeedsConnection(Exception):  # noqa: N818 - a verdict rather than an error
    """Building a network tried to open a connection."""


@dataclass(frozen=True)
class Built:
    """A network, and what was so before it ran: the names of its parameters, and of its modules in eval mode."""

    module: nn.Module
    parameters: set[str]
    in_eval_mode: list[str]


@dataclass(frozen=True)
class Attempt:
    """What came of running a network on one image of a size: the size of its logits, or why there are none.

    Attributes:
        unit: what the sides of images are taken to be a multiple of.
    """

    size: Size
    unit: int
    logits: Size = ()
    error: Exception | None = None

    @property
    def good(self) -> bool:
        """Whether the logits are as large as the image, or a whole fraction of that at any multiple of the unit."""
        factor = enlargement(self.logits, self.size) if self.logits else 0
        return factor > 0 and self.unit % factor == 0


@dataclass(frozen=True)
class Sides:
    """Which square images a network takes.

    Attributes:
        claimed: the stride the module gives, or the default.
        first: the attempt on the smallest odd multiple of it that is not below `SMALL`.
        unit: what sides have to be a multiple of, as far as it was found out.
        side: a side that works; where none gives logits of a size that can be used, one that gives any.
    """

    claimed: int
    first: Attempt
    unit: int
    side: int


@dataclass(frozen=True)
class Reference:
    """What the network makes of the two images, and what it changes on the way."""

    returned: Any
    logits: Tensor
    image_changed: bool
    state_changed: list[str]


class Trial:
    """Builds and runs one architecture. Each cached property raises what the plugin raises, at its first use."""

    def __init__(self, subject: Subject, params: Mapping[str, Any]):
        self.subject = subject
        self.params = dict(params)
        self.moved: dict[str, str] = {}  # torch's global settings that the plugin changed, and how

    # Building

    @cached_property
    def function(self) -> Callable:
        with self.watched("importing the file"):
            return self.subject.load()

    def build(self, num_classes: int = CLASSES, *, seed: int = SEED, device: str = "cpu") -> nn.Module:
        """A new network. Whatever opens a connection meanwhile is stopped.

        Raises:
            NeedsConnection: it tried to.
            TypeError: what was built is no module.
        """
        function = self.function
        torch.manual_seed(seed)
        place = torch.device(device) if device != "cpu" else contextlib.nullcontext()
        try:
            with place, self.watched("building the network"), no_connection():
                module = self.subject.call(function, num_classes, self.params)
        except ConnectionTried as error:
            raise NeedsConnection(str(error)) from error
        if not isinstance(module, nn.Module):
            raise TypeError(f"the function returned {type(module).__name__}, not a torch module")
        return module

    @cached_property
    def built(self) -> Built:
        module = self.build()
        in_eval_mode = [name or "the network" for name, inner in module.named_modules() if not inner.training]
        return Built(module, {name for name, _ in module.named_parameters()}, in_eval_mode)

    @property
    def network(self) -> nn.Module:
        """The network that was built first; `settled` changes its weights."""
        return self.built.module

    @cached_property
    def backbone(self) -> nn.Module | None:
        return backbone_of(self.network, self.subject.backbone)

    # Shapes

    @cached_property
    def hollow(self) -> nn.Module:
        """A network without numbers, to ask for figures; the real one where such a one cannot be built or run."""
        with contextlib.suppress(Exception):
            network = self.build(device="meta").eval()
            if all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
                with torch.no_grad():
                    network(empty(network, 2, 4 * SMALL, 4 * SMALL))
                return network
        return self.network

    @cached_property
    def probe(self) -> nn.Module:
        """The network to ask for shapes. Running without numbers has its own cost, which only large ones outweigh."""
        return self.hollow if count_parameters(self.network) > LARGE else self.network

    def attempt(self, height: int, width: int, unit: int) -> Attempt:
        """Runs one image of that size, a multiple of `unit`.

        What fails without numbers is tried with them, before it counts as a failure.
        """
        networks = [self.probe] if self.probe is self.network else [self.probe, self.network]
        for network in networks:
            try:
                logits = logits_of(self.shapes(network, height, width))
                return Attempt((height, width), unit, logits=(logits.shape[-2], logits.shape[-1]))
            except Exception as error:
                failure = error
        return Attempt((height, width), unit, error=failure)

    def shapes(self, network: nn.Module, height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
        """The outputs of empty images, in eval mode."""
        with torch.no_grad():
            return self.run(network.eval(), empty(network, batch, height, width))

    @cached_property
    def sides(self) -> Sides:
        """Finds out which sides work.

        Raises:
            Exception: what the network raised first, where it runs at no size.
        """
        claimed = self.claimed_stride
        side = odd_multiple(claimed, SMALL)
        first = self.attempt(side, side, claimed)
        if first.good:
            return Sides(claimed, first, claimed, first.size[0])
        ran = [first] if first.error is None else []
        candidates = [(claimed, odd_multiple(claimed, 3 * SMALL))]
        # 8 comes early: at a side of 35, logits at 1/8 rounded up pass for 1/7.
        candidates += [(k * claimed, odd_multiple(k * claimed, SMALL)) for k in (2, 3, 4, 8, 5, 6, 7)]
        candidates += [(k * claimed, k * claimed) for k in (16, 32)]
        for unit, side in candidates:
            if side <= LARGEST:
                attempt = self.attempt(side, side, unit)
                if attempt.good:
                    return Sides(claimed, first, unit, side)
                ran += [attempt] if attempt.error is None else []
        if not ran:
            assert first.error is not None
            raise first.error
        return Sides(claimed, first, claimed, ran[0].size[0])

    @cached_property
    def claimed_stride(self) -> int:
        try:
            claimed = stride_of(self.network)
        except (TypeError, ValueError):
            return SMALL
        return claimed if claimed > 0 else SMALL

    @cached_property
    def size(self) -> Size:
        """Height and width of the images that need numbers: as small as can be, and not square if that works."""
        side = self.sides.side
        wide = self.attempt(side, 2 * side, self.sides.unit)
        return (side, 2 * side) if wide.error is None else (side, side)

    def fitting(self, side: int) -> int:
        """The smallest side from this one on that the network takes."""
        return math.ceil(side / self.sides.unit) * self.sides.unit

    # Numbers

    @cached_property
    def images(self) -> Tensor:
        """Two images that have nothing in common: (2, 3, h, w), as if normalised."""
        return torch.randn(2, 3, *self.size, generator=torch.Generator().manual_seed(SEED))

    @cached_property
    def settled(self) -> nn.Module:
        """The network in eval mode, made such that its logits depend on the image.

        As built, many do not: a layer that starts with zeros hides what comes before it, and batch norms that have seen
        nothing let activations vanish. So weights that are all equal are spread a little, and batch norms are shown the
        images once.
        """
        network, images = self.network, self.images  # in search of their size, the network was put into eval mode
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in network.parameters():
                exists = not is_lazy(parameter) and parameter.numel() > 0
                if exists and parameter.is_floating_point() and len(set(extent(parameter))) == 1:
                    noise = torch.rand(parameter.shape, generator=generator) * 0.2 - 0.1
                    parameter.add_(noise.to(parameter))
        norms = [(m, m.momentum) for m in network.modules() if isinstance(m, _BatchNorm)]
        for norm, _ in norms:
            norm.momentum = 1.0
        with contextlib.suppress(Exception), torch.no_grad():  # a network that cannot be trained has a row for that
            self.run(network.train(), images)
        for norm, momentum in norms:
            norm.momentum = momentum
        return network.eval()

    def run(self, network: Callable[[Tensor], Any], images: Tensor, *, seed: int = SEED) -> dict[str, Tensor]:
        """The network's outputs by name, for a copy of the images."""
        torch.manual_seed(seed)
        with self.watched("running the network"):
            return named(network(images.clone(memory_format=torch.preserve_format)))

    def evaluate(self, images: Tensor, *, network: nn.Module | None = None, seed: int = SEED) -> Tensor:
        """The logits in eval mode."""
        with torch.no_grad():
            network = self.settled if network is None else network
            return logits_of(self.run(network.eval(), images, seed=seed))

    @cached_property
    def reference(self) -> Reference:
        network, images = self.settled, self.images.clone()
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        versions = {name: (parameter, parameter._version) for name, parameter in network.named_parameters()}
        torch.manual_seed(SEED)
        with torch.no_grad(), self.watched("running the network"):
            returned = network(images)
        changed = [n for n, b in network.named_buffers() if n in buffers and not equal(b, buffers[n])]
        for name, parameter in network.named_parameters():
            before, version = versions.get(name, (parameter, parameter._version))
            if parameter is not before or parameter._version != version:
                changed.append(name)
        image_changed = not torch.equal(images, self.images)
        return Reference(returned, logits_of(named(returned)).clone(), image_changed, changed)

    @cached_property
    def alone(self) -> Tensor:
        """The logits of the first image by itself."""
        return self.evaluate(self.images[:1])

    @property
    def contrast(self) -> float:
        """By how much the logits of the two images differ, which is what other differences are measured by."""
        first, second = self.reference.logits.float()
        return (first - second).abs().max().item()

    def difference(self, found: Tensor, expected: Tensor) -> str:
        """How far apart logits are; empty where rounding explains it."""
        if found.shape != expected.shape:
            return f"logits of {tuple(found.shape)}, not {tuple(expected.shape)}"
        apart = (found.float() - expected.float()).abs().max().item()
        if apart <= 0.01 * self.contrast + 1e-5 * expected.float().abs().max().item():
            return ""
        share = f", {apart / self.contrast:.0%} of what sets two images apart" if self.contrast else ""
        return f"logits that differ by up to {apart:.2g}{share}"

    @contextlib.contextmanager
    def training(self, network: nn.Module | None = None, *, frozen: bool = False) -> Iterator[nn.Module]:
        """The network in training mode; afterwards it is in eval mode, and all but its weights as it was."""
        network = self.settled if network is None else network
        asked = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        try:
            network.train()
            if frozen:
                set_training(network, self.backbone, frozen=True)
            yield network
        finally:
            for parameter, asks in asked:
                parameter.requires_grad_(asks)
            for buffer, value in buffers:
                buffer.copy_(value)
            network.zero_grad(set_to_none=True)
            network.eval()

    def train_step(self, images: Tensor, *, bf16: bool = False) -> Tensor:
        """A forward and a backward pass in the mode the network is in. Returns the loss.

        The loss is a random projection of all outputs, whose gradient is zero for none of them.
        """
        network = self.settled
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = self.run(network, images)
        generator = torch.Generator().manual_seed(SEED)
        total = torch.zeros(())
        for logits in outputs.values():
            if isinstance(logits, Tensor):
                total = total + (logits.float() * torch.randn(logits.shape, generator=generator)).mean()
        total.backward()
        return total.detach()

    # What the plugin does to the rest of the process

    @contextlib.contextmanager
    def watched(self, during: str) -> Iterator[None]:
        """Notes which of torch's global settings change meanwhile, and sets them back."""
        before = {name: get() for name, (get, _) in GLOBAL.items()}
        try:
            yield
        finally:
            for name, (get, put) in GLOBAL.items():
                if (after := get()) != before[name]:
                    self.moved.setdefault(name, f"{during} sets torch's {name} from {before[name]} to {after}")
                    put(before[name])


@contextlib.contextmanager
def no_connection() -> Iterator[None]:
    """Stops whatever looks a host up or connects to one.

    Raises:
        ConnectionTried: inside, at the place that tries; the message has the host.
    """

    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse_host(host: Any, *arguments: Any, **options: Any) -> Any:
        raise ConnectionTried(host.decode() if isinstance(host, bytes) else str(host))

    def refuse(ask: Callable) -> Callable:
        def refuse_address(self: socket.socket, address: Any) -> Any:
            if not isinstance(address, tuple):  # a socket of this machine
                return ask(self, address)
            raise ConnectionTried(str(address[0]))

        return refuse_address

    replaced: list[tuple[Any, str, Any]] = [
        (socket, "getaddrinfo", refuse_host),
        (socket.socket, "connect", refuse(connect)),
        (socket.socket, "connect_ex", refuse(connect_ex)),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def empty(network: nn.Module, batch: int, height: int, width: int) -> Tensor:
    """Images of zeros, where the network is."""
    return torch.zeros(batch, 3, height, width, device=next(network.parameters()).device)


def odd_multiple(unit: int, least: int) -> int:
    """The smallest odd multiple of `unit` that is not below `least`: no multiple of twice the unit."""
    times = math.ceil(least / unit)
    return unit * (times + (times + 1) % 2)


def named(returned: Any) -> dict[str, Tensor]:
    """What a network returned, by name; numbered where it has none, which the contract does not allow."""
    if isinstance(returned, Tensor):
        return {"out": returned}
    if isinstance(returned, Mapping):
        return dict(returned)
    return {str(i): part for i, part in enumerate(returned if isinstance(returned, tuple | list) else [returned])}


def logits_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """The logits: `out`, else the first tensor.

    Raises:
        TypeError: there is no tensor.
    """
    tensors = [outputs["out"]] if isinstance(outputs.get("out"), Tensor) else []
    tensors += [output for output in outputs.values() if isinstance(output, Tensor)]
    if not tensors:
        kinds = ", ".join(type(output).__name__ for output in outputs.values())
        raise TypeError(f"the network returned no tensor, but {kinds or 'nothing'}")
    return tensors[0]


def extent(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest value, both NaN if there is one among them; zeros where there is no value."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = tensor.detach().aminmax()
    return low.item(), high.item()


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same values; NaN is equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.allclose(one, other, 0, 0, equal_nan=True))


# Words


def shown(size: Size) -> str:
    return "x".join(map(str, size))


def said(error: BaseException, *, brief: bool = False) -> str:
    """An exception on one line; `brief`: only the first of its own, for those that go on with a manual."""
    if isinstance(error, NeedsConnection):
        return f"it tried to connect to {error}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: not Python: {error.msg}"
    text = " ".join((str(error).strip().split("\n")[0] if brief else str(error)).split())
    text = text if len(text) <= 200 else f"{text[:197]}..."
    if isinstance(error, VocsegError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException, file: Path | None) -> str:
    """`file:line` of the innermost place in the plugin that an exception came through; empty where there is none."""
    if file is None:
        return ""
    folder = file.resolve().parent if (file.parent / "__init__.py").is_file() else None

    def ours(path: str) -> bool:
        resolved = Path(path).resolve()
        return resolved == file.resolve() or resolved.parent == folder

    at: BaseException | None = error
    while at is not None:
        frames = [frame for frame in traceback.extract_tb(at.__traceback__) if ours(frame.filename)]
        if frames:
            return f"{shown_path(frames[-1].filename)}:{frames[-1].lineno}"
        at = at.__cause__ or at.__context__
    # The compiler runs no frame of the plugin's; it says in its message where it was.
    told = [(path, line) for path, line in re.findall(r'File "([^"]+)", line (\d+)', str(error)) if ours(path)]
    return f"{shown_path(told[-1][0])}:{told[-1][1]}" if told else ""


def joined(names: list[str], most: int = 4) -> str:
    """A few of the names and how many more there are."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" if count == 1 else f"{count} threads of {os.cpu_count()}"
