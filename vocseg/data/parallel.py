"""One function over all images of a data set, on threads: decoding and hashing release the interpreter."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Gets how many are done, and how many there are."""


def in_threads(function: Callable[[int], Result], count: int, progress: Progress | None = None) -> Iterator[Result]:
    """function(0) to function(count - 1), in this order. The first exception ends it, and nothing is left running."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vocseg-reader")
    ahead: deque[Future[Result]] = deque()
    try:
        for done in range(1, count + 1):
            for index in range(done - 1 + len(ahead), min(count, done + 8 * workers)):
                ahead.append(pool.submit(function, index))
            yield ahead.popleft().result()
            if progress:
                progress(done, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
