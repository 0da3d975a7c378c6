"""The time of one encoder layer, in ONNX Runtime and in the kernels."""

from pathlib import Path

import pytest

from de3.model_store.store import Store
from lab.layers import layers

kernels = pytest.importorskip("de3.native.kernels", reason="the kernels were not built: no C compiler")
ALL = kernels.implementations()  # the reference is the last


@pytest.mark.skipif(ALL == ["reference"], reason="the reference's peak is no measure")
def test_the_time_of_a_layer_by_both_runtimes(store: Path) -> None:
    found = layers(Store(store).open("tiny-int8"), lengths=(3, 10**6), rounds=1)
    (row,) = found["layers"]  # 10**6 tokens are above the model's maximum
    assert found["instructions"] == ALL[0]
    assert row["tokens"] == 3 and row["kernels_us"] > 0
    assert 0 < row["kernels_of_peak"] < 1 and 0 < row["onnxruntime_of_peak"] < 1
