"""Every error vocseg raises on purpose, with the exit code each one ends the program with.

    VocsegError
    ├── UsageError          2    a flag, a name or a recipe cannot be used as given
    ├── DataError           3    images, masks or split files are missing or wrong
    ├── EnvironmentFault    4    the machine lacks something: weights, disk space, a device, the network
    ├── TrainingError       5    training itself failed: the loss is not finite, memory ran out
    └── Interrupted   128 + N    a signal stopped a run that was saved first

An error carries one or more `Problem`s, so that a user reads all of them at once.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Controls, what ends a line or turns the direction of writing, what has no width, tags, and what is no character.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was expected and found, and the remedy.

    `where` is a file, `file:line`, flag or image; it may be empty. Both may quote what strangers wrote.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return visible(f"{self.where}: {self.message}" if self.where else self.message)


class VocsegError(Exception):
    """An error with a message for the user. `str(error)` has one line a problem."""

    exit_code = 1

    def __init__(self, *problems: Problem | str):
        self.problems = tuple(p if isinstance(p, Problem) else Problem("", p) for p in problems)
        super().__init__("\n".join(map(str, self.problems)))


class UsageError(VocsegError):
    exit_code = 2


class DataError(VocsegError):
    exit_code = 3


class IncompleteError(DataError):
    """Files that a split names are missing.

    `rest` is the data set all the same, in which it is reading what is missing that raises.
    """

    def __init__(self, *problems: Problem | str, rest: Any = None):
        super().__init__(*problems)
        self.rest = rest


class EnvironmentFault(VocsegError):  # noqa: N818 - EnvironmentError is Python's
    exit_code = 4


class TrainingError(VocsegError):
    exit_code = 5


class Interrupted(VocsegError):  # noqa: N818 - nothing went wrong
    """A signal stopped a command; a run first saved what it had to save, unless it was the second one."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def one_line(error: BaseException, most: int | None = 300) -> str:
    """What an error says, on one line, of so many letters at most: torch's and pydantic's have many."""
    return " ".join(str(error).split())[:most]


def visible(text: str) -> str:
    """Text on one line, with all that no reader would see spelt out: `\\n`, `\\x1b`, `\\u202e`.

    What stands in a stranger's file can then neither drive a terminal nor pass for a line of ours.
    """
    return text if text.isprintable() else UNSEEN.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


def shorten(text: str) -> str:
    """The beginning of a key, name or value, where it is too long to be quoted."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as a user would type it: relative where it is below the working directory."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):  # the working directory is gone, or on another drive
        return os.fspath(path)
    return os.fspath(path) if relative.startswith(os.pardir) else relative


def how_to_go_on(run: str | os.PathLike[str]) -> str:
    """What to tell of a run that ended before its end: the command that goes on with it, as a shell takes it."""
    import shlex  # here and not above, as difflib below

    if not os.path.exists(os.path.join(run, "state.json")):
        return f"no state was saved yet in {os.fspath(run)}: start the recipe again"
    return f"go on with: vocseg run --resume {shlex.quote(os.fspath(run))}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is spelt most like this one, whatever the case; None where none comes near."""
    import difflib  # here and not above: it is wanted where something is wrong, and costs a tenth of `vocseg --help`

    folded = {name.casefold(): name for name in sorted(known, reverse=True)}
    near = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy to append to a message: the nearest known word, else all of them, else nothing."""
    known = sorted(known)
    near = nearest(word, known)
    if near is not None:
        return f"; did you mean '{near}'?"
    if 0 < len(known) <= 30:
        return f"; known: {', '.join(known)}"
    return ""
