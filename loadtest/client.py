"""The load generator: one thread, blocking on select, so that it takes little of what it measures.

Open loop: requests are sent at the times of a Poisson process, whether or not earlier ones are answered, and
a latency counts from the time at which its request was due: a server that stalls pays for everyone who would
have come. Closed loop: so many connections, each sending its next request when it has its answer.
"""

import json
import random
import resource
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from loadtest.texts import Sample

MAX_CONNECTIONS = 500  # select's limit is 1024 files
GRACE_S = 20.0  # for the last answers
MAX_BROKEN = 1000  # connections; a server that breaks more of them is not worth measuring


@dataclass(frozen=True)
class Target:
    """A server and how it is asked.

    Attributes:
        url: scheme, host and port.
        body: the JSON to send for a text.
        label: the label in an answer's JSON.
    """

    url: str
    path: str = "/classify"
    body: Callable[[str], dict[str, Any]] = lambda text: {"input": text}
    label: Callable[[Any], str] = lambda answer: str(answer["data"][0]["label"])

    def request(self, sample: Sample) -> bytes:
        """The bytes of a request."""
        fields = self.body(sample.text) | ({} if sample.tau is None else {"tau": sample.tau})
        body = json.dumps(fields).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


@dataclass(slots=True)
class Answer:
    """What came of one request; times in seconds from the run's start."""

    sample: int
    due: float
    sent: float
    done: float = 0.0
    status: int = 0  # 0: the connection broke, or no answer came
    body: bytes = b""


@dataclass
class Run:
    """What a load test found.

    Attributes:
        offered: requests per second, or None for a closed loop.
        cpu_s: processor time of the generator itself.
    """

    samples: list[Sample]
    answers: list[Answer]
    seconds: float
    offered: float | None
    connections: int
    cpu_s: float
    labels: list[str | None] = field(default_factory=list)

    def ok(self, long: bool | None = None) -> list[Answer]:
        """The answers with status 200; long: only to such texts."""
        chosen = [a for a in self.answers if a.status == 200]
        return chosen if long is None else [a for a in chosen if self.samples[a.sample].long == long]

    def latencies_ms(self, long: bool | None = None) -> list[float]:
        """Latencies of the answers, sorted."""
        return sorted(1000 * (a.done - a.due) for a in self.ok(long))

    def lateness_ms(self, share: float) -> float:
        """A quantile of how late the generator itself was."""
        return quantile([1000 * (a.sent - a.due) for a in self.answers if a.sent], share)

    def rate(self) -> float:
        """Answers per second, of those that came within the time."""
        return sum(a.done <= self.seconds for a in self.ok()) / self.seconds

    def statuses(self) -> dict[int, int]:
        """Number of answers by status; 0 is no answer."""
        return dict(Counter(a.status for a in self.answers))


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile of some values; nan of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class _Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answer: Answer | None = None
        self._data = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, request: bytes, answer: Answer) -> None:
        self.answer = answer
        self.socket.sendall(request)

    def receive(self) -> Answer | None:
        """The answer once it is whole; its status stays 0 when the connection breaks."""
        try:
            data = self.socket.recv(1 << 18)
        except OSError:
            data = b""
        answer = self.answer
        assert answer is not None
        if not data:
            return answer
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end:
            return None
        lowered = head.lower()
        at = lowered.find(b"content-length:")
        if at < 0:
            raise ValueError(f"an answer without Content-Length: {head[:200]!r}")
        length = int(lowered[at + 15 :].split(b"\r\n", 1)[0])
        if len(body) < length:
            return None
        answer.status, answer.body, self._data = int(head[9:12]), body, b""
        return answer


def load(
    target: Target,
    samples: list[Sample],
    seconds: float,
    rate: float | Callable[[float], float] | None = None,
    connections: int = 16,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Run:
    """Send samples, in turn and from the start again, for so many seconds.

    Args:
        rate: requests per second (open loop), or that as a function of the seconds that have passed; None: a
            closed loop over `connections`.
        progress: called now and then with the seconds that have passed.
    """
    cpu = _cpu()
    rate_at = rate if callable(rate) or rate is None else lambda _: rate
    generator = _Generator(target, samples, seconds, rate_at, connections, random.Random(seed))
    answers = generator.go(progress)
    offered = rate if rate is None or isinstance(rate, float | int) else len(answers) / seconds
    run = Run(samples, answers, seconds, offered, connections, _cpu() - cpu)
    run.labels = [_label(target, a) for a in answers]
    return run


class _Generator:
    """One run: what is due waits until a connection is idle, is sent, and is collected."""

    def __init__(
        self,
        target: Target,
        samples: list[Sample],
        seconds: float,
        rate: Callable[[float], float] | None,
        connections: int,
        rng: random.Random,
    ) -> None:
        self._address = _address(target)
        self._requests = [target.request(s) for s in samples]
        self._seconds, self._rate, self._rng = seconds, rate, rng
        self._idle = deque(_Connection(self._address) for _ in range(connections))
        self._busy: set[_Connection] = set()
        self._waiting: deque[Answer] = deque()  # due, but every connection is busy
        self._answers: list[Answer] = []
        self._broken = 0
        self._next = rng.expovariate(rate(0.0)) if rate else 0.0
        self._start = perf_counter()

    def go(self, progress: Callable[[float], None]) -> list[Answer]:
        """Run; returns every request that was sent."""
        shown = 0.0
        while True:
            now = self._now()
            if now >= shown:
                progress(min(now, self._seconds))
                shown = now + 0.25
            self._add_due(now)
            self._send()
            over = now >= self._seconds and not self._waiting and not self._busy
            if over or now >= self._seconds + GRACE_S or self._broken > MAX_BROKEN:
                break
            more = self._rate and now < self._seconds and not self._waiting
            self._collect(max(0.0, self._next - now) if more else 0.1)
        for connection in [*self._idle, *self._busy]:
            connection.socket.close()
        return [*self._answers, *self._waiting]  # the last were due, but never sent: no answer

    def _now(self) -> float:
        return perf_counter() - self._start

    def _add_due(self, now: float) -> None:
        def add(due: float) -> None:
            number = len(self._answers) + len(self._waiting)
            self._waiting.append(Answer(number % len(self._requests), due, 0.0))

        if self._rate:
            while self._next <= min(now, self._seconds):
                add(self._next)
                self._next += self._rng.expovariate(self._rate(self._next))
        elif now < self._seconds:
            while len(self._waiting) < len(self._idle):
                add(now)

    def _send(self) -> None:
        while self._waiting and (self._idle or len(self._busy) < MAX_CONNECTIONS):
            connection = self._idle.popleft() if self._idle else _Connection(self._address)
            answer = self._waiting.popleft()
            self._answers.append(answer)
            answer.sent = self._now()
            try:
                connection.send(self._requests[answer.sample], answer)
                self._busy.add(connection)
            except OSError:  # the server closed it
                self._replace(connection)

    def _collect(self, wait: float) -> None:
        for connection in select.select(list(self._busy), [], [], wait)[0]:
            answer = connection.receive()
            if answer is None:
                continue
            answer.done = self._now()
            self._busy.discard(connection)
            if answer.status:
                self._idle.append(connection)
            else:
                self._replace(connection)

    def _replace(self, connection: _Connection) -> None:
        self._broken += 1
        connection.socket.close()
        self._idle.append(_Connection(self._address))


def _address(target: Target) -> tuple[str, int]:
    parts = urlsplit(target.url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def _label(target: Target, answer: Answer) -> str | None:
    if answer.status != 200:
        return None
    try:
        return target.label(json.loads(answer.body))
    except (ValueError, KeyError, IndexError, TypeError):
        return "not an answer"


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ask_alone(target: Target, samples: list[Sample]) -> list[str | None]:
    """The label of every sample, asked one at a time: what the answers under load must equal."""
    connection = _Connection(_address(target))
    labels = []
    for i, sample in enumerate(samples):
        answer = Answer(i, 0.0, 0.0)
        connection.send(target.request(sample), answer)
        while connection.receive() is None:
            pass
        labels.append(_label(target, answer))
    connection.socket.close()
    return labels


def wrong_labels(run: Run, alone: list[str | None]) -> int:
    """Answers whose label differs from that of the same text asked alone."""
    return sum(
        label != alone[answer.sample]
        for answer, label in zip(run.answers, run.labels, strict=True)
        if answer.status == 200
    )


def accuracy(run: Run) -> float | None:
    """Share of right answers among those to samples whose label is known; None if labels have other names."""
    pairs = [
        (label, run.samples[answer.sample].label)
        for answer, label in zip(run.answers, run.labels, strict=True)
        if answer.status == 200 and run.samples[answer.sample].label is not None
    ]
    if {a for a, _ in pairs}.isdisjoint(b for _, b in pairs):
        return None
    return sum(a == b for a, b in pairs) / len(pairs)
