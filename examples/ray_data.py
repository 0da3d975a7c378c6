"""Classify parquet files with Ray Data: python examples/ray_data.py IN OUT [MODEL]

Each actor loads the classifier once and uses one core. Needs: pip install '.[bulk]' 'ray[data]', in the checkout
"""

import os
import sys
from typing import Any

import pyarrow as pa
import ray

import de3

STORE = os.environ.get("DE3_STORE", str(de3.DEMO))
BATCH = 4096  # enough texts of each length to fill groups
BLOCK = 8 * BATCH  # rows that an actor takes at a time


class Classify:
    """An actor: a classifier with one engine thread."""

    def __init__(self, model: str, store: str) -> None:
        self.model = de3.load(model, store=store, threads=1)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the answers' columns added; `de3_error` is the reason if a text has no answer."""
        answers = self.model.answers(batch.column("text"), as_arrow=True)
        for name in answers.column_names:
            batch = batch.append_column(f"de3_{name}", answers.column(name))
        return batch


def main(source: str, out: str, model: str = "sst2", actors: int = os.cpu_count() or 1) -> None:
    """Classify the files of a folder, or one file, with an actor for each core."""
    options: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": BATCH, "num_cpus": 1 - 1 / actors}
    pool = ray.data.ActorPoolStrategy(size=actors)
    # Together the actors reserve all cores but one: with none left, the tasks that list and read files would never run.
    rows = ray.data.read_parquet(source, num_cpus=0.1)
    rows = rows.repartition(target_num_rows_per_block=BLOCK)  # otherwise one actor may get all rows of a file
    rows = rows.map_batches(Classify, fn_constructor_args=(model, STORE), compute=pool, **options)
    rows.write_parquet(out, ray_remote_args={"num_cpus": 0.1})


if __name__ == "__main__":
    main(*sys.argv[1:])
