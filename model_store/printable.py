"""Text from an artifact, escaped for terminals and logs."""

import re

# C0 and C1 control characters and DEL (terminal escape sequences), line separators, bidirectional controls, and lone
# surrogates, which UTF-8 cannot encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str) -> str:
    """Escape control characters as JSON strings do; single-line JSON keeps its meaning."""
    return _CONTROL.sub(lambda match: _SHORT.get(match[0], f"\\u{ord(match[0]):04x}"), text)
