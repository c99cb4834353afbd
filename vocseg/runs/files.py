"""Writing files whole or not at all."""

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from vocseg.errors import EnvironmentFault, Problem


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file's content in one step that survives a crash or a full disk: the old content or the new.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise EnvironmentFault(
            Problem(str(path), f"cannot be written: {error.strerror or error}; free space or choose another --out")
        ) from error


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
