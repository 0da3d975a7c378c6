"""Classify a column of a polars DataFrame: python examples/polars_frame.py IN OUT [MODEL]

The classifier's threads use all cores. Needs: pip install '.[bulk]' polars, in the checkout
"""

import os
import sys

import polars as pl

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))
ANSWER = ("label", "exit_layer", "error")


def main(source: str, out: str, model: str = "sst2") -> None:
    """Add each text's label and exit layer, or the reason why it has none, to a parquet file.

    The names of the added columns begin with de3_, because the file may have a column `label`.
    """
    frame = pl.read_parquet(source)
    with de3.load(model, store=STORE) as classifier:
        answers = pl.DataFrame(classifier.answers(frame["text"], as_arrow=True))
    frame.hstack(answers.select(pl.col(ANSWER).name.prefix("de3_"))).write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
