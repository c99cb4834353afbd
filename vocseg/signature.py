"""Reads marked functions and their parameters from source text, importing and running nothing.

Annotations are evaluated against a fixed list of names (the built-in types, `typing`, `annotated_types`,
pydantic's `Field`) after a check that the expression holds nothing but names, constants, subscripts,
unions and calls of those names. Constants of the module may be used as well.
"""

import ast
import pathlib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import annotated_types

from vocseg.registry import HANDED_OVER, KINDS, Component, Parameter

_TYPING = ("Annotated", "Any", "Literal", "Optional", "Union")
_BOUNDS = ("Ge", "Gt", "Interval", "Le", "Len", "Lt", "MaxLen", "MinLen", "MultipleOf")
_KNOWN: dict[str, Any] = {
    **{t.__name__: t for t in (bool, dict, float, int, list, str, tuple)},
    **{name: getattr(typing, name) for name in _TYPING},
    **{name: getattr(annotated_types, name) for name in _BOUNDS},
    "Path": pathlib.Path,
}
_PLAIN = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Subscript, ast.Tuple, ast.List, ast.Dict,
    ast.BinOp, ast.BitOr, ast.UnaryOp, ast.USub, ast.UAdd, ast.Call, ast.keyword,
)  # fmt: skip


def read_components(text: bytes, path: Path, origin: str, importer: Callable[[], Any]) -> list[Component]:
    """Every marked top-level function of a source file.

    Raises:
        SyntaxError: the file does not parse.
        ValueError: a marked function does not keep to the contract; the message names function and line.
    """
    tree = ast.parse(text, filename=str(path))
    marks = dict(_mark_names(tree))
    constants = _constants(tree)
    components = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            kind = marks.get(ast.unparse(call.func if call else decorator))
            if kind is None:
                continue
            options = {k.arg: _value(k.value, constants) for k in call.keywords if k.arg} if call else {}
            components.append(
                Component(
                    kind=kind,
                    name=node.name,
                    doc=ast.get_docstring(node) or "",
                    file=str(path),
                    line=node.lineno,
                    origin=origin,
                    handed_over=_handed_over(node, kind),
                    parameters=tuple(_parameters(node, constants)),
                    options=options,
                    importer=importer,
                )
            )
    return components


def _mark_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """How this file spells each mark: `architecture`, an alias, or `vocseg.architecture`."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in ("vocseg", "vocseg.registry") and not node.level:
            for alias in node.names:
                if alias.name in KINDS:
                    yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "vocseg":
                    for kind in KINDS:
                        yield f"{alias.asname or alias.name}.{kind}", kind


def _handed_over(node: ast.FunctionDef, kind: str) -> tuple[str, ...]:
    names = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args))
    known = HANDED_OVER[kind]
    if node.args.vararg or node.args.kwarg:
        raise ValueError(f"line {node.lineno}: {kind} '{node.name}' must not take *args or **kwargs")
    for name in names:
        if name not in known:
            offer = f"only {', '.join(known)} is handed over" if known else "nothing is handed over"
            raise ValueError(
                f"line {node.lineno}: {kind} '{node.name}' takes '{name}' by position, where {offer}; "
                "put a * before the recipe's keys"
            )
    return names


def _parameters(node: ast.FunctionDef, constants: dict[str, Any]) -> Iterator[Parameter]:
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if arg.annotation is None:
            raise ValueError(f"line {arg.lineno}: parameter '{arg.arg}' of '{node.name}' has no annotation")
        try:
            annotation = _value(arg.annotation, constants)
            value = ... if default is None else _value(default, constants)
        except Exception as error:
            raise ValueError(
                f"line {arg.lineno}: parameter '{arg.arg}' of '{node.name}' cannot be read without running the file "
                f"({error}); use built-in types, Literal, Annotated and annotated_types bounds"
            ) from error
        yield Parameter(arg.arg, annotation, value, ast.unparse(arg.annotation))


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Module-level `NAME = expression` that a signature may refer to."""
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            target, value = node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            target, value = node.target.id, node.value
        else:
            continue
        try:
            constants[target] = _value(value, constants)
        except Exception:  # not a constant a signature could use; most module-level values are not
            continue
    return constants


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """Evaluates an expression made of known names and constants only."""
    names = {**_KNOWN, **constants}
    for part in ast.walk(node):
        if not isinstance(part, _PLAIN):
            raise ValueError(f"'{ast.unparse(part)}' is not allowed in a signature")
        if isinstance(part, ast.Name) and part.id not in names and part.id != "Field":
            raise ValueError(f"unknown name '{part.id}'")
        if isinstance(part, ast.Call) and (
            not isinstance(part.func, ast.Name) or part.func.id not in (*_BOUNDS, "Field")
        ):
            raise ValueError(f"'{ast.unparse(part.func)}' may not be called in a signature")
        if isinstance(part, ast.Name) and part.id == "Field":
            from pydantic import Field  # 80 ms, wanted only where a file uses it

            names["Field"] = Field
    return eval(compile(ast.Expression(node), "<signature>", "eval"), {"__builtins__": {}}, names)
