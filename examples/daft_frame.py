"""Classify parquet files with Daft: python examples/daft_frame.py IN OUT [MODEL]

Each process loads the classifier once. Needs: pip install 'de3[bulk]' daft
"""

import os
import sys

import daft
from daft import DataType, Series, col

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))
ANSWER = DataType.struct({"label": DataType.string(), "exit_layer": DataType.int32()})


@daft.cls(max_concurrency=os.cpu_count() or 1, use_process=True)
class Classify:
    """A classifier with one engine thread, loaded in each process."""

    def __init__(self, model: str, store: str) -> None:
        self.model = de3.load(model, store=store, threads=1)

    @daft.method.batch(return_dtype=ANSWER)
    def __call__(self, texts: Series) -> Series:
        """The label and exit layer of each text."""
        answers = self.model.classify(texts.to_pylist(), as_arrow=True)
        return Series.from_arrow(answers.select(["label", "exit_layer"]).to_struct_array().combine_chunks())


def main(source: str, out: str, model: str = "sst2") -> None:
    """Add the label and the exit layer of each text to parquet files."""
    frame = daft.read_parquet(source)
    frame = frame.with_column("answer", Classify(model, STORE)(col("text")))
    answers = [col("answer")["label"].alias("label"), col("answer")["exit_layer"].alias("exit_layer")]
    frame.with_columns({one.name(): one for one in answers}).exclude("answer").write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
