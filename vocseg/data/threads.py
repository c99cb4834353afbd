"""Threads that read images, each of which says what it is at: the image to name when one hangs or the process dies.

No thread can be ended from outside, and the interpreter waits at its exit for those of `concurrent.futures`. These are
daemons, which are left behind where one of them hangs.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import Dataset
from vocseg.errors import DataError, EnvironmentFault, Problem, VocsegError, one_line
from vocseg.witness import at, at_now

Result = TypeVar("Result")

_LOOKS = 4  # at what the threads are at, while the time passes that one of them may take
_LEAVING = 5.0  # seconds that threads have to end what they are at, when nobody wants it any more


class HangError(EnvironmentFault):
    """Reading an image does not end."""


def read(dataset: Dataset, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its mask.

    Raises:
        DataError: they cannot be read, or the data set failed in whatever way.
    """
    at(dataset.names[index])
    try:
        return dataset.read(index)
    except (VocsegError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of a plugin, which may even try to exit
        where = str(dataset.files[index][0]) if dataset.files else dataset.names[index]
        failed = f"the data set failed to read it with {type(error).__name__}: {one_line(error)}; --debug shows where"
        raise DataError(Problem(where, failed)) from error


class Readers:
    """A pool of threads.

    Args:
        timeout: seconds that a thread may be at one image; 0: for ever.
    """

    def __init__(self, count: int, timeout: float, name: str = "vocseg-reader"):
        self._timeout = timeout
        self._tasks: SimpleQueue[tuple[Future, Callable, tuple] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"{name}_{i}", daemon=True) for i in range(count)]
        self._hang = False
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        future: Future[Result] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def result(self, future: "Future[Result]") -> Result:
        """What was submitted gives, or raises.

        Raises:
            HangError: it was waited for, and all that time, longer than it may, a thread has been at one image.
        """
        if not self._timeout:
            return future.result()
        # Looks are counted, and no clock is asked: it goes on while the whole process is suspended.
        seen: Counter[tuple[str, float]] = Counter()
        while True:
            try:
                return future.result(self._timeout / _LOOKS)
            except TimeoutError:
                if future.done():  # by now, or this is what it raised
                    return future.result()
            images = {image for thread in self._threads if (image := at_now(thread.ident))}
            seen = Counter({image: seen[image] + 1 for image in images})
            hang = sorted({name for (name, _), looks in seen.items() if looks > _LOOKS})
            if hang:
                self._hang = True
                waited = f"reading or augmenting it has taken more than {self._timeout:g} s, and goes on; "
                remedy = "is its disk or network share there? data.timeout_seconds is how long an image may take"
                raise HangError(*(Problem(name, waited + remedy) for name in hang))

    def close(self) -> None:
        """Lets go of what was not begun, and waits for what was, unless it hangs."""
        with contextlib.suppress(Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _LEAVING
        for thread in self._threads:
            thread.join(0 if self._hang else max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            at("")
            del task, future, function, arguments  # nothing is held on to while waiting
