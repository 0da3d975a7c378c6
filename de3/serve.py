"""`de3 serve`: the options of the server, as flags and as variables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from de3.models import StoreOption

if TYPE_CHECKING:
    from pydantic import SecretStr

SERVING = "Limits"
WISHES = "Requests that ask nothing"
LOAD = "Under load"
ACCESS = "Who may ask"
LOGS = "Logs and traces"


def _secret(variable: str) -> "SecretStr | None":
    """A secret of the environment; there is no flag for it, as others can see a process's flags."""
    from pydantic import SecretStr

    value = os.environ.get(variable)
    return None if value is None else SecretStr(value)  # an empty one is a mistake that must not go unseen


def serve(
    store: StoreOption = Path("models"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DE3_MODELS",
            help="name or name:version; repeat for more (in the variable: separated by spaces). "
            "The first answers requests that name none, the first version of a name those "
            "that name no version. [default: the newest of each in the store]",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="DE3_HOST", help="0.0.0.0 to be reached from elsewhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="DE3_PORT")] = 8000,
    threads: Annotated[
        int, typer.Option(envvar="DE3_THREADS", help="Engine threads; 0: one for each core.")
    ] = 0,
    runtime: Annotated[
        str,
        typer.Option(
            envvar="DE3_RUNTIME",
            help="onnxruntime, native (our kernels: int8, AMX or AVX-512), or auto: the faster that can.",
        ),
    ] = "auto",
    max_queue: Annotated[
        int, typer.Option(envvar="DE3_MAX_QUEUE", help="Most texts in flight.", rich_help_panel=SERVING)
    ] = 1024,
    max_texts: Annotated[
        int, typer.Option(envvar="DE3_MAX_TEXTS", help="Most texts in one request.", rich_help_panel=SERVING)
    ] = 256,
    max_body_bytes: Annotated[
        int, typer.Option(envvar="DE3_MAX_BODY_BYTES", help="Largest request body.", rich_help_panel=SERVING)
    ] = 2**20,
    body_timeout_s: Annotated[
        float,
        typer.Option(envvar="DE3_BODY_TIMEOUT_S", help="Longest wait for a body.", rich_help_panel=SERVING),
    ] = 10.0,
    timeout_s: Annotated[
        float,
        typer.Option(
            envvar="DE3_TIMEOUT_S", help="Longest time from arrival to answer.", rich_help_panel=SERVING
        ),
    ] = 30.0,
    max_connections: Annotated[
        int,
        typer.Option(
            envvar="DE3_MAX_CONNECTIONS",
            help="Most open connections; 0: what the limit of open files allows.",
            rich_help_panel=SERVING,
        ),
    ] = 0,
    max_inflight_bytes: Annotated[
        int,
        typer.Option(
            envvar="DE3_MAX_INFLIGHT_BYTES",
            help="Most bytes of request bodies in memory, of all requests together.",
            rich_help_panel=SERVING,
        ),
    ] = 2**26,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DE3_TRUSTED_PROXIES",
            help="Network of proxies whose X-Forwarded-For names the client, as in 10.0.0.0/8; repeat for "
            "more. Clients without a key are told apart by address.",
            rich_help_panel=SERVING,
            show_default=False,
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_TAU",
            help="Their τ. [default: each model's calibrated one]",
            rich_help_panel=WISHES,
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_TARGET_SPEEDUP",
            help="Or their mean speed-up, by the calibration.",
            rich_help_panel=WISHES,
            show_default=False,
        ),
    ] = None,
    latency_budget_ms: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_LATENCY_BUDGET_MS",
            help="Or the time in which to answer.",
            rich_help_panel=WISHES,
            show_default=False,
        ),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_MAX_DISAGREEMENT",
            help="Or the rate of answers that may differ from full depth, with 95% confidence.",
            rich_help_panel=WISHES,
            show_default=False,
        ),
    ] = None,
    ood_policy: Annotated[
        str,
        typer.Option(
            envvar="DE3_OOD_POLICY",
            help="Texts far from every prototype: off, flag them, or deepen: also let them go deeper.",
        ),
    ] = "off",
    slo_p99_ms: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_SLO_P99_MS",
            help="Latency to keep: raise the default τ as it is passed, then shed load.",
            rich_help_panel=LOAD,
            show_default=False,
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            envvar="DE3_MIN_ACCURACY",
            help="But only as far as the calibrated accuracy is at least this. "
            "[default: 0.02 under full depth]",
            rich_help_panel=LOAD,
            show_default=False,
        ),
    ] = None,
    max_load_disagreement: Annotated[
        float,
        typer.Option(
            envvar="DE3_MAX_LOAD_DISAGREEMENT",
            help="And the calibrated disagreement with full depth at most this.",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DE3_API_KEYS_FILE",
            help="Keys for /classify and /v1/models: lines of a name and a key, or a name and sha256:digest. "
            "Or in DE3_API_KEYS, lines separated by ;. [default: everybody may ask]",
            rich_help_panel=ACCESS,
            show_default=False,
        ),
    ] = None,
    admin_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="DE3_ADMIN_KEYS_FILE",
            help="Keys for loading and unloading models. Or in DE3_ADMIN_KEYS. [default: nobody can]",
            rich_help_panel=ACCESS,
            show_default=False,
        ),
    ] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option(
            envvar="DE3_RATE_LIMIT",
            help="Texts for each API key, as in 100/second.",
            rich_help_panel=ACCESS,
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DE3_CORS_ORIGINS",
            help="Pages of this origin may ask from a browser; repeat for more, * for all.",
            rich_help_panel=ACCESS,
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        str, typer.Option(envvar="DE3_LOG_FORMAT", help="text, or json.", rich_help_panel=LOGS)
    ] = "text",
    log_requests: Annotated[
        bool,
        typer.Option(
            "--log-requests", envvar="DE3_LOG_REQUESTS", help="A line for each request.", rich_help_panel=LOGS
        ),
    ] = False,
    log_texts: Annotated[
        bool,
        typer.Option(
            "--log-texts",
            envvar="DE3_LOG_TEXTS",
            help="And the texts in it: mind that they are your users'.",
            rich_help_panel=LOGS,
        ),
    ] = False,
    traces: Annotated[
        bool,
        typer.Option(
            "--traces",
            envvar="DE3_TRACES",
            help="Send OpenTelemetry traces, to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the otel extra.",
            rich_help_panel=LOGS,
        ),
    ] = False,
) -> None:
    """Serve models over HTTP: POST /classify, GET /docs, /metrics, /ready.

    Example: de3 serve --store models --port 8000
    """
    from server.main import serve as run
    from server.settings import Settings

    run(
        Settings(
            store=store,
            models=model or [],
            host=host,
            port=port,
            threads=threads,
            runtime=runtime,  # type: ignore[arg-type]  # Settings checks it
            max_queue=max_queue,
            max_texts=max_texts,
            max_body_bytes=max_body_bytes,
            body_timeout_s=body_timeout_s,
            timeout_s=timeout_s,
            max_connections=max_connections,
            max_inflight_bytes=max_inflight_bytes,
            trusted_proxies=trusted_proxy or [],
            ood_policy=ood_policy,  # type: ignore[arg-type]  # Settings checks it
            tau=tau,
            target_speedup=target_speedup,
            latency_budget_ms=latency_budget_ms,
            max_disagreement=max_disagreement,
            slo_p99_ms=slo_p99_ms,
            min_accuracy=min_accuracy,
            max_load_disagreement=max_load_disagreement,
            api_keys_file=api_keys_file,
            api_keys=_secret("DE3_API_KEYS"),
            admin_keys_file=admin_keys_file,
            admin_keys=_secret("DE3_ADMIN_KEYS"),
            rate_limit=rate_limit,
            cors_origins=cors_origin or [],
            log_format=log_format,  # type: ignore[arg-type]  # Settings checks it
            log_requests=log_requests,
            log_texts=log_texts,
            traces=traces,
        )
    )
