"""Encoder layers in C, fast on AMX and AVX-512 VNNI; on other processors ONNX Runtime runs the segments."""


class NoKernelsError(Exception):
    """This model or machine has no kernels; ONNX Runtime runs it."""
