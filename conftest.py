"""The fixtures of both test suites, the product's (tests/) and the laboratory's (lab/tests/)."""

pytest_plugins = ["tests.fixtures", "tests.serving"]
