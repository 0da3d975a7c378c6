"""Jobs for tests of the engine, with a stand-in for the model if none is given."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from de3.exits.criteria import Limits
from de3.exits.rule import ExitRule
from de3.exits.signals import Edr
from de3.runtime.choice import Choice
from de3.runtime.engine.job import Job
from de3.runtime.engine.plan import Plan
from de3.runtime.engine.request import Entry, Request, Sender, Text
from de3.runtime.fit import Job as FitJob
from de3.runtime.options import ExitOptions

NO_MONITOR = SimpleNamespace(samples=lambda: False, limits=None, tau_factor=1.0)


def stand_in(has_kernels: bool, encoder: Any = None) -> Any:
    """A stand-in for a model; encoder: None: one of its own."""
    encoder = encoder or SimpleNamespace(forward=object() if has_kernels else None)
    return SimpleNamespace(
        encoder=encoder,
        manifest=SimpleNamespace(num_layers=6),
        can_run=lambda other: other.encoder is encoder,
    )


NO_MODEL, WITH_KERNELS = stand_in(False), stand_in(True)


def job(
    texts: Sequence[str],
    full_s: Sequence[float],
    *,
    model: Any = None,
    group_s: float | None = None,
    layer_s: float = 0.0,
    first_exit_s: Sequence[float] = (),
    budget_s: float | None = None,
    best_effort: bool = False,
    client: str = "",
    windows: int = 1,
    truncate: bool = True,
    submitted: float | None = None,
    is_shadow: bool = False,
    rule: ExitRule | None = None,
    monitor: Any = NO_MONITOR,
    others: Sequence[Job] = (),
) -> Job:
    """A job with these predicted times instead of measured ones.

    full_s, first_exit_s: seconds of each text to full depth and to the first exit. layer_s: seconds of a layer.
    group_s: step time of each text in a group, seconds; None: texts run alone, unless `model` has kernels. submitted:
    None: now. rule: None: EDR at τ = 0. others: jobs whose models answer on the same pass.
    """
    full, first = iter(full_s), iter(first_exit_s)
    timing: Any = SimpleNamespace(
        predict=lambda *_: next(full),
        predict_first_exit=lambda *_: next(first),
        layer_s=lambda _: layer_s,
        piece_s=0.0,
    )
    if model is None:
        model = NO_MODEL if group_s is None else WITH_KERNELS
    served: Any = SimpleNamespace(
        model=model, timing=timing, monitor=monitor, group_s=lambda _: 0.0 if group_s is None else group_s
    )
    request = Request([Text(text) for text in texts], ExitOptions(best_effort=best_effort))
    choice = Choice(rule or ExitRule(0, Edr(1.0)), "default", budget_s=budget_s)
    parts = [one.first for one in others]
    entries = [Entry(None, request.options), *(one.entry for one in parts)]
    plan = Plan(entries, [choice, *(one.choice for one in parts)], windows, truncate)
    more = {} if submitted is None else {"submitted": submitted}
    models = [served, *(one.served for one in parts)]
    return Job(models, plan, request, lambda _: None, Sender(client), is_shadow, **more)


def fit_job(**fields: Any) -> FitJob:
    """A job for the process of a fit, with these fields."""
    folders = {"base": ".", "records": ".", "store": ".", "version": 2, "attempt": 1, "limits": Limits(0.05)}
    more = {"first_new": 0, "by_client": False, "speedup": 1.0, "memory": 2**31}
    return FitJob.model_validate(folders | more | fields)
