"""Bounded reads of untrusted files, and atomic writes."""

import os
import stat
from pathlib import Path


def read_regular_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    The type and size are checked on the opened file, because the path may lead to another file a moment later:
    reading /dev/zero would exhaust memory. Without O_NONBLOCK, opening a FIFO would block.

    Raises ValueError if the file is not a regular file, is larger than `limit` or grows while it is read, and OSError
    if it is a symbolic link or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes; at most {limit} are expected")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(status.st_size + 1)  # not limit + 1: read() allocates the whole buffer first
    finally:
        os.close(descriptor)
    if len(data) > status.st_size:
        raise ValueError("grows while it is read")
    return data


def write_private_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Atomically write a file, by default one that only its owner can read; raises OSError."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # O_EXCL refuses any file, such as one that a killed server left
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
