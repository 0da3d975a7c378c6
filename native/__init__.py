"""The kernels: encoder layers in C, for Linux on x86-64 (AVX2) and Arm (dotprod); elsewhere ONNX Runtime is used."""


class NoKernelsError(Exception):
    """The kernels cannot be used for this model or machine; ONNX Runtime runs the model instead."""
