"""Exit placement: the exits that save more time than they take.

A text pays for every exit that it passes, and each is another chance to leave with a wrong answer. So the exits of risk
are chosen for the least time at the usual limits. At the others, risk is 1, and they are not computed
(`Risk.may_exit`), except for other signals and for requests that need every exit.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import DISAGREEMENTS, FINE_TAUS
from de3.exits.guarantee import profiles
from de3.exits.recorded import Recorded

MIN_SAMPLES, MAX_SAMPLES = 1500, 4000  # with fewer, chance chooses; the most are a limit on time
MIN_GAIN = 0.01  # of time, for leaving out an exit: chance saves about as much
TAUS = np.array(FINE_TAUS[::2])
# Time of an exit by its weights, relative to a layer: about 0.3 per byte if a group of texts reads them, 0.9 for a text
# alone. A token classifier's exits multiply in float32.
BY_BYTE, BY_PRODUCT = 0.6, 8.0


def exit_cost(hidden: int, inner: int, labels: int, metric: int, is_spans: bool) -> float:
    """The time of an exit, in layers, for a text of about 25 tokens.

    It is the time of reading the exit's weights (lab/docs/experiments/time.md): the classifier and the prototypes in
    float32, the projection into the metric space in int8. hidden, inner: widths of the encoder. metric: dimension of
    the metric space; 0: no prototypes. is_spans: the exits classify each token.
    """
    layer = 4 * hidden**2 + 2 * hidden * inner
    if is_spans:
        return BY_PRODUCT * labels * hidden / layer
    return BY_BYTE * (4 * labels * (hidden + metric) + hidden * metric) / layer


def unused_exits(recorded: Recorded, scores: NDArray[np.float64], cost: float) -> frozenset[int]:
    """The exits, by index, without which texts take the least time.

    The time is the mean over the limits DISAGREEMENTS, at the best τ of each; exits are left out one after the other,
    the one that saves the most time first. One always remains.

    recorded: n samples. scores: their cross-fitted risk, (n, exits). cost: time of an exit, in layers; 0: not known, so
    all are used.
    """
    if len(scores) < MIN_SAMPLES or cost == 0:
        return recorded.unused
    rows = np.random.default_rng(0).permutation(len(scores))[:MAX_SAMPLES]
    scores, differs = scores[rows], recorded.differs[rows]
    used = [j for j in range(scores.shape[1] - 1) if j not in recorded.unused]
    best = _time(recorded.exit_layers, scores, differs, used, cost)
    while len(used) > 1:
        tries = [[i for i in used if i != j] for j in used]
        times = [_time(recorded.exit_layers, scores, differs, each, cost) for each in tries]
        if min(times) >= (1 - MIN_GAIN) * best:
            break
        best, used = min(times), tries[int(np.argmin(times))]
    return frozenset(range(scores.shape[1] - 1)) - frozenset(used)


def _time(
    layers: Sequence[int],
    scores: NDArray[np.float64],
    differs: NDArray[np.bool_],
    used: list[int],
    cost: float,
) -> float:
    """The mean time of a text with these exits, in layers, over the limits that can be kept."""
    exits = [*used, len(layers) - 1]
    costs = np.array([layers[j] + cost * (i + 1) for i, j in enumerate(exits)])
    found = profiles(scores[:, exits], differs[:, exits], costs, TAUS)
    differing, times = found.differs.mean(0), found.layers.mean(0)
    least = [times[differing <= limit].min(initial=costs[-1]) for limit in DISAGREEMENTS]
    return float(np.mean(least))
