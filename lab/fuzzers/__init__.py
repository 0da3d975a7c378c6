"""Fuzzers of the code that reads untrusted bytes, in process: `python -m lab fuzz-inputs`."""
