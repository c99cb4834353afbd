"""Discovery: which components there are, read from source files without running any of them.

Looked through in this order: vocseg's own components, the bundled `plugins/`, installed packages with an
entry point in the group `vocseg.plugins`, the nearest folder `plugins` beside or above the recipe, and the folder
given with `--plugins`. A name that two of them define is neither's; files that are equal byte for byte are one.

A plugin is a program: it runs, with all that its user may do, once a recipe that names one of its components is run,
checked or tried. Whoever runs a recipe from a folder trusts the `plugins` beside and above it. What no recipe names,
and whatever stands in a recipe or a file of weights, runs nothing.
"""

import contextlib
import importlib
import importlib.util
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from vocseg.errors import UsageError
from vocseg.registry import BrokenPlugin, Component, Registry
from vocseg.signature import read_components

PACKAGE = Path(__file__).parent
CORE_FILES = (
    "components/losses.py",
    "components/overlap_losses.py",
    "components/augmentations.py",
    "components/mixing.py",
    "components/optimizers.py",
    "components/schedules.py",
    "components/initializers.py",
    "data/voc.py",
    "data/folder.py",
    "data/synthetic.py",
)
ENTRY_POINT_GROUP = "vocseg.plugins"
MAX_BYTES = 1 << 20  # of a file with plugins: to parse more takes seconds and hundreds of megabytes


def bundled(kind: str) -> Path:
    """The folder of shipped `plugins` or `recipes`: inside the wheel, or beside the package in a checkout."""
    in_wheel = PACKAGE / "_bundled" / kind
    return in_wheel if in_wheel.is_dir() else PACKAGE.parent / kind


@dataclass(frozen=True)
class _Source:
    """A file to read components from, and how to import it should one of them be used."""

    path: Path
    origin: str
    importer: Callable[[], ModuleType]


def discover(project: Path | None = None, plugins: Path | None = None) -> Registry:
    """Finds every component.

    Args:
        project: a recipe, or a folder; the nearest folder `plugins` beside or above it is looked through.
        plugins: one more plugin folder (the flag `--plugins`).

    Raises:
        UsageError: `plugins` is not a folder.
    """
    if plugins is not None and not os.path.isdir(plugins):
        raise UsageError(f"--plugins {plugins}: no such folder")
    components: list[Component] = []
    broken: list[BrokenPlugin] = []
    nearest = _nearest_plugins(project) if project is not None else None
    if nearest is not None and _of_a_stranger(nearest):
        reason = "another user put it where anyone may write; trust it with --plugins, or move the recipe elsewhere"
        broken.append(BrokenPlugin(str(nearest), reason))
        nearest = None
    folders = [folder.absolute() for folder in (nearest, plugins) if folder is not None]
    seen: set[bytes] = set()
    for source in _sources(folders, broken):
        try:
            text = _read(source.path)
            # The same plugins are found twice where a checkout is used beside an installed wheel.
            if text in seen or b"vocseg" not in text:
                continue
            seen.add(text)
            components += read_components(text, source.path, source.origin, source.importer)
        except Exception as error:  # whatever is wrong with one file, it must not hide the others
            broken.append(BrokenPlugin(str(source.path), _reason(error)))
    return Registry(components, broken)


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a file")  # a pipe would be waited for, and a device never ends
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"expected a file of at most {MAX_BYTES:,} bytes, found more; move data out of it")
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return (f"line {error.lineno}: " if error.lineno else "") + f"not Python: {error.msg}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _sources(folders: list[Path], broken: list[BrokenPlugin]) -> Iterator[_Source]:
    for name in CORE_FILES:
        module = "vocseg." + name.removesuffix(".py").replace("/", ".")
        yield _Source(PACKAGE / name, "vocseg", partial(importlib.import_module, module))
    yield from _folder_sources(bundled("plugins"), "bundled", broken)
    yield from _installed_sources(broken)
    for folder in folders:
        yield from _folder_sources(folder, str(folder), broken)


def _nearest_plugins(start: Path) -> Path | None:
    start = start.resolve()
    return next((f / "plugins" for f in (start, *start.parents) if os.path.isdir(f / "plugins")), None)


def _of_a_stranger(plugins: Path) -> bool:
    """Whether another user may have put this folder in the way, as `/tmp/plugins` is above all that lies in /tmp."""
    return (
        hasattr(os, "getuid")
        and bool(os.stat(plugins.parent).st_mode & stat.S_IWOTH)
        and {os.stat(plugins).st_uid, os.lstat(plugins).st_uid} != {os.getuid()}  # of a link, both
    )


def plugin_files(component: Component) -> list[Path]:
    """All files of the plugin that a component is part of: one file, or a whole package."""
    file = Path(component.file)
    if component.origin in ("vocseg", "bundled"):
        return [file]
    top = file
    if os.path.isabs(component.origin):  # a plugin folder
        top = Path(component.origin) / file.relative_to(component.origin).parts[0]
    else:
        while (top.parent / "__init__.py").is_file():
            top = top.parent
    if not top.is_dir():
        return [top]
    return sorted(path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _folder_sources(folder: Path, origin: str, broken: list[BrokenPlugin]) -> Iterator[_Source]:
    """The plugins of a folder: files, and packages with all files of theirs."""
    try:
        for path in _public(folder):
            init = path / "__init__.py"
            if os.path.isfile(init):
                yield _Source(init, origin, partial(import_file, init))
                for inner in _public(path):
                    if inner.suffix == ".py":
                        yield _Source(inner, origin, partial(_import_inner, init, inner.stem))
            elif path.suffix == ".py":
                yield _Source(path, origin, partial(import_file, path))
    except OSError as error:
        broken.append(BrokenPlugin(str(folder), _reason(error)))


def _public(folder: Path) -> list[Path]:
    """What is in a folder, but for names with a leading _ or ., which are private."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(("_", ".")))


def _installed_sources(broken: list[BrokenPlugin]) -> Iterator[_Source]:
    """The modules that entry points name, and the files of those that are packages."""
    if not _some_package_offers_plugins():
        return
    import importlib.metadata

    try:
        entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    except Exception as error:  # one damaged installation spoils the list of all
        broken.append(BrokenPlugin("installed packages", f"their entry points cannot be read: {error}"))
        return
    for entry in entries:
        origin = entry.dist.name if entry.dist else entry.name
        try:
            files = list(_module_files(entry.module))
        except Exception as error:
            broken.append(BrokenPlugin(origin, f"entry point {entry.name} = {entry.value} leads nowhere: {error}"))
            continue
        for path, module in files:
            yield _Source(path, origin, partial(importlib.import_module, module))


def _some_package_offers_plugins() -> bool:
    """Whether the group's name stands in any installed package's entry points, or cannot be looked for.

    Asking `importlib.metadata` takes a quarter of `vocseg list`, and most machines have no such package.
    """
    for entry in map(os.fspath, sys.path):
        try:
            names = os.listdir(entry or os.curdir)
        except OSError:
            if os.path.isfile(entry):  # a zip archive, which `importlib.metadata` can read
                return True
            continue
        for name in names:
            if name.lower().endswith((".dist-info", ".egg-info", "egg-info")):
                with contextlib.suppress(OSError), open(os.path.join(entry, name, "entry_points.txt"), "rb") as file:
                    if ENTRY_POINT_GROUP.encode() in file.read():
                        return True
    return False


def _module_files(module: str) -> Iterator[tuple[Path, str]]:
    """The files of an installed module or package, found without importing it or its parents."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        if spec is not None:
            spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations or [])
    if spec is None:
        raise ModuleNotFoundError(f"no module named '{module}'")
    if spec.origin is not None and spec.has_location:
        yield Path(spec.origin), module
    for folder in spec.submodule_search_locations or ():
        for inner in _public(Path(folder)):
            if inner.suffix == ".py":
                yield inner, f"{module}.{inner.stem}"


def import_file(path: Path) -> ModuleType:
    """Imports a plugin file under a name of its own; the second import of a path gives the same module."""
    from hashlib import sha256  # listing imports nothing and is to be quick

    path = path.resolve()
    stem = path.parent.name if path.name == "__init__.py" else path.stem
    name = f"vocseg_plugin_{sha256(str(path).encode()).hexdigest()[:8]}_{stem}"
    if name in sys.modules:
        return sys.modules[name]
    locations = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_inner(init: Path, name: str) -> ModuleType:
    """Imports a file of a plugin that is a package, so that its relative imports work."""
    return importlib.import_module(f"{import_file(init).__name__}.{name}")
