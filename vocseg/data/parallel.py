"""One function over all images of a data set, on threads: decoding and hashing release the interpreter."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Gets how many are done, and how many there are."""


def in_threads(function: Callable[[int], Result], count: int, progress: Progress | None = None) -> Iterator[Result]:
    """function(0) to function(count - 1), in this order. The first exception ends it, and nothing is left running."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vocseg-reader")
    try:
        futures = [pool.submit(function, index) for index in range(count)]
        for done, future in enumerate(futures, 1):
            yield future.result()
            if progress:
                progress(done, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
