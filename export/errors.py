"""The error of an export."""


class ExportError(ValueError):
    """The exported model differs too much from the checkpoint; nothing was published."""
