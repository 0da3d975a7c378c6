"""The Ray Serve application: serve run deploy.ray.app:build store=/models max_replicas=8

Each replica is one server: the same HTTP routes, engine and models as `de3 serve`. Ray starts them, on as
many machines as its cluster has, sends each request to one of the less busy, starts a new one for one that
fails, and adds or removes some by the number of requests that wait and run.
"""

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.types import ASGIApp

from server.http.app import PROTOCOLS, create_app
from server.http.frontend import Frontend
from server.service import Service
from server.settings import Settings


class Options(BaseModel):
    """What `serve run` can be told, as name=value; everything else goes to the server (server/settings.py).

    Attributes:
        min_replicas, max_replicas: how many replicas there are at least and at most.
        cores: of a replica, each with an engine thread.
        target_requests: under way in each replica, on average: with more, Ray adds replicas. If unset, two
            for each core: they keep the cores busy, more would only wait.
        upscale_delay_s, downscale_delay_s: how long there must be more or fewer requests than that before
            replicas are added or removed. A replica takes about 5 s to start, so Ray's own 30 s are long.
        max_requests: under way in a replica, at most; others wait in Ray's proxy.
        max_queued: requests that wait in one of Ray's proxies, at most; it answers others with 503.
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


# A class that Ray makes in a process of its own, from these settings.
@serve.deployment
@serve.ingress()
class De3:
    """One replica."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load and warm up the models: Ray sends requests only after that."""
        logging.basicConfig(level=logging.INFO)
        self.service = Service(Settings(**settings))
        self._frontend = Frontend(self.service, PROTOCOLS)
        await self.service.load(lambda: None)
        if self.service.failure is not None:
            raise self.service.failure

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray serves."""
        return create_app(self._frontend)

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self.service.failure is not None:
            raise self.service.failure


def build(arguments: dict[str, str]) -> serve.Application:
    """The application, for `serve run`, `build` and `deploy`; raises ValueError for a wrong option."""
    options = Options.model_validate(arguments)
    settings: dict[str, Any] = {"threads": options.cores, **(options.model_extra or {})}
    if isinstance(settings.get("models"), str):
        settings["models"] = settings["models"].split()
    Settings.model_validate(settings)  # here, where whoever typed it sees the error
    settings.setdefault("store", "models")
    for name in ("store", "api_keys_file", "admin_keys_file"):  # a replica has another working directory
        if name in settings:
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
        logging_config={"enable_access_log": False},  # it costs as much as a layer; DE3 has one of its own
        health_check_period_s=5,
        graceful_shutdown_timeout_s=40,
    )
    return deployment.bind(settings)
