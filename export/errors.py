"""The exception of a failed export."""


class ExportError(ValueError):
    """The exported model differs too much from the checkpoint; nothing was published."""
