"""Turning Ctrl-C and SIGTERM into a flag that the loop reads between two steps."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """`signal_number` is 0 until a signal came."""

    signal_number = 0


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While open, the first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        if request.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals stay with whoever embeds vocseg
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
