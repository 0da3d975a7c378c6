"""Child processes end with their parent, however that ends."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from de3.runtime import child
from de3.runtime.fit import Found
from de3.server.learn import fitting
from tests.jobs import fit_job
from tests.serving import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
# Starts a child process, prints its pid once its code runs, and waits for it.
PARENT = """
import subprocess
from de3.runtime.child import command_of
command = command_of("import time; print(flush=True); time.sleep(600)")
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_child_ends_with_a_parent_that_is_killed(is_stopped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if is_stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    until(lambda: not is_running(pid), "the end of the child")


def is_running(pid: int) -> bool:
    """False if the process has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_whose_parent_has_ended_first_does_not_run() -> None:
    """As if the parent had ended while this process started: it has another parent now."""
    command = [part.replace(str(os.getpid()), "999999999") for part in child.command_of("print('runs')")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_fit_is_not_stopped_before_it_would_end_with_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, was_begun = tmp_path / "begun", list[bool]()

    def command_of(*arguments: str) -> list[str]:
        late = f"import time; time.sleep(0.2); open({str(begun)!r}, 'w')\n"
        return [late + part if "end_with" in part else part for part in child.command_of(*arguments)]

    async def slow_down(*_: Any) -> None:
        was_begun.append(begun.exists())

    monkeypatch.setattr(fitting, "command_of", command_of)
    monkeypatch.setattr(fitting, "_slow_down", slow_down)
    monkeypatch.setattr(fitting, "PROGRAM", "import time; time.sleep(0.1); print('{}')")
    found = asyncio.run(fitting.run_fit(fit_job()))
    assert found == Found(seconds=found.seconds)
    assert was_begun == [True]
