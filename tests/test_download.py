"""Downloads from a hub, which is untrusted, into the cache of huggingface_hub."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Semaphore
from time import sleep
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from de3.export import download
from de3.export.download import File, HubError, list_files
from de3.export.encoder import describe_encoder
from de3.export.hub import ENCODER_FILES, fetch
from tests.hub import Hub, hub_of, offline, use_hub

WEIGHTS = bytes(range(256)) * 400
FILES = {"config.json", "tokenizer.json", "model.safetensors"}
CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 10}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The handler class of a hub that serves org/model, whose weights nothing can read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    monkeypatch.setattr(download, "RETRY_S", 0)
    with hub_of(folder) as (handler, port):
        use_hub(monkeypatch, port, tmp_path / "hf")
        yield handler


def download_one(hub: type[Hub], file: File) -> bytes:
    return (download.download("org/model", hub.COMMIT, [file]) / file.name).read_bytes()


def listed(name: str = "model.safetensors") -> File:
    (file,) = [file for file in list_files("org/model", "main").files if file.name == name]
    return file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def blobs() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("blobs/*"))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("path", ["OUT/file", "../file"])
@pytest.mark.parametrize("what", ["etag", "commit", "sha", "blobId", "lfs", "rfilename"])
def test_a_hub_chooses_no_path(hub: type[Hub], tmp_path: Path, what: str, path: str) -> None:
    path = path.replace("OUT", str(tmp_path / "out"))
    before = files(tmp_path)
    match what:
        case "etag" | "commit":
            hub.headers_of = {{"etag": "ETag", "commit": "X-Repo-Commit"}[what]: path}
        case "sha":
            hub.listed = {"sha": path}
        case "rfilename":
            hub.listed = {"siblings": [{what: name} for name in (*FILES, f"model-/{path}-of-.safetensors")]}
        case _:
            hub.other = {what: {"sha256": path} if what == "lfs" else path}
    if what in ("etag", "commit", "rfilename"):  # not used
        assert names(fetch("org/model")) == FILES
    else:
        with pytest.raises(ValueError, match=f"^org/model: .*list of its files is invalid: .*{what}"):
            fetch("org/model")
    assert all((tmp_path / "hf") in file.parents for file in files(tmp_path) - before)
    assert all(file.resolve().parent.name == "blobs" for file in (tmp_path / "hf").rglob("snapshots/*/*"))


def endless(self: Hub, _: bytes) -> None:
    while True:
        self.wfile.write(bytes(2**16))


def in_parts(self: Hub, data: bytes) -> None:
    self.wfile.write(data[:50_000])
    self.close_connection = True


def only_at_first(self: Hub, data: bytes) -> None:
    in_parts(self, data)
    type(self).send_response = lambda self, _: BaseHTTPRequestHandler.send_response(self, 200)


def backwards(self: Hub, data: bytes) -> None:
    self.wfile.write(data[::-1])


@pytest.mark.parametrize(
    ("send", "name", "size", "says"),
    [
        (endless, "model.safetensors", 100, "more for model.safetensors than .* 100 bytes"),
        (endless, "model.safetensors", None, f"more for model.safetensors than .* {2**20} bytes"),
        (Hub.send_contents, "tokenizer.json", 3, "sends 2 bytes for tokenizer.json, but lists 3"),
        (backwards, "model.safetensors", "as listed", "wrong contents for model.safetensors"),
        (backwards, "tokenizer.json", "as listed", "wrong contents for tokenizer.json"),
        (only_at_first, "model.safetensors", "as listed", "lost while reading model.safetensors"),
    ],
)
def test_other_contents_than_announced_or_allowed_are_refused(
    hub: type[Hub],
    send: Callable[[Hub, bytes], None],
    name: str,
    size: Any,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "MAX_DOWNLOAD_BYTES", 2**20)
    file = listed(name) if size == "as listed" else File(rfilename=name, size=size)
    hub.send_contents = send
    hub.headers_of = {"Content-Length": str(2**40)} if send == endless else {}
    with pytest.raises(HubError, match=says):
        download_one(hub, file)
    assert not blobs()


def test_a_list_of_files_is_limited(hub: type[Hub]) -> None:
    for hub.listed, says in (
        ({"siblings": [{}] * 10_001}, "siblings: List should have at most 10000 items"),
        ({"more": "x" * 2**23}, r"more for .* list of files than the expected 8388608 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^org/model: .*{says}"):
            fetch("org/model")


def slow_body(self: Hub, _: bytes) -> None:
    while True:
        self.wfile.write(b"x")
        self.wfile.flush()
        sleep(0.01)


def slow_headers(self: Hub) -> None:
    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    slow_body(self, b"")


def silent(self: Hub) -> None:
    self.rfile.read(1)  # until the client closes the connection


@pytest.mark.parametrize("how", ["body", "headers"])
def test_a_download_without_progress_ends(hub: type[Hub], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "body":
        hub.send_contents = slow_body
        hub.headers_of = {"Content-Length": str(2**30)}
    else:
        hub.do_GET = slow_headers
    monkeypatch.setattr(download, "STALL_S", 0.3)
    with pytest.raises(HubError, match=r"^model\.safetensors is downloading too slowly .* in 0\.3 s"):
        download_one(hub, File(rfilename="model.safetensors", size=2**30))
    assert not blobs()
    with pytest.raises(ValueError, match=r"^org/model: .* its list of files is downloading too slowly"):
        fetch("org/model")


def test_progress_sets_a_new_time_limit(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: Hub, data: bytes) -> None:
        download.STALL_S = 0  # the limit from the next progress on
        self.wfile.write(data[: download.STALL_BYTES])
        silent(self)

    (hub.folder / "model.safetensors").write_bytes(bytes(download.STALL_BYTES + 1))
    file = listed()
    hub.send_contents = send
    monkeypatch.setattr(download, "STALL_S", 60.0)
    with pytest.raises(HubError, match=rf"less than {download.STALL_BYTES} bytes in 0 s"):
        download_one(hub, file)


def test_a_lost_connection_is_resumed(hub: type[Hub]) -> None:
    file = listed()
    hub.send_contents = in_parts
    assert download_one(hub, file) == WEIGHTS
    assert len(hub.asked) == 1 + -(-len(WEIGHTS) // 50_000)


def test_a_second_download_waits_for_the_first(hub: type[Hub]) -> None:
    starts, file = Semaphore(0), listed()

    def start() -> bytes:
        starts.release()
        return download_one(hub, file)

    def send(self: Hub, data: bytes) -> None:
        assert starts.acquire(timeout=60) and starts.acquire(timeout=60)  # both are there
        Hub.send_contents(self, data)

    hub.asked.clear()
    hub.send_contents = send
    with ThreadPoolExecutor(2) as pool:
        assert [one.result(60) for one in (pool.submit(start), pool.submit(start))] == [WEIGHTS] * 2
    assert len(hub.asked) == 1


def test_a_thread_with_an_event_loop_can_download(hub: type[Hub]) -> None:
    async def notebook() -> Path:
        return fetch("org/model")

    assert names(asyncio.run(notebook())) == FILES


def test_a_cache_that_cannot_be_written_is_named(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "hf").touch()
    with pytest.raises(ValueError, match=r"^org/model: .* into .*/hf .*: set HF_HOME"):
        fetch("org/model")


def test_the_cache_is_that_of_huggingface_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = snapshot_download("org/model")
    hub.asked.clear()
    assert fetch("org/model") == Path(theirs)
    assert len(hub.asked) == 1  # the list of files
    with hub_of(hub.folder) as (_, port), monkeypatch.context() as patch:
        use_hub(patch, port, hub.folder.parent / "other")
        folder = fetch("org/model@v1")
        ours = {path.name: path.resolve().name for path in folder.iterdir()}
        assert ours == {path.name: path.resolve().name for path in Path(theirs).iterdir()}
        with offline():
            assert snapshot_download("org/model", revision="v1") == str(folder)
            assert hf_hub_download("org/model", "config.json", revision="v1") == str(folder / "config.json")


def test_only_an_encoders_pooling_comes_from_another_folder(hub: type[Hub]) -> None:
    for name in ("1_Pooling/config.json", "onnx/config.json"):
        (hub.folder / name).parent.mkdir()
        (hub.folder / name).write_text("{}")
    assert names(fetch("org/model")) == FILES
    folder = fetch("org/model", describe_encoder, ENCODER_FILES)
    assert names(folder) == FILES | {"1_Pooling"}
    assert (folder / "1_Pooling/config.json").read_text() == "{}"
    assert snapshot_download("org/model", allow_patterns="*.json") == str(folder)


@pytest.mark.parametrize("same_commit", [False, True])  # True: from another hub
def test_only_files_that_changed_are_downloaded_again(hub: type[Hub], same_commit: bool) -> None:
    before = fetch("org/model")
    (hub.folder / "tokenizer.json").write_text("[]")
    hub.COMMIT = hub.COMMIT if same_commit else hub.LATER
    hub.asked.clear()
    folder = fetch("org/model")
    assert folder.name == hub.COMMIT and (folder / "tokenizer.json").read_text() == "[]"
    assert (folder / "model.safetensors").samefile(before / "model.safetensors")
    assert [line.split("/")[-1] for line in hub.asked[1:]] == ["tokenizer.json"]


def test_drafts_of_killed_downloads_are_removed(hub: type[Hub]) -> None:
    folder = fetch("org/model")
    draft = blobs()[0].with_name("0" * 32 + ".incomplete")
    draft.write_bytes(b"half of a file")
    next(iter(folder.iterdir())).unlink()
    fetch("org/model")
    assert not draft.exists()


def redirect_to(self: Hub, url: str) -> None:
    self.send_response(302)
    self.send_header("Location", url)
    self.end_headers()
    with suppress(OSError):
        endless(self, b"")  # could also grow a thousandfold when it is decompressed


def test_a_redirect_gets_no_token_and_its_body_is_not_read(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub_of(hub.folder) as (storage, port):

        def redirect(self: Hub) -> None:
            if "/resolve/" not in self.path:
                return Hub.do_GET(self)
            self.tokens.append(self.headers.get("Authorization"))
            return redirect_to(self, f"http://127.0.0.1:{port}{self.path}")

        hub.do_GET = redirect
        assert names(fetch("org/model")) == FILES
    assert hub.tokens == ["Bearer hf_secret"] * 4 and storage.tokens == [None] * 3
    hub.do_GET = lambda self: redirect_to(self, self.path)
    with pytest.raises(ValueError, match="redirected too often"):
        fetch("org/model@v1")
