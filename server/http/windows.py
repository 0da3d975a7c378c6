"""The check that a text in several windows was read whole, for protocols whose responses cannot say that it was not."""

from de3.runtime.engine.outcome import Outcome
from de3.runtime.errors import RequestError


def check_all_ran(outcome: Outcome) -> None:
    """Raise RequestError if a latency budget ended before all windows of a text had run."""
    ran, windows = max(1, len(outcome.windows)), outcome.num_windows
    if outcome.reason == "deadline" and ran < windows:
        message = f"latency_budget_ms: only {ran} of a text's {windows} windows were read in time; allow more"
        raise RequestError(message, "latency_budget_ms", "budget", retry_after_s=1)
