"""What each thread is at, and a process that tells it when this one dies without a word.

A process that is killed, or in which a library crashes, says nothing itself. So `vocseg run` is watched by a small copy
of itself, made before there are threads and before torch is imported. It shares a page or two of memory with the run,
where the images stand that are being read; it waits until the run ends, and tells where that was not in good order.
"""

import contextlib
import faulthandler
import mmap
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import get_ident

from vocseg.errors import how_to_go_on, shorten, shown_path, visible

_SLOT, _SLOTS = 256, 80  # bytes of a name, ended by a zero, and threads
_RUN = _SLOT * _SLOTS  # where the run's folder stands
_SIZE = _RUN + 4096
_GOOD = b"\0"  # what the run says before it ends in good order
_SIGNALS = {signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])}

_at: dict[int, tuple[str, float]] = {}  # by thread: the image that it is at, and since when
_shared: mmap.mmap | None = None
_tells: int | None = None  # what the witness hears
_slot: dict[int, int] = {}  # by thread: where in the shared memory its image stands
_free: list[int] = []


def at(image: str) -> None:
    """This thread begins with an image; "" says that it is at none. A microsecond."""
    thread = get_ident()
    if image:
        _at[thread] = image, time.monotonic()
    else:
        _at.pop(thread, None)
    if _shared is not None:
        _share(thread, image)


def at_now(thread: int | None) -> tuple[str, float] | None:
    """The image that a thread is at, and since when by `time.monotonic`."""
    return _at.get(thread or 0)


def share_run(folder: Path) -> None:
    """Says where the run is that this process trains."""
    if _shared is not None:
        text = os.fsencode(folder)[:4095]
        _shared[_RUN : _RUN + len(text) + 1] = text + b"\0"


def end_in_order() -> None:
    """Says that this process is about to end, and means to."""
    global _tells
    if _tells is not None:
        with contextlib.suppress(OSError):  # the witness is gone already
            os.write(_tells, _GOOD)
        _tells = None


def _share(thread: int, image: str) -> None:
    assert _shared is not None
    start = _slot.get(thread)
    if start is None:
        if not image or not _free:
            return
        start = _slot[thread] = _free.pop()
    text = image.encode(errors="replace")[: _SLOT - 1]
    _shared[start : start + len(text) + 1] = text + b"\0"
    if not image:
        del _slot[thread]
        _free.append(start)


@contextlib.contextmanager
def witnessed() -> Iterator[None]:
    """Inside, should this process die, a line on stderr tells what was being read and how to go on.

    Not on Windows, which cannot copy a process, nor under `torchrun`, which says itself which of its processes died.
    """
    global _shared, _tells
    if not hasattr(os, "fork") or "TORCHELASTIC_RUN_ID" in os.environ:
        yield
        return
    memory = mmap.mmap(-1, _SIZE)
    hears, tells = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # For good in the copy, which has to be there when the run is not.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the copy takes no lock that a thread may hold
        child = os.fork()
    if not child:
        try:
            os.close(tells)  # else the end of the parent would not be heard
            _watch(memory, hears, parent)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    os.close(hears)
    _slot.clear()
    _free[:] = range(0, _RUN, _SLOT)
    _shared, _tells = memory, tells
    crashes = not faulthandler.is_enabled()  # else whoever enabled it wants to see the traceback
    if crashes:
        faulthandler.enable(tells, all_threads=False)
    # Until a run is under way, which has its own: whoever ends the process means to.
    ends = {signal.SIGTERM, signal.SIGHUP} - {n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_IGN}
    before = {number: signal.signal(number, _leave) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _shared = None
        if crashes:
            faulthandler.disable()
        end_in_order()
        os.close(tells)
        with contextlib.suppress(OSError):
            os.waitpid(child, 0)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _watch(memory: mmap.mmap, hears: int, parent: int) -> None:
    """Waits for the end of the parent, and tells if that was a bad one."""
    # Whoever reads what the run prints is not to wait for this process; nor is anything else held open.
    for first, end in ((0, 2), (3, hears), (hears + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first, end)
    said = b""
    while _GOOD not in said and os.getppid() == parent:  # a process that the run left behind may keep the pipe open
        if select.select([hears], [], [], 2.0)[0]:
            received = os.read(hears, 4096)
            if not received:
                break
            said += received
    if _GOOD not in said:
        os.write(2, f"{visible(_account(memory, said.decode(errors='replace')))}\n".encode())


def _account(memory: mmap.mmap, crash: str) -> str:
    """One line on how the run ended.

    Args:
        crash: what `faulthandler` wrote; nothing where the process was killed.
    """
    what = "the process was killed; if nobody did, the machine had no memory left: try a smaller data.batch_size"
    if crash:
        kind, place = re.search("Fatal Python error: (.*)", crash), re.search('File "(.*)", line ([0-9]+)', crash)
        where = f" in {shown_path(place[1])}:{place[2]}" if place else ""
        what = f"a library crashed{where} ({kind[1] if kind else 'for an unknown reason'})"
    slots = {memory[start : start + _SLOT].split(b"\0")[0].decode(errors="replace") for start in range(0, _RUN, _SLOT)}
    names = sorted(slots - {""})
    reading = f"; images being read: {', '.join(map(shorten, names))}" if names else "; no image was being read"
    run = os.fsdecode(memory[_RUN:].split(b"\0")[0])
    if not run:
        return f"vocseg: {what}{reading}; nothing was written yet"
    return f"vocseg: {what}{reading}; {how_to_go_on(run)}"
