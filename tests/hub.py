"""A small server with the routes of the Hugging Face hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """The routes that a download from the hub needs, for one repository, whose files are in a folder."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]]
    tokens: ClassVar[list[str | None]]  # of the requests
    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    LATER = "f" * 40
    REVISIONS = ("main", "v1", COMMIT, LATER)
    moves: ClassVar[bool] = False  # once a client has asked for a branch's commit, all move on to LATER
    listed: ClassVar[dict[str, Any]] = {}  # values that replace those of the list of files
    other: ClassVar[dict[str, Any]] = {}  # values that replace those of each file in this list
    headers_of: ClassVar[dict[str, str]] = {}  # headers of files that replace the right ones

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        self.tokens.append(self.headers.get("Authorization"))
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        if path.startswith("/api/models/org/gated"):
            self._answer(b"", code=403, error="GatedRepo")
        elif path.startswith("/api/models/org/model/revision/") and path.split("/")[-1] not in self.REVISIONS:
            self._answer(b"", code=404, error="RevisionNotFound")
        elif path == "/api/models/org/model" or path.startswith("/api/models/org/model/revision/"):
            commit = self._commit(path.split("/")[-1])
            siblings = [self._entry(p) | self.other for p in files]
            listed = {"id": "org/model", "sha": commit, "siblings": siblings} | self.listed
            self._answer(json.dumps(listed).encode())
            type(self).COMMIT = self.LATER if self.moves else self.COMMIT
        elif path.startswith("/api/models/org/model/tree/"):
            rows = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in files]
            self._answer(json.dumps(rows).encode())
        elif path.startswith("/org/model/resolve/") and path.split("/")[4] in self.REVISIONS:
            file = self.folder / path.split("/", 5)[5]
            if file.is_file():
                entry = self._entry(file)
                etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
                self._answer(file.read_bytes(), headers={"ETag": f'"{etag}"'} | self.headers_of)
            else:
                self._answer(b"", code=404, error="EntryNotFound")
        else:
            self._answer(b"", code=404, error="RepoNotFound")

    def _entry(self, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = file.relative_to(self.folder).as_posix()
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return entry

    def _answer(
        self, data: bytes, code: int = 200, error: str = "", headers: dict[str, str] | None = None
    ) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.send_response(206 if start else code)
        commit = self._commit(self.path.split("/")[4] if "/resolve/" in self.path else "main")
        right = {"Content-Length": str(len(data) - start), "X-Repo-Commit": commit}
        for key, value in (right | (headers or {}) | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_contents(data[start:])

    def send_contents(self, data: bytes) -> None:
        """Send the contents of a file, or of the list of files."""
        self.wfile.write(data)

    def _commit(self, revision: str) -> str:
        return revision if revision in (Hub.COMMIT, Hub.LATER) else self.COMMIT

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_of(folder: Path, host: str = "127.0.0.1") -> Iterator[tuple[type[Hub], int]]:
    """Serve the files of a folder as org/model; yields the handler class, which records the requests, and the port."""
    handler = type("OfFolder", (Hub,), {"folder": folder, "asked": [], "tokens": []})
    server = ThreadingHTTPServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield handler, server.server_port
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    """Let this process, and new ones, use a hub on this machine, with an empty cache of huggingface_hub."""
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)


@contextmanager
def offline() -> Iterator[None]:
    """Let this process use only files that were downloaded before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
