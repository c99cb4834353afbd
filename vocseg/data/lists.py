"""Split lists, and lists in messages. No image is read here: what is missing is said without OpenCV and PIL."""

from collections.abc import Sequence
from pathlib import Path

from vocseg.errors import DataError, Problem


def read_lines(path: Path) -> list[str]:
    """The lines of a split list.

    Raises:
        DataError: the list cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), f"the list cannot be read: {error}")) from error


def first_few(things: Sequence[object], most: int = 10) -> str:
    """The first of many, and how many more there are, for messages that name what is wrong."""
    text = ", ".join(map(str, things[:most]))
    return text if len(things) <= most else f"{text} and {len(things) - most} more"
