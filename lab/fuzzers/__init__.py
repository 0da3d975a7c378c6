"""Fuzzers of the code that reads untrusted bytes, in process: `python -m lab fuzz-inputs`.

Each module has a `FUZZER`; `run.py` runs it.
"""

NAMES = ("connection", "graph", "manifest", "state", "tokenizer")
