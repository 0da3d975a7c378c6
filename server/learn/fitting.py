"""Runs a fit, or other work, in a separate process: at the lowest priority, with limits on memory and time."""

import asyncio
import json
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from de3.runtime.background import keep_running
from de3.runtime.child import command_of
from de3.runtime.cores import cpu_quota
from de3.runtime.fit import Found, Job

log = logging.getLogger("de3")
# At a low priority from the start: the imports take half a second of CPU time.
PROGRAM = "import os; os.nice(19); from de3.export.fit_process import child; child()"
TIMEOUT_S = 86_400.0  # long, because a server that is always busy leaves a fit little time
MAX_OUTPUT = 2**25
# Even at the lowest priority, a fit slows down others: it evicts their data from the caches, and uses up a CPU quota.
# So it runs a sixth of the time under a quota, and otherwise a third of the time while few cores are idle.
RUN_S, PAUSE_S, LONG_PAUSE_S = 0.01, 0.02, 0.05
SAMPLE_TICKS = 100
IDLE_CORES = 0.75  # a fit does not pause if other processes leave this many cores idle
# A fit starts at a low priority, which still gets a small share of busy cores, and drops to the lowest one once this
# many cores are idle. (Raising it again needs privileges.)
SPARE_CORES = 0.1
MEMORY_BYTES = 400 * 2**20  # in addition to COPIES of the model's and the records' files
COPIES = 4


class FitError(Exception):
    """A failed fit, or other work; the message gives the reason."""


def memory_limit(model_bytes: int, record_bytes: int) -> int:
    """Limit on the memory of a fit, bytes, given the sizes of the model's files and of the file of records."""
    return MEMORY_BYTES + COPIES * (model_bytes + record_bytes)


async def run_fit(job: Job) -> Found:
    """Run a fit, or a test of a version; raises FitError if it fails or exceeds a limit."""
    started = time.monotonic()
    found = Found.model_validate_json(await run_idle(PROGRAM, job.model_dump_json()))
    return found.model_copy(update={"seconds": round(time.monotonic() - started, 2)})


async def run_idle(program: str, argument: str, data: bytes | None = None) -> str:
    """Run a program at the lowest priority; returns the last line of its output, a JSON object.

    data: its standard input. Raises FitError if it fails, exceeds a limit, or the object has an `error`.
    """
    # The job is an argument, because the process may end before it reads its input.
    command = command_of("print(flush=True)\n" + program, argument)
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if data is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Unbuffered, Python loses the rest of a result whose write a pause has interrupted.
        env={**os.environ, **dict.fromkeys(threads, "1"), "PYTHONUNBUFFERED": ""},
        limit=MAX_OUTPUT,
    )
    slowed = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert process.stdout is not None
            await process.stdout.readline()
            # From here on it ends with this process, even while it is stopped.
            slowed = keep_running("pausing_fit", lambda: _slow_down(process, cpu_quota() is not None))
            try:
                output, errors = await process.communicate(data)
            except RuntimeError:  # uvloop's, if the process ended before it could read its input
                output, errors = b"", b""
                await process.wait()
    except TimeoutError:
        raise FitError(f"it takes more than {TIMEOUT_S:g} s") from None
    finally:
        if slowed is not None:
            slowed.cancel()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == -signal.SIGXCPU:
        raise FitError("it takes more CPU time than its limit")
    if process.returncode == -signal.SIGKILL:
        raise FitError("its process was killed, probably for lack of memory")
    try:
        last_line = output.splitlines()[-1].decode()
        result = json.loads(last_line)
    except (ValueError, IndexError):
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no valid output"]
        raise FitError(f"its process ended with {process.returncode}: {last[0][:300]}") from None
    if "error" in result:
        raise FitError(str(result["error"]))
    return last_line


async def _slow_down(process: "asyncio.subprocess.Process", has_quota: bool) -> None:
    """Pause the process most of the time: while other processes keep the cores busy, or always under a quota.

    It is not paused again before it has run: each pause costs it its time slice, so on a busy machine it would never
    run.
    """
    before, cores, ran = _times(process.pid), os.sysconf("SC_NPROCESSORS_ONLN"), -1
    try:
        while process.returncode is None:
            await asyncio.sleep(RUN_S)
            now = _times(process.pid)
            total, used, own = (b - a for a, b in zip(before, now, strict=True))
            is_busy = has_quota or (total > 0 and (total - used) * cores < IDLE_CORES * total)
            if is_busy and ran == now[2] > 0:
                await asyncio.sleep(PAUSE_S)
            elif is_busy:
                ran = now[2]
                process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(LONG_PAUSE_S if has_quota else PAUSE_S)
                finally:
                    process.send_signal(signal.SIGCONT)
            if total >= SAMPLE_TICKS:
                before = now
                if (total - used - own) * cores >= SPARE_CORES * total:
                    with suppress(PermissionError, AttributeError):
                        os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    except ProcessLookupError:
        pass


def _times(pid: int) -> tuple[int, int, int]:
    """Ticks so far: of all cores (including idle time), of processes other than `pid`, and of `pid`; 0 if unknown."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0, 0, 0
    total, idle, ran = sum(fields), fields[3] + fields[4], int(own[11]) + int(own[12])
    return total, total - idle - ran, ran
