"""Pretrained weights: reading a file, and putting it into the network it belongs to.

Which file was published for a network, and where, is in `vocseg/data/published.py`.

A network, or its backbone, whose published files have other names or shapes than it has itself takes them through a
method of its own:

    def adapt_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]

It gets all tensors of a file by the file's names, and returns them by the names of the module (what may stand before
them, see `PREFIXES`): renamed, reshaped, or left out. The network's sees every file; the backbone's sees, after that,
the files that do not hold the whole network. Files that vocseg saved come this way too and must leave as they came.
"""

import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vocseg.data.tensors import is_plain, load_pickled, load_safetensors
from vocseg.errors import EnvironmentFault, Problem, UsageError, VocsegError, one_line, shown_path

PICKLED = (".pth", ".pt", ".bin", ".tar")  # the last for `.pth.tar`, a habit of older training scripts
SUFFIXES = (".safetensors", *PICKLED)

# What wraps a network, or holds one, puts this before its keys: DataParallel, torch.compile, timm's and smp's feature
# extractors, torchvision's and our own segmentation networks, torchvision's classifiers.
PREFIXES = ("module.", "_orig_mod.", "model.", "body.", "backbone.", "encoder.", "features.")

Part = Literal["whole network", "encoder"]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth, .pt, .bin or .tar file, on the CPU.

    A training checkpoint is taken for what it holds as `state_dict` or `model`. Nothing is ever unpickled but tensors
    and plain containers.

    Raises:
        UsageError: there is no such file, or it holds something else than named tensors.
        EnvironmentFault: the file is damaged.
    """
    where = str(path)
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(Problem(where, f"weights are read from files that end in {known}, not '{path.suffix}'"))
    if not path.is_file():
        raise UsageError(Problem(where, "no such weights file"))
    try:
        pickled = path.suffix in PICKLED
        content: Any = load_pickled(path) if pickled else load_safetensors(path)
    except pickle.UnpicklingError as error:
        reason = "is damaged or holds Python objects, which could run code; save its tensors alone, as .safetensors"
        raise UsageError(Problem(where, reason)) from error
    except Exception as error:
        reason = f"cannot be read and is probably damaged ({type(error).__name__}: {one_line(error)}); get it anew"
        raise EnvironmentFault(Problem(where, reason)) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        reason = f"holds {type(content).__name__} where named tensors were expected; save a network's state_dict()"
        raise UsageError(Problem(where, reason))
    for key, value in content.items():
        if not isinstance(key, str) or not is_plain(value):
            kind = "a sparse, quantised or empty Tensor" if isinstance(value, Tensor) else type(value).__name__
            reason = f"holds {kind} '{key}' among its tensors; save a network's state_dict() alone"
            raise UsageError(Problem(where, reason))
    return dict(content)


@dataclass(frozen=True)
class Filled:
    """What `load_weights` filled. As text it is one line for the user.

    Attributes:
        untouched: the network's layers that the file has for another number of classes; they keep their start.
        unused: what else the file holds, by its outermost names.
    """

    path: Path
    part: Part
    untouched: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"{self.part} from {shown_path(self.path)}"
        if self.untouched:
            line += f", but for {', '.join(self.untouched)}, which it has for another number of classes"
        if self.unused:
            line += f"; not used of it: {', '.join(self.unused)}"
        return line


def load_weights(
    network: nn.Module,
    path: Path,
    *,
    name: str,
    backbone: nn.Module | None = None,
    part: Part | None = None,
    other_classes: Callable[[], Mapping[str, torch.Size]] = dict,
) -> Filled:
    """Fills a network or its encoder from a weights file, all of it or nothing.

    A file that has a tensor for each name of the network fills the network; any other fills its encoder. Keys are
    compared without what wraps a network on either side (`PREFIXES`), so that the file of a classifier fits an encoder
    cut from it, and the file of one segmentation network fits the encoder of another. What is filled is filled
    completely, each tensor with its shape, but for a whole network's layers whose shape depends on the number of
    classes, where the file's has another. What else the file holds must belong to parts that are not there to be
    filled, like a classifier's head or an auxiliary one: a ResNet34 file has every tensor of a ResNet18 and yet is
    not its.

    Args:
        name: what to call the network in a message.
        backbone: its encoder; without it, only the whole network can be filled.
        part: what to fill, whatever the file holds.
        other_classes: makes the shapes that the network's tensors would have with another number of classes.

    Raises:
        UsageError: the file is not this network's; the message counts what is missing, unexpected and misshapen.
        EnvironmentFault: the file is damaged.
    """
    tensors = _adapted(network, read_weights(path), path, name)
    module, match = network, _match(network, tensors)
    part = part or ("encoder" if backbone is not None and match.missing else "whole network")
    if part == "encoder":
        assert backbone is not None
        tensors = _adapted(backbone, tensors, path, name)
        module, match = backbone, _match(backbone, tensors)
    state = module.state_dict()
    misshapen = [key for key, found in match.pairs.items() if tensors[found].shape != state[key].shape]
    # Of counts of batches nobody minds the kind, which whoever casts a whole network to float changes.
    typed = {key: found for key, found in match.pairs.items() if not key.endswith("num_batches_tracked")}
    mistyped = [key for key, found in typed.items() if _kind(tensors[found]) != _kind(state[key])]
    if mistyped:
        key = mistyped[0]
        found = f"'{key}' is {tensors[match.pairs[key]].dtype} in the file and {state[key].dtype} in the network"
        raise UsageError(Problem(str(path), f"not the weights of {name}: {found}; save them as they are in training"))
    of_classes: list[str] = []
    if misshapen and part == "whole network":
        others = other_classes()
        for key in misshapen:
            if key in others and _differ_by_classes(tensors[match.pairs[key]].shape, state[key].shape, others[key]):
                of_classes.append(key)
        misshapen = [key for key in misshapen if key not in of_classes]
    if match.missing or misshapen or match.unexpected:
        if misshapen:
            key = misshapen[0]
            shapes = tuple(tensors[match.pairs[key]].shape), tuple(state[key].shape)
            example = f"'{key}' is {shapes[0]} in the file and {shapes[1]} in the network"
        elif match.missing:
            example = f"'{match.missing[0]}' is missing"
        else:
            example = f"'{match.unexpected[0]}' is unexpected"
        counts = f"{len(match.missing)} missing, {match.surplus} unexpected, {len(misshapen)} of another shape"
        whose = name if part == "whole network" else f"the encoder of {name}"
        reason = f"not the weights of {whose}: of {match.needed} keys, {counts}; e.g. {example}"
        raise UsageError(Problem(str(path), f"{reason}; name this network's file, or this file's network"))
    with torch.no_grad():
        for key, found in match.pairs.items():
            if key not in of_classes:
                state[key].copy_(tensors[found])
    untouched = dict.fromkeys(key.rpartition(".")[0] for key in of_classes)
    return Filled(path, part, tuple(untouched), match.unused)


def _adapted(module: nn.Module, tensors: dict[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    """The file's tensors as the module's own method wants them, where it has one."""
    adapt = getattr(module, "adapt_weights", None)
    if adapt is None:
        return tensors
    try:
        return dict(adapt(dict(tensors)))
    except VocsegError:
        raise
    except Exception as error:
        failed = f"{type(error).__name__}: {one_line(error)}"
        reason = f"adapt_weights of {name} cannot take it ({failed}); name this network's file"
        raise UsageError(Problem(str(path), reason)) from error


@dataclass(frozen=True)
class _Match:
    """What a file has for a module.

    Attributes:
        needed: how many tensors the module must get.
        pairs: the module's keys and the file's for them.
        missing: the module's keys that it must get and that the file lacks.
        surplus: how many tensors of the file the module has not.
        unexpected: the file's keys that the module has not, in parts that it has.
        unused: the outermost names of all that the file has besides.
    """

    needed: int
    pairs: dict[str, str]
    missing: list[str]
    surplus: int
    unexpected: list[str]
    unused: tuple[str, ...]


def _match(module: nn.Module, tensors: dict[str, Tensor]) -> _Match:
    keys = list(module.state_dict())
    ours = _common_prefix(keys)
    wanted = [key.removeprefix(ours) for key in keys]
    readings = ((theirs, file, _pairs(wanted, file)) for theirs, file in _readings(tensors))
    theirs, file, pairs = max(readings, key=lambda reading: len(reading[2]))

    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    buffers = (key.removeprefix(ours) for key, _ in module.named_buffers())  # also those no longer saved
    used = {*pairs.values(), *buffers}
    surplus = [key for key in file if key not in used]
    parts = {key.split(".")[0] for key in wanted}
    around = _common_prefix(tensors)
    read = {theirs + key for key in used}
    unused = [key.removeprefix(around).split(".")[0] for key in tensors if key not in read]
    return _Match(
        len(needed),
        {ours + key: theirs + found for key, found in pairs.items()},
        [ours + key for key in needed if key not in pairs],
        len(surplus),
        [theirs + key for key in surplus if not parts.isdisjoint(_part(key))],
        tuple(dict.fromkeys(unused)),
    )


def _kind(tensor: Tensor) -> str:
    """Numbers of one kind can be taken for each other: of float16 for float32, but of int8 for neither."""
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "whole"


def _differ_by_classes(found: torch.Size, wanted: torch.Size, other: torch.Size) -> bool:
    """Whether a shape differs from the wanted one only in dimensions that the number of classes sets."""
    if not len(found) == len(wanted) == len(other):
        return False
    return all(f == w or w != o for f, w, o in zip(found, wanted, other, strict=True))


def _common_prefix(keys: Collection[str]) -> str:
    """What of `PREFIXES` all keys begin with."""
    prefix = ""
    while keys and (more := [p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)]):
        prefix += more[0]
    return prefix


def _readings(tensors: dict[str, Tensor], before: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The file as it is, then what it holds below each prefix that any of its keys begin with."""
    yield before, tensors
    for prefix in PREFIXES:
        inner = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if inner:
            yield from _readings(inner, before + prefix)


def _pairs(wanted: Iterable[str], file: Collection[str]) -> dict[str, str]:
    """The file's key for each of the module's that it has."""
    loosely = {_loosely(key): key for key in file}
    found = {key: key if key in file else loosely.get(_loosely(key)) for key in wanted}
    return {key: other for key, other in found.items() if other is not None}


def _loosely(key: str) -> str:
    """A key as timm's feature extractors and the first DenseNet files spell it, too.

    The former turn `stages.0.norm` into `stages_0.norm`, the latter have `norm.1` for `norm1`.
    """
    return re.sub(r"(?<=[a-z])(?=\d)", ".", key).replace("_", ".")


def _part(key: str) -> tuple[str, str]:
    """The outermost module that a key may belong to: `stages`, or `stages_0` as timm's feature extractors have it."""
    first, second = (*key.split("."), "")[:2]
    return first, f"{first}_{second}"
