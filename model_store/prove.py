"""Loads and runs an artifact in a process that can be killed, with limits of time and memory.

What a file may hold is checked before it is opened (graph_check.py, tokenizer_check.py); this is for what
only running it shows: how long it takes, how much memory, and whether it ends the process.
"""

import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from threading import Lock

from model_store.manifest import Manifest
from model_store.store import Artifact, StoreError

TIMEOUT_S = 120.0
MEMORY_BYTES = 2**30  # beside the files, of which there are a few copies for a moment
COPIES = 6
PROGRAM = "from model_store.prove import child; child()"


class Prover:
    """Proves one artifact at a time, and can be told to stop."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def prove(self, artifact: Artifact, runtime: str) -> None:
        """Load and run an artifact elsewhere; raises StoreError if that fails, or takes too long or too
        much."""
        size = sum(entry.bytes for entry in artifact.manifest.files.values())
        # -P: no module is taken from the working directory.
        command = [sys.executable, "-P", "-c", PROGRAM, str(artifact.path.absolute()), runtime]
        command.append(str(MEMORY_BYTES + COPIES * size))
        with self._lock:
            if self._stopped:
                raise StoreError(f"{artifact.path}: not loaded: the server stops")
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            self._running = process
        try:
            # The manifest that was read and checked, not one that may be there by now.
            said, complaint = process.communicate(artifact.manifest.model_dump_json(), TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise StoreError(f"{artifact.path}: takes more than {TIMEOUT_S:g} s to load and run") from None
        finally:
            self._running = None
        if process.returncode == -SIGKILL:
            raise StoreError(
                f"{artifact.path}: the process that loads it was killed, probably for lack of memory"
            )
        if process.returncode != 0:
            lines = complaint.strip().splitlines()
            raise StoreError(
                f"{artifact.path}: ends the process that loads it ({process.returncode}): "
                f"{lines[-1][:300] if lines else 'it says nothing'}"
            )
        if said.strip():
            raise StoreError(said.strip())

    def stop(self) -> None:
        """Give up what is being proved, and whatever is to come."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                with suppress(ProcessLookupError):
                    self._running.kill()


def child() -> None:
    """What the other process does: say what is wrong with the artifact, or nothing."""
    path, runtime, memory = sys.argv[1:]
    # Of the heap and private mappings; address space would count what is only reserved.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(
        OSError
    ):  # where a container's memory is not enough, the kernel kills this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    artifact = Artifact(Path(path), Manifest.model_validate_json(sys.stdin.read()))
    from model_store.model import Model  # within the limits

    try:
        model = Model(artifact, runtime)
        try:
            model.full_depth(model.tokenize("a " * model.manifest.max_tokens))
        except Exception as error:  # onnxruntime raises its own classes, without a common base
            raise StoreError(f"{path}: loads, but does not run: {error}") from None
    except StoreError as error:
        print(error)
    except MemoryError:
        print(f"{path}: needs more than {int(memory) // 2**20} MiB to load and run")
