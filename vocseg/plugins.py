"""Discovery: which components there are, read from source files without running any of them.

Looked through in this order: vocseg's own components, the bundled `plugins/`, installed packages with an
entry point in the group `vocseg.plugins`, and the project's plugin folder.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from vocseg.errors import UsageError
from vocseg.registry import BrokenPlugin, Component, Registry
from vocseg.signature import read_components

PACKAGE = Path(__file__).parent
CORE_FILES = (
    "components/losses.py",
    "components/augmentations.py",
    "components/optimizers.py",
    "components/schedules.py",
    "components/initializers.py",
    "data/voc.py",
    "data/folder.py",
    "data/synthetic.py",
)
ENTRY_POINT_GROUP = "vocseg.plugins"


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
        plugins: a plugin folder to use in place of that one (the flag `--plugins`).

    Raises:
        UsageError: `plugins` is not a folder, or two components have one kind and name.
    """
    if plugins is not None and not plugins.is_dir():
        raise UsageError(f"--plugins {plugins}: no such folder")
    folder = plugins or (_nearest_plugins(project) if project else None)
    components: list[Component] = []
    broken: list[BrokenPlugin] = []
    seen: set[str] = set()
    for source in _sources(folder):
        try:
            text = source.path.read_bytes()
            # A checkout used beside an installed wheel holds the same plugins twice; equal files are one plugin.
            digest = sha256(text).hexdigest()
            if digest in seen or b"vocseg" not in text:
                continue
            seen.add(digest)
            components += read_components(text, source.path, source.origin, source.importer)
        except (SyntaxError, ValueError, OSError) as error:
            line = getattr(error, "lineno", None)
            reason = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}"
            broken.append(BrokenPlugin(str(source.path), reason + (f" (line {line})" if line else "")))
    return Registry(components, broken)


def _sources(project: Path | None) -> Iterator[_Source]:
    for name in CORE_FILES:
        module = "vocseg." + name.removesuffix(".py").replace("/", ".")
        yield _Source(PACKAGE / name, "vocseg", lambda module=module: importlib.import_module(module))
    yield from _folder_sources(bundled("plugins"), "bundled")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        origin = entry.dist.name if entry.dist else entry.value
        for path, module in _package_files(entry.module):
            yield _Source(path, origin, lambda module=module: importlib.import_module(module))
    if project is not None:
        yield from _folder_sources(project, str(project))


def _nearest_plugins(start: Path) -> Path | None:
    start = start.resolve()
    for folder in (start, *start.parents):
        if (folder / "plugins").is_dir():
            return folder / "plugins"
    return None


def _folder_sources(folder: Path, origin: str) -> Iterator[_Source]:
    """One source a plugin: a file, or a package by its `__init__.py`. Names with a leading _ or . are private."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(("_", ".")):
            continue
        if path.is_dir() and (path / "__init__.py").is_file():
            path = path / "__init__.py"
        elif path.suffix != ".py":
            continue
        yield _Source(path, origin, lambda path=path: import_file(path))


def _package_files(module: str) -> Iterator[tuple[Path, str]]:
    """The files of an entry point's module, found without importing it or its parents."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin)
    for i, part in enumerate(rest):
        inner = path.parent / part
        last = i == len(rest) - 1
        path = inner.with_suffix(".py") if last and inner.with_suffix(".py").is_file() else inner / "__init__.py"
    yield path, module
    if path.name == "__init__.py":
        for inner in sorted(path.parent.glob("*.py")):
            if inner.name != "__init__.py":
                yield inner, f"{module}.{inner.stem}"


def import_file(path: Path) -> ModuleType:
    """Imports a plugin file under a name of its own; the second import of a path gives the same module."""
    path = path.resolve()
    stem = path.parent.name if path.name == "__init__.py" else path.stem
    name = f"vocseg_plugin_{sha256(str(path).encode()).hexdigest()[:8]}_{stem}"
    if name in sys.modules:
        return sys.modules[name]
    locations = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
