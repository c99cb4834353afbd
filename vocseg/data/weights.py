"""Pretrained weights: reading a file, putting it into the network it belongs to, finding an encoder's published file.

A backbone says what was published for it in `pretrained_cfg`, a dict as timm attaches it to its networks, on itself or
on a module inside it: `architecture`, `tag`, `hf_hub_id`, `url`, `mean`, `std`. Architecture plugins never download;
`imagenet_weights` does, when asked, from the Hugging Face hub and from nowhere else.
"""

import os
import pickle
import queue
import re
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from vocseg.errors import EnvironmentFault, Problem, UsageError

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)

PICKLED = (".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_SECONDS = 0.6  # a hub that does not open a connection in this time counts as out of reach

# What wraps a network, or holds one, puts this before its keys: DataParallel, torch.compile, timm's and smp's feature
# extractors, torchvision's and our own segmentation networks.
PREFIXES = ("module.", "_orig_mod.", "model.", "body.", "backbone.", "encoder.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth, .pt or .bin file, on the CPU.

    A training checkpoint is taken for what it holds as `state_dict` or `model`. Nothing is ever unpickled but tensors
    and plain containers.

    Raises:
        UsageError: there is no such file, or it holds something else than named tensors.
        EnvironmentFault: the file is damaged.
    """
    where = str(path)
    if path.suffix not in (".safetensors", *PICKLED):
        known = ", ".join((".safetensors", *PICKLED))
        raise UsageError(Problem(where, f"weights are read from files that end in {known}, not '{path.suffix}'"))
    if not path.is_file():
        raise UsageError(Problem(where, "no such weights file"))
    try:
        pickled = path.suffix in PICKLED
        content: Any = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except pickle.UnpicklingError as error:
        reason = "is damaged or holds Python objects, which could run code; save its tensors alone, as .safetensors"
        raise UsageError(Problem(where, reason)) from error
    except Exception as error:
        reason = f"cannot be read and is probably damaged ({_one_line(error)}); get it anew"
        raise EnvironmentFault(Problem(where, reason)) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        reason = f"holds {type(content).__name__} where named tensors were expected; save a network's state_dict()"
        raise UsageError(Problem(where, reason))
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            reason = f"holds {type(value).__name__} '{key}' among its tensors; save a network's state_dict() alone"
            raise UsageError(Problem(where, reason))
    return dict(content)


def load_weights(module: nn.Module, path: Path, *, name: str) -> None:
    """Fills a module from a weights file, all of it or nothing.

    Keys are compared without what wraps a network on either side (`PREFIXES`), so that the file of a classifier fits
    an encoder cut from it, and the file of a whole segmentation network fits its encoder. Every tensor of the module
    must be in the file with its shape. What else the file holds must belong to parts that the module does not have,
    like a classifier's head: a ResNet34 file fills every tensor of a ResNet18 and yet is not its.

    Args:
        name: what to call the module in a message.

    Raises:
        UsageError: the file is not this network's; the message counts what is missing, unexpected and misshapen.
        EnvironmentFault: the file is damaged.
    """
    tensors = read_weights(path)
    state = module.state_dict()
    prefix = _common_prefix(state)
    wanted = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    file, pairs = max(((r, _pairs(wanted, r)) for r in _readings(tensors)), key=lambda reading: len(reading[1]))

    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]
    missing = [key for key in needed if key not in pairs]
    misshapen = [key for key, found in pairs.items() if file[found].shape != wanted[key].shape]
    buffers = (key.removeprefix(prefix) for key, _ in module.named_buffers())  # also those no longer saved
    ours = {*pairs.values(), *buffers}
    surplus = [key for key in file if key not in ours]
    parts = {key.split(".")[0] for key in wanted}
    unexpected = [key for key in surplus if not parts.isdisjoint(_part(key))]
    if missing or misshapen or unexpected:
        if misshapen:
            key = misshapen[0]
            shapes = tuple(file[pairs[key]].shape), tuple(wanted[key].shape)
            example = f"'{key}' is {shapes[0]} in the file and {shapes[1]} in the network"
        else:
            example = f"'{missing[0]}' is missing" if missing else f"'{unexpected[0]}' is unexpected"
        counts = f"{len(missing)} missing, {len(surplus)} unexpected, {len(misshapen)} of another shape"
        reason = f"not the weights of {name}: of {len(needed)} keys, {counts}; e.g. {example}"
        raise UsageError(Problem(str(path), f"{reason}; name this network's file, or this file's network"))
    with torch.no_grad():
        for key, found in pairs.items():
            wanted[key].copy_(file[found])


def _common_prefix(keys: Collection[str]) -> str:
    """What of `PREFIXES` all keys begin with."""
    prefix = ""
    while keys and (more := [p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)]):
        prefix += more[0]
    return prefix


def _readings(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The file as it is, then what it holds below each prefix that any of its keys begin with."""
    yield tensors
    for prefix in PREFIXES:
        inner = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if inner:
            yield from _readings(inner)


def _pairs(wanted: dict[str, Tensor], file: dict[str, Tensor]) -> dict[str, str]:
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


def imagenet_weights(backbone: nn.Module, search: Sequence[Path]) -> Path:
    """The file of a backbone's published weights.

    Looked for in this order: `<architecture>.<tag>.safetensors` and `<architecture>.safetensors` in the folders of
    `search`, the Hugging Face cache, torch's cache. Then it is downloaded, if the hub answers at once; if not, this
    fails in less than a second, whatever the name server does.

    Raises:
        UsageError: nothing is known to be published for this backbone.
        EnvironmentFault: the file is not here and cannot be had now.
    """
    published = _published(backbone)
    if not published.get("architecture"):
        raise UsageError('model.weights = "imagenet": no weights are known for this encoder; use "none" or a file')
    local = next((file for file in _local_files(published, search) if file.is_file()), None)
    if local is not None:
        return local

    architecture = published["architecture"]
    repository, _ = _repository(published)
    host = urlsplit(constants.ENDPOINT).hostname
    if not repository:
        reason = f"published at {published['url']} only; download that" if published.get("url") else "not published"
    elif constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        reason = "not on this machine, and HF_HUB_OFFLINE forbids to download them; unset it"
    elif not _reachable(constants.ENDPOINT):
        reason = f"not on this machine, and {host} does not answer; run once with a connection to it"
    else:
        try:
            return _download(published)
        except Exception as error:
            reason = f"not on this machine, and their download from {host} failed ({_one_line(error)}); try again"
    remedy = (
        f'set model.weights to a file or to "none" (--set model.weights=\'"none"\'), '
        f"or set VOCSEG_WEIGHTS to a folder that holds {architecture}.safetensors"
    )
    raise EnvironmentFault(Problem(f"ImageNet weights of {architecture}", f"{reason}, or {remedy}"))


def _local_files(published: dict[str, Any], search: Sequence[Path]) -> Iterator[Path]:
    """Where on this machine the file may be, the likeliest place first."""
    architecture, tag = published["architecture"], published.get("tag")
    for folder in search:
        if tag:
            yield folder / f"{architecture}.{tag}.safetensors"
        yield folder / f"{architecture}.safetensors"
    repository, revision = _repository(published)
    for name in HUB_FILES if repository else ():
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            yield Path(cached)
    name = Path(urlsplit(published.get("url") or "").path).name
    if name.endswith(PICKLED):
        yield Path(torch.hub.get_dir(), "checkpoints", name)


def _repository(published: dict[str, Any]) -> tuple[str, str | None]:
    """The repository on the hub and its revision: timm writes them as one, `owner/name@revision`."""
    hub_id = published.get("hf_hub_id") or ""
    if hub_id == "timm/":  # timm's placeholder for its own repository of that name
        hub_id += ".".join(filter(None, (published["architecture"], published.get("tag"))))
    repository, _, revision = hub_id.partition("@")
    return repository, revision or None


def _reachable(url: str) -> bool:
    """Whether the host of a URL, or the proxy that leads to it, accepts a connection right now."""
    target = urlsplit(url)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = target.hostname, target.port or (443 if target.scheme == "https" else 80)
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=HUB_SECONDS).close()
            answers.put(True)
        except (OSError, ValueError):
            answers.put(False)

    # In a thread that is left behind: nothing can interrupt a name lookup, and without network it may take a minute.
    threading.Thread(target=connect, daemon=True).start()
    try:
        return answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        return False


def _download(published: dict[str, Any]) -> Path:
    repository, revision = _repository(published)
    safetensors, pickled = HUB_FILES
    try:
        return Path(hf_hub_download(repository, safetensors, revision=revision))
    except EntryNotFoundError:
        return Path(hf_hub_download(repository, pickled, revision=revision))


def normalization(backbone: nn.Module) -> tuple[RGB, RGB]:
    """The mean and the deviation of RGB in 0…1 that a backbone was pretrained with; ImageNet's if it does not say."""
    published = _published(backbone)
    return tuple(published.get("mean", IMAGENET_MEAN)), tuple(published.get("std", IMAGENET_STD))


def _published(backbone: nn.Module) -> dict[str, Any]:
    """The first `pretrained_cfg` of a backbone and the modules in it; empty where there is none."""
    found = (getattr(module, "pretrained_cfg", None) for module in backbone.modules())
    return next((cfg for cfg in found if isinstance(cfg, dict)), {})


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
