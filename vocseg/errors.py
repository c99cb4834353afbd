"""Every error vocseg raises on purpose, with the exit code each one ends the program with.

    VocsegError
    ├── UsageError          2    a flag, a name or a recipe cannot be used as given
    ├── DataError           3    images, masks or split files are missing or wrong
    ├── EnvironmentFault    4    the machine lacks something: weights, disk space, a device, the network
    ├── TrainingError       5    training itself failed: the loss is not finite, memory ran out
    └── Interrupted   130/143    a signal stopped a run that was saved first

An error carries one or more `Problem`s, so that a user reads all of them at once.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was expected and found, and the remedy.

    `where` is a file, `file:line`, flag or image; it may be empty.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


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


class EnvironmentFault(VocsegError):  # noqa: N818 - EnvironmentError is Python's
    exit_code = 4


class TrainingError(VocsegError):
    exit_code = 5


class Interrupted(VocsegError):  # noqa: N818 - nothing went wrong
    """A run was stopped by a signal after it saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as a user would type it: relative where it is below the working directory."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith(os.pardir) else relative


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
