"""From a recipe's name or path to a `Recipe`: every value checked, every default filled in.

All problems are collected before any is raised. Nothing here imports torch or runs a plugin.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from vocseg.errors import Problem, UsageError, did_you_mean
from vocseg.plugins import bundled
from vocseg.recipe.describe import describe_type
from vocseg.recipe.schema import (
    PLACES,
    Augmentation,
    Data,
    EarlyStopping,
    Evaluate,
    Initializer,
    Loss,
    Model,
    Named,
    Optimizer,
    Place,
    Plain,
    Schedule,
    Train,
    table_model,
)
from vocseg.recipe.toml import Key, apply_override, foreign_values, key_lines, parse
from vocseg.registry import Component, Registry

Settings = TypeVar("Settings", bound=Named)


@dataclass(frozen=True)
class Part(Generic[Settings]):
    """A component that a recipe names: the core's settings for it, and the component's own parameters."""

    component: Component
    settings: Settings
    params: dict[str, Any]

    @property
    def name(self) -> str:
        return self.component.name


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read whole.

    Attributes:
        name: the file's stem; runs are filed under it.
        path: where it was read from.
        text: the file as it was given, byte for byte.
        resolved: every key with its value, defaults included; nested plain data in the order of the schema.
            Keys that are not set and have no value (`train.minutes`) are left out.
        given: the keys that the recipe or `--set` gave; the others are defaults.
    """

    name: str
    path: Path
    text: bytes
    description: str
    seed: int
    model: Part[Model]
    data: Part[Data]
    augmentations: tuple[Part[Augmentation], ...]
    losses: tuple[Part[Loss], ...]
    optimizer: Part[Optimizer]
    schedule: Part[Schedule]
    initializer: Part[Initializer]
    train: Train
    evaluate: Evaluate
    early_stopping: EarlyStopping | None
    resolved: dict[str, Any] = field(repr=False)
    given: frozenset[Key] = field(repr=False)


def locate(path: str, recipe: Path) -> Path:
    """A path that stands in a recipe: absolute, else from the working directory, else beside the recipe."""
    found = Path(path).expanduser()
    beside = recipe.parent / found
    return (beside if beside.exists() and not found.exists() else found).absolute()


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a bundled one.

    Raises:
        UsageError: there is no such file and no such name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix == "" and os.sep not in name:
        shipped = bundled("recipes") / f"{name}.toml"
        if shipped.is_file():
            return shipped
    names = [p.stem for p in bundled("recipes").glob("*.toml")]
    kind = "is a folder, not a recipe" if path.is_dir() else "no such recipe file"
    raise UsageError(Problem(name, f"{kind}, and no bundled recipe has that name{did_you_mean(path.stem, names)}"))


def read_recipe(path: Path, registry: Registry, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe file.

    Raises:
        UsageError: with one problem for each thing wrong, ordered by line.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    return _Reading(path, text, registry).read(overrides)


class _Reading:
    """One reading of one recipe: gathers problems while it goes."""

    def __init__(self, path: Path, text: bytes, registry: Registry):
        self.path, self.text, self.registry = path, text, registry
        self.data = parse(text, str(path))
        self.lines = key_lines(text.decode())
        self.set_keys: dict[Key, str] = {}
        self.problems: list[tuple[int, Problem]] = []

    def read(self, overrides: Sequence[str]) -> Recipe:
        for override in overrides:
            try:
                self.set_keys[apply_override(self.data, override)] = override
            except UsageError as error:
                self.problems += [(0, problem) for problem in error.problems]
        for key, message in foreign_values(self.data):
            self.problem(key, message)
        if self.problems:  # values that are not JSON cannot be looked at further
            raise self.error()

        known = [place.table for place in PLACES] + list(Plain.model_fields)
        for table in self.data:
            if table not in known:
                self.problem((table,), f"unknown table or key{did_you_mean(table, known)}")
        parts = {place.table: self.place(place) for place in PLACES}
        plain = self.validate(Plain, {k: v for k, v in self.data.items() if k in Plain.model_fields}, ())
        if not self.problems and isinstance(plain, Plain):
            self.cross_check(parts, plain)
        if self.problems or not isinstance(plain, Plain):
            raise self.error()
        resolved: dict[str, Any] = {"description": plain.description, "seed": plain.seed}
        for place in PLACES:
            found = parts[place.table]
            if place.many:
                resolved[place.table] = [_plain(part) for part in found]
            else:
                resolved[place.table] = _plain(found[0])
        for table in ("train", "evaluate", "early_stopping"):
            value = getattr(plain, table)
            if value is not None:
                resolved[table] = value.model_dump(mode="json", exclude_none=True)
        one = {table: found[0] for table, found in parts.items() if found}
        return Recipe(
            name=self.path.stem,
            path=self.path,
            text=self.text,
            description=plain.description,
            seed=plain.seed,
            model=one["model"],
            data=one["data"],
            augmentations=tuple(parts["augmentation"]),
            losses=tuple(parts["loss"]),
            optimizer=one["optimizer"],
            schedule=one["schedule"],
            initializer=one["initializer"],
            train=plain.train,
            evaluate=plain.evaluate,
            early_stopping=plain.early_stopping,
            resolved=resolved,
            given=frozenset(_keys(self.data)),
        )

    def place(self, place: Place) -> list[Part]:
        """The parts that one table of the recipe (or each entry of one array of tables) names."""
        value = self.data.get(place.table)
        if value is None and place.default is None:
            example = f'[{place.table}] with name = "…"'
            known = ", ".join(self.registry.names(place.kind))
            self.problem((place.table,), f"missing; add {example} (known: {known})")
            return []
        if place.many:
            if value is None:
                entries: Any = [{"name": place.default}] if place.default else []
            else:
                entries = value
            if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                self.problem((place.table,), f"expected an array of tables: write [[{place.table}]]")
                return []
            if not entries and place.default:
                self.problem((place.table,), f"empty; leave it out for '{place.default}'")
            found = [self.part(place, entry, (place.table, i)) for i, entry in enumerate(entries)]
            return [part for part in found if part is not None]
        if value is not None and not isinstance(value, dict):
            self.problem((place.table,), f"expected a table: write [{place.table}]")
            return []
        table = {"name": place.default} if value is None else value
        part = self.part(place, table, (place.table,))
        return [] if part is None else [part]

    def part(self, place: Place, table: dict[str, Any], key: Key) -> Part | None:
        name = table.get("name")
        component = self.registry.find(place.kind, name) if isinstance(name, str) else None
        if isinstance(name, str) and component is None:
            self.problem((*key, "name"), self.registry.missing(place.kind, name))
        if component is None:
            # The component's own keys cannot be told from misspelt ones: check the core's only.
            core = {k: v for k, v in table.items() if k in place.core.model_fields}
            self.validate(place.core, core, key)
            return None
        settings = self.validate(table_model(place, component), table, key)
        if not isinstance(settings, place.core):
            return None
        own = [p.name for p in component.parameters]
        return Part(
            component,
            place.core(**{k: getattr(settings, k) for k in place.core.model_fields}),
            {k: getattr(settings, k) for k in own},
        )

    def validate(self, model: type[BaseModel], table: dict[str, Any], key: Key) -> BaseModel | None:
        try:
            return model.model_validate_json(json.dumps(table))
        except ValidationError as error:
            kinds: dict[Key, str] = {}
            for item in error.errors(include_url=False):
                # Union members and array items add to the location; the recipe's key is where the model ends.
                kinds.setdefault(_depth(model, item["loc"]), item["type"])
            for at, kind in kinds.items():
                self.problem((*key, *at), _message(model, at, kind, table))
            return None

    def cross_check(self, parts: dict[str, list[Part]], plain: Plain) -> None:
        """What only shows when several keys are seen together."""
        architecture = parts["model"][0]
        model, train = architecture.settings, plain.train
        if not architecture.component.backbone:
            none = f"'{architecture.name}' has no encoder that is set apart"
            if model.weights in ("imagenet",):
                self.problem(("model", "weights"), f'"imagenet" is for an encoder, and {none}; use "none" or a file')
            if train.freeze_encoder:
                self.problem(("train", "freeze_encoder"), f"{none}; leave the key out")
            if parts["optimizer"][0].settings.encoder_lr != 1:
                self.problem(("optimizer", "encoder_lr"), f"{none}; leave the key out")
        if train.unfreeze_after is not None and not train.freeze_encoder:
            self.problem(("train", "unfreeze_after"), "has no effect without train.freeze_encoder = true")
        if train.unfreeze_after is not None and train.unfreeze_after >= train.epochs:
            self.problem(("train", "unfreeze_after"), f"expected less than train.epochs = {train.epochs}, found {train.unfreeze_after}")
        if model.weights not in ("none", "imagenet"):
            file = locate(model.weights, self.path)
            if not file.is_file():
                known = 'expected "none", "imagenet" or a file'
                self.problem(("model", "weights"), f"{known}, and there is no file {file}")
        if plain.early_stopping and parts["data"][0].settings.train == parts["data"][0].settings.val:
            self.problem(("data", "val"), "early stopping needs another split to validate on than data.train")
        warmup = parts["schedule"][0].settings.warmup_epochs
        if warmup >= train.epochs:
            self.problem(("schedule", "warmup_epochs"), f"expected less than train.epochs = {train.epochs}, found {warmup:g}")

    def problem(self, key: Key, message: str) -> None:
        for length in range(len(key), 0, -1):
            override = self.set_keys.get(key[:length])
            if override is not None:
                self.problems.append((0, Problem(f"--set {override}", f"{_name(key)}: {message}")))
                return
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), 1)
        self.problems.append((line, Problem(f"{self.path}:{line}", f"{_name(key)}: {message}")))

    def error(self) -> UsageError:
        return UsageError(*(problem for _, problem in sorted(self.problems, key=lambda item: item[0])))


def _name(key: Key) -> str:
    """A key as a user writes it with --set: `augmentation.0.size`."""
    return ".".join(map(str, key))


def _depth(model: type[BaseModel], location: tuple[str | int, ...]) -> Key:
    """The part of a pydantic error's location that is a recipe key: through nested tables, not into a value."""
    key: Key = ()
    at: Any = model
    for part in location:
        if not (isinstance(at, type) and issubclass(at, BaseModel)):
            break
        key = (*key, part)
        info = at.model_fields.get(str(part))
        at = _table_type(info.annotation) if info else None
    return key


def _table_type(annotation: Any) -> Any:
    """The table in an annotation such as `EarlyStopping | None`, or None."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _message(model: type[BaseModel], key: Key, kind: str, table: dict[str, Any]) -> str:
    """What is wrong with one key of a table, in one sentence."""
    at: Any = model
    found: Any = table
    for part in key[:-1]:
        at = _table_type(at.model_fields[str(part)].annotation)
        found = found[part]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(key[-1]), at.model_fields)}"
    if kind == "missing":
        return "missing, and has no default"
    info = at.model_fields[str(key[-1])]
    expected = describe_type(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)
    return f"expected {expected}, found {json.dumps(found[key[-1]], ensure_ascii=False)}"


def _plain(part: Part) -> dict[str, Any]:
    settings = part.settings.model_dump(mode="json", exclude_none=True)
    return json.loads(json.dumps({**settings, **{k: v for k, v in part.params.items() if v is not None}}, default=str))


def _keys(data: Any, key: Key = ()) -> list[Key]:
    """The key of every value that is not a table, at the depth the recipe's schema ends."""
    if isinstance(data, dict):
        return [found for k, v in data.items() for found in _keys(v, (*key, k))]
    if isinstance(data, list) and data and all(isinstance(v, dict) for v in data):
        return [found for i, v in enumerate(data) for found in _keys(v, (*key, i))]
    return [key]
