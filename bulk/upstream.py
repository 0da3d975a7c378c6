"""The answers of upstreams in a run: the calls that one process makes for all, and the journal of their answers."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import orjson

from de3.bulk.pool import LocalPool
from de3.client import Input, Options
from de3.columns import Answers, prefixes
from de3.library import checked_text
from de3.model_store.manifest import Manifest
from de3.model_store.regular_file import read_regular_file
from de3.model_store.store import Artifact
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.settings import RuntimeSettings
from de3.runtime.upstream.answer import reading_of
from de3.runtime.upstream.calls import Calls
from de3.runtime.upstream.client import Reply
from de3.runtime.upstream.undelivered import key_of
from de3.runtime.upstream.usage import Kind, Query
from de3.runtime.upstream_settings import UpstreamModel

AHEAD = 4  # slices, in addition to those that run, whose texts may wait for an upstream


class Journal:
    """The answers of upstreams, on disk as they arrive, so that a run that continues does not pay for them again.

    Each line has the hash of an upstream and a text, the number of the label, and the probabilities.
    """

    def __init__(self, file: Path) -> None:
        """Raises OSError or ValueError for a file that cannot be read."""
        self._file, self.replies = file, dict[str, Reply]()
        self._opened: int | None = None
        if not file.exists():
            return
        for line in read_regular_file(file, sys.maxsize).splitlines():
            try:
                key, label, probs = orjson.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            self.replies[key] = Reply(label, probs)

    def add(self, key: str, reply: Reply) -> None:
        """Record an answer; raises OSError."""
        if self._opened is None:
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._opened = os.open(self._file, flags, 0o600)
        # The line break comes first, because the last line may be incomplete.
        os.write(self._opened, b"\n" + orjson.dumps([key, reply.label, reply.probs]))
        self.replies[key] = reply

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            os.close(self._opened)


class UpstreamPool(LocalPool):
    """Completes the answers of the processes with those of upstreams; other slices run while texts wait for them.

    Attributes:
        callers: the callers of the upstreams.
    """

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        options: Options,
        threads: int | None,
        upstreams: Sequence[UpstreamModel],
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        """folder: of the journal and the usage. say: see Calls. The others, and errors: see LocalPool."""
        super().__init__(artifacts, options, threads, upstreams)
        self.size += AHEAD
        self._journal, self._asking = Journal(folder / "answers.jsonl"), dict[str, asyncio.Task[Reply]]()
        manifests = [artifact.manifest for artifact in artifacts]
        names = prefixes([one.name for one in manifests]) if len(manifests) > 1 else [""]
        self._models = {p: one for p, one in zip(names, manifests, strict=True) if one.upstream is not None}
        self._calls = Calls(RuntimeSettings(upstreams=list(upstreams), state_dir=folder), say)
        self.callers = list(self._calls.upstreams.all.values())
        for caller in self.callers:
            caller.usage.totals.local = 0  # of this run, as it repeats rows of a part that was not complete

    def submit(self, texts: Sequence[Input | None]) -> "Future[Answers]":
        """Classify a slice."""
        return self._calls.submit(self._complete(texts, super().submit(texts)))

    async def _complete(self, texts: Sequence[Input | None], running: "Future[Answers]") -> Answers:
        answers = await asyncio.wrap_future(running)
        for prefix, manifest in self._models.items():
            reasons = answers.values[f"{prefix}exit_reason"]
            rows = {
                index: checked_text(texts[index], "")
                for index, why in enumerate(reasons)
                if why == "upstream"
            }
            await asyncio.gather(*(self._fill(answers, prefix, manifest, *row) for row in rows.items()))
            local = sum(why not in (None, "upstream") for why in reasons)
            self._calls.answered(manifest.name, local, len(rows))
        return answers

    async def _fill(self, answers: Answers, prefix: str, manifest: Manifest, index: int, text: Text) -> None:
        """Put the upstream's answer to a text in place of the placeholder."""
        values = answers.values
        kind: Kind = "uncertain" if values[f"{prefix}exit_tau"][index] > 0 else "learning"
        try:
            reply = await self._reply(manifest, text, kind)
        except RequestError as error:
            for column in values.values():
                column[index] = None
            values["error"][index] = error.message
            return
        values[f"{prefix}label"][index] = manifest.labels[reply.label]
        values[f"{prefix}probs"][index] = reading_of(reply, manifest.num_layers, len(manifest.labels)).probs

    async def _reply(self, manifest: Manifest, text: Text, kind: Kind) -> Reply:
        """The upstream's answer to a text, which is asked for once; raises RequestError."""
        key = key_of(manifest, text).hex()
        if (known := self._journal.replies.get(key)) is not None:
            return known
        if key not in self._asking:
            self._asking[key] = asyncio.ensure_future(self._ask(key, manifest.name, text, kind))
        return await self._asking[key]

    async def _ask(self, key: str, name: str, text: Text, kind: Kind) -> Reply:
        reply = await self._calls.ask(name, Query(text, kind), 0.0, False)
        self._journal.add(key, reply)
        del self._asking[key]  # those of texts without an answer stay
        return reply

    def close(self) -> None:
        """Cancel the calls, and end the processes."""
        self._calls.close(waits=True)
        super().close()
        self._journal.close()
