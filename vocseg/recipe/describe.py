"""Types and docstrings in words, for error messages, `vocseg list` and the JSON schema."""

import json
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_NOUNS = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
}


def describe_type(annotation: Any, *, many: bool = False) -> str:
    """A parameter's type and bounds in words: `number from 0 to 1`, `"a" or "b"`, `array of 2 numbers > 0`.

    Args:
        many: in the plural, as in `array of …`.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(describe_type(arguments[0], many=many), arguments[1:])
    if origin is Literal:
        return _either([json.dumps(value, ensure_ascii=False) for value in arguments])
    if origin in (Union, UnionType):
        words = [describe_type(a, many=many) for a in arguments if a is not type(None)]
        return ", or ".join(words) if any(" or " in word for word in words) else _either(words)
    if origin is tuple and len(set(arguments) - {...}) == 1:
        count = "" if ... in arguments else f"{len(arguments)} "
        return f"array{'s' * many} of {count}{describe_type(arguments[0], many=True)}"
    if origin is tuple:
        return f"array{'s' * many} [{', '.join(describe_type(a) for a in arguments)}]"
    if origin is list:
        return f"array{'s' * many} of {describe_type(arguments[0], many=True)}"
    if origin is dict or annotation is dict:
        return "tables" if many else "table"
    if annotation in _NOUNS:
        return _NOUNS[annotation][many]
    return getattr(annotation, "__name__", str(annotation))


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _bounded(words: str, marks: tuple[Any, ...]) -> str:
    """A type in words with the bounds of its `Annotated`; pydantic's `Field` keeps them in a list of its own.

    A field with a title is called that.
    """
    titles = [mark.title for mark in marks if getattr(mark, "title", None)]
    words = titles[0] if titles else words
    names = ("ge", "gt", "le", "lt", "min_length", "max_length", "multiple_of")
    flat = [inner for mark in marks for inner in (getattr(mark, "metadata", None) or [mark])]
    found = {n: getattr(mark, n) for mark in flat for n in names if getattr(mark, n, None) is not None}
    low, high = found.get("min_length", 0), found.get("max_length")
    length = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
    if (low or high is not None) and words.startswith("array of "):
        words = words.replace("of ", f"of {length} ", 1)
    elif low or high is not None:
        words += f" of {length} characters"
    if "ge" in found and "le" in found:
        words += f" from {found.pop('ge')} to {found.pop('le')}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {found[name]}" for name, sign in signs.items() if name in found]
    limits += [f"a multiple of {found['multiple_of']}"] if "multiple_of" in found else []
    return f"{words} {' and '.join(limits)}".rstrip()


def choices(annotation: Any) -> list[str]:
    """The texts that an annotation names one by one, at any depth."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [choice for inner in get_args(annotation) for choice in choices(inner)]


def split_doc(doc: str) -> tuple[str, dict[str, str]]:
    """A Google-style docstring as its text, without the sections, and what `Args:` says of each parameter."""
    text, *sections = re.split(r"^(Args|Raises|Returns):[ ]*$", doc, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = re.split(r"^ {4}(\w+): *", body, flags=re.MULTILINE)[1:] if title == "Args" else []
        found |= {name: " ".join(said.split()) for name, said in zip(entries[::2], entries[1::2], strict=True)}
    return text.strip(), found
