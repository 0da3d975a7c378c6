"""Human-readable reports of runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from de3.bulk.run import Summary
from de3.model_store.store import Artifact
from de3.progress import plural
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    from de3.runtime.upstream.upstreams import Caller


def report(
    summary: Summary,
    artifacts: Sequence[Artifact],
    options: Mapping[str, Any],
    callers: "Sequence[Caller]" = (),
) -> list[str]:
    """The report of a run, as lines of text.

    artifacts: none if a server answered. options: the run's options. callers: of upstreams that were called.
    """
    rate = summary.answered / summary.seconds if summary.seconds else 0.0
    lines = [
        plural(summary.rows, "row")
        + (f" ({summary.earlier:,} of them by an earlier run)" if summary.earlier else "")
        + f" in {summary.seconds:.1f} s"
        + (f": {rate:,.{int(rate < 10)}f} rows/s" if rate else "")
    ]
    for (prefix, layers), times in zip(summary.layers.items(), summary.times.values(), strict=True):
        model = f"{prefix[:-1]}: " if prefix else ""
        if summary.answered:
            shares = (f"{n}: {100 * count / summary.answered:.1f}%" for n, count in sorted(layers.items()))
            run = " in this run" if summary.earlier else ""
            lines.append(f"{model}exits by layer{run}: {', '.join(shares)}")
        if times.model_s:
            speedup = times.full_depth_s / times.model_s
            lines.append(f"{model}speed-up in model time: {speedup:.1f}× over full depth")
    if summary.truncated:
        limit = "windows" if options.get("long") == "windows" else "limit (--long windows reads more)"
        run = " in this run" if summary.earlier else ""
        lines.append(f"{plural(summary.truncated, 'text')}{run} truncated to the model's {limit}")
    for artifact in artifacts:
        if artifact.manifest.upstream is not None:  # never certified
            continue
        model = f"{artifact.manifest.name}: " if len(artifacts) > 1 else ""
        lines.append(model + _certified(artifact, options))
    return [*lines, *(_cost(caller, summary.answered) for caller in callers)]


def _certified(artifact: Artifact, options: Mapping[str, Any]) -> str:
    wanted = options.get("max_disagreement")
    if wanted is None:
        return "certified: nothing; --max-disagreement chooses τ by a certified bound"
    if options.get("long") == "windows":
        return "certified: nothing, because texts may have several windows"
    rules = Rules(artifact.manifest, RuntimeSettings())
    choice = rules.choose(ExitOptions(max_disagreement=wanted, signal=options.get("signal")), 0, "")
    if choice.rule.tau == 0 or choice.certificate is None:
        return "certified: every text runs to full depth, as no τ is certified for this rate"
    return (
        f"certified: at most {100 * wanted:g}% of the answers differ from full depth (with 95% confidence), for texts "
        f"like the model's {choice.certificate['samples']} calibration samples; other texts are not covered"
    )


def _cost(caller: "Caller", answered: int) -> str:
    totals, one = caller.usage.totals, caller.of.upstream
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in totals.calls.items() if count)
    line = (
        f"{caller.of.name}: {totals.local:,} of {answered:,} texts answered without its upstream in this run; "
        f"{sum(totals.calls.values()):,} calls for this output{f' ({kinds})' if kinds else ''}"
    )
    if one.price_per_call is None and one.price_per_million_tokens is None:
        return line
    return f"{line}, which cost {totals.cost:.6g}; saved about {caller.usage.saved:.6g}"
