"""TOML in and out: parsing behind a fence, the line of every key, `--set` overrides, and writing."""

import json
import re
import tomllib
from datetime import date, datetime, time
from typing import Any

from vocseg.errors import Problem, UsageError

MAX_BYTES = 64 * 1024
MAX_NESTING = 64  # dots or brackets on one line; more makes tomllib take seconds and gigabytes, or recurse too deep

Key = tuple[str | int, ...]


def parse(text: bytes, where: str) -> dict[str, Any]:
    """Parses a recipe's text.

    Raises:
        UsageError: too large, not UTF-8, nested too deep, or not TOML; the message names file and line.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(Problem(where, f"{len(text):,} bytes, where a recipe has at most {MAX_BYTES:,}"))
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise UsageError(Problem(f"{where}:{line}", "not UTF-8 text; save the recipe as UTF-8")) from None
    for number, line in enumerate(decoded.splitlines(), 1):
        if max(line.count("."), line.count("["), line.count("{")) > MAX_NESTING:
            raise UsageError(Problem(f"{where}:{number}", f"more than {MAX_NESTING} dots or brackets on one line"))
    try:
        return tomllib.loads(decoded)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        found = re.search(r"\s*\(at line (\d+), column \d+\)|\s*\(at end of document\)", str(error))
        line = int(found[1]) if found and found[1] else decoded.count("\n") + 1
        message = str(error)[: found.start()] if found else str(error)
        raise UsageError(Problem(f"{where}:{line}", f"not TOML: {message[:1].lower()}{message[1:]}")) from None


def key_lines(text: str) -> dict[Key, int]:
    """The line of each table header and key, counted from 1. Best effort: a key it misses has its table's line."""
    lines: dict[Key, int] = {}
    arrays: dict[str, int] = {}
    table: Key = ()
    depth, fence = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if fence:  # inside a multi-line string
            fence = "" if fence in line else fence
            continue
        if depth == 0:
            if header := re.match(r"\s*(\[\[?)\s*([^\]#]+?)\s*\]", line):
                names = _dotted(header[2])
                if header[1] == "[[":
                    arrays[header[2]] = arrays.get(header[2], -1) + 1
                    names += (arrays[header[2]],)
                table = names
                lines.setdefault(table, number)
                continue
            if key := re.match(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""", line):
                lines.setdefault(table + _dotted(key[1]), number)
        bare = re.sub(r'"(?:\\.|[^"\\])*"|' + r"'[^']*'|#.*", "", line.replace('""""""', ""))
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2:
                fence = quotes
        depth = max(0, depth + bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}"))
    return lines


def _dotted(text: str) -> Key:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def apply_override(data: dict[str, Any], override: str) -> Key:
    """Applies one `--set key=TOML` to `data` in place, and returns the key.

    The right side is a TOML value; what is not TOML and does not begin like an array, table or string is taken
    as a string, since shells eat the quotes of `--set model.weights="none"`. A number in the key is an index
    into an array of tables.

    Raises:
        UsageError: there is no `=`, the value is not TOML, or the key leads through something else than a table.
    """
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+){0,8}", name):
        raise UsageError(Problem(where, "expected key=value, as in --set train.epochs=5"))
    try:
        value = parse(f"value = {text}".encode(), where)["value"]
    except UsageError:
        if not text or text[0] in "[{\"'":
            raise UsageError(Problem(where, f"{text!r} is not a TOML value")) from None
        value = text
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    at: Any = data
    for i, part in enumerate(key):
        last = i == len(key) - 1
        if isinstance(part, int):
            if not isinstance(at, list) or not 0 <= part < len(at):
                count = f"{len(at)} entries" if isinstance(at, list) else "no array"
                raise UsageError(Problem(where, f"there is no '{'.'.join(map(str, key[: i + 1]))}': {count} there"))
        elif not isinstance(at, dict):
            kind = "an array; give an index" if isinstance(at, list) else "no table"
            raise UsageError(Problem(where, f"'{'.'.join(map(str, key[:i]))}' is {kind}"))
        if last:
            at[part] = value
        else:
            at = at[part] if isinstance(part, int) else at.setdefault(part, {})
    return key


def foreign_values(data: Any, key: Key = ()) -> list[tuple[Key, str]]:
    """Values that TOML has and recipes have not: dates and times. Each with its key."""
    if isinstance(data, dict):
        return [found for k, v in data.items() for found in foreign_values(v, (*key, k))]
    if isinstance(data, list):
        return [found for i, v in enumerate(data) for found in foreign_values(v, (*key, i))]
    return [(key, f"{data} is a date or time, which no recipe key takes")] if isinstance(data, date | datetime | time) else []


def write_value(value: Any) -> str:
    """One TOML value on one line: strings, numbers, booleans, arrays and inline tables."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_key(k)} = {write_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def write_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
