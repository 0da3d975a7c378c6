"""Classify a column of a polars DataFrame: python examples/polars_frame.py IN OUT [MODEL]

The classifier's threads use all cores. Needs: pip install 'de3[bulk]' polars
"""

import os
import sys

import polars as pl

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))


def main(source: str, out: str, model: str = "sst2") -> None:
    """Add the label and the exit layer of each text to a parquet file."""
    with de3.load(model, store=STORE) as classifier:
        answer = pl.Struct({"label": pl.String, "exit_layer": pl.Int32})

        def classify(texts: pl.Series) -> pl.Series:
            table = classifier.classify(texts.to_list(), as_arrow=True)
            return pl.DataFrame(table.select(["label", "exit_layer"])).to_struct("answer")

        frame = pl.read_parquet(source)
        answers = pl.col("text").map_batches(classify, return_dtype=answer).alias("answer")
        frame.with_columns(answers).unnest("answer").write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
