"""Classify a column of a polars DataFrame: python examples/polars_frame.py IN OUT [MODEL]

The classifier's threads use all cores. Needs: pip install 'de3[bulk]' polars
"""

import os
import sys

import polars as pl

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))


def main(source: str, out: str, model: str = "sst2") -> None:
    """Add each text's label and exit layer, or the reason why it has none, to a parquet file."""
    frame = pl.read_parquet(source)
    with de3.load(model, store=STORE) as classifier:
        answers = pl.DataFrame(classifier.answers(frame["text"], as_arrow=True))
    frame.hstack(answers.select("label", "exit_layer", "error")).write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
