"""Plans: a kept one is what would be resolved now."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.model_store.store import Store
from de3.runtime.choice import InForce, Standing
from de3.runtime.classification import Classification
from de3.runtime.engine import plan
from de3.runtime.engine.plan import plan_of
from de3.runtime.engine.request import Request, Text
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.server.settings import Settings

TENANTS = st.sampled_from(["", "one", "two"])
CHANGES = st.tuples(st.just("change"), st.integers(0, 2), TENANTS, st.sampled_from([0.0, 0.1, 0.3]))
KINDS = st.sampled_from([Request, Classification])
ASKED = st.sampled_from([{}, {"options": ExitOptions(tau=0.2)}, {"long": "windows"}, {"explain": True}])
REQUESTS = st.tuples(st.just("ask"), KINDS, ASKED, st.integers(0, 3), TENANTS)


@pytest.mark.parametrize("settings", [{"guarantee": 0.05}, {"slo_p99_ms": 10.0}, {"flags": ["negative"]}])
@given(st.lists(CHANGES | REQUESTS, max_size=12))
def test_a_kept_plan_is_the_one_that_would_be_resolved_now(
    store: Path, settings: dict[str, Any], steps: list[Any]
) -> None:
    """Under audits and resets of any tenant, which change τ, at any load level."""
    manifest = Store(store).open("tiny-int8").manifest
    rules = Rules(manifest, Settings(**settings))

    def served() -> Any:
        return SimpleNamespace(rules=rules, model=SimpleNamespace(manifest=manifest), plans={})

    keeps, epoch = served(), 0
    for kind, *values in steps:
        if kind == "change":
            more, tenant, tau = values
            epoch += more // 2  # a reset
            rules.apply(Standing(epoch, 0, {tenant: InForce(epoch, tau, "evidence")}))
        else:
            of, asked, level, tenant = values
            request = of([Text("a")], **asked)
            found = plan_of([keeps], request, level, tenant)
            assert found == plan_of([served()], request, level, tenant)
            # What a client chooses is not kept: it could be anything.
            assert request.options == ExitOptions() or found not in keeps.plans.values()


def test_kept_plans_are_few_and_one_tenants_audit_drops_no_others(store: Path) -> None:
    manifest = Store(store).open("tiny-int8").manifest
    rules, request = Rules(manifest, Settings(guarantee=0.05)), Request([Text("a")])
    served: Any = SimpleNamespace(rules=rules, model=SimpleNamespace(manifest=manifest), plans={})

    def plan_for(tenant: str) -> plan.Plan:
        return plan_of([served], request, 0, tenant)

    rules.apply(Standing(1, 0, {"one": InForce(1, 0.1, "evidence")}))
    first, other = plan_for("one"), plan_for("two")
    assert plan_for("one") is first
    rules.apply(Standing(1, 1, {"one": InForce(1, 0.3, "evidence")}))
    assert plan_for("one").choices[0].rule.tau == 0.3 and plan_for("two") is other
    for number in range(2 * plan.MAX_KEPT):
        plan_for(str(number))
    assert len(served.plans) <= plan.MAX_KEPT
