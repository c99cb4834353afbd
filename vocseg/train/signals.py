"""Turning Ctrl-C and SIGTERM into a flag that the loop reads between two steps."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

# A terminal's Ctrl-C comes twice to processes of torchrun: from the terminal, and from torchrun, which heard it too.
_ECHO_SECONDS = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class StopRequest:
    """`signal_number` is 0 until a signal came."""

    signal_number = 0


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While open, the first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""
    request = StopRequest()
    noted = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if request.signal_number and number == signal.SIGINT and time.monotonic() - noted > _ECHO_SECONDS:
            raise KeyboardInterrupt
        if not request.signal_number:
            request.signal_number, noted = number, time.monotonic()

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals stay with whoever embeds vocseg
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
