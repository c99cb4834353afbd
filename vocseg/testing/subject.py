"""What is to be checked: from a marked function, a file or a name to architectures, and the parameters they take.

A file whose signature cannot be read is still checked for all the rest, where it can be imported.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vocseg.errors import Problem, UsageError, did_you_mean, shown_path
from vocseg.plugins import discover, import_file
from vocseg.registry import MARK, Component, Mark, Parameter
from vocseg.signature import read_components

KIND = "architecture"


@dataclass(frozen=True)
class Subject:
    """One architecture to be checked.

    Attributes:
        component: what listing knows of it; None where its source cannot be read.
        unreadable: why not.
        load: imports its file and returns the function.
        backbone: what its mark says of the encoder.
        clash: what discovery says of another architecture of this name.
    """

    name: str
    file: Path | None
    component: Component | None
    unreadable: str
    load: Callable[[], Callable]
    backbone: str = ""
    clash: str = ""

    @property
    def source(self) -> str:
        if self.component is not None:
            return shown_path(self.component.source)
        return shown_path(self.file) if self.file else self.name

    def call(self, function: Callable, num_classes: int, params: Mapping[str, Any]) -> Any:
        """Builds as vocseg does: by position what the function asks for by position, the rest by keyword."""
        handed_over = self.component.handed_over if self.component is not None else ("num_classes",)
        return function(*([num_classes] if handed_over else []), **params)


def subjects(target: Callable | Component | str | os.PathLike[str]) -> list[Subject]:
    """The architectures that a target stands for.

    Args:
        target: a marked function, a component, a path that ends in .py, or the name of a registered architecture.

    Raises:
        UsageError: it stands for none.
    """
    if isinstance(target, Component):
        return [_of_component(target)]
    if isinstance(target, str | os.PathLike):
        path = Path(target).expanduser()
        if path.suffix == ".py" or isinstance(target, os.PathLike):
            return _of_file(path)
        return [_of_component(discover(project=Path.cwd()).get(KIND, str(target)))]
    return [_of_function(target)]


def _of_component(component: Component, clash: str = "") -> Subject:
    return Subject(component.name, Path(component.file), component, "", component.load, component.backbone, clash)


def _of_function(function: Callable) -> Subject:
    mark = getattr(function, MARK, None)
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(mark, Mark) or mark.kind != KIND:
        raise UsageError(f"{name} is not marked as an architecture; put @architecture above it")
    try:
        source = inspect.getsourcefile(function)
    except TypeError:
        source = None
    file = Path(source) if source else None
    found, unreadable = _read(file) if file is not None else ([], "it has no source file")
    component = next((c for c in found if c.name == name), None)
    if component is None:
        unreadable = unreadable or f"architecture '{name}' does not stand at the top level of its file"
    return Subject(name, file, component, unreadable, lambda: function, mark.options.get("backbone", ""))


def _of_file(path: Path) -> list[Subject]:
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UsageError(Problem(str(path), f"no such file{near}"))
    path = path.absolute()
    found, unreadable = _read(path)
    if not unreadable:
        if not found:
            message = "holds no architecture; mark its function with @architecture, from vocseg"
            raise UsageError(Problem(shown_path(path), message))
        return [_of_component(*_as_discovered(component)) for component in found]
    try:
        functions = list(_marked(import_file(path)))
    except (Exception, SystemExit) as error:
        return [Subject(path.name, path, None, unreadable, partial(_raise, error))]
    if not functions:  # the mark is there, and importing the file leaves no function that has it
        return [Subject(path.name, path, None, unreadable, partial(_raise, ImportError(unreadable)))]
    return [
        Subject(f.__name__, path, None, unreadable, partial(_same, f), getattr(f, MARK).options.get("backbone", ""))
        for f in functions
    ]


def _read(path: Path) -> tuple[list[Component], str]:
    """The architectures in a file, as listing reads them, and why they cannot be read."""
    try:
        read = read_components(path.read_bytes(), path, str(path.parent), partial(import_file, path))
    except SyntaxError as error:
        return [], f"line {error.lineno}: not Python: {error.msg}"
    except ValueError as error:
        return [], str(error)
    except OSError as error:
        return [], f"cannot be read: {error.strerror}"
    return [component for component in read if component.kind == KIND], ""


def _as_discovered(component: Component) -> tuple[Component, str]:
    """The component as discovery finds it, which can import a file of a package, and what it says of a second one."""
    registry = discover(project=Path(component.file))
    if any((c.kind, c.name) == (KIND, component.name) for c in registry.clashes):
        return component, registry.missing(KIND, component.name)
    found = registry.find(KIND, component.name)
    same = found is not None and os.path.exists(found.file) and os.path.samefile(found.file, component.file)
    return (found if same and found is not None else component), ""


def _marked(module: ModuleType) -> Iterator[Callable]:
    for value in list(vars(module).values()):
        mark = getattr(value, MARK, None)
        if isinstance(mark, Mark) and mark.kind == KIND and getattr(value, "__module__", "") == module.__name__:
            yield value


def _same(function: Callable) -> Callable:
    return function


def _raise(error: BaseException) -> Callable:
    raise error


# Parameters


def checked_params(subject: Subject, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters to build with, checked as a recipe's are. Defaults that break their own types are left out.

    Raises:
        UsageError: with every one that is unknown, missing or out of bounds.
    """
    if subject.component is None:
        return dict(given)
    known = {p.name: p for p in subject.component.parameters}
    problems = [
        Problem(name, f"{KIND} '{subject.name}' has no such parameter{did_you_mean(name, known)}")
        for name in given
        if name not in known
    ]
    params = {}
    for name, parameter in known.items():
        if name not in given and parameter.required:
            message = f"{KIND} '{subject.name}' needs a value of it: {parameter.text}"
            problems.append(Problem(name, f"{message}; give it as a keyword, or with --set {name}=…"))
        elif name in given:
            try:
                params[name] = accept(parameter, given[name])
            except ValueError as error:
                problems.append(Problem(name, str(error)))
    if problems:
        raise UsageError(*problems)
    return params


def accept(parameter: Parameter, value: Any) -> Any:
    """A value as a recipe may give it, turned into what the function gets: arrays into tuples, text into paths.

    Raises:
        ValueError: it does not keep to the parameter's type or bounds.
        TypeError: no value could be checked against that type.
    """
    adapter = TypeAdapter[Any](parameter.annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        return adapter.validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise ValueError(f"{message[:1].lower()}{message[1:]}, found {value!r}") from None


def beyond_bounds(annotation: Any) -> Iterator[Any]:
    """Values that lie just outside what an annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        members = [a for a in arguments if a is not type(None)]
        if len(members) == 1:  # beyond one member of several may be within another
            yield from beyond_bounds(members[0])
    elif origin is Literal:
        yield "no such choice"
    elif origin is Annotated:
        marks = [inner for mark in arguments[1:] for inner in (getattr(mark, "metadata", None) or [mark])]
        for mark in marks:
            for bound, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                limit = getattr(mark, bound, None)
                if isinstance(limit, int | float):
                    yield limit + step
        yield from beyond_bounds(arguments[0])
