"""Settings of the process that only count if they are made before torch is imported."""

import ctypes
import os
import platform
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's names for what it sets
_GIB = 1 << 30


def prepare_process() -> None:
    """Sets up threads and memory for training on the CPU. What the environment says already is left alone.

    Threads that wait for work spin for a tenth of a millisecond or so, and then sleep. By default they spin thirty
    times as long, which takes a core that others want from the thread that has work: beside a program that keeps one
    core of two busy, a step takes up to half as long again. Sleeping at once makes the steps of a small network take
    twice as long.

    And memory that torch frees is kept for the next step, where glibc would give large blocks back to the system and
    fault them in again, which is a seventh of a step.

    NumPy and OpenCV get no threads for linear algebra, which is torch's affair here: starting them takes a tenth of a
    second, while a user waits to hear what is wrong with a recipe.
    """
    if platform.machine() in ("x86_64", "AMD64"):  # elsewhere torch itself may compute with OpenBLAS
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"  # of GNU OpenMP, which torch comes with on Linux
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (AttributeError, OSError):  # another C library, such as musl
            return
        _ = mallopt(_MMAP_THRESHOLD, _GIB) or mallopt(_MMAP_THRESHOLD, 32 << 20)  # glibc before 2.35 takes no more
        mallopt(_TRIM_THRESHOLD, 2 * _GIB - 1)
        mallopt(_TOP_PAD, 64 << 20)
