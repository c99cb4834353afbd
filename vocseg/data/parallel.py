"""One function over many images, on threads: to decode, hash or write them releases the interpreter."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from itertools import count, islice
from operator import length_hint
from typing import TypeVar

from vocseg.data.threads import Readers

Thing = TypeVar("Thing")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Gets how many are done, and how many there are."""


def in_threads(
    function: Callable[[Thing], Result],
    things: Iterable[Thing],
    progress: Progress | None = None,
    *,
    timeout: float = 0.0,
    workers: int = 0,
    ahead: int = 0,
) -> Iterator[Result]:
    """What a function makes of each thing, in their order. The first exception ends it, and nothing is left running.

    Args:
        things: taken on the thread that asks for results, one after the other.
        timeout: seconds that a thread may be at one image, of those that say which they are at; 0: for ever.
        workers: threads; 0 for one a core.
        ahead: how many are begun before they are asked for; 0 for eight a thread.
    """
    workers = workers or os.cpu_count() or 1
    ahead = ahead or 8 * workers
    coming = iter(things)
    begun: deque[Future[Result]] = deque()
    with closing(Readers(workers, timeout)) as readers:
        for done in count(1):
            for thing in islice(coming, ahead + 1 - len(begun)):
                begun.append(readers.submit(function, thing))
            if not begun:
                return
            yield readers.result(begun.popleft())
            if progress:
                progress(done, length_hint(things))
