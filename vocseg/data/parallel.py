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
    function: Callable[[int], Result], count: int, progress: Progress | None = None, *, timeout: float = 0.0
) -> Iterator[Result]:
    """function(0) to function(count - 1), in this order. The first exception ends it, and nothing is left running.

    Args:
        timeout: seconds that a thread may be at one image, of those that say which they are at; 0: for ever.
    """
    workers = os.cpu_count() or 1
    ahead: deque[Future[Result]] = deque()
    with closing(Readers(workers, timeout)) as readers:
        for done in range(1, count + 1):
            for index in range(done - 1 + len(ahead), min(count, done + 8 * workers)):
                ahead.append(readers.submit(function, index))
            yield readers.result(ahead.popleft())
            if progress:
                progress(done, count)
