"""What the server can be told; `de3 serve` fills this from flags and DE3_* variables."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from server.protocol import MAX_BUDGET_MS, one_wish


class Settings(BaseModel):
    """Settings of one server; checks itself.

    Attributes:
        store: folder of the model store.
        models: models to serve, as name or name:version; empty: the newest version of each in the store.
            A request that names none gets the first, one that names no version the first of that name.
        runtime: what runs the layers: onnxruntime, native (our kernels, for int8, on AMX or AVX-512 VNNI), or
            auto, which takes the kernels where there are some for the model and gives way to ONNX Runtime.
        threads: engine threads, each runs one text at a time; 0: one for each core.
        max_queue: most texts in flight, from when a request is whole to its answer. What would exceed it is
            answered 503, or 429 for a client that has more than its share of them.
        max_texts: most texts in one request.
        max_body_bytes: largest request body.
        body_timeout_s: longest wait for a request's body.
        timeout_s: longest time from a request's arrival to its answer.
        max_connections: most open connections; 0: as many as the process may have files, less what it needs
            itself. At the limit a connection on which nothing is being answered is closed for a new one.
        max_inflight_bytes: most bytes of bodies in memory, of all requests that are received or answered;
            shared like max_queue.
        trusted_proxies: networks, as in 10.0.0.0/8, whose X-Forwarded-For names the client. Clients without
            an API key are told apart by address.
        ood_policy: what to do with texts that are far from every prototype: nothing, flag them, or also let
            them go deeper.
        tau, target_speedup, latency_budget_ms, max_disagreement: at most one, for requests that ask for none
            of them. All unset: each model's calibrated default.
        slo_p99_ms: the latency that the server tries to keep, first by raising the default τ, then by
            shedding load; None: it does neither.
        min_accuracy: under load τ is raised only as far as the calibrated accuracy stays at least this;
            None: 2 points under that of full depth.
        max_load_disagreement: and as the calibrated disagreement with full depth stays at most this.
        api_keys_file, api_keys: keys that /classify and /v1/models ask for, in a file or as text
            (server/access.py: Keys.read); unset: everybody may ask.
        admin_keys_file, admin_keys: keys for changing the models; unset: nobody can.
        rate_limit: texts for each API key, as in 100/second.
        cors_origins: pages of these origins may ask from a browser; * for all; as in https://page.example.
        log_format: of the log on standard error: text, or json, one object a line.
        log_requests: log a line for each request to /classify.
        log_texts: and in it the texts themselves.
        traces: send OpenTelemetry traces, as the OTEL_* variables say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    store: Path = Path("models")
    models: list[str] = []
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    runtime: Literal["auto", "native", "onnxruntime"] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    max_queue: Annotated[int, Field(ge=1)] = 1024
    max_texts: Annotated[int, Field(ge=1)] = 256
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20
    body_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    max_connections: Annotated[int, Field(ge=0)] = 0
    max_inflight_bytes: Annotated[int, Field(ge=1024)] = 2**26
    trusted_proxies: list[str] = []
    ood_policy: Literal["off", "flag", "deepen"] = "off"
    tau: Annotated[float, Field(ge=0, le=1)] | None = None
    target_speedup: Annotated[float, Field(ge=1)] | None = None
    latency_budget_ms: Annotated[float, Field(gt=0, le=MAX_BUDGET_MS)] | None = None
    max_disagreement: Annotated[float, Field(ge=0, le=1)] | None = None
    slo_p99_ms: Annotated[float, Field(gt=0)] | None = None
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    max_load_disagreement: Annotated[float, Field(ge=0, le=1)] = 1.0
    api_keys_file: Path | None = None
    api_keys: SecretStr | None = None
    admin_keys_file: Path | None = None
    admin_keys: SecretStr | None = None
    rate_limit: str | None = None
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = []
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = False
    log_texts: bool = False
    traces: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Settings":
        if self.max_texts > self.max_queue:
            raise ValueError("max_texts must not exceed max_queue: such a request could never be accepted")
        if self.max_body_bytes > self.max_inflight_bytes:
            raise ValueError("max_body_bytes must not exceed max_inflight_bytes: it could never be accepted")
        one_wish(self)
        return self

    def engine_threads(self) -> int:
        """The number of engine threads: as set, or one for each core that this process may use."""
        return self.threads or available_cores()


def available_cores() -> int:
    """Cores that this process may use: its affinity, cut to a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))  # a share of a core counts as one
    except (OSError, ValueError):
        pass
    return max(1, cores)
