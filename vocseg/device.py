"""Where a network runs, and in which precision."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vocseg.errors import EnvironmentFault, UsageError, one_line

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Placement:
    """A device, a precision and a memory format, chosen once for a run."""

    device: torch.device
    precision: str  # "fp32", "bf16", or "fp32+bf16": training in the first, inference in the other
    channels_last: bool = True

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision != "bf16":
            return _NOTHING
        return torch.autocast(self.device.type, torch.bfloat16)

    def for_inference(self) -> "Placement":
        return replace(self, precision="bf16") if self.precision == "fp32+bf16" else self

    def kernels_tried(self, wanted: bool) -> contextlib.AbstractContextManager:
        """CUDA's convolutions are tried in several ways at each new size, and the fastest is kept.

        That is for many images of one size. It may choose otherwise in the next run, with sums that are rounded in
        another order: who asks torch for deterministic algorithms does not get it.
        """
        if not wanted or self.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return _NOTHING
        return _trying_kernels()

    def place(self, network: torch.nn.Module) -> torch.nn.Module:
        """Moves a network to the device, in the memory format."""
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(self.device, memory_format=memory)  # type: ignore[call-overload]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Moves a tensor to the device; to CUDA without waiting for it, which takes memory that is pinned."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def seed(self, seed: int) -> None:
        """Seeds torch's generators of the CPU and of this device alone: `torch.manual_seed` takes a tenth of a
        millisecond, most of it for devices that are not there."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def lay_out(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, c, h, w) in the memory format of the network."""
        return images if self.channels_last else images.contiguous()

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {self.precision}"


@contextlib.contextmanager
def _trying_kernels() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def choose_device(name: str) -> torch.device:
    """The device of `--device`: `auto` takes CUDA, else MPS, else the CPU; each process of `torchrun` its own GPU.

    Raises:
        UsageError: no device has that name.
        EnvironmentFault: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_gpu()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; use auto, cpu, mps, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: not supported; use auto, cpu, mps, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device.type] or (device.index or 0) >= count:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise EnvironmentFault(f"--device {name}: this machine has no such device; there is: {there}")
    if name == "cuda":
        return _own_gpu()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams and events are then the ones without another's name
    return device


def _own_gpu() -> torch.device:
    """The GPU of this process: `torchrun` numbers those of one machine from 0."""
    number = os.environ.get("LOCAL_RANK")
    if number is None:
        return torch.device("cuda")
    if int(number) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise EnvironmentFault(f"process {number} has no GPU; give torchrun --nproc-per-node {there}, one for each GPU")
    return torch.device("cuda", int(number))


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 where the device computes in it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return "bf16" if _cpu_has_bf16_units() else "fp32"
    return "fp32"


def _cpu_has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX); emulated, it is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch before 2.12


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of a device or of the machine; torch has several ways to say so."""
    signs = ("out of memory", "can't allocate", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in one_line(error) for sign in signs)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the run held so far: on the device for CUDA, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
