"""Published weights: finding on this machine the file that belongs to a network, or downloading it.

A module says what was published for it in `pretrained_cfg`, a dict as timm attaches it to its networks:
`architecture`, `tag`, `hf_hub_id`, `url`, `mean`, `std`. A backbone has it on itself or on a module inside it, for
`model.weights = "imagenet"`; a network whose weights were published as a whole has one on itself, for "published".
Architecture plugins never download; `imagenet_weights` and `published_weights` do, when asked: from the Hugging Face
hub, or, where that does not have them, from `url` into torch's cache.
"""

import http.client
import os
import queue
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, tqdm
from torch import nn

from vocseg.data.download import alone_in, delete_part, download, remote_size
from vocseg.data.weights import SUFFIXES
from vocseg.errors import EnvironmentFault, Problem, UsageError, VocsegError, one_line
from vocseg.network import IMAGENET, RGB

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_SECONDS = 0.6  # a hub that does not open a connection in this time counts as out of reach
ANSWER_SECONDS = 10.0  # and so does one that opens it and says nothing; `huggingface_hub` would wait for minutes


def imagenet_weights(backbone: nn.Module, search: Sequence[Path], *, local_http: bool = False) -> Path:
    """The file of a backbone's published weights.

    Looked for in this order: `<architecture>.<tag>.safetensors`, the name that its `url` ends in and
    `<architecture>.safetensors` in the folders of `search`, the Hugging Face cache, torch's cache. Then it is
    downloaded, if the host answers at once; if not, this fails in less than a second, whatever the name server does.

    Args:
        local_http: whether this machine itself may be asked over http, as a test's server is.

    Raises:
        UsageError: nothing is known to be published for this backbone.
        EnvironmentFault: the file is not here and cannot be had now.
        DataError: what was downloaded is not the published file.
    """
    published = _published(backbone)
    if not published.get("architecture"):
        raise UsageError('model.weights = "imagenet": no weights are known for this encoder; use "none" or a file')
    return _find(published, "ImageNet weights", search, local_http)


def published_weights(network: nn.Module, search: Sequence[Path], *, local_http: bool = False) -> Path:
    """The file of a whole network's published weights; looked for and downloaded as `imagenet_weights` does.

    Raises:
        UsageError: nothing is known to be published for this network.
        EnvironmentFault: the file is not here and cannot be had now.
        DataError: what was downloaded is not the published file.
    """
    published = getattr(network, "pretrained_cfg", None)
    if not isinstance(published, dict) or not published.get("architecture"):
        known = "no weights are known for the whole of this network"
        raise UsageError(f'model.weights = "published": {known}; use "imagenet", "none" or a file')
    return _find(published, "published weights", search, local_http)


def _find(published: dict[str, Any], what: str, search: Sequence[Path], local_http: bool) -> Path:
    local = next((file for file in _local_files(published, search) if file.is_file()), None)
    if local is not None:
        return local

    architecture, url = published["architecture"], published.get("url") or ""
    repository, _ = _repository(published)
    cached = None if repository else _cached(url)
    place = constants.ENDPOINT if repository else url
    host = urlsplit(place).hostname
    remedy = 'set model.weights to a file or to "none" (--set model.weights=\'"none"\')'
    if cached is not None:
        remedy = f"put {url} into {cached.parent} or into a folder that VOCSEG_WEIGHTS names, or {remedy}"
    else:
        remedy += f", or set VOCSEG_WEIGHTS to a folder that holds {architecture}.safetensors"

    if not repository and cached is None:
        reason = f"published at {url} only, which is no file to be read here" if url else "not published"
    elif repository and (
        constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    ):
        reason = "not on this machine, and HF_HUB_OFFLINE forbids to download them; unset it"
    elif not _reachable(place) or (repository and not _answers(place)):
        reason = f"not on this machine, and {host} does not answer; run once with a connection to it"
    else:
        try:
            return _download(published) if cached is None else _download_from(url, cached, remedy, local_http)
        except VocsegError:
            raise
        except Exception as error:
            failed = f"{type(error).__name__}: {one_line(error)}"
            reason = f"not on this machine, and their download from {host} failed ({failed}); try again"
    raise EnvironmentFault(Problem(f"{what} of {architecture}", f"{reason}, or {remedy}"))


def _local_files(published: dict[str, Any], search: Sequence[Path]) -> Iterator[Path]:
    """Where on this machine the file may be, the likeliest place first."""
    architecture, tag = published["architecture"], published.get("tag")
    in_torchs_cache = _cached(published.get("url") or "")
    for folder in search:
        if tag:
            yield folder / f"{architecture}.{tag}.safetensors"
        if in_torchs_cache is not None:
            yield folder / in_torchs_cache.name
        yield folder / f"{architecture}.safetensors"
    repository, revision = _repository(published)
    for name in HUB_FILES if repository else ():
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            yield Path(cached)
    if in_torchs_cache is not None:
        yield in_torchs_cache


def _cached(url: str) -> Path | None:
    """Where torch keeps the file of a URL; None for a file that cannot be read here."""
    name = Path(urlsplit(url).path).name
    return Path(torch.hub.get_dir(), "checkpoints", name) if name.endswith(SUFFIXES) else None


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


def _answers(url: str) -> bool:
    """Whether a host that takes connections has anything to say: what it says is for others to read."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "vocseg"})
    try:
        urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
    except TimeoutError:
        return False
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return not isinstance(error.reason, TimeoutError)
    except (OSError, http.client.HTTPException):
        return True
    return True


def _download(published: dict[str, Any]) -> Path:
    repository, revision = _repository(published)
    safetensors, pickled = HUB_FILES
    try:
        return Path(hf_hub_download(repository, safetensors, revision=revision))
    except EntryNotFoundError:
        return Path(hf_hub_download(repository, pickled, revision=revision))


def _download_from(url: str, file: Path, remedy: str, local_http: bool) -> Path:
    """Downloads a file under the name it has at its URL, checked by the SHA-256 that such a name may end in."""
    part = file.with_name(f"{file.name}.part")
    hash_in_name = re.search(r"-([0-9a-f]{8,64})\.", file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(file.parent):
            if file.is_file():  # another run brought it meanwhile
                return file
            size = remote_size(url, remedy=remedy, local_http=local_http)
            with tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
                for have in download(
                    [url],
                    part,
                    size=size,
                    sha256=hash_in_name[1] if hash_in_name else "",
                    remedy=remedy,
                    say=lambda line: None,
                    local_http=local_http,
                ):
                    bar.update(have - bar.n)
            os.replace(part, file)
            delete_part(part)
    except OSError as error:  # the network's own are dealt with where they occur
        reason = f"cannot be written: {error.strerror or error}; free or name another (TORCH_HOME), or {remedy}"
        raise EnvironmentFault(Problem(str(error.filename or file.parent), reason)) from error
    return file


def normalization(backbone: nn.Module) -> tuple[RGB, RGB]:
    """The mean and the deviation of RGB in 0…1 that a backbone was pretrained with; ImageNet's if it does not say."""
    published = _published(backbone)
    return tuple(published.get("mean", IMAGENET[0])), tuple(published.get("std", IMAGENET[1]))


def _published(backbone: nn.Module) -> dict[str, Any]:
    """The first `pretrained_cfg` of a backbone and the modules in it; empty where there is none."""
    found = (getattr(module, "pretrained_cfg", None) for module in backbone.modules())
    return next((cfg for cfg in found if isinstance(cfg, dict)), {})
