"""The weights of the models' kernels, in shared memory that one process fills and every process maps."""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress

from de3.model_store.manifest import encoder_hashes
from de3.model_store.store import Artifact
from de3.server.processes.receiver import WEIGHTS


class Weights:
    """The weights of the served encoders: a file descriptor of shared memory for each, by the encoder's hash."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def put(self, key: str, fd: int) -> None:
        """Keep the memory of an encoder's weights, which a process has filled; replaces memory with the same key."""
        if (old := self._fds.pop(key, None)) is not None:
            os.close(old)
        self._fds[key] = fd

    def send(self, sockets: socket.socket, artifacts: Iterable[Artifact]) -> None:
        """Send a process the memory of models that it will load; it fills its own for those that have none."""
        for key in _keys(artifacts):
            if (fd := self._fds.get(key)) is not None:
                with suppress(OSError):
                    socket.send_fds(sockets, [WEIGHTS + key.encode()], [fd])

    def keep(self, artifacts: Iterable[Artifact]) -> None:
        """Close the file descriptors of all models but these; processes that still use their memory have mapped it."""
        for key in self._fds.keys() - set(_keys(artifacts)):
            os.close(self._fds.pop(key))


def _keys(artifacts: Iterable[Artifact]) -> list[str]:
    return list(dict.fromkeys(encoder_hashes(artifact.manifest)[-1] for artifact in artifacts))
