"""Types in words, for error messages and `vocseg list`."""

import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def describe_type(annotation: Any) -> str:
    """A parameter's type and bounds in words: `number from 0 to 1`, `one of "a", "b"`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = []
        for mark in arguments[1:]:
            fields = {name: getattr(mark, name, None) for name in ("ge", "gt", "le", "lt", "min_length", "max_length")}
            words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
            bounds += [f"{words[name]} {value}" for name, value in fields.items() if value is not None]
        return " ".join([describe_type(arguments[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f"array of {describe_type(arguments[0])}"
        return f"[{', '.join(describe_type(a) for a in arguments)}]"
    if origin in (Union, UnionType):
        return ", or ".join(describe_type(a) for a in arguments if a is not type(None))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))
