"""The fixtures of both test suites, the product's (tests/) and the laboratory's (lab/tests/)."""

from collections import Counter

import pytest

pytest_plugins = ["tests.fixtures", "tests.serving"]
PACKAGES = "tests/docker/packages.sh"  # installs the tools, on Debian


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Say in the last line which tests were skipped because a tool is missing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):  # a worker of pytest-xdist
        return
    reasons = (str(one.longrepr[2]) for one in reporter.stats.get("skipped", []) if one.longrepr)
    missing = Counter(one.removeprefix("Skipped: ").partition(":")[0] for one in reasons if PACKAGES in one)
    if missing:
        what = ", ".join(f"{count} ({reason})" for reason, count in missing.items())
        reporter.write_line(f"skipped for want of tools: {what}; on Debian, {PACKAGES} installs them")
