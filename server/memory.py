"""Keeps a server's memory small: glibc would keep the peak of its largest requests and of loading models."""

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
LARGE, KEPT = 2**22, 2**24


def keep_large_blocks_apart() -> None:
    """Have glibc return blocks of LARGE bytes or more at once, and keep up to KEPT bytes of others for reuse.

    By default it would begin to put blocks as large as any freed before among the others: loading models leaves a heap
    full of holes. Does nothing without glibc.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, LARGE)
        library.mallopt(TRIM_THRESHOLD, KEPT)


def trim() -> None:
    """Return freed memory to the operating system; does nothing without glibc.

    Takes half a millisecond if there is little to return.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
