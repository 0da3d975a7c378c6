"""The check that a text was read and decided in time, for protocols whose responses cannot say that it was not."""

from de3.runtime.engine.outcome import Outcome
from de3.runtime.errors import RequestError


def check_all_ran(outcome: Outcome) -> None:
    """Raise RequestError if a latency budget ended before all windows of a text ran or, with a flag, were decided."""
    ran, windows = max(1, len(outcome.windows)), outcome.num_windows
    if outcome.reason == "deadline" and (ran < windows or outcome.rule.flag is not None):
        what = (
            f"only {ran} of a text's {windows} windows were read"
            if ran < windows
            else "a text was not decided"
        )
        message = f"latency_budget_ms: {what} in time; allow more"
        raise RequestError(message, "latency_budget_ms", "budget", retry_after_s=1)
