"""The process in which a server compares a classifier that it serves by name in int8 with the original, in fp32."""

import json
import resource
import sys
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from de3.data.examples import Example
from de3.exits.bound import CONFIDENCE, upper_bound
from de3.export import record
from de3.export.cache import artifact_of
from de3.model_store.model import Model
from de3.model_store.store import Artifact, read_manifest
from de3.progress import console
from de3.runtime.child import limit_memory

MAX_CPU_S = 3600


def child() -> None:
    """Entry point: prints the result, as `GET /v1/models` shows it, as JSON; {} while another process compares.

    The argument is a JSON list: the folder of the artifact, in the cache, and that of the original; the artifact's
    runtime; and the memory limit, bytes. Standard input has the texts as a JSON list: [text, its pair or null] each.
    The share and its bounds, each with 95% confidence, are rounded to 1e-5.
    """
    path, source, runtime, memory = json.loads(sys.argv[1])
    limit_memory(memory)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    console.quiet, record.THREADS = True, 1
    examples = [Example(text if pair is None else (text, pair), 0) for text, pair in json.load(sys.stdin)]
    artifact, work = Artifact(Path(path), read_manifest(Path(path))), Path(path).parents[1] / ".fp32"
    try:
        with FileLock(work.with_suffix(".lock"), timeout=0):
            rmtree(work, ignore_errors=True)  # left by a process that was killed
            try:
                plain = Model(artifact_of(source, "fp32", work), "onnxruntime")
                expected = record.record(plain, examples).answers[:, -1]
            finally:
                rmtree(work, ignore_errors=True)
            del plain  # frees its memory
            found = record.record(Model(artifact, runtime), examples).differs_from(expected)[:, -1]
    except Timeout:
        return print("{}")
    n, differ = len(found), int(found.sum())
    shares = {"share": differ / n, "lower": 1 - upper_bound(n - differ, n), "upper": upper_bound(differ, n)}
    rounded = {name: round(share, 5) for name, share in shares.items()}
    print(json.dumps({"texts": n, "differ": differ, **rounded, "confidence": CONFIDENCE}))
