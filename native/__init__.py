"""Encoder layers in C, fast on x86-64 with AVX2 and on Arm with dotprod; elsewhere ONNX Runtime runs the segments."""


class NoKernelsError(Exception):
    """This model or machine has no kernels; ONNX Runtime runs it."""
