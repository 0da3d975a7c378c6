"""Chooses the number of processes; the default follows from measurements with small and large models."""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.runtime.settings import RuntimeSettings

SHARED_MEMORY = "/dev/shm"
# A model is large above LARGE multiply-adds per token: 25 tokens then take about a millisecond, and the rest of the
# request a third of that. A process that serves a large model has LARGE_THREADS engine threads.
LARGE, LARGE_THREADS = 2e7, 4
MEMORY_BYTES = 2**28  # memory of one process with its requests, without the weights, which are shared


def number_of_processes(settings: RuntimeSettings, artifacts: Sequence[Artifact]) -> int:
    """The number in the settings; by default one for each engine thread, or one for every four if a model is large.

    The default is limited as in most_processes().

    With a large model, inference takes much longer than the rest of a request, so more processes save little. And the
    engine threads of one process share a queue, so none is idle while a text is pending. Raises ValueError if the
    settings ask for more than one process and the system does not support it.
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


def most_processes(settings: RuntimeSettings, artifacts: Sequence[Artifact], each: int = 1) -> int:
    """The number of processes: one for every `each` engine threads (rounded up), as far as memory allows, at most 64.

    The number is 1 if a model runs on ONNX Runtime: each process would have its own copy of the weights, and would gain
    less, because ONNX Runtime needs the GIL less often. The number is also 1 if the system does not support more.
    """
    have_kernels = (
        settings.runtime != "onnxruntime"
        and find_spec("de3.native.kernels") is not None
        and all(a.manifest.precision == "int8" for a in artifacts)
    )
    if sys.platform != "linux" or not have_kernels or not find_temporary_folder():
        return 1
    return max(1, min(-(-settings.engine_threads() // each), _memory() // MEMORY_BYTES, 64))


def _work(manifest: Manifest) -> float:
    """Multiply-adds per token: the mean at the model's default τ, or at full depth without a calibration."""
    encoder, calibration = manifest.encoder, manifest.calibration
    layers = manifest.num_layers if calibration is None else calibration.default.mean_exit_layer
    return layers * (4 * encoder.hidden_size**2 + 2 * encoder.hidden_size * encoder.inner)


def find_temporary_folder() -> bool:
    """Find a folder for temporary files, where the fork server's socket is created; False if there is none.

    If there is no other folder, as in a container with a read-only file system, `tempfile.tempdir` is set to
    SHARED_MEMORY, provided that it is writable.
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
        with suppress(OSError, ValueError):  # no limit is set
            memory = min(memory, int(Path(limit).read_text()))
    return memory
