"""From a recipe's name or path to a `Recipe`: every value checked, every default filled in.

All problems are collected before any is raised. Nothing here imports torch or runs a plugin.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vocseg.errors import (
    Problem,
    UsageError,
    VocsegError,
    did_you_mean,
    nearest,
    one_line,
    shorten,
    shown_path,
)
from vocseg.plugins import bundled
from vocseg.recipe.describe import choices, describe_type
from vocseg.recipe.schema import (
    PLACES,
    TABLES,
    WEIGHTS,
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
    Schedule,
    Table,
    Top,
    Train,
    table_model,
)
from vocseg.recipe.toml import (
    MAX_BYTES,
    Key,
    apply_override,
    flag,
    key_lines,
    parse,
    without_foreign,
    write_value,
)
from vocseg.registry import Component, Registry

Settings = TypeVar("Settings", bound=Named)
AnyTable = TypeVar("AnyTable", bound=Table)

MOST_PROBLEMS = 100
"""A recipe with more than these is not read to its end: 64 kB can hold ten thousand unknown keys."""

_MADE = ("loss", "augmentation", "schedule", "initializer")
"""The kinds whose components make a function."""


@dataclass(frozen=True)
class Part(Generic[Settings]):
    """A component that a recipe names: the core's settings for it, and the component's own parameters."""

    component: Component
    settings: Settings
    params: dict[str, Any]

    @property
    def name(self) -> str:
        return self.component.name

    def build(self, available: dict[str, Any]) -> Any:
        """Builds the component; what goes wrong inside a plugin names its file.

        Raises:
            UsageError: the component's function raised, or made no function where it is to.
        """
        kind, source = self.component.kind, shown_path(self.component.source)
        try:
            built = self.component.build(available, self.params)
        except VocsegError:
            raise
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{k} = {shorten(repr(v))}" for k, v in self.params.items())
            reason = f"cannot be built with {given or 'no parameters'}: {type(error).__name__}: {one_line(error)}"
            raise UsageError(Problem(source, f"{kind} '{self.name}' {reason}")) from error
        if kind in _MADE and not callable(built):
            raise UsageError(Problem(source, f"{kind} '{self.name}' returned {type(built).__name__}, not a function"))
        return built


Trial = Callable[[Mapping[str, "list[Part[Any]]"]], Iterable[VocsegError]]
"""Tries the parts of a recipe, by table, and gives what is wrong with them."""


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

    @property
    def components(self) -> list[Component]:
        """Every component the recipe names."""
        parts: list[Part[Any]] = [self.model, self.data, self.optimizer, self.schedule, self.initializer]
        return [part.component for part in (*parts, *self.augmentations, *self.losses)]


def locate(path: str, recipe: Path) -> Path:
    """A path that stands in a recipe: absolute, else from the working directory, else beside the recipe."""
    found = os.path.expanduser(path)
    beside = os.path.join(recipe.parent, found)
    return Path(beside if os.path.exists(beside) and not os.path.exists(found) else found).absolute()


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by the name of a bundled one.

    Raises:
        UsageError: there is no such file and no such name.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    shipped = bundled("recipes") / f"{name}.toml"
    if path.name == name and os.path.isfile(shipped):
        return shipped
    if path.name == name or not os.path.isdir(path.parent):
        here = [str(p) for folder in (Path(), Path("recipes")) for p in folder.glob("*.toml") if p.stem == name]
        known = here or [p.stem for p in bundled("recipes").glob("*.toml")]
    else:
        known = [str(p) for p in path.parent.glob("*.toml")]
    kind = "is a folder, not a recipe" if os.path.isdir(path) else "no such recipe, neither a file nor a bundled name"
    raise UsageError(Problem(name, f"{kind}{did_you_mean(name, known)}"))


def read_recipe(
    path: Path,
    registry: Registry,
    overrides: Sequence[str] = (),
    *,
    look_for_weights: bool = False,
    trial: Trial | None = None,
) -> Recipe:
    """Reads and checks a recipe file.

    Args:
        overrides: `key=TOML`, as the flag `--set` takes them.
        look_for_weights: whether a file named by `model.weights` must be there.
        trial: a further check of the parts that are right in themselves.

    Raises:
        UsageError: with one problem for each thing wrong, ordered by line; then those of the trial.
        VocsegError: that of the trial, if nothing else is wrong.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(Problem(str(path), f"cannot be read: {error.strerror}")) from None
    return _Reading(path, text, registry).read(overrides, look_for_weights, trial)


class _Reading:
    """One reading of one recipe: gathers problems while it goes."""

    def __init__(self, path: Path, text: bytes, registry: Registry):
        self.path, self.text, self.registry = path, text, registry
        self.where = shown_path(path)
        self.given = parse(text, self.where)
        self.data: dict[str, Any] = {}
        self.lines = key_lines(text.decode("utf-8-sig"))
        self.flags: dict[Key, tuple[int, str]] = {}
        self.foreign: list[Key] = []
        self.models: dict[tuple[str, str], type[Named]] = {}
        self.problems: list[tuple[tuple[int, int], Problem]] = []  # first those of flags in their order, then by line

    def read(self, overrides: Sequence[str], look_for_weights: bool, trial: Trial | None) -> Recipe:
        for i, override in enumerate(overrides):
            try:
                self.flags[apply_override(self.given, override)] = (i, flag(override))
            except UsageError as error:
                self.problems += [((0, i), problem) for problem in error.problems]
                self.stop_if_many()
        self.data, foreign = without_foreign(self.given)
        for key, message in foreign:
            self.problem(key, message)
        self.foreign = [key for key, _ in foreign]

        known = [*Top.model_fields, *(place.table for place in PLACES), *TABLES]
        for name in self.data:
            if name not in known:
                self.problem((name,), self.unknown(name, known))
        if self.path.stem in (".", "..") or not self.path.stem.isprintable():
            message = "its runs are filed under a recipe's name, and this is no folder's; rename it, as to my_net.toml"
            self.problems.append(((1, 0), Problem(self.where, message)))
        top = self.validate(Top, {k: v for k, v in self.data.items() if k in Top.model_fields}, ())
        parts = {place.table: self.place(place) for place in PLACES}
        train = self.table("train", Train)
        evaluate = self.table("evaluate", Evaluate) if "evaluate" in self.data else Evaluate()
        stopping = self.table("early_stopping", EarlyStopping) if "early_stopping" in self.data else None
        self.cross_check({table: found[0] for table, found in parts.items() if found}, train, stopping)
        if evaluate and evaluate.window is None and evaluate.overlap != Evaluate().overlap:
            self.problem(("evaluate", "overlap"), "has no effect without evaluate.window; leave it out")
        if look_for_weights and parts["model"]:
            self.look_for(parts["model"][0].settings.weights)
        failed = [*trial(parts)] if trial else []
        if self.problems or failed:
            wrong = self.in_order()
            kind = type(failed[0]) if not wrong and len({*map(type, failed)}) == 1 else UsageError
            raise kind(*dict.fromkeys([*wrong, *(problem for error in failed for problem in error.problems)]))
        assert top is not None
        assert train is not None
        assert evaluate is not None

        resolved: dict[str, Any] = top.model_dump(mode="json")
        for place in PLACES:
            tables = [_plain(part) for part in parts[place.table]]
            resolved[place.table] = tables if place.many else tables[0]
        for name, settings in (("train", train), ("evaluate", evaluate), ("early_stopping", stopping)):
            if settings is not None:
                resolved[name] = settings.model_dump(mode="json", exclude_none=True)
        return Recipe(
            name=self.path.stem,
            path=self.path,
            text=self.text,
            description=top.description,
            seed=top.seed,
            model=parts["model"][0],
            data=parts["data"][0],
            augmentations=tuple(parts["augmentation"]),
            losses=tuple(parts["loss"]),
            optimizer=parts["optimizer"][0],
            schedule=parts["schedule"][0],
            initializer=parts["initializer"][0],
            train=train,
            evaluate=evaluate,
            early_stopping=stopping,
            resolved=resolved,
            given=frozenset(_keys(self.given)),
        )

    def place(self, place: Place) -> list[Part]:
        """The parts that one table of the recipe (or each entry of one array of tables) names."""
        key: Key = (place.table,)
        value = self.data.get(place.table)
        if place.table not in self.data:
            if place.default is None:
                known = ", ".join(self.registry.names(place.kind))
                self.problem(key, f'missing; add {place.header} with name = "…"; known: {known}')
                return []
            value = {"name": place.default}
            if place.many:
                value = [value] if place.default else []
        if not place.many:
            part = self.part(place, value, key)
            return [] if part is None else [part]
        if not isinstance(value, list):
            self.mismatch(key, f"expected an array of tables, found {_shown(value)}; write {place.header}")
            return []
        if not value and place.default:
            self.problem(key, f"expected at least one; leave {place.table} out for '{place.default}'")
        found = [self.part(place, entry, (*key, i)) for i, entry in enumerate(value)]
        return [part for part in found if part is not None]

    def part(self, place: Place, table: Any, key: Key) -> Part | None:
        if not self.is_table(table, key, place.header):
            return None
        name = table.get("name")
        component = self.registry.find(place.kind, name) if isinstance(name, str) else None
        if component is None:
            # Which parameters it has cannot be told, but a key that no component of its kind has is misspelt.
            core = {k: v for k, v in table.items() if k in place.core.model_fields}
            any_kind = {p.name for c in self.registry if c.kind == place.kind for p in c.parameters}
            for own in table.keys() - place.core.model_fields.keys() - any_kind:
                message = self.unknown(own, [*place.core.model_fields, *any_kind], place.table)
                self.problem((*key, own), message)
            self.validate(place.core, {**core, "name": "unknown"}, key)
            if isinstance(name, str):
                self.problem((*key, "name"), self.registry.missing(place.kind, name))
            else:
                found = f"expected text, found {_shown(name)}" if "name" in table else "missing"
                self.mismatch((*key, "name"), f"{found}; known: {', '.join(self.registry.names(place.kind))}")
            return None
        try:
            model = self.models.get((place.table, component.name)) or table_model(place, component)
        except UsageError as error:
            self.problems += [((1, 0), problem) for problem in error.problems]
            return None
        self.models[place.table, component.name] = model
        # Defaults go through the same checks as what the recipe gives, so that the resolved form reads the same.
        defaults = {p.name: p.default for p in component.parameters if not p.required and p.default is not None}
        settings = self.validate(model, table, key, defaults, component)
        if settings is None:
            return None
        return Part(
            component,
            place.core(**{k: getattr(settings, k) for k in place.core.model_fields}),
            {p.name: getattr(settings, f"parameter_{p.name}") for p in component.parameters},
        )

    def table(self, name: str, model: type[AnyTable]) -> AnyTable | None:
        """One of the tables that name no component."""
        key: Key = (name,)
        if name not in self.data:
            self.problem(key, f"missing; add [{name}]")
            return None
        value = self.data[name]
        return self.validate(model, value, key) if self.is_table(value, key, f"[{name}]") else None

    def is_table(self, value: Any, key: Key, header: str) -> bool:
        if not isinstance(value, dict):
            self.mismatch(key, f"expected a table, found {_shown(value)}; write {header}")
        return isinstance(value, dict)

    def validate(
        self,
        model: type[AnyTable],
        table: dict[str, Any],
        key: Key,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        component: Component | None = None,
    ) -> AnyTable | None:
        """The checked table, or None where there is something wrong with it."""
        try:
            return model.model_validate_json(json.dumps({**defaults, **table}, default=lambda value: None))
        except TypeError as error:  # a bound that its type cannot have, such as a length for a number
            assert component is not None
            message = f"the parameters of {component.kind} '{component.name}' cannot be checked: {error}"
            self.problems.append(((1, 0), Problem(shown_path(component.source), message)))
            return None
        except ValidationError as error:
            # A location goes on into union members and array items; the first of each key is enough.
            kinds: dict[str, str] = {}
            for item in error.errors(include_url=False):
                name, *inside = item["loc"]
                kinds.setdefault(str(name), "wrong" if inside else item["type"])
        fields = {info.alias or name: info for name, info in model.model_fields.items()}
        misspelt = {nearest(name, fields) for name, kind in kinds.items() if kind == "extra_forbidden"}
        for name, kind in kinds.items():
            at = (*key, name)
            if kind == "extra_forbidden":
                self.problem(at, self.unknown(name, fields, str(key[0])))
            elif kind == "missing":
                if name not in misspelt:
                    self.problem(at, f"missing; expected {_expected(fields[name])}")
            elif name in table:
                near = nearest(table[name], choices(fields[name].annotation)) if isinstance(table[name], str) else None
                remedy = f"; did you mean {_shown(near)}?" if near else ""
                self.mismatch(at, f"expected {_expected(fields[name])}, found {_shown(table[name])}{remedy}")
            else:
                assert component is not None
                expected, found = _expected(fields[name]), _shown(defaults[name])
                message = f"the default of '{name}' breaks its own type: expected {expected}, found {found}"
                self.problems.append(((1, 0), Problem(shown_path(component.source), message)))
        return None

    def cross_check(self, parts: Mapping[str, Part], train: Train | None, stopping: EarlyStopping | None) -> None:
        """What only shows when several keys are seen together."""
        model, data, optimizer = parts.get("model"), parts.get("data"), parts.get("optimizer")
        if model and not model.component.backbone:
            none = f"'{model.name}' has no encoder that is set apart"
            if model.settings.weights == "imagenet":
                self.problem(("model", "weights"), f'"imagenet" is for an encoder, and {none}; use "none" or a file')
            if train and train.freeze_encoder:
                self.problem(("train", "freeze_encoder"), f"{none}; leave the key out")
            if optimizer and optimizer.settings.encoder_lr != 1:
                self.problem(("optimizer", "encoder_lr"), f"{none}; leave the key out")
        if train and train.unfreeze_after is not None:
            if not train.freeze_encoder:
                self.problem(("train", "unfreeze_after"), "has no effect without train.freeze_encoder = true")
            self.below_epochs(("train", "unfreeze_after"), train.unfreeze_after, train)
        if train and "schedule" in parts:
            self.below_epochs(("schedule", "warmup_epochs"), parts["schedule"].settings.warmup_epochs, train)
        if data and stopping and data.settings.train == data.settings.val:
            self.problem(("data", "val"), "early stopping needs another split to validate on than data.train")

    def below_epochs(self, key: Key, value: float, train: Train) -> None:
        if value >= train.epochs:
            self.problem(key, f"expected less than train.epochs = {train.epochs}, found {value:g}")

    def look_for(self, weights: str) -> None:
        file = locate(weights, self.path)
        if weights not in WEIGHTS and not os.path.isfile(file):
            near = nearest(weights, WEIGHTS)
            remedy = f"; did you mean '{near}'?" if near else ""
            known = 'expected "none", "imagenet", "published" or a file'
            self.problem(("model", "weights"), f"{known}, and there is no file {file}{remedy}")

    def unknown(self, name: str, known: Iterable[str], table: str = "") -> str:
        """What to say of a key that a table has not: its right spelling, or the table that it belongs in."""
        near = nearest(name, known, cutoff=0.8)
        if near is None:
            for place in PLACES:
                keys = {*place.core.model_fields, *(p.name for c in self.named(place) for p in c.parameters)} - {"name"}
                if name in keys and place.table != table:
                    return f"unknown key here; it belongs in {place.header}"
            for other, model in TABLES.items():
                if name in model.model_fields and other != table:
                    return f"unknown key here; it belongs in [{other}]"
        return f"unknown {'key' if table else 'key or table'}{did_you_mean(name, known)}"

    def named(self, place: Place) -> list[Component]:
        """The components that the recipe names in a table, or its default."""
        tables = self.data.get(place.table, {"name": place.default})
        names = [t.get("name") for t in (tables if isinstance(tables, list) else [tables]) if isinstance(t, dict)]
        found = [self.registry.find(place.kind, name) for name in names if isinstance(name, str)]
        return [component for component in found if component is not None]

    def mismatch(self, key: Key, message: str) -> None:
        """A problem with a value; said once where the value has been found to be foreign already."""
        if not any(key[: len(f)] == f or f[: len(key)] == key for f in self.foreign):
            self.problem(key, message)

    def problem(self, key: Key, message: str) -> None:
        """Notes a problem at the flag or the line that gave the key, else that of its table."""
        prefixes = [key[:n] for n in range(len(key), 0, -1)]
        given = next((self.flags[prefix] for prefix in prefixes if prefix in self.flags), None)
        line = 0
        for prefix in prefixes:
            if given or line:
                break
            line = self.lines.get(prefix, 0)
            if not line:  # a table that is there only because of a flag
                given = next((f for flagged, f in self.flags.items() if flagged[: len(prefix)] == prefix), None)
        order = (0, given[0]) if given else (1, line)
        where = given[1] if given else f"{self.where}:{line}" if line else self.where
        # As a user writes a key with --set: augmentation.0.size
        written = ".".join(shorten(str(part)) for part in key)
        self.problems.append((order, Problem(where, f"{written}: {message}")))
        self.stop_if_many()

    def stop_if_many(self) -> None:
        if len(self.problems) >= MOST_PROBLEMS:
            more = Problem(self.where, "there may be more; the rest is looked at once these are mended")
            raise UsageError(*self.in_order()[: MOST_PROBLEMS - 1], more)

    def in_order(self) -> list[Problem]:
        return [problem for _, problem in sorted(self.problems, key=lambda item: item[0])]


def _expected(info: FieldInfo) -> str:
    return describe_type(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)


def _shown(value: Any) -> str:
    return shorten(write_value(value))


def _plain(part: Part) -> dict[str, Any]:
    settings = part.settings.model_dump(mode="json", exclude_none=True)
    return json.loads(json.dumps({**settings, **{k: v for k, v in part.params.items() if v is not None}}, default=str))


def _keys(data: Any, key: Key = ()) -> list[Key]:
    """The key of every value that is no table and no array of tables."""
    if isinstance(data, dict):
        return [found for k, v in data.items() for found in _keys(v, (*key, k))]
    if isinstance(data, list) and data and all(isinstance(v, dict) for v in data):
        return [found for i, v in enumerate(data) for found in _keys(v, (*key, i))]
    return [key]
