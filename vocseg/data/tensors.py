"""Reading files of tensors, wherever they come from: nothing in them runs code, or takes much more than their size."""

import contextlib
import io
import mmap
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

_MOST_NAMES = 4 << 20  # bytes of what a file says of its tensors; of a network of a thousand tensors it is 0.1 MB


def load_safetensors(source: Path | bytes) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU.

    Raises:
        Exception: it is damaged; safetensors has an error of its own.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            names = int.from_bytes(file.read(8), "little")
    else:
        names = int.from_bytes(source[:8], "little")
    if names > _MOST_NAMES:  # 70 MB of them take half a minute and 1.5 GB
        raise ValueError(f"its header is said to have {names:,} bytes, more than any network's")
    return safetensors.torch.load_file(source) if isinstance(source, Path) else safetensors.torch.load(source)


def load_pickled(source: Path | io.BytesIO) -> Any:
    """What `torch.save` wrote, if it is tensors and plain data, on the CPU.

    Raises:
        pickle.UnpicklingError: it holds Python objects, or is damaged.
        Exception: it is damaged; torch, zipfile and pickle each have errors of their own.
    """
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
        size = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
        # torch.save compresses nothing, but torch.load would unpack what is: a thousand times the file, or more where
        # members share their bytes.
        if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("it is compressed, which torch.save does not do")
        if any(m.filename.endswith(".pkl") and m.file_size > 4 * _MOST_NAMES for m in members):
            raise ValueError("it names more than any network has")
        if not _ends_with_its_directory(source):  # else torch may find another one than was looked at here
            raise ValueError("it does not end as torch.save ends a file")
    # Both of these take as much memory as they say, whatever the file holds.
    if _holds(source, b"\nbytearray\n") or _holds(source, b"_rebuild_device_tensor_from"):
        raise pickle.UnpicklingError("it has memory set aside for other things than tensors of the CPU or CUDA")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused in any case
        return torch.load(source, map_location="cpu", weights_only=True)


def _ends_with_its_directory(source: Path | io.BytesIO) -> bool:
    """Whether nothing comes between or after an archive's one list of members and the records that tell where it is."""
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        end = file.seek(0, io.SEEK_END) - 22
        file.seek(max(0, end - 76))
        tail = file.read()
    if tail[-22:-18] != b"PK\5\6":
        return False
    size, start = struct.unpack("<II", tail[-10:-2])
    if tail[-42:-38] == b"PK\6\7":  # more members or bytes than that record has room for, which another one tells
        end -= 76
        if len(tail) < 98 or tail[:4] != b"PK\6\6" or struct.unpack("<Q", tail[-34:-26])[0] != end:
            return False
        size, start = struct.unpack("<QQ", tail[40:56])
    return start + size == end


def _holds(source: Path | io.BytesIO, what: bytes) -> bool:
    if isinstance(source, io.BytesIO):
        return source.getvalue().find(what) >= 0
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(what) >= 0


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor of numbers in memory: neither sparse nor quantised, and no stand-in for one."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    )
