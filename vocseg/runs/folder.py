"""The files of a run, by name. A run folder alone is enough to resume, repeat and explain the run.

recipe.toml         the recipe as it was given
resolved.toml       every key with its value; a recipe itself
environment.json    versions, device, git, command line, seed, hashes of the plugin files
plugins/            a copy of the plugin files that came neither with vocseg nor from a package
classes.json        the class names and colours
metrics.jsonl .csv  one record an epoch
model.safetensors   the weights that were kept
bad_images.json     the images that were left out, since they cannot be read, and why
nonfinite.json      the steps whose loss or gradient was not finite, with the names of their images
counts.safetensors  of the validation set: `confusion` (c, c), rows truth, and `per_image` (n, 4, c): pixels of
                    each class that were hit, true and predicted, and predicted on void, which all figures are made of
result.json         the figures
state.json, *.pt    what `vocseg run --resume` goes on from
lock                held by the process that trains, whose number is in it
curves, iou, confusion, examples   pictures
"""

import csv
import hashlib
import io
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import vocseg
from vocseg.errors import EnvironmentFault, Problem, UsageError, one_line
from vocseg.lock import take_lock
from vocseg.plugins import plugin_files
from vocseg.recipe.reader import Recipe
from vocseg.recipe.writer import write_resolved
from vocseg.runs.files import read_bytes, unwritable, without_nan, write_bytes, write_json

PACKAGES = (
    "torch", "torchvision", "timm", "segmentation-models-pytorch", "numpy", "opencv-python-headless", "pillow",
    "simplejpeg", "isal", "pydantic", "safetensors",
)  # fmt: skip

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.toml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def plugins(self) -> Path:
        return self.path / "plugins"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def counts(self) -> Path:
        return self.path / "counts.safetensors"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.json"

    @property
    def nonfinite(self) -> Path:
        return self.path / "nonfinite.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    @classmethod
    def create(cls, out: Path, recipe: Recipe) -> "RunFolder":
        """Makes a new folder `<out>/<recipe>/<time>-<id>` with the recipe in both forms.

        Raises:
            EnvironmentFault: the folder cannot be made.
        """
        runs = out / recipe.name
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder = cls(_new_folder(runs))
        except OSError as error:
            reason = f"cannot be made: {error.strerror or error}; choose another folder with --out"
            raise EnvironmentFault(Problem(str(runs), reason)) from error
        try:
            write_bytes(folder.recipe, recipe.text)
            folder.write_resolved(recipe)
        except EnvironmentFault:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            UsageError: the path is not a run folder.
        """
        folder = cls(path)
        if not folder.resolved.is_file():
            what = "not a run folder: it has no resolved.toml" if path.is_dir() else "no such run folder"
            raise UsageError(Problem(str(path), what))
        return folder

    def write_resolved(self, recipe: Recipe) -> None:
        write_bytes(self.resolved, write_resolved(recipe).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in this folder.

        Raises:
            EnvironmentFault: one does.
        """
        path = self.path / "lock"
        try:
            # Not through a link, which leads to whatever file whoever made the folder chose: it is emptied below.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            if not take_lock(descriptor):
                holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
                raise EnvironmentFault(
                    Problem(str(self.path), f"{holder} trains in this folder; wait for its end, or stop it")
                )
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:
                raise unwritable(path, error) from error
            yield
        finally:
            os.close(descriptor)

    def write_environment(
        self, recipe: Recipe, device: str, precision: str, processes: int = 1, launched: str = ""
    ) -> None:
        """Records what the run depends on, and copies the plugin files nobody else keeps.

        Args:
            launched: what tells the start of these processes from others, for finding their folder when they restart.
        """
        hashes = {}
        for component in recipe.components:
            source = Path(component.file)
            hashes[f"{component.kind} {component.name}"] = {
                "source": component.source,
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
                "files": {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in plugin_files(component)},
            }
            if component.origin not in ("vocseg", "bundled") and os.path.isabs(component.origin):
                self._keep_plugin(source, Path(component.origin))
        write_json(
            self.environment,
            {
                "id": secrets.token_hex(8),
                "recipe": recipe.name,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "vocseg": vocseg.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cpus": os.cpu_count(),
                "device": device,
                "precision": precision,
                "processes": processes,
                "launched": launched,
                "packages": {name: _version(name) for name in PACKAGES},
                "git": _git(),
                "command": sys.argv,
                "folder": os.getcwd(),
                "seed": recipe.seed,
                "components": hashes,
            },
        )

    def write_classes(self, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        write_json(self.path / "classes.json", {"classes": list(classes), "palette": [list(c) for c in palette]})

    def read_classes(self) -> tuple[list[str], list[list[int]]]:
        """The class names, and their colours where the data set gave any.

        Raises:
            EnvironmentFault: the file is missing or damaged.
        """
        classes, palette = self._read("classes.json", "classes", list), self._read("classes.json", "palette", list)
        if not all(isinstance(name, str) for name in classes):
            raise EnvironmentFault(Problem(str(self.path / "classes.json"), "damaged: expected names as its 'classes'"))
        return classes, palette

    def write_bad_images(self, images: Mapping[str, Mapping[str, str]]) -> None:
        """Records, by split, which images are left out, and what is wrong with each."""
        write_json(self.bad_images, {"images": images})

    def read_bad_images(self) -> dict[str, dict[str, str]]:
        """What `write_bad_images` recorded; nothing where it did not.

        Raises:
            EnvironmentFault: the file is damaged.
        """
        return self._read(self.bad_images.name, "images", dict) if self.bad_images.exists() else {}

    def add_nonfinite(self, step: dict[str, Any]) -> None:
        """Records a step that was not finite, in place of any later ones a resumed run will come to again."""
        place = step["epoch"], step["step"]
        before = [found for found in self.read_nonfinite() if (found["epoch"], found["step"]) < place]
        write_json(self.nonfinite, {"steps": [*before, step]})

    def read_nonfinite(self) -> list[dict[str, Any]]:
        """The steps that were not finite.

        Raises:
            EnvironmentFault: the file is damaged.
        """
        steps = self._read(self.nonfinite.name, "steps", list) if self.nonfinite.exists() else []
        for step in steps:
            if not (isinstance(step, dict) and {"epoch", "step", "skipped"} <= step.keys()):
                reason = "damaged: expected epoch, step and skipped of each of its 'steps'"
                raise EnvironmentFault(Problem(str(self.nonfinite), reason))
        return steps

    @property
    def recipe_name(self) -> str:
        return self._read("environment.json", "recipe", str)

    @property
    def id(self) -> str:
        """What tells this run from all others, wherever its folder is moved to."""
        return self._read("environment.json", "id", str)

    @property
    def launched(self) -> str:
        try:
            return self._read("environment.json", "launched", str)
        except EnvironmentFault:  # it is asked of all runs of a recipe: one that is damaged is not the one looked for
            return ""

    @property
    def precision(self) -> str:
        """What the run computes in, as in `Placement`; where a trial chose it, it is not to be chosen again."""
        return self._read("environment.json", "precision", str)

    def _read(self, name: str, key: str, kind: type[Value]) -> Value:
        """A value of one of the run's JSON files.

        Raises:
            EnvironmentFault: the file is missing or damaged.
        """
        path = self.path / name
        try:
            value = json.loads(read_bytes(path))[key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EnvironmentFault(Problem(str(path), f"damaged: {type(error).__name__}: {one_line(error)}")) from None
        if not isinstance(value, kind):
            reason = f"damaged: expected {kind.__name__} as its '{key}', found {type(value).__name__}"
            raise EnvironmentFault(Problem(str(path), reason))
        return value

    def _keep_plugin(self, source: Path, folder: Path) -> None:
        """Copies a plugin out of its folder: one file, or the whole package that a component's file is part of."""
        plugin = folder / source.relative_to(folder).parts[0]
        kept = self.plugins / plugin.name
        try:
            self.plugins.mkdir(exist_ok=True)
            if plugin.is_dir():
                shutil.copytree(plugin, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(plugin, kept)
        except OSError as error:
            raise unwritable(kept, error) from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds an epoch's record, in place of any later ones a resumed run will write again."""
        records = [r for r in self.read_metrics() if r["epoch"] < record["epoch"]] + [without_nan(record)]
        write_bytes(self.metrics, "".join(json.dumps(r) + "\n" for r in records).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(record), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_bytes(self.metrics.with_suffix(".csv"), table.getvalue().encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The epochs' records, none where no epoch ended yet.

        Raises:
            EnvironmentFault: the file is damaged.
        """
        if not self.metrics.exists():
            return []
        records = []
        for number, line in enumerate(read_bytes(self.metrics).splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record["epoch"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                reason = "damaged: this line is no record of an epoch; remove it to go on without"
                raise EnvironmentFault(Problem(f"{self.metrics}:{number}", reason)) from None
            records.append(record)
        return records


def _new_folder(runs: Path) -> Path:
    while True:
        path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with suppress(FileExistsError):  # another run began in this second, and drew the same id
            path.mkdir()
            return path


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the repository of the working directory; None outside of one.

    Whether files differ from it is not asked: to tell, git runs programs that the repository's own settings name.
    """
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": done.stdout.strip()}
