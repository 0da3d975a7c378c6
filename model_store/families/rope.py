"""Rotary positions (RoPE), also scaled ones, which stretch a model's positions over longer texts, as in transformers.

A pair of a head's dimensions is rotated by position · frequency. Scaling divides low frequencies by a factor, and keeps
high ones.
"""

from math import ceil, floor, log, pi

import numpy as np
from numpy.typing import NDArray

from de3.model_store.families.encoder import Config

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
LONG_TYPES = ("yarn", "llama3")  # they depend on the length of the texts in pretraining
MAX_THETA = 1e12
MAX_NUMBER = 2.0**20  # limit for any other parameter


def rotation(rope: Config, size: int) -> tuple[NDArray[np.float32], float]:
    """Frequencies (size / 2,) of a head of this size, and the factor of its rotated queries and keys.

    rope: the entry of rope_parameters. Raises ValueError for parameters that cannot be exported.
    """
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind not in TYPES:
        raise ValueError(f"rope_type {kind!r:.50} cannot be exported; supported: {', '.join(TYPES)}")
    if rope.get("type", kind) != kind:  # transformers 4 reads type, transformers 5 rope_type
        raise ValueError(f"type {rope['type']!r:.50} must be rope_type, {kind!r}; set both or only rope_type")
    if not 1 < theta < MAX_THETA:
        raise ValueError(f"rope_theta must be above 1, and below {MAX_THETA:g}, got {theta!s:.50}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r:.50}")
    # Rounded to float32 as in transformers: at position 8,191, one rounding error more is an angle of 0.0005.
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = 1 / (theta ** exponents.astype(np.float64)).astype(np.float32)
    # dynamic scales only texts of more than max_position_embeddings, which are truncated or split.
    if kind in ("default", "dynamic"):
        return frequencies, 1.0

    factor = _number(rope, "factor", least=1)
    kept, scale = np.zeros(1), 1.0  # kept: the share of each frequency that is not divided by the factor
    if kind == "llama3":
        length = _number(rope, "original_max_position_embeddings")
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if low >= high:
            raise ValueError(f"high_freq_factor must be above low_freq_factor, {low:g}, got {high:g}")
        kept = np.clip((length * frequencies / (2 * pi) - low) / (high - low), 0, 1)
    elif kind == "yarn":
        kept = _yarn_share(rope, theta, size)
        scale = _number(rope, "attention_factor", _yarn_scale(rope, factor))
    scaled = frequencies * (kept + (1 - kept) / factor)
    if (np.diff(scaled) > 0).any():
        raise ValueError(
            f"the frequencies of rope_type {kind!r} must descend, but those of {dict(rope)} do not"
        )
    return scaled.astype(np.float32), scale


def _yarn_share(rope: Config, theta: float, size: int) -> NDArray[np.float64]:
    length = _number(rope, "original_max_position_embeddings")
    if not rope.get("truncate", True):  # transformers 5 ignores it where layers have their own parameters
        raise ValueError(f"truncate must be true, got {rope['truncate']!r:.50}")

    def pair(rotations: float) -> float:
        """Index of the pair that makes this number of rotations in a text of the original length."""
        return size * log(length / (rotations * 2 * pi)) / (2 * log(theta))

    low = max(floor(pair(_number(rope, "beta_fast", 32))), 0)
    high = min(ceil(pair(_number(rope, "beta_slow", 1))), size - 1)
    return 1 - np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)


def _yarn_scale(rope: Config, factor: float) -> float:
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        most, least = (0.1 * _number(rope, name) * log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        return most / least
    return 0.1 * log(factor) + 1


def _number(rope: Config, name: str, default: float | None = None, least: float = 1e-6) -> float:
    """A parameter, or its default if it is None or missing; raises ValueError unless it is a number in its range."""
    value = default if rope.get(name) is None else rope[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MAX_NUMBER:
        raise ValueError(f"{name} must be a number from {least:g} to {MAX_NUMBER:g}, got {value!r:.50}")
    return float(value)
