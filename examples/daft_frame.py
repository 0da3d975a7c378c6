"""Classify parquet files with Daft: python examples/daft_frame.py IN OUT [MODEL]

Each process loads the classifier once. Needs: pip install '.[bulk]' daft, in the checkout
"""

import os
import sys

import daft
from daft import DataType, Series, col

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))
ANSWER = {"label": DataType.string(), "exit_layer": DataType.int32(), "error": DataType.string()}


@daft.cls(max_concurrency=os.cpu_count() or 1, use_process=True)
class Classify:
    """A classifier with one engine thread, loaded in each process."""

    def __init__(self, model: str, store: str) -> None:
        self.model = de3.load(model, store=store, threads=1)

    @daft.method.batch(return_dtype=DataType.struct(ANSWER))
    def __call__(self, texts: Series) -> Series:
        """The columns ANSWER of each text; `error` is the reason if there is no label."""
        answers = self.model.answers(texts.to_pylist(), as_arrow=True)
        return Series.from_arrow(answers.select(list(ANSWER)).to_struct_array().combine_chunks())


def main(source: str, out: str, model: str = "sst2") -> None:
    """Add the columns in ANSWER to Parquet files, with the prefix de3_, because a file may have a column `label`."""
    frame = daft.read_parquet(source).with_column("de3", Classify(model, STORE)(col("text")))
    frame = frame.with_columns({f"de3_{name}": col("de3")[name] for name in ANSWER})
    frame.exclude("de3").write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
