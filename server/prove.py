"""Loads and runs an artifact as the server will, in a process that can be killed, with limits of time and
memory.

What a file may hold is checked before it is opened (graph_check.py, graph_reader.py and tokenizer_check.py of
model_store); this is for what only running it shows: how long it takes, how much memory, and whether it ends
the process.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from threading import Event, Lock, Timer
from time import monotonic

from de3.model_store.manifest import Manifest
from de3.model_store.printable import printable
from de3.model_store.store import Artifact, StoreError

TIMEOUT_S = 120.0
MEMORY_BYTES = 2**30  # beside the files, of which there are a few copies for a moment
COPIES = 6
MAX_OUTPUT = 2**16  # characters of what the process says
REFUSED = 3  # its exit code if the artifact is not sound
PROGRAM = "from de3.server.prove import child; child()"


class Prover:
    """Proves one artifact at a time, and can be told to stop."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def prove(self, artifact: Artifact, runtime: str) -> str:
        """Load and run an artifact elsewhere; raises StoreError if that fails, or takes too long or too much.

        Why an int8 artifact has no kernels here, if it has none; else empty.
        """
        # -P: no module is taken from the working directory.
        command = [sys.executable, "-P", "-X", "utf8", "-c", PROGRAM, str(artifact.path.absolute()), runtime]
        command.append(str(MEMORY_BYTES + COPIES * artifact.size()))
        with self._lock:
            self._check(artifact)
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
            )
            self._running = process
        late = Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = Timer(TIMEOUT_S, end)
        timer.daemon = True
        timer.start()
        try:
            output = _talk(process, artifact.manifest)
        finally:
            timer.cancel()
            self._running = None
        code, last = process.returncode, output.removesuffix("\n").split("\n")[-1]
        if late.is_set():
            raise _too_late(artifact)
        if len(output) == MAX_OUTPUT:
            raise StoreError(f"{artifact.path}: the process that loads it says too much")
        if code == REFUSED:
            raise StoreError(last)
        if code == -SIGKILL:
            raise StoreError(
                f"{artifact.path}: the process that loads it was killed, probably for lack of memory"
            )
        if code != 0:
            raise StoreError(
                f"{artifact.path}: ends the process that loads it ({code}): {last[:300] or 'it says nothing'}"
            )
        return last

    def limit(self, artifact: Artifact) -> Callable[[], None]:
        """For loading an artifact in this process: raises StoreError once that takes too long, or is stopped."""
        end = monotonic() + TIMEOUT_S

        def check() -> None:
            self._check(artifact)
            if monotonic() > end:
                raise _too_late(artifact)

        return check

    def stop(self) -> None:
        """Give up what is being proved or loaded, and whatever is to come."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                with suppress(ProcessLookupError):
                    self._running.kill()

    def _check(self, artifact: Artifact) -> None:
        if self._stopped:
            raise StoreError(f"{artifact.path}: not loaded: the server stops")


def _too_late(artifact: Artifact) -> StoreError:
    return StoreError(f"{artifact.path}: takes more than {TIMEOUT_S:g} s to load and run")


def _talk(process: "subprocess.Popen[str]", manifest: Manifest) -> str:
    """Give the process its manifest, and wait for its end; what it says, or the beginning of that."""
    with process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            # The manifest that was read and checked, not one that may be there by now.
            process.stdin.write(manifest.model_dump_json())
        with suppress(BrokenPipeError):
            process.stdin.close()
        output = process.stdout.read(MAX_OUTPUT)
        if len(output) == MAX_OUTPUT:
            process.kill()
    return output


def child() -> None:
    """What the other process does: say in its last line what is wrong with the artifact, or why it has no
    kernels."""
    path, runtime, memory = sys.argv[1:]
    # Of the heap and private mappings; address space would count what is only reserved.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(
        OSError
    ):  # where a container's memory is not enough, the kernel kills this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    artifact = Artifact(Path(path), Manifest.model_validate_json(sys.stdin.read()))
    try:
        said, code = _load(artifact, runtime), 0
    except StoreError as error:
        said, code = str(error), REFUSED
    except MemoryError:
        said, code = f"{path}: needs more than {int(memory) // 2**20} MiB to load and run", REFUSED
    except Exception as error:
        said, code = str(StoreError(f"{path}: {type(error).__name__}: {error}")), REFUSED
    print(printable(said))
    sys.exit(code)


def _load(artifact: Artifact, runtime: str) -> str:
    """Do once with an artifact what the server does with it before it answers; why it has no kernels."""
    import numpy as np  # within the limits

    from de3.model_store.model import Model
    from de3.model_store.segments import Tokens
    from de3.server.engine.timing import Timing

    model, most = Model(artifact, runtime), artifact.manifest.max_tokens
    try:
        Timing(model, runs=1)
        tokens = model.tokenize("a")  # as often as fit, whatever the tokenizer makes of longer texts
        ids, types = (np.resize(x, (1, most)) for x in (tokens.ids, tokens.type_ids))
        model.full_depth(Tokens(ids, types, False))
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None
    return model.why_not_native
