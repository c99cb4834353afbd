"""How far a command is that reads, downloads or scores: a bar on a terminal, plain lines elsewhere.

Not here: what a run says while it trains (`reporters.py`).
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vocseg.cli.output import print_line
from vocseg.errors import visible

QUIET_SECONDS = 5.0
"""Without a terminal, what takes less than this says nothing of its progress."""


Step = TypeVar("Step")
Result = TypeVar("Result")


def follow(steps: Generator[Step, None, Result], each: Callable[[Step], object]) -> Result:
    """Calls `each` with all that a generator yields, and gives what it returns."""
    while True:
        try:
            each(next(steps))
        except StopIteration as finished:
            return finished.value


@contextmanager
def progress_bar(
    label: str, in_bytes: bool = False
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Two functions: one takes (done, total), the other a line of text to show. Both write to stderr.

    On a terminal there is a bar; elsewhere a line every tenth of the way.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=None, visible=False)
            yield (
                lambda done, total: bar.update(task, completed=done, total=total, visible=True),
                lambda line: console.print(visible(line), markup=False, emoji=False, highlight=False),
            )
        return

    start = time.monotonic()
    told = 0

    def line(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told and time.monotonic() - start > QUIET_SECONDS:
            told = tenth
            print_line(f"{label}: {10 * tenth} %", err=True)

    yield line, lambda text: print_line(text, err=True)
