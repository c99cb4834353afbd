"""Ctrl-C, SIGTERM and a terminal that is closed while a run is under way: it saves and stops.

A second Ctrl-C or SIGTERM ends it at once.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from vocseg.errors import Interrupted
from vocseg.witness import end_in_order

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP else []))

# A terminal's Ctrl-C comes twice to processes of torchrun: from the terminal, and from torchrun, which heard it too.
_ECHO_SECONDS = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

_TIDYING_SECONDS = 2.0
"""What a second signal leaves for putting the terminal right and removing half-written files."""


class StopRequest:
    """What the signals asked for.

    Attributes:
        signal_number: of the signal that came, the last one of several; 0 until one did.
    """

    signal_number = 0
    _since = 0.0
    _nothing_to_save = False

    def __init__(self) -> None:
        self._terminals = [output for output in (1, 2) if os.isatty(output)]

    @contextlib.contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """For what has nothing to save: inside, the first signal ends it.

        Raises:
            Interrupted: with this message, if a signal came.
        """
        self._nothing_to_save = True
        try:
            if self.signal_number:
                raise KeyboardInterrupt
            yield
            if self.signal_number:  # it was raised where Python swallows it, as in what runs when an object goes
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not self.signal_number:
                raise
            raise Interrupted(message, self.signal_number) from None
        finally:
            self._nothing_to_save = False

    def note(self, number: int, frame: object) -> None:
        """Takes a signal, between two instructions of the main thread."""
        now = time.monotonic()
        if number == _HANGUP:
            for output in self._terminals:  # what is written to it from here on would fail
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
            if self.signal_number:  # a terminal's end is told twice, by the system and by the shell
                return
        if self.signal_number and now - self._since <= _ECHO_SECONDS:
            return
        second = bool(self.signal_number)
        if not second:
            self._since = now
        self.signal_number = number
        # Neither is an `Exception`, which plugins and libraries may catch.
        if self._nothing_to_save or (second and number == signal.SIGINT):
            raise KeyboardInterrupt
        if second:
            raise SystemExit(128 + number)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While open, the first SIGINT, SIGTERM or SIGHUP is noted; a second of the first two raises KeyboardInterrupt or
    SystemExit. Those that the process was started to ignore, as by `nohup`, are ignored.

    If that does not end the process soon, a thread does: the main thread may be inside torch, where Python cannot
    interrupt it. Outside the main thread, signals stay with whoever embeds vocseg.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    hears, tells = socket.socketpair()  # not a pipe, which Windows cannot make non-blocking
    tells.setblocking(False)
    watcher = threading.Thread(target=_end_at_the_second, args=(hears,), name="vocseg-signals", daemon=True)
    watcher.start()
    told_before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.note) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set by Python
        signal.set_wakeup_fd(told_before)
        tells.close()
        watcher.join()
        hears.close()


def _end_at_the_second(hears: socket.socket) -> None:
    """Reads the number of each signal as the system delivers it, until the other end is closed."""
    first: float | None = None
    while received := hears.recv(1):
        number, now = received[0], time.monotonic()
        if number not in _SIGNALS or (number == _HANGUP and first is not None):
            continue
        if first is None:
            first = now
        elif now - first > _ECHO_SECONDS:
            hears.settimeout(_TIDYING_SECONDS)
            with contextlib.suppress(TimeoutError):
                if not hears.recv(1):
                    return  # the main thread is through
            end_in_order()
            os.write(2, b"\x1b[?25hstopped at once\n" if os.isatty(2) else b"stopped at once\n")  # with its cursor
            os._exit(128 + number)
