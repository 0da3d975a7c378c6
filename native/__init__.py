"""The kernels: encoder layers in C, for x86-64 with AVX2 and Arm with dotprod. Elsewhere, ONNX Runtime runs models."""


class NoKernelsError(Exception):
    """The kernels do not support this model or machine; ONNX Runtime runs the model instead."""
