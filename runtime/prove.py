"""Test-runs an artifact: loads and runs it in a separate process, with limits on time and memory.

`model_store` checks the contents of the files before it opens them (graph_check.py, segment_graph.py,
tokenizer_check.py). This run finds problems that only appear at run time: slowness, memory use and crashes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from signal import SIGKILL
from threading import Event, Lock, Timer
from time import monotonic
from typing import Any

from de3.model_store.manifest import Manifest
from de3.model_store.printable import printable
from de3.model_store.regular_file import read_regular_file, write_private_file
from de3.model_store.store import Artifact, StoreError
from de3.runtime.child import command_of, limit_memory

TIMEOUT_S = 120.0
MEMORY_BYTES = 2**30  # limit of the process, in addition to COPIES of the artifact's files
COPIES = 6  # copies of the files that may be in memory at the same time
MAX_OUTPUT = 2**16  # longest output of the process, characters
MAX_COUNT = 2**53
INT8_FIELDS = ("share", "lower", "upper", "texts", "differ", "confidence")  # numbers; see int8_process.py
REFUSED = 3  # exit code of the process for an unsound artifact
PROGRAM = "from de3.runtime.prove import child; child()"


class Prover:
    """Test-runs artifacts, one at a time; the run in progress can be aborted."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def prove(self, artifact: Artifact, runtime: str) -> str:
        """Load and run an artifact in a process; raises StoreError if it fails or exceeds a limit.

        Returns the reason why the kernels cannot run an int8 artifact here; empty if they can and agree with ONNX
        Runtime, or are not used. The proof is recorded in `artifact.proof`, if set, and a recorded one is not repeated.
        """
        proved = recorded(artifact, runtime)
        if not proved:
            proved = {"no_kernels": self._prove(artifact, runtime)}
            with suppress(OSError):  # a read-only cache
                record(artifact, runtime, proved)
        return str(proved["no_kernels"])

    def _prove(self, artifact: Artifact, runtime: str) -> str:
        memory = str(MEMORY_BYTES + COPIES * artifact.size())
        command = command_of(PROGRAM, str(artifact.path.absolute()), runtime, memory)
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
            raise StoreError(f"{artifact.path}: the process that loads it prints too much")
        if code == REFUSED:
            raise StoreError(last)
        if code == -SIGKILL:
            self._check(artifact)
            raise StoreError(
                f"{artifact.path}: the process that loads it was killed, probably for lack of memory"
            )
        if code != 0:
            raise StoreError(
                f"{artifact.path}: crashes the process that loads it ({code}): {last[:300] or 'no output'}"
            )
        return last

    def limit(self, artifact: Artifact) -> Callable[[], None]:
        """A check to call while this process loads an artifact: raises StoreError after TIMEOUT_S, or once stopped."""
        end = monotonic() + TIMEOUT_S

        def check() -> None:
            self._check(artifact)
            if monotonic() > end:
                raise _too_late(artifact)

        return check

    def stop(self) -> None:
        """Abort the current proof or loading, and refuse later ones."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                with suppress(ProcessLookupError):
                    self._running.kill()

    def _check(self, artifact: Artifact) -> None:
        if self._stopped:
            raise StoreError(f"{artifact.path}: not loaded: the server is stopping")


def _what(artifact: Artifact, runtime: str) -> str:
    """The identity of a proof: everything that it depends on."""
    try:
        from de3.native import kernels

        instructions = kernels.supported()
    except ImportError:
        instructions = ""
    manifest = sha256(artifact.manifest.model_dump_json().encode()).hexdigest()
    return " ".join([version("de3"), version("onnxruntime"), instructions, runtime, manifest])


def recorded(artifact: Artifact, runtime: str) -> dict[str, Any]:
    """The record in `artifact.proof`; empty if it is not set, or the file is missing, unusable or outdated.

    The record has `no_kernels`, as Prover.prove returns it, and `int8` once that is measured (int8.py).
    """
    try:
        proved = {} if artifact.proof is None else json.loads(read_regular_file(artifact.proof, MAX_OUTPUT))
    except (OSError, ValueError, RecursionError):
        return {}
    is_valid = isinstance(proved, dict) and isinstance(proved.get("no_kernels"), str)
    if not is_valid or proved.get("what") != _what(artifact, runtime):
        return {}
    int8 = proved.get("int8")
    values = [int8.get(field) for field in INT8_FIELDS] if isinstance(int8, dict) else [None]
    if not all(isinstance(value, int | float) and 0 <= value <= MAX_COUNT for value in values):
        proved.pop("int8", None)  # if it is damaged, it is measured again
    return dict(proved)


def record(artifact: Artifact, runtime: str, proved: dict[str, Any]) -> None:
    """Write `artifact.proof`, if it is set; raises OSError."""
    if artifact.proof is not None:
        content = json.dumps(proved | {"what": _what(artifact, runtime)})
        write_private_file(artifact.proof, content.encode(), 0o644)


def _too_late(artifact: Artifact) -> StoreError:
    return StoreError(f"{artifact.path}: takes more than {TIMEOUT_S:g} s to load and run")


def _talk(process: "subprocess.Popen[str]", manifest: Manifest) -> str:
    """Send the process its manifest and wait for it to exit; returns its output, truncated to MAX_OUTPUT."""
    with process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            # The manifest that was checked; the file may have changed since.
            process.stdin.write(manifest.model_dump_json())
        with suppress(BrokenPipeError):
            process.stdin.close()
        output = process.stdout.read(MAX_OUTPUT)
        if len(output) == MAX_OUTPUT:
            process.kill()
    return output


def child() -> None:
    """Entry point of the process: prints, as its last line, why the artifact is unsound or cannot use the kernels.

    The line is empty if neither is the case. The exit code is REFUSED if the artifact is unsound, else 0.
    """
    path, runtime, memory = sys.argv[1:]
    limit_memory(int(memory))
    artifact = Artifact(Path(path), Manifest.model_validate_json(sys.stdin.read()))
    try:
        message, code = _load(artifact, runtime), 0
    except StoreError as error:
        message, code = str(error), REFUSED
    except MemoryError:
        message, code = f"{path}: needs more than {int(memory) // 2**20} MiB to load and run", REFUSED
    except Exception as error:
        message, code = str(StoreError(f"{path}: {type(error).__name__}: {error}")), REFUSED
    print(printable(message))
    sys.exit(code)


def _load(artifact: Artifact, runtime: str) -> str:
    """Load an artifact and warm it up as the server does; returns why it cannot use the kernels, empty if it can."""
    import numpy as np  # imported after the limits are set

    from de3.model_store.model import Model
    from de3.model_store.segments import Tokens
    from de3.runtime.engine.timing import Timing

    model, most = Model(artifact, runtime), artifact.manifest.max_tokens
    try:
        Timing(model, runs=1)
        tokens = model.tokenize("a")  # repeated to the longest input; a long text might have fewer tokens
        ids, types = (np.resize(x, (1, most)) for x in (tokens.ids, tokens.type_ids))
        model.full_depth(Tokens(ids, types, False))
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None
    return model.why_not_native
