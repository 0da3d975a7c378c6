"""How many processes measure best on this machine."""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from de3.model_store.store import Artifact
from de3.server.settings import Settings

SHARED_MEMORY = "/dev/shm"
MEMORY_BYTES = 2**28  # of one process, with its requests; the weights are shared


def number_of_processes(settings: Settings, artifacts: Sequence[Artifact]) -> int:
    """The number in the settings; by default one for each engine thread, as far as memory allows.

    One if a model runs on ONNX Runtime, whose weights every process would have for itself, and which needs the GIL
    less often. Raises ValueError if the system does not support more.
    """
    if sys.platform != "linux":
        if settings.processes > 1:
            raise ValueError("processes: more than one needs Linux")
        return 1
    if settings.processes > 1 and not find_temporary_folder():
        raise ValueError("processes: more than one needs a folder for temporary files, such as /tmp")
    if settings.processes:
        return settings.processes
    have_kernels = settings.runtime != "onnxruntime" and all(
        a.manifest.precision == "int8" and not a.manifest.encoder.NO_KERNELS for a in artifacts
    )
    if not (have_kernels and find_temporary_folder()):
        return 1
    return max(1, min(settings.engine_threads(), _memory() // MEMORY_BYTES, 64))


def find_temporary_folder() -> bool:
    """True if there is a folder for temporary files: processes are started through a socket in it.

    In a container whose file system is read-only, this may be shared memory.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if not os.access(SHARED_MEMORY, os.W_OK):
            return False
        tempfile.tempdir = SHARED_MEMORY
    return True


def _memory() -> int:
    """Memory of this machine or container, bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is none
            memory = min(memory, int(Path(limit).read_text()))
    return memory
