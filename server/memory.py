"""Returns freed memory to the operating system.

The C library keeps freed memory in the arena of the thread that freed it. Without this, a server would keep the peak
memory of its largest requests and of loading models.
"""

import ctypes
from contextlib import suppress


def trim() -> None:
    """Return freed memory to the operating system; does nothing without glibc.

    Takes half a millisecond if there is little to return.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
