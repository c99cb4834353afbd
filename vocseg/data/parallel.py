"""One function over all images of a data set, on threads: decoding and hashing release the interpreter."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import TypeVar

from vocseg.data.threads import Readers

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Gets how many are done, and how many there are."""


def in_threads(
    function: Callable[[int], Result],
    count: int,
    progress: Progress | None = None,
    *,
    timeout: float = 0.0,
    workers: int = 0,
    ahead: int = 0,
) -> Iterator[Result]:
    """function(0) to function(count - 1), in this order. The first exception ends it, and nothing is left running.

    Args:
        timeout: seconds that a thread may be at one image, of those that say which they are at; 0: for ever.
        workers: threads; 0 for one a core.
        ahead: how many are begun before they are asked for; 0 for eight a thread.
    """
    workers = workers or os.cpu_count() or 1
    ahead = ahead or 8 * workers
    begun: deque[Future[Result]] = deque()
    with closing(Readers(workers, timeout)) as readers:
        for done in range(1, count + 1):
            for index in range(done - 1 + len(begun), min(count, done + ahead)):
                begun.append(readers.submit(function, index))
            yield readers.result(begun.popleft())
            if progress:
                progress(done, count)
