"""Request bodies that are compressed with zstd, as some clients send them; needs the zstd extra."""

from de3.runtime.errors import RequestError

ZSTD, GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"  # the first bytes of compressed data; no JSON begins so
MAX_WINDOW_BYTES = 2**23  # which RFC 8878 recommends
FIRST = frozenset({ZSTD[:1], GZIP[:1]})


def decompressed(body: bytes, limit: int) -> bytes:
    """The body, decompressed if it is compressed.

    Raises RequestError for another encoding than zstd, without the extra, and for more bytes than the limit.
    """
    if not body.startswith((ZSTD, GZIP)):
        return body
    try:
        import zstandard
    except ImportError:
        zstandard = None  # type: ignore[assignment]
    if zstandard is None or body.startswith(GZIP):
        allowed = "identity" if zstandard is None else "zstd or identity"
        raise RequestError(
            f"content-encoding: the body is compressed; allowed: {allowed}",
            "content-encoding",
            "unsupported_encoding",
        )
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(body) as reader:
            found = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise RequestError(f"content-encoding: the body is not zstd: {error}", "content-encoding") from None
    if len(found) > limit:
        raise RequestError(
            f"the decompressed body is larger than the limit of {limit} bytes", cause="too_large"
        )
    return found
