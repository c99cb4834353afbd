"""Settings of the process that only count if they are made before torch is imported."""

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's names for what it sets
_GIB = 1 << 30


def prepare_process() -> None:
    """Sets up threads and memory for training on the CPU. What the environment says already is left alone.

    Waiting threads sleep rather than spin: as soon as anything else wants the cores, torch's spinning threads
    hold up the one that has work, and a step takes many times as long. And memory that torch frees is kept for the next
    step, where glibc would give large blocks back to the system and fault them in again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (AttributeError, OSError):  # another C library, such as musl
            return
        _ = mallopt(_MMAP_THRESHOLD, _GIB) or mallopt(_MMAP_THRESHOLD, 32 << 20)  # glibc before 2.35 takes no more
        mallopt(_TRIM_THRESHOLD, 2 * _GIB - 1)
        mallopt(_TOP_PAD, 64 << 20)
