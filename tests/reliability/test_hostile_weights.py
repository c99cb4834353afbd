"""Files of weights and states from anywhere: nothing in them runs, none takes much memory, each is told in a line."""

import ast
import copy
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vocseg
from vocseg.data.weights import read_weights
from vocseg.errors import EnvironmentFault, UsageError

PACKAGE = Path(vocseg.__file__).parent
MOST_MEGABYTES = 200


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def weights() -> OrderedDict[str, Any]:
    return OrderedDict(weight=torch.ones(2, 2), bias=torch.ones(2))


def metadata(evil: Evil) -> Any:
    content = weights()
    content._metadata = OrderedDict({"": evil})  # type: ignore[attr-defined]  # as torch's own state_dict has it
    return content


def attribute(evil: Evil) -> Any:
    content = weights()
    content["weight"].note = evil
    return content


class Hooked:
    """Is read as a parameter with a hook."""

    def __init__(self, hook: Evil):
        self.hook = hook

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_parameter, (torch.ones(2, 2), True, OrderedDict({0: self.hook}))


def buffer_of(module: nn.Module, evil: Evil) -> nn.Module:
    module.evil = evil  # type: ignore[assignment]
    return module


# Where code may hide in what torch.save writes.
SLOTS: dict[str, Callable[[Evil], Any]] = {
    "all of it": lambda evil: evil,
    "value": lambda evil: {**weights(), "bias": evil},
    "key": lambda evil: {**weights(), evil: torch.ones(1)},
    "nested": lambda evil: {"state_dict": {"inner": [({"deep": evil},)]}},
    "beside": lambda evil: {"state_dict": weights(), "epoch": evil},
    "optimizer": lambda evil: {"model": weights(), "optimizer": {"state": {0: {"exp_avg": evil}}}},
    "metadata": metadata,
    "attribute": attribute,
    "hook": lambda evil: {**weights(), "weight": Hooked(evil)},
    "module": lambda evil: nn.Linear(2, 2),
    "module with code": lambda evil: buffer_of(nn.Linear(2, 2), evil),
    "function": lambda evil: {**weights(), "bias": os.system},
}


def torch_zip(pickled: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def bomb(times: int, *, compressed: bool) -> bytes:
    """Zeros that a small file unpacks to: 600 MB where it is compressed, else so many members of the same bytes."""
    size = 600_000_000 if compressed else 4_000_000
    saved = io.BytesIO()
    torch.save({f"w{i}": torch.zeros(1) for i in range(times)}, saved)
    with zipfile.ZipFile(saved) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    pickled = pickled.replace(b"cpuq\x06K\x01t", b"cpuq\x06J" + struct.pack("<i", size // 4) + b"t")
    if compressed:
        return torch_zip(pickled, {"data/0": bytes(size)}, zipfile.ZIP_DEFLATED)
    buffer = io.BytesIO(torch_zip(pickled, {"data/0": bytes(size)}))
    with zipfile.ZipFile(buffer, "a") as archive:
        shared = archive.getinfo("archive/data/0")
        for i in range(1, times):
            again = copy.copy(shared)
            again.filename = f"archive/data/{i}"
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]
    return buffer.getvalue()


def setting_aside(size: int) -> bytes:
    """A pickle of {"w": bytearray(size)}."""
    number = pickle.dumps(size, 2)[2:-1]
    return torch_zip(b"\x80\x02}X\x01\x00\x00\x00wc__builtin__\nbytearray\n" + number + b"\x85Rs.", {})


def torchscript(evil: Evil) -> bytes:
    return torch_zip(pickle.dumps(evil, 2), {"constants.pkl": pickle.dumps(evil, 2), "code/__torch__.py": b"x = 1\n"})


def sparse() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2, 2).to_sparse(), "bias": torch.ones(2)}, buffer)
    return buffer.getvalue()


def stand_in() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2, 2, device="meta"), "bias": torch.ones(2)}, buffer)
    return buffer.getvalue()


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", said: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if said is None else said) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS: dict[str, bytes] = {
    "a header beyond the end": safetensors({}, said=10**9),
    "a header beyond all memory": safetensors({}, said=2**63),
    "a header of 40 MB": safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(700_000)) + b"}"
    ),
    "overlapping tensors": safetensors({"weight": entry([2, 2], 0, 16), "bias": entry([2], 8, 16)}, bytes(16)),
    "a tensor beyond the end": safetensors({"weight": entry([2, 2], 0, 16)}, bytes(8)),
    "a shape of 2^64": safetensors({"weight": entry([2**32, 2**32], 0, 4)}, bytes(4)),
    "an axis beyond torch's": safetensors({"weight": entry([0, 2**63 + 1], 0, 0)}),
    "a dtype of objects": safetensors({"weight": entry([1], 0, 8, "OBJ")}, bytes(8)),
    "brackets": safetensors(b'{"a":' + b"[" * 100_000),
    "whole numbers": safetensors({"weight": entry([2, 2], 0, 16, "I32"), "bias": entry([2], 16, 24)}, bytes(24)),
    "complex numbers": safetensors({"weight": entry([2, 2], 0, 32, "C64"), "bias": entry([2], 32, 40)}, bytes(40)),
    "another shape": safetensors({"weight": entry([4], 0, 16), "bias": entry([2], 16, 24)}, bytes(24)),
}


def pickled(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Every hostile file that is or pretends to be one of torch.save, in its new and its old format."""
    evil = Evil(canary)
    for name, content in SLOTS.items():
        for form, new in (("zip", True), ("old", False)):
            buffer = io.BytesIO()
            torch.save(content(evil), buffer, _use_new_zipfile_serialization=new)
            yield f"{name}, {form}", buffer.getvalue()
    yield "plain pickle", pickle.dumps({"weight": evil})
    yield "torchscript", torchscript(evil)
    yield "compressed", bomb(1, compressed=True)
    yield "shared bytes", bomb(150, compressed=False)
    yield "memory set aside", setting_aside(2_000_000_000)
    yield "a million names", torch_zip(pickle.dumps({f"name {i:012}": None for i in range(1_000_000)}, 2), {})


# Reads the files that it is given in lines, and answers each with what came of it, and by how much memory grew.
READ = """
import json, resource, sys, warnings
from pathlib import Path
from torch import nn
from vocseg.data.weights import load_weights
from vocseg.errors import VocsegError
from vocseg.runs.checkpoint import load_state, load_tensors

warnings.simplefilter("error")
readers = {
    "weights": lambda path: load_weights(nn.Linear(2, 2), path, name="it"),
    "state": lambda path: load_state(path, "this run"),
    "tensors": load_tensors,
}
for line in sys.stdin:
    reader, path = json.loads(line)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = "read: " + repr(readers[reader](Path(path)))[:200]
    except VocsegError as error:
        said = str(error)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([said, grown // (1 << 20 if sys.platform == "darwin" else 1 << 10)]), flush=True)
"""

Read = Callable[[str, list[Path]], dict[Path, str]]


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """What a process says that reads files one after the other, by path."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", READ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def said(reader: str, paths: list[Path]) -> dict[Path, str]:
            found = {}
            for path in paths:
                process.stdin.write(json.dumps([reader, str(path)]) + "\n")
                process.stdin.flush()
                found[path], grown = json.loads(process.stdout.readline())
                assert grown < MOST_MEGABYTES, path
            return found

        yield said
        process.stdin.close()


def refused_in_a_line(said: dict[Path, str]) -> None:
    for path, text in said.items():
        assert text.startswith(f"{path}: "), text
        assert "\n" not in text


def test_hostile_pickles_are_refused_as_weights_and_nothing_in_them_runs(read, tmp_path):
    canary, files = tmp_path / "canary", []
    pickle.loads(pickle.dumps(Evil(canary)))
    canary.rmdir()  # it would be there
    for number, (name, content) in enumerate(pickled(canary)):
        path = tmp_path / f"{number} {name}{('.pt', '.pth', '.bin')[number % 3]}"
        path.write_bytes(content)
        files.append(path)
    assert len(files) == 2 * 12 + 6
    said = read("weights", files)
    refused_in_a_line(said)
    assert "it names more than any network has" in said[files[-1]]  # which is found before they are read
    assert not canary.exists()


def test_hostile_pickles_are_refused_as_states_and_nothing_in_them_runs(read, tmp_path):
    canary, folders = tmp_path / "canary", []
    for name, content in pickled(canary):
        folder = tmp_path / name
        folder.mkdir()
        digest = hashlib.sha256(content).hexdigest()
        file = {"file": f"state-00000007-{digest[:8]}.pt", "sha256": digest, "step": 7}
        (folder / file["file"]).write_bytes(content)
        (folder / "state.json").write_text(json.dumps({"states": [file]}))
        folders.append(folder)
    for folder, said in read("state", folders).items():
        first, last = said.splitlines()
        assert first.startswith(f"{folder}/state-00000007-")
        assert "refused" in first or "damaged" in first or "expected the state of a run" in first, first
        assert "no state to resume from" in last
    assert not canary.exists()


def test_hostile_safetensors_are_refused(read, tmp_path):
    files = []
    for name, content in SAFETENSORS.items():
        files.append(tmp_path / f"{name}.safetensors")
        files[-1].write_bytes(content)
    refused_in_a_line(read("weights", files))
    # The last three are whole files of other tensors, which the network they are for has to tell.
    refused_in_a_line(read("tensors", files[:-3]))


def test_tensors_that_hold_no_numbers_are_refused(read, tmp_path):
    files = [tmp_path / "sparse.pt", tmp_path / "meta.pt"]
    for path, content in zip(files, (sparse(), stand_in()), strict=True):
        path.write_bytes(content)
    said = read("weights", files)
    refused_in_a_line(said)
    assert all("holds a sparse, quantised or empty Tensor 'weight'" in text for text in said.values())


def test_what_is_no_file_is_refused(read, tmp_path):
    made = []
    for suffix in (".pt", ".pth", ".safetensors"):
        made.append(tmp_path / f"folder{suffix}")
        made[-1].mkdir()
        made.append(tmp_path / f"circle{suffix}")
        made[-1].symlink_to(made[-1])
        if hasattr(os, "mkfifo"):
            made.append(tmp_path / f"pipe{suffix}")
            os.mkfifo(made[-1])
        made.append(tmp_path / f"empty{suffix}")
        made[-1].touch()
    refused_in_a_line(read("weights", made))
    refused_in_a_line(read("tensors", made))


def test_hostile_weights_end_a_run_with_a_line_and_no_folder(tmp_path):
    canary = tmp_path / "canary"
    torch.save(SLOTS["module with code"](Evil(canary)), tmp_path / "evil.pt")
    overrides = (f"model.weights={tmp_path / 'evil.pt'}", "data.images=4", "data.val_images=2")
    command = [sys.executable, "-m", "vocseg", "run", "quickstart", "--out", str(tmp_path / "runs")]
    ended = subprocess.run(
        [*command, *(word for setting in overrides for word in ("--set", setting))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'evil.pt'}: is damaged or holds Python objects, which could run code")
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


LOADERS = {"cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "ruamel", "shelve", "yaml"}


def test_nothing_in_the_package_unpickles_or_evaluates_what_it_reads():
    files = [path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts]
    assert len(files) >= 70
    loads = 0
    for path in files:
        where = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not LOADERS & {name.split(".")[0] for name in module}, where
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            # Only the error that torch.load raises.
            assert not text.startswith("pickle.") or text == "pickle.UnpicklingError", f"{where}: {text}"
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load":
                loads += 1
                assert given.get("weights_only") == "True", where
            assert called not in ("exec", "torch.jit.load", "torch.hub.load", "__import__"), where
            # Of a signature that was parsed, and holds names and constants only.
            assert called != "eval" or where == "signature.py", where
            assert "allow_pickle" not in given, where
    assert loads == 1, "one way to read a file of tensors"


def two_directories() -> bytes:
    """A file of 100 kB that torch unpacks to 100 MB, and in which zipfile sees nothing but empty members."""
    plain = io.BytesIO()
    torch.save({"weight": torch.zeros(25_000_000)}, plain)
    with zipfile.ZipFile(plain) as archive:
        members = [(member.filename.encode(), archive.read(member)) for member in archive.infolist()]

    def fields(name: bytes, content: bytes, stored: int, method: int) -> bytes:
        sizes = zlib.crc32(content), stored, len(content)
        return struct.pack("<HHHHIIIHH", 0, method, 0, 0, *sizes, len(name), 0)

    def listed(name: bytes, content: bytes, stored: int, method: int, at: int) -> bytes:
        head = b"PK\1\2" + struct.pack("<HH", 20, 20) + fields(name, content, stored, method)
        return head + struct.pack("<HHHII", 0, 0, 0, 0, at) + name

    data, real = b"", b""
    for name, content in members:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(content) + packer.flush()
        real += listed(name, content, len(packed), 8, len(data))
        data += b"PK\3\4" + struct.pack("<H", 20) + fields(name, content, len(packed), 8) + name + packed
    lengths = [len(real) // len(members) - 46] * len(members)
    lengths[-1] += len(real) - sum(46 + length for length in lengths)
    shown = b"".join(listed(length * b"x", b"", 0, 0, 0) for length in lengths)
    assert len(shown) == len(real)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(real), len(data), 0)
    return data + real + shown + end


def test_an_archive_that_two_programs_read_differently_is_refused(tmp_path):
    path = tmp_path / "two.pth"
    path.write_bytes(two_directories())
    assert path.stat().st_size < 200_000
    with zipfile.ZipFile(path) as archive:
        assert {member.file_size for member in archive.infolist()} == {0}
    assert torch.load(path, weights_only=True)["weight"].numel() == 25_000_000  # which is why
    with pytest.raises(EnvironmentFault, match="it does not end as torch"):
        read_weights(path)


def test_honest_files_of_any_number_of_tensors_are_read(tmp_path):
    for count in (1, 300):
        path = tmp_path / f"{count}.pth"
        tensors = {f"{number}": torch.zeros(1) for number in range(count)}
        torch.save(tensors, path)
        assert read_weights(path).keys() == tensors.keys()


class _Expanded:
    """One number that asks to be 200 million in memory."""

    def __reduce__(self):
        one = torch.zeros(1).as_strided((200_000_000,), (0,))
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (one, torch.float64, "cpu", False)


def test_one_number_that_asks_for_the_memory_of_many_is_refused(tmp_path):
    path = tmp_path / "expanded.pth"
    torch.save({"weight": _Expanded()}, path)
    assert path.stat().st_size < 5_000
    with pytest.raises(UsageError, match="is damaged or holds Python objects"):
        read_weights(path)
