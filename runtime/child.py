"""Starts the Python code of a child process that must not outlive its parent, and limits its memory."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

PR_SET_PDEATHSIG = 1


def command_of(code: str, *arguments: str) -> list[str]:
    """Command that runs Python code in a process that ends with this one, even if this one is killed."""
    code = f"from de3.runtime.child import end_with; end_with({os.getpid()})\n{code}"
    # -P: import no modules from the working directory.
    return [sys.executable, "-P", "-X", "utf8", "-c", code, *arguments]


def ignore_working_directory() -> None:
    """Keep the processes that multiprocessing starts from importing modules from the working directory.

    It may be the folder of a model, with files that look like the modules of libraries.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


def end_with(parent: int) -> None:
    """Have the kernel kill this process, even if it is stopped, once its parent has ended; exit if it already has.

    parent: pid of the process that started this one. On systems other than Linux, the process may outlive it.

    The kernel acts when the thread that started this process ends. So that thread must wait for this process, or be one
    that runs an event loop.
    """
    with suppress(OSError, AttributeError):  # no C library, or not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(SIGKILL))
    if os.getppid() != parent:  # the parent ended before that call
        os._exit(1)


def limit_memory(most: int) -> None:
    """Limit the memory of this process, in bytes; the kernel kills it first if the machine runs out of memory."""
    # RLIMIT_DATA limits the heap and private mappings; RLIMIT_AS would count reserved address space.
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
