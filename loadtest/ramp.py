"""An overload test: a ramp of the request rate past saturation, with the server's load controller off and on."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from de3.client import Row
from de3.loadtest import report
from de3.loadtest.client import Answer, Run, quantile, send_traffic
from de3.loadtest.report import console, write_json
from de3.loadtest.servers import free_port, ours, running
from de3.loadtest.texts import Sample

# (name, seconds, request rate at the start and at the end as a share of the capacity)
PHASES = (("half", 5, 0.5, 0.5), ("ramp", 5, 0.5, 2.0), ("twice", 10, 2.0, 2.0), ("half again", 10, 0.5, 0.5))
SECONDS = sum(length for _, length, _, _ in PHASES)
WINDOW_S = 0.5
CONNECTIONS = 64


def ramp(
    store: Path,
    model: str,
    samples: list[Sample],
    slo_ms: float,
    out: Path,
) -> dict[str, Any]:
    """Run the ramp without and with the controller; write ramp.json and ramp.png to `out`, and return the results."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "server.log"
    with running(ours(store, model), free_port(), log) as started:
        send_traffic(started.target, samples[:200], 1.0, connections=CONNECTIONS)
        capacity = median(
            send_traffic(started.target, samples, 3.0, connections=CONNECTIONS).rate() for _ in range(3)
        )
    console.print(f"capacity at the default τ: {capacity:.0f} answers/s")
    results: dict[str, Any] = {"capacity": capacity, "slo_ms": slo_ms, "runs": {}}
    for name, extra in (("off", []), ("on", ["--slo-p99-ms", f"{slo_ms:g}"])):
        console.print(f"the ramp, controller {name}: {SECONDS} s")
        with running(ours(store, model, options=extra), free_port(), log) as started:
            send_traffic(started.target, samples[:200], 1.0, connections=2)  # warm up
            run = send_traffic(
                started.target, samples, float(SECONDS), lambda s: _rate(s) * capacity, CONNECTIONS
            )
        results["runs"][name] = _summary(run, slo_ms)
    write_json(out / "ramp.json", results)
    _plot(out / "ramp.png", results)
    return results


def _rate(second: float) -> float:
    """The request rate at a time (seconds from the start), as a share of the capacity."""
    start = 0.0
    for _, length, begin, end in PHASES:
        if second < start + length:
            return begin + (end - begin) * (second - start) / length
        start += length
    return PHASES[-1][3]


def _summary(run: Run, slo_ms: float) -> dict[str, Any]:
    """The numbers by phase and by window, and `recovery_s`.

    recovery_s: seconds from the end of the overload to the end of the last window that misses the objective; 0 if none
    does.
    """
    pairs = list(zip(run.answers, run.labels, strict=True))

    def within(start: float, end: float) -> dict[str, Any]:
        due = [(a, label) for a, label in pairs if start <= a.due < end]
        ok = [(a, label) for a, label in due if a.status == 200]
        latencies = sorted(1000 * (a.done - a.due) for a, _ in ok)
        correct = [label == run.samples[a.sample].label for a, label in ok]
        return {
            "offered_per_s": round(len(due) / (end - start), 1),
            "answered": round(len(ok) / len(due), 4) if due else None,
            "within_slo": round(sum(ms <= slo_ms for ms in latencies) / len(due), 4) if due else None,
            "p50_ms": round(quantile(latencies, 0.5), 2) if ok else None,
            "p99_ms": round(quantile(latencies, 0.99), 2) if ok else None,
            "accuracy": round(sum(correct) / len(correct), 4) if correct else None,
            "tau": round(median(_tau(a) for a, _ in ok[:: max(1, len(ok) // 50)]), 6) if ok else None,
        }

    phases, start = {}, 0.0
    for name, length, _, _ in PHASES:
        phases[name] = within(start, start + length)
        start += length
    windows = [
        {"at": i * WINDOW_S, **within(i * WINDOW_S, (i + 1) * WINDOW_S)}
        for i in range(int(SECONDS / WINDOW_S))
    ]
    overload_end = SECONDS - PHASES[-1][1]
    missed = [  # ends of windows after the overload that miss the objective
        w["at"] + WINDOW_S
        for w in windows
        if w["at"] >= overload_end and not (w["p99_ms"] or slo_ms + 1) <= slo_ms
    ]
    recovery_s = max(missed, default=overload_end) - overload_end
    return {"phases": phases, "windows": windows, "recovery_s": recovery_s}


def _tau(answer: Answer) -> float:
    return Row.parse(json.loads(answer.body)["data"][0]).exit.tau


def _plot(path: Path, results: dict[str, Any]) -> None:
    """Plot request rate, p99, share within the objective, and τ over time."""
    figure, axes = report.panels(4, "A ramp to twice the capacity, load controller off and on", "seconds")
    offered = results["runs"]["on"]["windows"]
    axes[0].plot([w["at"] for w in offered], [w["offered_per_s"] for w in offered], color="gray")
    axes[0].axhline(results["capacity"], linestyle=":", color="gray")
    axes[0].set_ylabel("requests/s\n(dotted: capacity)")
    for name, run in results["runs"].items():
        at = [w["at"] for w in run["windows"]]
        for axis, key, label in (
            (axes[1], "p99_ms", "p99, ms"),
            (axes[2], "within_slo", "share within\nthe objective"),
            (axes[3], "tau", "τ"),
        ):
            values = [float("nan") if w[key] is None else w[key] for w in run["windows"]]
            axis.plot(at, values, label=f"controller {name}")
            axis.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[1].axhline(results["slo_ms"], linestyle=":", color="gray")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
