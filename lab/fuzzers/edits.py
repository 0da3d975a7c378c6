"""Random edits of valid inputs: of JSON values, and of bytes."""

from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

# Values that parsers often mishandle.
NUMBERS = (0, -1, 1, 2, 3, 0.5, 1.0, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, "", " ", "a", "\x00", "\ud800", "é" * 300, "a" * 300, "[UNK]", "others", "1", "NaN"),
    *([], [[]], [None], {}, {"": None}, {"type": "Sequence"}, *NUMBERS),
)
strange = st.sampled_from(STRANGE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def edited(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """A JSON value with up to `most` edits, each at a random place."""
    root = [deepcopy(value)]
    for _ in range(draw(st.integers(0, most))):
        _edit(draw, root)
    return root[0]


def _edit(draw: st.DrawFn, root: list[Any]) -> None:
    place, key = root, 0  # type: Any, Any
    while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 9)) > 0:
        place = place[key]
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(keys))
    kinds = ["replace", "number", "delete", "copy", "more"]
    match draw(st.sampled_from(kinds)):
        case "number" if isinstance(place[key], int | float):
            place[key] = draw(st.sampled_from([place[key] + 1, place[key] - 1, -place[key], *NUMBERS]))
        case "delete" if place is not root:
            del place[key]
        case "copy" if place is not root:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            place[key] = deepcopy(place[draw(st.sampled_from(keys))])
        case "more" if isinstance(place, list) and place is not root:
            place += deepcopy(place[key : key + 1] * draw(st.sampled_from([1, 2, 20])))
        case "more" if isinstance(place, dict):
            place[draw(st.text(max_size=5))] = deepcopy(draw(strange))
        case _:
            place[key] = deepcopy(draw(strange))


@st.composite
def spliced(draw: st.DrawFn, data: bytes, fragments: tuple[bytes, ...], most: int = 3) -> bytes:
    """Bytes with up to `most` edits: a few bytes are removed, and others inserted in their place."""
    for _ in range(draw(st.integers(0, most))):
        at, cut = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 0, 1, 2, 20]))
        new = draw(st.sampled_from(fragments) | st.binary(max_size=4) | st.just(data[at : at + 30]))
        data = data[:at] + new + data[at + cut :]
    return data
