"""Downloading one large file of known size, checked by SHA-256: https only, resumable, from the first host that has it.

The file grows as `<name>.part`; `<name>.part.json` beside it keeps what the server called its version.
"""

import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vocseg.errors import DataError, EnvironmentFault, Problem
from vocseg.lock import take_lock

TIMEOUT = 20.0
"""Seconds to wait for a connection, and for the next bytes."""

_ATTEMPTS = 5  # requests to one host for what a broken connection left out, as long as each brings bytes
_CHUNK = 2**18
_HEADERS = {"User-Agent": "vocseg", "Accept-Encoding": "identity"}


@contextmanager
def alone_in(folder: Path, *, busy: str = "") -> Iterator[None]:
    """Keeps a second download out of a folder: two would write into the same files.

    Args:
        busy: what to say if another is running; without it, its end is waited for.

    Raises:
        EnvironmentFault: another is running, and `busy` is to say so.
    """
    if os.name == "nt":  # where folders cannot be opened; two downloads at once then end in a wrong SHA-256
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(descriptor, wait=not busy):
            raise EnvironmentFault(Problem(str(folder), busy))
        yield
    finally:
        os.close(descriptor)


def download(
    urls: Sequence[str],
    part: Path,
    *,
    size: int,
    sha256: str,
    remedy: str,
    say: Callable[[str], None],
    local_http: bool = False,
) -> Iterator[int]:
    """Completes `part`, going on from the bytes it has, and yields again and again how many these are.

    Args:
        urls: places of the same file; each is asked in turn until one gave all of it.
        sha256: in hexadecimal; its first digits where no more is known, nothing where nothing is.
        remedy: what a user can do where no place did.
        say: gets a line of text at the start of each step.
        local_http: whether this machine itself may be asked over http, as a test's server is.

    Raises:
        EnvironmentFault: no host gave the whole file; what there is stays in `part`.
        DataError: the whole file has another SHA-256; it is deleted.
    """
    name = part.name.removesuffix(".part")
    broken_off: dict[str, list[str]] = {}  # reason -> hosts
    wrong: list[Problem] = []
    queue = list(urls)
    while queue:
        url = queue.pop(0)
        resumed = bytes_in(part) > 0
        reason = yield from _from_one_host(url, part, size, say, local_http)
        if reason:
            broken_off.setdefault(reason, []).append(urlsplit(url).hostname or url)
            continue
        say(f"checking {name}")
        found = hash_file(part)
        if found.startswith(sha256):
            return
        delete_part(part)
        if resumed:
            queue.insert(0, url)  # the bytes that were kept may have been at fault: once more, from the first one
        else:
            wanted = sha256 if len(sha256) == len(found) else f"{sha256}…"
            wrong.append(Problem(url, f"expected SHA-256 {wanted}, found {found}; the download was deleted; {remedy}"))
    if wrong:
        raise DataError(*wrong)
    have = bytes_in(part)
    kept = f"{megabytes(have)} are kept in {part} and the same command goes on from there; " if have else ""
    reasons = "; ".join(f"{', '.join(hosts)}: {reason}" for reason, hosts in broken_off.items())
    raise EnvironmentFault(f"could not download {name} ({reasons}); {kept}{remedy}")


def remote_size(url: str, *, remedy: str, local_http: bool = False) -> int:
    """The bytes of the file at a URL, as its server says; arguments as those of `download`.

    Raises:
        EnvironmentFault: the server cannot be asked, or does not say.
    """
    request = urllib.request.Request(url, headers=_HEADERS, method="HEAD")
    try:
        with _open(request, local_http) as response:
            length = response.headers.get("Content-Length") or ""
    except _BrokenOffError as error:
        raise EnvironmentFault(Problem(url, f"could not be downloaded ({error}); {remedy}")) from error
    if not length.isdecimal():
        raise EnvironmentFault(Problem(url, f"the server does not say how large the file is; {remedy}"))
    return int(length)


def delete_part(part: Path) -> None:
    """Deletes a partial file and what is known of it."""
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def bytes_in(path: Path) -> int:
    """The size of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def hash_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


class _BrokenOffError(Exception):
    """A transfer ended early: the network failed, or the server's answer is one that we do not take."""


def _from_one_host(
    url: str, part: Path, size: int, say: Callable[[str], None], local_http: bool
) -> Generator[int, None, str]:
    """Fills `part` up from one host, over several requests if need be. Returns "", or why it is still incomplete."""
    name, host = part.name.removesuffix(".part"), urlsplit(url).hostname
    if bytes_in(part) > size:
        delete_part(part)
    reason = ""
    for _ in range(_ATTEMPTS):
        before = bytes_in(part)
        if before == size:
            return ""
        say(f"downloading {name} from {host}" + f", going on after {megabytes(before)}" * (before > 0))
        try:
            yield from _one_request(url, part, size, local_http)
            reason = "the connection was lost"
        except _BrokenOffError as error:
            reason = str(error)
        if bytes_in(part) <= before:
            break
    return "" if bytes_in(part) == size else reason


def _one_request(url: str, part: Path, size: int, local_http: bool) -> Iterator[int]:
    """Appends to the file, or writes it anew where the server does not send a range."""
    start = bytes_in(part)
    headers = {**_HEADERS}
    if start:
        headers["Range"] = f"bytes={start}-"
        version = _version_at(url, part)
        if version:
            headers["If-Range"] = version
    with _open(urllib.request.Request(url, headers=headers), local_http) as response:
        sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 206 and sent and int(sent[1]) == start:
            whole = int(sent[2])
        elif response.status == 200:
            start, whole = 0, size if response.length is None else response.length
        else:
            raise _BrokenOffError("the answer was not the bytes that were asked for")
        if whole != size:
            raise _BrokenOffError(f"expected a file of {size} bytes, found one of {whole}")
        _keep_version(url, part, response.headers)
        with part.open("ab" if start else "wb") as file:
            while chunk := _read(response):
                start += len(chunk)
                if start > size:
                    raise _BrokenOffError(f"the server sends more than {size} bytes")
                file.write(chunk)
                yield start


def _open(request: urllib.request.Request, local_http: bool) -> Any:
    _check_url(request.full_url, local_http)
    try:
        return urllib.request.build_opener(_Redirects(local_http)).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise _BrokenOffError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _BrokenOffError(_in_a_line(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_in_a_line(error)) from error


def _read(response: Any) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(_in_a_line(error)) from error


def _in_a_line(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).split("\n")[0]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to nothing except https."""

    def __init__(self, local_http: bool):
        self._local_http = local_http

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_url(newurl, self._local_http)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str, local_http: bool) -> None:
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not (parts.scheme == "https" or (local and local_http)):
        raise _BrokenOffError(f"{url} is not https")


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _keep_version(url: str, part: Path, headers: Any) -> None:
    """Notes the server's name for this version of the file, to go on only within the same version."""
    tag = headers.get("ETag", "")
    if not tag or tag.startswith("W/"):  # a weak tag may not be used for that (RFC 9110, 13.1.5)
        tag = headers.get("Last-Modified", "")
    _version_file(part).write_text(json.dumps({"url": url, "version": tag}), encoding="utf-8")


def _version_at(url: str, part: Path) -> str:
    """The version that `part` began with, where it came from this very place; else ""."""
    try:
        begun = json.loads(_version_file(part).read_text(encoding="utf-8"))
        return begun["version"] if begun["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
