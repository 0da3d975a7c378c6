"""Run a server with limits on open files and, where a control group can be created, on memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from de3.loadtest.servers import Server

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """The limits of one server.

    Attributes:
        group: the control group that limits the memory; None if none could be created.
    """

    group: Path | None
    memory_bytes: int
    files: int

    def apply(self, server: Server) -> Server:
        """The same server, with a command that starts it within the limits."""
        enter = "" if self.group is None else f"echo 0 > '{self.group}/cgroup.procs' && "
        shell = f'{enter}ulimit -n {self.files} && exec "$@"'
        return replace(server, command=["sh", "-c", shell, "sh", *server.command])

    def killed(self) -> bool:
        """True if the kernel's OOM killer has ended a process of the group; False if there is no group."""
        for name in ("memory.oom_control", "memory.events"):
            if self.group is not None and (self.group / name).exists():
                count = re.search(r"^oom_kill (\d+)", (self.group / name).read_text(), re.M)
                return count is not None and int(count[1]) > 0
        return False


@contextmanager
def limits(name: str, memory_bytes: int, files: int) -> Iterator[Limit]:
    """Limits for one server. name: of its control group, which is removed at the end of the block."""
    group = _new_group(name, memory_bytes)
    try:
        yield Limit(group, memory_bytes, files)
    finally:
        if group is not None:
            with suppress(OSError):
                group.rmdir()


def _new_group(name: str, size: int) -> Path | None:
    """A control group with this memory limit in bytes; None if it cannot be created."""
    is_v1 = V1.is_dir()
    group = (V1 if is_v1 else V2) / name
    try:
        with suppress(FileNotFoundError):  # left by a killed run
            group.rmdir()
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(size))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        return None
    with suppress(OSError):  # the file does not exist on systems without swap
        if is_v1:
            (group / "memory.memsw.limit_in_bytes").write_text(str(size))
        else:
            (group / "memory.swap.max").write_text("0")
    return group
