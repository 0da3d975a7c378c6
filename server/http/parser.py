"""Parses the HTTP/1.1 requests of a connection, within limits on their size.

The parsing itself is done by httptools (Node's llhttp), which is fed up to the end of one message and no further. That
end can be found in advance: a head or a chunked body ends with an empty line, and llhttp accepts only CR LF as a line
end.
"""

import re

from httptools import HttpRequestParser

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# Chunk sizes, extensions and trailers of a chunked body may exceed the size of the body by this much.
MAX_FRAMING_BYTES = 64 * 1024
# Minimum mean size of the chunks after the first MAX_SMALL_CHUNKS. Each call to llhttp also counts as this many bytes
# of framing.
MIN_CHUNK_BYTES = 64
MAX_SMALL_CHUNKS = 1024
# Upgrades are not supported: the header is ignored.
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_END = b"\r\n\r\n"


class RequestParser:
    """Parses the requests of one connection, one at a time.

    `parse_head` and `parse_body` remove from `data` the bytes that they parse. They raise ValueError or
    httptools.HttpParserError for an invalid request.

    Attributes:
        data: received bytes that are not yet parsed.
        method, url, version, headers: parts of the current request; header names are in lower case.
        keep_alive: the client may send another request on this connection.
        host, hosts: the last Host header, and the number of Host headers.
        length: length of the body by Content-Length; -1 without that header.
        expects_continue: the client waits for 100 Continue before it sends the body.
        size: bytes of the body so far.
        is_complete: the whole request was parsed.
    """

    def __init__(self) -> None:
        self._llhttp = HttpRequestParser(self)
        self.data = b""
        self._searched = 0  # bytes of `data` already searched for the end of a head
        self._blank = 0  # bytes of empty lines before a head
        self._reset()

    def _reset(self) -> None:
        self.method, self.url, self.version = "", b"", ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.host, self.hosts = b"", 0
        self.keep_alive = self.expects_continue = self.is_complete = False
        self.length, self.size, self._framing = -1, 0, 0
        self._body: list[bytes] = []
        self._in_head = True

    @property
    def is_idle(self) -> bool:
        """True if nothing of the next request has been received."""
        return not self.data and not self._blank

    def parse_head(self) -> bool:
        """Parse a head; returns False if it is incomplete."""
        data = self.data
        if data[:1] in (b"\r", b"\n"):  # empty lines before a request are allowed (RFC 9112, 2.2)
            stripped = data.lstrip(b"\r\n")
            self._blank += len(data) - len(stripped)
            self.data = data = stripped
        if data and not 65 <= data[0] <= 90:  # such as TLS: its client would wait for a response
            raise ValueError("it does not begin with a method")
        end = data.find(_END, self._searched)
        if self._blank + (len(data) if end < 0 else end) > MAX_HEAD_BYTES:
            raise ValueError(f"its head is larger than {MAX_HEAD_BYTES} bytes")
        if end < 0:
            self._searched = max(0, len(data) - len(_END) + 1)
            return False
        if data.count(b"\r\n", 0, end) > MAX_HEADERS:
            raise ValueError(f"its head has more than {MAX_HEADERS} headers")
        head, self.data = data[: end + len(_END)], data[end + len(_END) :]
        self._searched = self._blank = 0
        if b"upgrade:" in head.lower():
            head = _UPGRADE.sub(b"", head)
        self._reset()
        self._llhttp.feed_data(head)
        self._in_head = False
        return True

    def parse_body(self) -> int:
        """Parse the received part of the body; returns the number of body bytes in it."""
        before = self.size
        if self.length >= 0:
            left = self.length - before
            piece, self.data = self.data[:left], self.data[left:]
            self._llhttp.feed_data(piece)
        else:
            self._parse_chunks()
        return self.size - before

    def _parse_chunks(self) -> None:
        while not self.is_complete:
            end = self.data.find(_END)
            # If the end has not arrived, feed all bytes except the last ones, which may be its beginning.
            to = len(self.data) - len(_END) + 1 if end < 0 else end + len(_END)
            if to <= 0:
                break
            piece, self.data = self.data[:to], self.data[to:]
            before = self.size
            self._llhttp.feed_data(piece)
            self._framing += to - (self.size - before) + MIN_CHUNK_BYTES
            if self._framing > MAX_FRAMING_BYTES + self.size:
                raise ValueError(f"more than {MAX_FRAMING_BYTES} bytes of chunk sizes and trailers")

    def take_body(self) -> bytes:
        """The complete body, which is then released."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        return body

    def release_body(self) -> None:
        """Release the parsed part of the body."""
        self._body = []

    # Callbacks of httptools

    def on_url(self, url: bytes) -> None:
        """Append a part of the URL."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header; trailers are ignored."""
        if not self._in_head:
            return
        name = name.lower()
        self.headers.append((name, value))
        if name == b"host":
            self.host, self.hosts = value, self.hosts + 1
        elif name == b"content-length":
            self.length = int(value)  # llhttp accepts digits only
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expects_continue = self._llhttp.get_http_version() == "1.1"

    def on_headers_complete(self) -> None:
        """Store the head's properties, which llhttp forgets once the message is complete."""
        self.method, self.version = self._llhttp.get_method().decode("ascii"), self._llhttp.get_http_version()
        self.keep_alive = self.version != "1.0" and bool(self._llhttp.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        """Append a part of the body; raises ValueError if its chunks are too small."""
        self._body.append(body)
        self.size += len(body)
        if self.length < 0 and len(self._body) > MAX_SMALL_CHUNKS + self.size // MIN_CHUNK_BYTES:
            raise ValueError("too many small chunks")

    def on_message_complete(self) -> None:
        """Mark the request as complete."""
        self.is_complete = True
