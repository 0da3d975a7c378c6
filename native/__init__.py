"""Encoder layers in C for processors with AMX or AVX-512 VNNI; without them ONNX Runtime runs the segments."""


class NoKernelsError(Exception):
    """This model or machine has no kernels; ONNX Runtime runs it."""
