"""A small server with the routes of the Hugging Face hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class Hub(BaseHTTPRequestHandler):
    """The routes that a download from the hub needs, for one repository, whose files are in a folder."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]]
    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    LATER = "f" * 40
    REVISIONS = ("main", "v1", COMMIT, LATER)
    moves: ClassVar[bool] = (
        False  # once a client has asked for the newest commit, every branch moves on to LATER
    )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/models/org/gated"):
            self._answer(b"", code=403, error="GatedRepo")
        elif path.startswith("/api/models/org/model/revision/") and path.split("/")[-1] not in self.REVISIONS:
            self._answer(b"", code=404, error="RevisionNotFound")
        elif path == "/api/models/org/model" or path.startswith("/api/models/org/model/revision/"):
            names = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
            commit = self._commit(path.split("/")[-1])
            self._answer(json.dumps({"id": "org/model", "sha": commit, "siblings": names}).encode())
            type(self).COMMIT = self.LATER if self.moves else self.COMMIT
        elif path.startswith("/api/models/org/model/tree/"):
            rows = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in files]
            self._answer(json.dumps(rows).encode())
        elif path.startswith("/org/model/resolve/") and path.split("/")[4] in self.REVISIONS:
            file = self.folder / path.split("/")[-1]
            if file.is_file():
                self._answer(file.read_bytes())
            else:
                self._answer(b"", code=404, error="EntryNotFound")
        else:
            self._answer(b"", code=404, error="RepoNotFound")

    def _answer(self, data: bytes, code: int = 200, error: str = "") -> None:
        self.send_response(code)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        commit = self._commit(self.path.split("/")[4] if "/resolve/" in self.path else "main")
        headers = {"Content-Length": str(len(data)), "X-Repo-Commit": commit, "ETag": etag}
        for key, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _commit(self, revision: str) -> str:
        return revision if revision in (Hub.COMMIT, Hub.LATER) else self.COMMIT

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_of(folder: Path, host: str = "127.0.0.1") -> Iterator[tuple[type[Hub], int]]:
    """Serve the files of a folder as org/model; yields the handler class, which records the requests, and the port."""
    handler = type("OfFolder", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield handler, server.server_port
    finally:
        server.shutdown()
        server.server_close()
