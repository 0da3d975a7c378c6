# /// script
# dependencies = ["fastapi", "uvicorn[standard]", "onnxruntime>=1.20", "orjson", "tokenizers", "numpy"]
# ///
"""Peer: the full-depth graph of a token classifier behind a minimal FastAPI app, like fused_app.py.

Its spans are those of transformers' aggregation `simple`.
Usage: spans_app.py FOLDER --port PORT [--threads N]
"""

from pathlib import Path

import numpy as np
from graph import Graph
from lean import parser, run
from tokenizers import Encoding


class SpanGraph(Graph):
    """Finds the spans of a text."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tags = [name[2:] if name[:2] in ("B-", "I-") else name for name in self.labels]
        self.begins = [name.startswith("B-") for name in self.labels]

    def warm_up(self) -> None:
        """Run texts of several lengths; without their spans, as the labels are not prepared yet."""
        for tokens in (8, 64, self.max_tokens):
            self.logits(self.encode("warm " * tokens))

    def logits(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The logits of a text's tokens, (tokens, num_labels)."""
        return self.session.run(None, inputs)[0]

    def __call__(self, text: str) -> dict[str, object]:
        encoding = self.tokenizer.encode_batch([text])[
            0
        ]  # with offsets, which encode_batch_fast does not compute
        return {"spans": self.spans(encoding, self.logits(self.inputs(encoding)))}

    def spans(self, encoding: Encoding, logits: np.ndarray) -> list[dict[str, object]]:
        """The spans that the logits, (tokens, num_labels), give."""
        best, spans, last, scores = logits.argmax(-1).tolist(), [], -2, []
        offsets, special = encoding.offsets, encoding.special_tokens_mask
        for t, label in enumerate(best):
            tag = self.tags[label]
            if tag == "O" or special[t]:
                continue
            score = 1 / float(np.exp(logits[t] - logits[t, label]).sum())
            if last == t - 1 and spans[-1]["label"] == tag and not self.begins[label]:
                scores.append(score)
            else:
                scores = [score]
                spans.append({"start": offsets[t][0], "label": tag})
            spans[-1] |= {"end": offsets[t][1], "score": sum(scores) / len(scores)}
            last = t
        return spans


if __name__ == "__main__":
    args = parser(__doc__).parse_args()
    run(args, SpanGraph(args.folder))
