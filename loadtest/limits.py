"""A server within limits: memory by a control group where one can be made, and open files."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.servers import Server

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """The limits of one server.

    Attributes:
        group: the control group that limits the memory; None: there is none here.
    """

    group: Path | None
    memory_bytes: int
    files: int

    def apply(self, server: Server) -> Server:
        """The server, started within the limits."""
        enter = "" if self.group is None else f"echo 0 > '{self.group}/cgroup.procs' && "
        shell = f'{enter}ulimit -n {self.files} && exec "$@"'
        return replace(server, command=["sh", "-c", shell, "sh", *server.command])

    def killed(self) -> bool:
        """Whether the kernel killed a process for its memory."""
        for name in ("memory.oom_control", "memory.events"):
            if self.group is not None and (self.group / name).exists():
                found = re.search(r"^oom_kill (\d+)", (self.group / name).read_text(), re.M)
                return found is not None and int(found[1]) > 0
        return False


@contextmanager
def limits(name: str, memory_bytes: int, files: int) -> Iterator[Limit]:
    """Limits for one server; the control group goes when the server has ended."""
    group = _new_group(name, memory_bytes)
    try:
        yield Limit(group, memory_bytes, files)
    finally:
        if group is not None:
            with suppress(OSError):
                group.rmdir()


def _new_group(name: str, size: int) -> Path | None:
    """A control group with so many bytes of memory; None if this user, or this machine, cannot make one."""
    old = V1.is_dir()
    group = (V1 if old else V2) / name
    try:
        with suppress(FileNotFoundError):  # of a run that was killed
            group.rmdir()
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        return None
    with suppress(OSError):  # where there is no swap there is no such file
        if old:
            (group / "memory.memsw.limit_in_bytes").write_text(str(size))
        else:
            (group / "memory.swap.max").write_text("0")
    return group
