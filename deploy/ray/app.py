"""The Ray Serve application: serve run de3.deploy.ray.app:build store=/models max_replicas=8

Each replica is a server with the HTTP routes, engine and models of `de3 serve`. Ray starts the replicas on
the machines of its cluster, sends each request to one of the less busy replicas, replaces replicas that fail,
and adds or removes replicas by the number of pending and in-flight requests.
"""

import logging
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from de3.server.http.app import PROTOCOLS, create_app
from de3.server.http.exchange import HEADER
from de3.server.http.frontend import Frontend
from de3.server.service import Service
from de3.server.settings import Settings


class Options(BaseModel):
    """The options of `serve run`, as name=value; any other option is a setting of the server (server/settings.py).

    The settings of the listener, the processes and the log format have no effect under Ray.

    Attributes:
        min_replicas, max_replicas: limits on the number of replicas.
        cores: cores per replica, each with an engine thread.
        target_requests: mean number of in-flight requests per replica above which Ray adds replicas. Default:
            two per core, which keep the cores busy; more would only be queued.
        upscale_delay_s, downscale_delay_s: seconds for which that mean must be above or below target_requests
            before Ray adds or removes replicas. A replica starts in about 5 s, so Ray's default of 30 s is too long.
        max_requests: maximum number of in-flight requests per replica; further ones are queued in Ray's proxy.
        max_queued: maximum number of requests queued in each of Ray's proxies; further ones are answered with 503.
    """

    model_config = ConfigDict(extra="allow")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    cores: int = Field(default=1, ge=1)
    target_requests: float | None = Field(default=None, gt=0)
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    max_requests: int = Field(default=64, ge=1)
    max_queued: int = Field(default=1024, ge=1)


# Ray creates one instance per replica, in its own process.
@serve.deployment
@serve.ingress()
class De3:
    """One replica: the server's ASGI application in a process that Ray manages."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load and warm up the models; Ray sends requests only afterwards."""
        logging.basicConfig(level=logging.INFO)
        self.service = Service(Settings(**settings))
        self._frontend = Frontend(self.service, PROTOCOLS)
        await self.service.load(lambda: None)
        if self.service.failure is not None:
            raise self.service.failure

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application that Ray serves."""
        return _on_ray(create_app(self._frontend))

    def check_health(self) -> None:
        """Ray's health check: a replica that raises is replaced."""
        if self.service.failure is not None:
            raise self.service.failure


def _on_ray(app: ASGIApp) -> ASGIApp:
    """Adapt the application to Ray. Ray sets the id that the server uses and adds X-Request-ID itself, so the header is
    removed from responses. If a client disconnects before its body has arrived, Ray's `receive` may raise an error
    instead of reporting it.
    """

    async def on_ray(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != HEADER]
            await send(message)

        async def receive_without_error() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await app(scope, receive_without_error, send_without_id)

    return on_ray


def build(arguments: dict[str, str]) -> serve.Application:
    """The application, for `serve run`, `build` and `deploy`; raises ValueError for an invalid option."""
    options = Options.model_validate(arguments)
    settings: dict[str, Any] = {"threads": options.cores, **(options.model_extra or {})}
    if isinstance(settings.get("models"), str):
        settings["models"] = settings["models"].split()
    Settings.model_validate(settings)  # report errors in the terminal of `serve run`
    settings.setdefault("store", "models")
    # Replicas have another working directory, so paths must be absolute.
    for name, field in Settings.model_fields.items():
        if name in settings and Path in (field.annotation, *get_args(field.annotation)):
            settings[name] = str(Path(settings[name]).absolute())
    deployment = De3.options(  # type: ignore[attr-defined]  # the decorator is untyped
        name="de3",
        ray_actor_options={"num_cpus": options.cores},
        max_ongoing_requests=options.max_requests,
        max_queued_requests=options.max_queued,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests or 2.0 * options.cores,
            "upscale_delay_s": options.upscale_delay_s,
            "downscale_delay_s": options.downscale_delay_s,
        },
        logging_config={
            "enable_access_log": False
        },  # an access log takes as long as a layer; DE3 has its own
        health_check_period_s=5,
        graceful_shutdown_timeout_s=40,
    )
    return deployment.bind(settings)
