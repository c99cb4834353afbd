"""The files of a run, by name. A run folder alone is enough to resume, repeat and explain the run.

recipe.toml         the recipe as it was given
resolved.toml       every key with its value; a recipe itself
environment.json    versions, device, git, command line, seed, hashes of the plugin files
plugins/            a copy of the plugin files that came neither with vocseg nor from a package
classes.json        the class names and colours
metrics.jsonl .csv  one record an epoch
model.safetensors   the weights that were kept
counts.safetensors  of the validation set: `confusion` (c, c), rows truth, and `per_image` (n, 4, c): pixels of
                    each class that were hit, true and predicted, and predicted on void, which all figures are made of
result.json         the figures
state.json, *.pt    what `vocseg run --resume` goes on from
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
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import vocseg
from vocseg.errors import EnvironmentFault, Problem, UsageError
from vocseg.recipe.reader import Recipe
from vocseg.recipe.writer import write_resolved
from vocseg.runs.files import without_nan, write_bytes, write_json

PACKAGES = (
    "torch", "torchvision", "timm", "segmentation-models-pytorch", "numpy", "opencv-python-headless", "pillow",
    "pydantic", "safetensors",
)  # fmt: skip


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
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = cls(out / recipe.name / f"{stamp}-{secrets.token_hex(2)}")
        try:
            folder.path.mkdir(parents=True)
        except OSError as error:
            raise EnvironmentFault(
                Problem(str(folder.path), f"cannot be made: {error.strerror}; choose another folder with --out")
            ) from None
        write_bytes(folder.recipe, recipe.text)
        write_bytes(folder.resolved, write_resolved(recipe).encode())
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

    def write_environment(self, recipe: Recipe, device: str, processes: int = 1, launched: str = "") -> None:
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
            }
            if component.origin not in ("vocseg", "bundled") and os.path.isabs(component.origin):
                self._keep_plugin(source, Path(component.origin))
        write_json(
            self.environment,
            {
                "recipe": recipe.name,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "vocseg": vocseg.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cpus": os.cpu_count(),
                "device": device,
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
        found = self._read_json("classes.json")
        return found["classes"], found["palette"]

    @property
    def recipe_name(self) -> str:
        return self._read_json("environment.json")["recipe"]

    @property
    def launched(self) -> str:
        return self._read_json("environment.json").get("launched", "")

    @property
    def precision(self) -> str:
        """What the run computes in, "fp32" or "bf16"; where a trial chose it, it is not to be chosen again."""
        return self._read_json("environment.json")["device"].rsplit(", ", 1)[-1]

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise EnvironmentFault(Problem(str(self.path / name), f"missing or damaged: {error}")) from None

    def _keep_plugin(self, source: Path, folder: Path) -> None:
        """Copies a plugin out of its folder: one file, or the whole package that a component's file is part of."""
        self.plugins.mkdir(exist_ok=True)
        plugin = folder / source.relative_to(folder).parts[0]
        if plugin.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(plugin, self.plugins / plugin.name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy2(plugin, self.plugins / plugin.name)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds an epoch's record, in place of any later ones a resumed run will write again."""
        records = [r for r in self.read_metrics() if r["epoch"] < record["epoch"]] + [record]
        write_bytes(self.metrics, "".join(json.dumps(without_nan(r)) + "\n" for r in records).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(record), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_bytes(self.metrics.with_suffix(".csv"), table.getvalue().encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except FileNotFoundError:
            return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and state of the repository of the working directory; None outside of one."""

    def ask(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "modified": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
