"""Reads marked functions and their parameters from source text, importing and running nothing.

Annotations and defaults are evaluated, but only expressions of a few kinds over a fixed list of names: the built-in
types, what the file imports from `typing`, `annotated_types`, `pathlib` and pydantic's `Field`, and the file's own
constants that are written in the same way.
"""

import ast
import inspect
import pathlib
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import annotated_types

from vocseg import registry
from vocseg.registry import HANDED_OVER, KINDS, RESERVED, Component, Parameter

_BUILTINS: dict[str, Any] = {t.__name__: t for t in (bool, dict, float, int, list, str, tuple)}
_BOUNDS = ("Ge", "Gt", "Interval", "Le", "Len", "Lt", "MaxLen", "MinLen", "MultipleOf")
_TYPES = {
    "typing": SimpleNamespace(**{n: getattr(typing, n) for n in ("Annotated", "Any", "Literal", "Optional", "Union")}),
    "annotated_types": SimpleNamespace(**{n: getattr(annotated_types, n) for n in _BOUNDS}),
    "pathlib": SimpleNamespace(Path=pathlib.Path),
}
_MARKS = {kind: getattr(registry, kind) for kind in KINDS}
_MARKING = {
    "vocseg": SimpleNamespace(**_MARKS, registry=SimpleNamespace(**_MARKS)),
    "vocseg.registry": SimpleNamespace(**_MARKS),
}
_PLAIN = (
    ast.Name, ast.Attribute, ast.Load, ast.Constant, ast.Subscript, ast.Tuple, ast.List, ast.Dict,
    ast.BinOp, ast.BitOr, ast.UnaryOp, ast.USub, ast.UAdd, ast.Call, ast.keyword,
)  # fmt: skip


def read_components(text: bytes, path: Path, origin: str, importer: Callable[[], Any]) -> list[Component]:
    """Every marked function of a source file.

    Raises:
        SyntaxError: the file does not parse.
        ValueError: a marked function does not keep to the contract; the message names function and line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in somebody's docstring is not the reader's affair
        tree = ast.parse(text, filename=str(path))
    statements = list(_statements(tree))
    marks = _imported(statements, _MARKING)
    names = _BUILTINS | _imported(statements, _types(text))
    names |= _constants(tree, names)
    components = []
    for node in statements:
        found = [d for d in getattr(node, "decorator_list", ()) if _marked(d, marks)]
        if not found:
            continue
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        kind = _marked(found[0], marks)
        where = f"line {node.lineno}: {kind} '{node.name}'"
        if not isinstance(node, ast.FunctionDef) or node not in tree.body:
            raise ValueError(f"{where} must be a plain function at the top level of the file")
        if len(found) > 1:
            raise ValueError(f"{where} has two marks; keep one")
        components.append(
            Component(
                kind=kind,
                name=node.name,
                doc=ast.get_docstring(node) or "",
                file=str(path),
                line=node.lineno,
                origin=origin,
                handed_over=_handed_over(node.args, kind, where),
                parameters=tuple(_parameters(node.args, kind, where, names)),
                options=_options(found[0], kind, where, names),
                importer=importer,
            )
        )
    return components


def _types(text: bytes) -> dict[str, SimpleNamespace]:
    if b"pydantic" not in text:
        return _TYPES
    from pydantic import Field  # 80 ms, wanted only where a file uses it

    return {**_TYPES, "pydantic": SimpleNamespace(Field=Field)}


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Every statement of a file, however deep; expressions, nine tenths of its nodes, hold none and are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _imported(statements: Sequence[ast.stmt], modules: Mapping[str, SimpleNamespace]) -> dict[str, Any]:
    """What the file's imports bind, of the members of these modules: name → member, or the module's namespace."""
    found: dict[str, Any] = {}
    for node in statements:
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module in modules:
            members = vars(modules[node.module])
            for alias in node.names:
                if alias.name == "*":
                    found |= members
                elif alias.name in members:
                    found[alias.asname or alias.name] = members[alias.name]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                if bound in modules:
                    found[alias.asname or bound] = modules[bound]
    return found


def _look_up(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The known object that a name or a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _look_up(node.value, names)
        return vars(owner).get(node.attr) if isinstance(owner, SimpleNamespace) else None
    return None


def _marked(decorator: ast.expr, marks: Mapping[str, Any]) -> str:
    """The kind that a decorator marks; empty for any other decorator."""
    function = _look_up(decorator.func if isinstance(decorator, ast.Call) else decorator, marks)
    return function.__name__ if function in _MARKS.values() else ""


def _options(decorator: ast.expr, kind: str, where: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """What the mark is called with."""
    if not isinstance(decorator, ast.Call):
        return {}
    known = inspect.signature(_MARKS[kind], eval_str=True).parameters
    for argument in decorator.args:
        raise ValueError(f"{where}: its mark takes no '{ast.unparse(argument)}' by position")
    options = {}
    for keyword in decorator.keywords:
        if keyword.arg is None or keyword.arg not in known or keyword.arg == "function":
            raise ValueError(f"{where}: its mark takes no '{ast.unparse(keyword)}'")
        try:
            options[keyword.arg] = _value(keyword.value, names)
        except Exception as error:
            raise ValueError(f"{where}: '{keyword.arg}' of its mark cannot be read: {error}") from error
        if not isinstance(options[keyword.arg], known[keyword.arg].annotation):
            raise ValueError(f"{where}: '{keyword.arg}' of its mark must be text")
    return options


def _handed_over(args: ast.arguments, kind: str, where: str) -> tuple[str, ...]:
    known = HANDED_OVER[kind]
    if args.vararg or args.kwarg:
        raise ValueError(f"{where} must not take *args or **kwargs")
    names = tuple(a.arg for a in (*args.posonlyargs, *args.args))
    for name in names:
        if name not in known:
            offer = f"only {', '.join(known)} is handed over" if known else "nothing is handed over"
            raise ValueError(f"{where} takes '{name}' by position, where {offer}; put a * before the recipe's keys")
    return names


def _parameters(args: ast.arguments, kind: str, where: str, names: Mapping[str, Any]) -> Iterator[Parameter]:
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        name, annotation = arg.arg, arg.annotation
        if name in RESERVED[kind]:
            raise ValueError(f"{where} has a parameter '{name}', a key that vocseg reads itself; rename it")
        if name in HANDED_OVER[kind]:
            raise ValueError(f"{where} takes '{name}' by keyword, and vocseg hands it over; put it before the *")
        if annotation is None:
            raise ValueError(f"{where} has a parameter '{name}' without an annotation")
        try:
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                annotation = ast.parse(annotation.value, mode="eval").body
            kept = _value(annotation, names)
            value = ... if default is None else _value(default, names)
        except Exception as error:
            raise ValueError(
                f"{where} has a parameter '{name}' that cannot be read without running the file ({error}); "
                "use built-in types, Literal, Annotated, annotated_types bounds and plain constants"
            ) from error
        yield Parameter(name, kept, value, ast.unparse(annotation))


def _constants(tree: ast.Module, names: Mapping[str, Any]) -> dict[str, Any]:
    """Module-level `NAME = expression` that a signature may refer to."""
    constants: dict[str, Any] = {}
    statements = [s for s in tree.body if not isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    stored = (n for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    times = Counter(n.id for n in stored)
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if not isinstance(target, ast.Name) or times[target.id] > 1:  # assigned again, it is no constant
            continue
        try:
            constants[target.id] = _value(value, {**names, **constants})
        except Exception:  # nothing a signature could use; most module-level values are not
            continue
    return constants


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Evaluates an expression made of known names and constants only."""
    for part in ast.walk(node):
        if not isinstance(part, _PLAIN):
            raise ValueError(f"'{ast.unparse(part) or type(part).__name__}' is not allowed in a signature")
        unknown_name = isinstance(part, ast.Name) and part.id not in names
        if unknown_name or (isinstance(part, ast.Attribute) and _look_up(part, names) is None):
            raise ValueError(f"'{ast.unparse(part)}' is unknown")
        if isinstance(part, ast.Call):
            function = _look_up(part.func, names)
            if getattr(function, "__module__", None) not in ("annotated_types", "pydantic.fields"):
                raise ValueError(f"'{ast.unparse(part.func)}' may not be called in a signature")
    return eval(compile(ast.Expression(node), "<signature>", "eval"), {"__builtins__": {}, **names})
