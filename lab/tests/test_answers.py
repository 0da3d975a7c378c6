"""Whether two servers answer alike, with two real servers."""

from pathlib import Path

import pytest

from lab.answers import compare
from lab.tests.commands import lab
from tests.serving import serving

TEXTS = ["good film", "a bad film, by all accounts", "no", "what a good, good day it was"]


@pytest.mark.slow
def test_servers_that_differ_in_one_setting_are_found_to_differ(store: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    with serving(store, models=["tiny"]) as one, serving(store, models=["tiny"], tau=0.0) as other:
        alike = lab(f"answers {one.url} {one.url} --model tiny --texts {texts} --count 300")
        assert "0 differences" in alike and "200: " in alike and "422: " in alike
        _, _, found = compare([one.url, other.url], TEXTS, 300, "tiny")
        assert {difference.path for difference in found} >= {"/classify"}
        assert all('"tau": 2' not in difference.body for difference in found)  # invalid for both
