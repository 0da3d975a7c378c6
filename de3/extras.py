"""How to install an extra."""

import shlex
import sys


def install(extra: str) -> str:
    """The command that installs an extra for this interpreter, and where to run it."""
    return f"{shlex.quote(sys.executable)} -m pip install -e '.[{extra}]' in the checkout"
