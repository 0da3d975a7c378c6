"""The process in which a server fits exits: at a low priority, with limits on memory and time."""

import json
import os
import resource
import sys
from contextlib import suppress

from de3.export import learn
from de3.model_store.printable import printable
from de3.model_store.records import MAX_FILE_BYTES, read
from de3.model_store.store import Artifact, Store, read_manifest
from de3.progress import console
from de3.runtime.child import limit_memory
from de3.runtime.fit import Job

MAX_CPU_S = 3600


def child() -> None:
    """Entry point: the argument is a Job as JSON; prints a Found, or an object with an error, as JSON."""
    job = Job.model_validate_json(sys.argv[1])
    _run_at_idle()
    limit_memory(job.memory)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    console.quiet = True
    try:
        artifact = Artifact(job.base, read_manifest(job.base))
        records = read(job.records, MAX_FILE_BYTES)
        if job.after is None:
            result = learn.learn(artifact, records, Store(job.store), job)
        else:
            result = learn.test(artifact, records, job.after, job.by_client, job.limits.flag)
        print(result.model_dump_json())
    except MemoryError:
        print(json.dumps({"error": f"it needs more than {job.memory // 2**20} MiB"}))
    except (ValueError, OSError) as error:
        print(json.dumps({"error": printable(str(error))[:500]}))


def _run_at_idle() -> None:
    """Run at a low priority, which still gets a small share of a processor that is never idle.

    The server lowers it further once processors are idle.
    """
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(19)
