"""Encoder layers in C for processors with AMX; optional: without it ONNX Runtime runs the segments."""


class NoKernelsError(Exception):
    """This model or machine has no kernels; ONNX Runtime runs it."""
