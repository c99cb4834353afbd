"""A lock between processes, which the system lets go of when its holder ends, however that ends."""

import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

_FAR = 1 << 30  # Windows locks bytes, against reading too: one beyond all that is ever written


def take_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file until it is closed; False where another holds it. A folder can be locked where it can be open.

    A file system without locks gives none and refuses none.

    Args:
        wait: for the other, however long it takes; not on Windows.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            position = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            finally:
                os.lseek(descriptor, position, os.SEEK_SET)
    except BlockingIOError:
        return False
    except PermissionError:
        return fcntl is not None  # which is how Windows says that another has it
    except OSError:
        pass
    return True
