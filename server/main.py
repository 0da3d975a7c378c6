"""Run the server: one process, drained on SIGTERM."""

import signal
from types import FrameType

import uvicorn

from server import logs
from server.app import create_app
from server.http import Http
from server.service import Service
from server.settings import Settings


class _Server(uvicorn.Server):
    """uvicorn, saying "not ready" as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.drain()
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was accepted and return.

    Raises StoreError when a model is missing or not sound.
    """
    logs.configure(settings.log_format)
    service = Service(settings)

    def stop() -> None:
        server.should_exit = True

    config = uvicorn.Config(
        create_app(service, on_failure=stop),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here uses a client's address
        # An accepted request ends by its own time-out; leave it that long, and a little.
        timeout_graceful_shutdown=int(settings.timeout_s) + 5,
        http=Http,
        ws="none",  # an upgrade is not offered: such a request is answered like any other
    )
    server = _Server(config, service)
    # uvicorn handles these while it runs and raises them again at its end: a drained stop is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    server.run()
    if service.failure is not None:
        raise service.failure
