"""The settings of one server. Each is declared here once: `de3 serve` makes its flags, variables, help and
defaults of these fields."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

PREFIX = "DE3_"
# Variables with the prefix that are not settings of the server.
OTHER_VARIABLES = ("DE3_ADMIN_KEY", "DE3_API_KEY", "DE3_URL")  # of clients
MAX_BUDGET_MS = 60_000
EXCLUSIVE = ("tau", "target_speedup", "latency_budget_ms", "max_disagreement")


@dataclass(frozen=True, slots=True)
class ExitOptions:
    """What decides where a text exits; checks that its fields go together. None: not asked for.

    Attributes:
        tau: leave at the first exit whose score is below it.
        signal: entropy, edr or risk; None: the model's, or edr with a λ.
        lam: EDR's λ.
        max_layer: go no deeper than this layer.
        target_speedup: the mean speed-up over full depth, by the calibration.
        latency_budget_ms: answer within this time, at the deepest exit reached by then.
        max_disagreement: the rate of answers that may differ from full depth, at 95% confidence.
        best_effort: with a budget that cannot be met: answer at the first exit.
        thresholds: of a multi-label model: the probability above which a label is given, of all labels or by name.
    """

    tau: float | None = None
    signal: str | None = None
    lam: float | None = None
    max_layer: int | None = None
    target_speedup: float | None = None
    latency_budget_ms: float | None = None
    max_disagreement: float | None = None
    best_effort: bool = False
    thresholds: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        is_entropy = self.lam == 0 and self.signal == "entropy"  # λ = 0 is entropy
        if self.lam is not None and self.signal not in (None, "edr") and not is_entropy:
            raise ValueError(f"lambda: goes with the signal edr only, not with {self.signal}")
        values = (self.tau, self.target_speedup, self.latency_budget_ms, self.max_disagreement)
        if values == (None, None, None, None):
            return
        asked = [name for name, value in zip(EXCLUSIVE, values, strict=True) if value is not None]
        if len(asked) > 1:
            raise ValueError(f"{asked[1]}: cannot go with {asked[0]}; give one of {', '.join(EXCLUSIVE)}")
        if self.thresholds is not None and asked[0] in ("target_speedup", "max_disagreement"):
            raise ValueError(
                f"thresholds: cannot go with {asked[0]}, which was calibrated with the model's own"
            )
        if asked != ["tau"] and self.max_layer is not None:
            raise ValueError(f"max_layer: goes with tau only, not with {asked[0]}")


@dataclass(frozen=True)
class Option:
    """How a field of Settings is set from the command line.

    Attributes:
        panel: the heading in --help under which it is listed.
        flag: its flag, where that is not the field's name; a list's flag is repeated.
    """

    panel: str = "Options"
    flag: str = ""


LIMITS = Option("Limits")
DEFAULTS = Option("Default exit options")
LOAD = Option("Under load")
ACCESS = Option("Access")
LOGS = Option("Logs and traces")
AUDITS = Option("Audits")
GUARANTEE_SHARE = 0.05  # of audits, where none is set


class Settings(BaseModel):
    """Settings of one server; checks itself.

    A field's description is the help of its flag. Secrets have no flag, only a variable, as other users of
    the machine can see a process's flags.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    store: Annotated[Path, Option()] = Field(Path("models"), description="Folder of the model store.")
    models: Annotated[list[str], Option(flag="--model")] = Field(
        [],
        description="name or name:version; repeat for more (in the variable: separated by spaces). The first "
        "answers requests that name none, the first version of a name those that name no version. "
        "Default: the newest of each in the store.",
    )
    default_model: Annotated[str | None, Option()] = Field(
        None,
        description="Name of the model that answers requests that name none. Default: the first --model; of "
        "several models that are served without --model, none does.",
    )
    host: Annotated[str, Option()] = Field("127.0.0.1", description="0.0.0.0 to be reached from elsewhere.")
    port: Annotated[int, Option()] = Field(8000, ge=0, le=65535, description="Port to listen on.")
    threads: Annotated[int, Option()] = Field(
        0,
        ge=0,
        le=1024,
        description="Engine threads, each of which runs a text, or a group of short ones; 0: one per core.",
    )
    runtime: Annotated[Literal["auto", "native", "onnxruntime"], Option()] = Field(
        "auto",
        description="onnxruntime, native (our int8 kernels), or auto: native where possible.",
    )
    max_queue: Annotated[int, LIMITS] = Field(
        1024,
        ge=1,
        description="Most texts in flight. Beyond it the answer is 503, or 429 for a client that has more than "
        "its share.",
    )
    max_texts: Annotated[int, LIMITS] = Field(256, ge=1, description="Most texts in one request.")
    max_body_bytes: Annotated[int, LIMITS] = Field(2**20, ge=1024, description="Largest request body.")
    body_timeout_s: Annotated[float, LIMITS] = Field(10.0, gt=0, description="Longest wait for a body.")
    timeout_s: Annotated[float, LIMITS] = Field(
        30.0, gt=0, description="Longest time from a request's arrival to its response."
    )
    max_connections: Annotated[int, LIMITS] = Field(
        0, ge=0, description="Most open connections; 0: what the limit of open files allows."
    )
    max_inflight_bytes: Annotated[int, LIMITS] = Field(
        2**26, ge=1024, description="Most bytes of request bodies in memory, of all requests together."
    )
    trusted_proxies: Annotated[list[str], Option("Limits", "--trusted-proxy")] = Field(
        [],
        description="Network of proxies whose X-Forwarded-For names the client, as in 10.0.0.0/8; repeat for "
        "more. Clients without a key are told apart by address.",
    )
    ood_policy: Annotated[Literal["off", "flag", "deepen"], Option()] = Field(
        "off",
        description="Texts far from every prototype: off, flag them, or deepen: also halve their τ.",
    )
    tau: Annotated[float | None, DEFAULTS] = Field(
        None, ge=0, le=1, description="τ of requests that choose none. Default: each model's calibrated one."
    )
    target_speedup: Annotated[float | None, DEFAULTS] = Field(
        None,
        ge=1,
        description="Mean speed-up of requests that choose nothing, by the calibration; instead of --tau.",
    )
    latency_budget_ms: Annotated[float | None, DEFAULTS] = Field(
        None, gt=0, le=MAX_BUDGET_MS, description="Time within which to answer them; instead of --tau."
    )
    max_disagreement: Annotated[float | None, DEFAULTS] = Field(
        None,
        ge=0,
        le=1,
        description="Rate of their answers that may differ from full depth, at 95% confidence; instead of --tau.",
    )
    slo_p99_ms: Annotated[float | None, LOAD] = Field(
        None,
        gt=0,
        description="Latency objective: when it is exceeded, the default τ is raised, then load is shed.",
    )
    min_accuracy: Annotated[float | None, LOAD] = Field(
        None,
        ge=0,
        le=1,
        description="Under load τ is raised only as far as the calibrated accuracy is at least this. "
        "Default: 0.02 under full depth.",
    )
    max_load_disagreement: Annotated[float, LOAD] = Field(
        1.0,
        ge=0,
        le=1,
        description="Under load τ is raised only as far as the calibrated disagreement is at most this.",
    )
    audit_share: Annotated[float | None, AUDITS] = Field(
        None,
        ge=0,
        le=1,
        description="Share of the texts that also run to full depth while nothing else is pending, to measure how "
        "often early answers differ from it. Default: none; 0.05 with --guarantee.",
    )
    guarantee: Annotated[float | None, AUDITS] = Field(
        None,
        gt=0,
        lt=1,
        description="Rate of answers that may differ from full depth, at 95% confidence, of requests that choose "
        "nothing: starts at full depth, and exits earlier as audits of live traffic show that this keeps the promise. "
        "Instead of --tau and the like.",
    )
    guarantee_start: Annotated[Literal["strict", "calibrated"], AUDITS] = Field(
        "strict",
        description="With --guarantee: strict, or calibrated: start with the calibration's τ, which assumes that "
        "texts are like the calibration's.",
    )
    state_dir: Annotated[Path | None, AUDITS] = Field(
        None,
        description="Folder that keeps what audits showed across restarts; each replica needs its own. Default: "
        "in memory only.",
    )
    log_audits: Annotated[Path | None, AUDITS] = Field(
        None,
        description="File for what each audited text showed at every exit, for de3 calibrate --from-audits; without "
        "texts. Beyond 100 MB it begins anew, and the last one is kept as FILE.1.",
    )
    log_audit_texts: Annotated[bool, AUDITS] = Field(
        False, description="Also log the audited texts there, which are user data."
    )
    api_keys_file: Annotated[Path | None, ACCESS] = Field(
        None,
        description="Keys for /classify and /v1/models: lines of a name and a key, or a name and "
        "sha256:digest. Or in DE3_API_KEYS, lines separated by ;. Default: no key is needed.",
    )
    api_keys: SecretStr | None = None
    admin_keys_file: Annotated[Path | None, ACCESS] = Field(
        None,
        description="Keys for loading and unloading models. Or in DE3_ADMIN_KEYS. Default: models cannot be changed.",
    )
    admin_keys: SecretStr | None = None
    rate_limit: Annotated[str | None, ACCESS] = Field(
        None, description="Texts for each API key, as in 100/second."
    )
    cors_origins: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]], Option("Access", "--cors-origin")
    ] = Field([], description="Pages of this origin may send requests; repeat for more, * for all.")
    log_format: Annotated[Literal["text", "json"], LOGS] = Field(
        "text", description="text, or json: one object a line."
    )
    log_requests: Annotated[bool, LOGS] = Field(False, description="Log a line for each request.")
    log_texts: Annotated[bool, LOGS] = Field(False, description="Also log the texts, which are user data.")
    traces: Annotated[bool, LOGS] = Field(
        False,
        description="Send OpenTelemetry traces, to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the otel extra.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if self.max_texts > self.max_queue:
            raise ValueError("max_texts must not exceed max_queue: such a request could never be accepted")
        if self.max_body_bytes > self.max_inflight_bytes:
            raise ValueError("max_body_bytes must not exceed max_inflight_bytes: it could never be accepted")
        _ = self.options
        if self.guarantee is not None:
            other = next((name for name in EXCLUSIVE if getattr(self, name) is not None), None)
            if other is not None:
                raise ValueError(f"guarantee: cannot go with {other}; give one of them")
            if self.audit_share == 0:
                raise ValueError("guarantee: needs audits, and audit_share is 0")
        elif self.guarantee_start != "strict":
            raise ValueError("guarantee_start: goes with guarantee only, which is not set")
        if self.log_audits is not None and not self.share_of_audits:
            raise ValueError("log_audits: there are no audits; give audit_share or guarantee")
        if self.log_audit_texts and self.log_audits is None:
            raise ValueError("log_audit_texts: goes with log_audits, the file, which is not set")
        return self

    @property
    def share_of_audits(self) -> float:
        """The share of texts that are audited; 0: none."""
        if self.audit_share is None:
            return GUARANTEE_SHARE if self.guarantee is not None else 0.0
        return self.audit_share

    @property
    def options(self) -> ExitOptions:
        """The exit options of requests that have none."""
        return ExitOptions(**{name: getattr(self, name) for name in EXCLUSIVE})

    def engine_threads(self) -> int:
        """The number of engine threads: as set, or one for each core that this process may use."""
        return self.threads or available_cores()


def option(name: str) -> Option | None:
    """How a field of Settings is set from the command line; None for a secret, which has a variable only."""
    metadata: Iterable[Any] = Settings.model_fields[name].metadata
    return next((m for m in metadata if isinstance(m, Option)), None)


def variable(name: str) -> str:
    """The environment variable of a field of Settings."""
    return PREFIX + name.upper()


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: misspelt, or of another version."""
    known = {variable(name) for name in Settings.model_fields} | {*OTHER_VARIABLES}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


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
