"""TOML in and out: parsing behind a fence, the line of every key, `--set` overrides, and writing."""

import json
import math
import re
import tomllib
from datetime import date, time
from typing import Any

from vocseg.errors import UNSEEN, Problem, UsageError, shorten

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
"""Parts of a dotted key, or levels of nesting. 20,000 parts in 40 kB take tomllib 4 seconds and 1.5 GB."""

Key = tuple[str | int, ...]

_STRING = r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\''
# What is not closed goes on to the end, of the line or of all: to look for an end from every quote takes seconds.
_TOKEN = re.compile(
    r'"""(?:\\.|.)*?(?:"{3,5}|\Z)|\'\'\'.*?(?:\'{3,5}|\Z)|"(?:\\.|[^"\\\n])*+"?|\'[^\'\n]*\'?|#[^\n]*', re.DOTALL
)
_KEY = rf"(?:[\w-]+|{_STRING})(?:\s*\.\s*(?:[\w-]+|{_STRING}))*"


def parse(text: bytes, where: str) -> dict[str, Any]:
    """Parses a recipe's text, which may begin with a byte order mark.

    Raises:
        UsageError: too large, not UTF-8, nested too deep, or not TOML; the message names file and line.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(Problem(where, f"expected a recipe of at most {MAX_BYTES:,} bytes, found more"))
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise UsageError(Problem(f"{where}:{line}", "not UTF-8 text; save the recipe as UTF-8")) from None
    for line, content in enumerate(_TOKEN.sub(_strings_out, decoded).split("\n"), 1):
        if any(key.count(".") >= MAX_DEPTH for key in re.split(r"[^\w\s.-]", content)):
            raise UsageError(Problem(f"{where}:{line}", f"a key of more than {MAX_DEPTH} parts"))
    try:
        data = tomllib.loads(decoded)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        found = re.match(r"line (\d+)", place)
        line = int(found[1]) if found else decoded.rstrip().count("\n") + 1
        raise UsageError(Problem(f"{where}:{line}", f"not TOML: {message[:1].lower()}{message[1:]}")) from None
    except RecursionError:
        raise UsageError(Problem(where, f"nested deeper than {MAX_DEPTH} levels")) from None
    except ValueError:  # Python turns at most 4,300 digits into a number
        raise UsageError(Problem(where, "not TOML: a number with thousands of digits")) from None
    if _depth(data) > MAX_DEPTH:
        raise UsageError(Problem(where, f"nested deeper than {MAX_DEPTH} levels"))
    return data


def _depth(data: Any) -> int:
    level, depth = [data], 0
    while level := [v for d in level if isinstance(d, dict | list) for v in (d.values() if isinstance(d, dict) else d)]:
        depth += 1
    return depth


def key_lines(text: str) -> dict[Key, int]:
    """The line of each table header and key, counted from 1. Keys within an inline table have the line of its key."""
    lines: dict[Key, int] = {}
    arrays: dict[Key, int] = {}
    table: Key = ()
    depth = 0
    for number, line in enumerate(_TOKEN.sub(_blank, text).split("\n"), 1):
        header = re.match(rf"\s*(\[\[?)\s*({_KEY})\s*\]", line) if depth == 0 else None
        key = re.match(rf"\s*({_KEY})\s*=", line) if depth == 0 else None
        if header:
            table = ()
            names = _parts(header[2])
            for i, name in enumerate(names, 1):
                table = (*table, name)
                lines.setdefault(table, number)
                if header[1] == "[[" and i == len(names):
                    arrays[table] = arrays.get(table, -1) + 1
                if table in arrays:  # [[a]] then [a.b]: b is a key of the last a
                    table = (*table, arrays[table])
            lines.setdefault(table, number)
        elif key:
            names = _parts(key[1])
            for i in range(len(names)):
                lines.setdefault((*table, *names[: i + 1]), number)
        depth += len(re.findall(r"[\[{]", line)) - len(re.findall(r"[\]}]", line))
    return lines


def _strings_out(token: re.Match[str]) -> str:
    """Takes out strings and comments, and no line break."""
    return "\n" * token[0].count("\n") + "_"


def _blank(token: re.Match[str]) -> str:
    """Takes out what could be mistaken for brackets and keys, and no line break."""
    if token[0].startswith(('"""', "'''")):
        return "\n" * token[0].count("\n")
    return "" if token[0].startswith("#") else re.sub(r"[][{}#=]", "_", token[0])


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(rf"[\w-]+|{_STRING}", dotted))


def apply_override(data: dict[str, Any], override: str) -> Key:
    """Applies one `--set key=TOML` to `data` in place, and returns the key.

    The right side is a TOML value; what is not TOML and does not begin like an array, table or string is taken
    as a string, since shells eat the quotes of `--set model.weights="none"`. A number in the key is an index
    into an array of tables.

    Raises:
        UsageError: there is no `=`, the value is not TOML, or the key leads through something else than a table;
            `data` is as it was.
    """
    where = flag(override)
    if not encodable(override):
        raise UsageError(Problem(where, "not UTF-8 text"))
    name, equals, text = override.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not re.fullmatch(r"(?!\d)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,8}", name):
        raise UsageError(Problem(where, "expected key=value, as in --set train.epochs=5"))
    try:
        (value,) = parse(f"value = {text}".encode(), where).values()
    except (UsageError, ValueError):  # ValueError: a line break, and more keys after it
        if not text or text[0] in "[{\"'" or "\n" in text:
            found = f"{text!r} is not a TOML value" if text else "no value"
            raise UsageError(Problem(where, f"expected key=value, as in --set train.epochs=5; {found}")) from None
        value = text
    key: Key = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    at: Any = data
    for i, part in enumerate(key):
        here = f"'{'.'.join(map(str, key[:i]))}'"
        problem = ""
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                problem = f"{here} is an array of {len(at)}, counted from 0"
        elif not isinstance(at, dict):
            problem = f"{here} is neither a table nor an array"
        elif isinstance(part, int):
            problem = f"{here} is a table, and {part} an index"
        elif part not in at and any(isinstance(later, int) for later in key[i:]):
            problem = f"the recipe gives no array '{part}'"
        if problem:
            raise UsageError(Problem(where, problem))
        if i == len(key) - 1:
            at[part] = value
        elif isinstance(at, dict):
            at = at.setdefault(part, {})
        else:
            at = at[part]
    return key


def encodable(text: str) -> bool:
    """Whether a file can hold the text: bytes of the command line that are not UTF-8 become what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def flag(override: str) -> str:
    """How an override is named in an error: short enough for a line."""
    return f"--set {shorten(' '.join(override.split()))}"


def without_foreign(data: Any, key: Key = ()) -> tuple[Any, list[tuple[Key, str]]]:
    """`data` with None for every value that TOML has and recipes have not, and what each of them is."""
    if isinstance(data, dict | list):
        items = list(data.items() if isinstance(data, dict) else enumerate(data))
        cleaned = [without_foreign(value, (*key, k)) for k, value in items]
        values = [value for value, _ in cleaned]
        clean = dict(zip(data, values, strict=True)) if isinstance(data, dict) else values
        return clean, [problem for _, problems in cleaned for problem in problems]
    if isinstance(data, str) and "\0" in data:
        return None, [(key, "expected text, found a NUL character in it, which ends text for much of a computer")]
    if isinstance(data, date | time):
        return None, [(key, f"{data} is a date or time, which no recipe key takes; quote it if it is text")]
    if isinstance(data, float) and not math.isfinite(data):
        return None, [(key, f"expected a finite number, found {data}")]
    if isinstance(data, int) and not -(2**63) <= data < 2**63:
        return None, [(key, "expected a whole number of at most 64 bits, found a larger one")]
    return data, []


def write_value(value: Any) -> str:
    """One TOML value on one line: strings, numbers, booleans, arrays and inline tables."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return UNSEEN.sub(_spelt, json.dumps(value, ensure_ascii=False))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_key(k)} = {write_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _spelt(letter: re.Match[str]) -> str:
    """How TOML spells a letter that cannot be seen."""
    code = ord(letter[0])
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def write_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else write_value(key)
