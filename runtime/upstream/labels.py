"""Finds the label in a chat's reply."""

from collections.abc import Sequence
from typing import Any

from de3.runtime.upstream_settings import folded

MAX_CHARS = 2**14  # of a normalized reply, so that it takes a few milliseconds of the event loop
END = ""  # in the tree of labels, the key of a label's number; no word is empty


class Labels:
    """The labels that a reply may name."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._by_words = {folded(label): number for number, label in enumerate(labels)}
        self._tree: dict[str, Any] = {}  # of the words of labels, with a level for each word
        for words, number in self._by_words.items():
            node = self._tree
            for word in words:
                node = node.setdefault(word, {})
            node[END] = number

    def find(self, reply: str, is_exact: bool = False) -> tuple[int | None, bool]:
        """The number of the label that a reply names (None: no label, or several), and true if words are around it.

        A label is a sequence of whole words; a label within a longer one does not count. is_exact: the reply must be
        the label alone.
        """
        words = folded(reply, MAX_CHARS)
        if words in self._by_words:
            return self._by_words[words], False
        if is_exact:
            return None, False
        found, end = set[int](), 0
        for start in range(len(words)):
            node, longest = self._tree, None
            for at in range(start, len(words)):
                node = node.get(words[at], {})
                if not node:
                    break
                if END in node and at >= end:  # otherwise it is within a longer label
                    longest = at + 1, node[END]
            if longest is not None:
                end = longest[0]
                found.add(longest[1])
        return (found.pop(), True) if len(found) == 1 else (None, False)
