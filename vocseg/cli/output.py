"""What commands print: lines, in which no stranger's name drives the terminal, and JSON.

Texts that hold no line break and come from outside, such as names, paths and descriptions, go through `visible` once,
here or where rich takes them.
"""

from typing import Any

import click

from vocseg.errors import UNSEEN, visible


def print_line(text: str = "", *, err: bool = False) -> None:
    """Prints one line."""
    click.echo(visible(text), err=err)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints JSON, on one line without an `indent`."""
    import json  # here and not above: lines are all that most commands print

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # JSON's own line breaks stand between strings, which hold none.
    click.echo(UNSEEN.sub(lambda c: c[0] if c[0] == "\n" else json.dumps(c[0])[1:-1], text))


def printable(text: str) -> str:
    """Text of several lines, each of them visible."""
    return "\n".join(map(visible, text.splitlines()))
