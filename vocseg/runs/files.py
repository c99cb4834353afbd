"""Writing files whole or not at all, and reading them."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from vocseg.errors import EnvironmentFault, Problem

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))  # the disk, a limit, a quota


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file's content in one step that survives a crash or a full disk: the old content or the new.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                left = memoryview(data)
                while left:  # the system may take less than all; Linux takes 2 GiB at most
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error, len(data)) from error


def unwritable(path: Path, error: OSError, size: int = 0) -> EnvironmentFault:
    """What to raise where a file of so many bytes cannot be written."""
    reason, remedy = error.strerror or str(error), "mend that, or move the folder elsewhere"
    if error.errno in _FULL:
        remedy = "free space, or move the folder to another disk"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            reason += f" in {path.parent} (needed: {size:,} bytes, free: {free:,} bytes)"
    return EnvironmentFault(Problem(str(path), f"cannot be written: {reason}; {remedy}"))


def remove_unfinished(folder: Path) -> None:
    """Removes what writers that were killed left of their files; for when nobody else writes there."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        EnvironmentFault: there is no such file, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, and a device may have no end
            raise EnvironmentFault(Problem(str(path), "cannot be read: it is no file"))
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(Problem(str(path), f"cannot be read: {error.strerror or error}")) from error


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(without_nan(value), indent=2, ensure_ascii=False) + "\n").encode())


def without_nan(value: Any) -> Any:
    """Plain data with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
