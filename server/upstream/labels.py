"""Finds the label in a chat's reply."""

from collections.abc import Sequence

from de3.server.upstream_settings import folded

MAX_CHARS = 2**14  # of a reply; folding a megabyte would block the event loop


class Labels:
    """The labels that a reply may name."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._by_words = {folded(label): number for number, label in enumerate(labels)}
        self._lengths = sorted({len(words) for words in self._by_words}, reverse=True)

    def find(self, reply: str, is_exact: bool = False) -> tuple[int | None, bool]:
        """The number of the label that a reply names (None: no label, or several), and true if words are around it.

        A label is a sequence of whole words; a label within a longer one does not count. is_exact: the reply must be
        the label alone.
        """
        if len(reply) > MAX_CHARS:
            return None, False
        words = folded(reply)
        if words in self._by_words:
            return self._by_words[words], False
        if is_exact:
            return None, False
        found, end = set[int](), 0
        for at in range(len(words)):
            left = len(words) - at  # a longer slice would end early
            length = next((n for n in self._lengths if n <= left and words[at : at + n] in self._by_words), 0)
            if length and at + length > end:  # otherwise it is within a longer label
                end = at + length
                found.add(self._by_words[words[at:end]])
        return (found.pop(), True) if len(found) == 1 else (None, False)
