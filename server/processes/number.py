"""How many processes measure best on this machine."""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.server.settings import Settings

SHARED_MEMORY = "/dev/shm"
# Multiply-adds of a token in a large model: 25 tokens take about a millisecond; the rest of a request, a third of one.
LARGE, LARGE_THREADS = 2e7, 4
MEMORY_BYTES = 2**28  # of one process, with its requests; the weights are shared


def number_of_processes(settings: Settings, artifacts: Sequence[Artifact]) -> int:
    """The number in the settings; by default one for each engine thread, or for four if a model is large.

    A text of a large model takes longer than all the rest of its request, so processes save little; and threads that
    share a queue never wait while another has work. Raises ValueError if the system does not support more than one.
    """
    if settings.processes > 1:
        if sys.platform != "linux":
            raise ValueError("processes: more than one needs Linux")
        if not find_temporary_folder():
            raise ValueError("processes: more than one needs a folder for temporary files, such as /tmp")
    if settings.processes:
        return settings.processes
    each = LARGE_THREADS if any(_work(a.manifest) > LARGE for a in artifacts) else 1
    return most_processes(settings, artifacts, each)


def most_processes(settings: Settings, artifacts: Sequence[Artifact], each: int = 1) -> int:
    """One for `each` engine threads, as far as memory allows.

    One in all if a model runs on ONNX Runtime, whose weights every process would have for itself, and which needs the
    GIL less often; or if the system does not support more.
    """
    have_kernels = settings.runtime != "onnxruntime" and all(
        a.manifest.precision == "int8" for a in artifacts
    )
    if sys.platform != "linux" or not have_kernels or not find_temporary_folder():
        return 1
    return max(1, min(-(-settings.engine_threads() // each), _memory() // MEMORY_BYTES, 64))


def _work(manifest: Manifest) -> float:
    """Multiply-adds of a token, on average at the model's default."""
    encoder, calibration = manifest.encoder, manifest.calibration
    layers = manifest.num_layers if calibration is None else calibration.default.mean_exit_layer
    return layers * (4 * encoder.hidden_size**2 + 2 * encoder.hidden_size * encoder.inner)


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
