"""Downloads from the Hugging Face hub into the cache of huggingface_hub, with limits on what the hub can do.

A hub or mirror is untrusted. huggingface_hub takes paths from the hub's headers, writes as many bytes as the hub sends,
and keeps waiting as long as a byte arrives now and then. So this module uses the library's cache and settings, but not
its download functions.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from io import BufferedRandom, BytesIO
from os.path import relpath
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from huggingface_hub import constants, get_token
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, tqdm, validate_repo_id  # type: ignore[attr-defined]
from pydantic import BaseModel, Field, ValidationError

from de3.model_store.part import first_error
from de3.model_store.store import MAX_FILE_BYTES

log = logging.getLogger("de3")

MAX_LIST_BYTES, MAX_FILES = 2**23, 10_000  # a list of this size takes 0.4 GB to parse
MAX_OTHER_BYTES = MAX_FILE_BYTES["tokenizer.json"]  # limit for a file other than weights
MAX_DOWNLOAD_BYTES = 2**34
STALL_S, STALL_BYTES = 60.0, 2**20  # a download fails if it receives fewer than this many bytes in this time
NEXT = ": try again, or check HF_ENDPOINT"
MAX_REDIRECTS = 10
RETRY_S = 1.0  # pause before a lost connection is reopened

Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
T = TypeVar("T")


class HubError(ValueError):
    """The hub cannot be reached, refuses a request, or sends something other than what it announced."""


class Large(BaseModel):
    """The entry of a file in large file storage."""

    sha256: Sha256


class File(BaseModel):
    """A file as the hub lists it.

    Attributes:
        name: its path in the repository.
        size: in bytes; None if the hub does not say.
        git: git's hash of the file or, if `large` is set, of a pointer to it.
    """

    name: str = Field(alias="rfilename")
    size: int | None = Field(None, ge=0)
    git: Commit | None = Field(None, alias="blobId")
    large: Large | None = Field(None, alias="lfs")

    @property
    def hash(self) -> str | None:
        """The hash under which the cache keeps the file; None if the hub does not say."""
        return self.large.sha256 if self.large else self.git

    def hash_of(self, file: BufferedRandom) -> str:
        """The hash of a file's contents, of the same kind as `hash`; a sha256 if the hub lists none."""
        prefix = b"blob %d\0" % file.seek(0, 2) if self.git and not self.large else b""
        file.seek(0)
        kind = hashlib.sha1 if prefix else hashlib.sha256
        return hashlib.file_digest(file, lambda: kind(prefix, usedforsecurity=False)).hexdigest()


class Listing(BaseModel):
    """The commit of a revision, and its files."""

    commit: Commit = Field(alias="sha")
    files: list[File] = Field(alias="siblings", max_length=MAX_FILES)


def limit_of(name: str) -> int:
    """Maximum size of a file with this name, in bytes."""
    return MAX_DOWNLOAD_BYTES if name.endswith((".safetensors", ".bin")) else MAX_OTHER_BYTES


def list_files(repository: str, revision: str) -> Listing:
    """The files of a revision; raises HubError, and HFValidationError for an invalid repository id."""
    validate_repo_id(repository)
    url = f"{constants.ENDPOINT}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"

    async def get(transfer: _Transfer) -> bytes:
        body = BytesIO()
        await transfer.receive("no such folder here, and its list of files", url, MAX_LIST_BYTES, body)
        return body.getvalue()

    try:
        return Listing.model_validate_json(_run(get))
    except ValidationError as error:
        raise HubError(f"the hub's list of its files is invalid: {first_error(error)}") from None


def download(repository: str, commit: str, files: Collection[File]) -> Path:
    """The folder in huggingface_hub's cache with the files of a commit, after downloading those that are missing.

    files: their names must not lead out of the folder. Raises HubError, and OSError if the cache cannot be written.
    """
    cache, name = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repository, repo_type="model")
    folder, blobs = cache / name / "snapshots" / commit, cache / name / "blobs"

    def is_there(file: File) -> bool:
        """True if the file is in the cache, unless it is a link to a blob with another hash, such as another hub's."""
        path = folder / file.name
        return path.exists() and not (path.is_symlink() and file.hash and path.readlink().name != file.hash)

    async def get(transfer: _Transfer) -> None:
        for file in files:
            if not is_there(file):
                url = f"{constants.ENDPOINT}/{repository}/resolve/{commit}/{file.name}"
                _link(folder / file.name, await transfer.blob(file, url, blobs))

    if not all(map(is_there, files)):
        lock = cache / ".locks" / name / "de3.lock"
        for parent in (lock.parent, folder, blobs):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # a second server waits for the first, and then uses its files
            for left in blobs.glob("?" * 32 + ".incomplete"):  # partial downloads of a killed process
                left.unlink(missing_ok=True)
            size = sum(file.size or 0 for file in files if not is_there(file))
            if size >= 1e6:  # not config.json, which comes first
                log.info("%s: downloading %.0f MB into %s", repository, size / 1e6, cache)
            _run(get, size)
    return folder


def _link(path: Path, blob: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a file that was removed
    try:
        path.symlink_to(Path(relpath(blob, path.parent)))
    except OSError:  # a file system without links
        blob.rename(path)


def _run(work: "Callable[[_Transfer], Coroutine[Any, Any, T]]", total: int = 0) -> T:
    """Run a transfer in an event loop, whose timeouts also cover connection attempts and headers that never end."""

    async def run() -> T:
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        trusted = httpx.create_ssl_context()
        trusted.load_default_certs()  # the system's certificates, in addition to certifi's
        client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            verify=trusted,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        transfer = _Transfer(client)
        hidden = None if total > STALL_BYTES else True  # None: hidden unless stderr is a terminal
        try:
            with tqdm(total=total, unit="B", unit_scale=True, disable=hidden) as transfer.bar:  # type: ignore[no-untyped-call]
                async with asyncio.timeout(STALL_S) as transfer.stall, client:
                    return await work(transfer)
        except TimeoutError:
            raise HubError(
                f"{transfer.what} is downloading too slowly from the hub: less than {STALL_BYTES} bytes in "
                f"{STALL_S:g} s: try again, or check the network and HF_ENDPOINT"
            ) from None

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as thread:  # the caller's thread may have a loop, as in a notebook
        return thread.submit(asyncio.run, run()).result()


class _Transfer:
    """The requests of one run.

    Attributes:
        what: the file in progress, for messages.
        stall: the time at which the run ends unless it makes progress.
    """

    bar: Any
    stall: asyncio.Timeout

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.what = ""
        self._client = client
        self._received = self._seen = 0  # bytes so far, and at the last progress

    async def receive(self, what: str, url: str, limit: int, file: IO[bytes]) -> None:
        """Write the contents of an address to a file; raises HubError.

        what: the file, for messages. limit: maximum number of bytes.
        """
        self.what, received = what, 0
        while True:
            resume = {"Range": f"bytes={received}-"} if received else {}
            try:
                async with aclosing(await self._open(url, resume)) as response:
                    if response.status_code != (206 if received else 200):
                        raise HubError(_reason(what, response))
                    async for chunk in response.aiter_raw():
                        received += len(chunk)
                        if received > limit:
                            raise HubError(
                                f"the hub sends more for {what} than the expected {limit} bytes{NEXT}"
                            )
                        file.write(chunk)
                        self._count(len(chunk))
                return
            except httpx.RequestError as error:
                if not received:
                    reason = f"{type(error).__name__}: {error!s:.200}"
                    raise HubError(
                        f"{what} cannot be read from the hub ({reason}): check the name, the network and HF_ENDPOINT"
                    ) from None
                await asyncio.sleep(RETRY_S)

    async def _open(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """The response after redirects. httpx would read the body of a redirect, decompressed, without a limit."""
        request = self._client.build_request("GET", url, headers=headers)
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._client.send(request, stream=True)
            if response.next_request is None:
                return response
            await response.aclose()
            request = response.next_request
        raise HubError(f"{self.what} is redirected too often{NEXT}")

    def _count(self, received: int) -> None:
        self.bar.update(received)
        self._received += received
        if self._received - self._seen >= STALL_BYTES:
            self._seen = self._received
            self.stall.reschedule(asyncio.get_running_loop().time() + STALL_S)

    def _extend(self, seconds: float) -> None:
        if (end := self.stall.when()) is not None:
            self.stall.reschedule(end + seconds)

    async def blob(self, file: File, url: str, folder: Path) -> Path:
        """The path of a file in the cache's folder of blobs, after downloading it if it is missing; raises HubError."""
        if file.hash and (folder / file.hash).is_file():
            return folder / file.hash
        limit = file.size
        if limit is None:
            limit = min(limit_of(file.name), MAX_DOWNLOAD_BYTES - self._received)
        draft = folder / f"{uuid4().hex}.incomplete"
        try:
            with draft.open("xb+") as opened:
                await self.receive(file.name, url, limit, opened)
                if file.size not in (None, opened.tell()):
                    raise HubError(
                        f"the hub sends {opened.tell()} bytes for {file.name}, but lists {file.size}{NEXT}"
                    )
                start = asyncio.get_running_loop().time()
                found = file.hash_of(opened)
                self._extend(asyncio.get_running_loop().time() - start)  # by the time that hashing took
            if file.hash not in (None, found):
                raise HubError(
                    f"the hub sends wrong contents for {file.name} (hash {found}, not {file.hash}){NEXT}"
                )
            return draft.replace(folder / found)
        finally:
            draft.unlink(missing_ok=True)


def _reason(what: str, response: httpx.Response) -> str:
    """The reason why the hub refused a request, or why a download was not resumed."""
    code = response.headers.get("X-Error-Code")
    if code == "GatedRepo":
        return "access to it is restricted: accept its terms on the hub, and set HF_TOKEN"
    if code == "RevisionNotFound":
        return "the hub has no such revision"
    if code == "RepoNotFound" or response.status_code == 401:
        return "no such folder here, and no such repository on the hub; for a private one, set HF_TOKEN"
    if response.is_success:
        return f"the connection was lost while reading {what}, and the hub cannot resume it: try again"
    return f"{what} cannot be read from the hub, which answered {response.status_code}: try again later"
