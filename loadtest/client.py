"""The load generator: one thread, blocking on select, so that it uses little CPU.

Open loop: requests arrive as a Poisson process, whether or not earlier ones have been answered. Latency is
measured from the time a request was due, so a server stall counts for every request due during it. Closed loop: each
connection sends its next request once it has an answer.
"""

import json
import random
import resource
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from de3.client import Row
from de3.loadtest.texts import Sample

MAX_CONNECTIONS = 500  # select's limit is 1024 file descriptors
GRACE_S = 20.0  # time to wait for the last answers after the end
MAX_BROKEN = 1000  # broken connections before a run is aborted


def post(
    fields: dict[str, Any],
    path: str = "/classify",
    host: str = "localhost",
    request_id: str = "",
    key: str = "",
) -> bytes:
    """The bytes of a POST request with `fields` as its JSON body."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"X-Request-ID: {request_id}\r\n" if request_id else ""
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def label_of(answer: Any) -> str:
    """The label in the answer of /classify to one text, or a regression model's value or a token classifier's spans."""
    row = Row.parse(answer["data"][0])
    if row.spans is not None:
        return ", ".join(f"{span.start}-{span.end} {span.label}" for span in row.spans)
    return row.label if row.value is None else str(row.value)


@dataclass(frozen=True)
class Target:
    """A server and the format of its requests and answers.

    Attributes:
        url: scheme, host and port.
        body: makes a request's JSON from a text.
        label: takes the label from an answer's JSON.
        key: API key; empty for none.
    """

    url: str
    path: str = "/classify"
    body: Callable[[str], dict[str, Any]] = lambda text: {"input": text}
    label: Callable[[Any], str] = label_of
    key: str = field(default="", repr=False)

    def request(self, sample: Sample) -> bytes:
        """The bytes of a request."""
        fields = self.body(sample.text) | ({} if sample.tau is None else {"tau": sample.tau})
        return post(fields, self.path, urlsplit(self.url).netloc, key=self.key)


@dataclass(slots=True)
class Answer:
    """The result of a request for the sample with index `sample`; times are seconds since the start of the run."""

    sample: int
    due: float
    sent: float
    done: float = 0.0
    status: int = 0  # 0: no answer, or a broken connection
    body: bytes = b""


@dataclass
class Run:
    """The result of a load test.

    Attributes:
        offered: requests per second; None for a closed loop.
        cpu_s: CPU time of the generator itself.
        labels: the label in each answer; None unless its status is 200, "not an answer" if it is malformed.
    """

    samples: list[Sample]
    answers: list[Answer]
    seconds: float
    offered: float | None
    connections: int
    cpu_s: float
    labels: list[str | None] = field(default_factory=list)

    def ok(self, long: bool | None = None) -> list[Answer]:
        """The answers with status 200. long: only answers to long (True) or to short texts (False); None: all."""
        chosen = [a for a in self.answers if a.status == 200]
        return chosen if long is None else [a for a in chosen if self.samples[a.sample].long == long]

    def latencies_ms(self, long: bool | None = None) -> list[float]:
        """The sorted latencies of the answers with status 200; long: see `ok`."""
        return sorted(1000 * (a.done - a.due) for a in self.ok(long))

    def lateness_ms(self, share: float) -> float:
        """The quantile, at `share`, of the generator's own delay in sending requests; nan if it sent none."""
        return quantile([1000 * (a.sent - a.due) for a in self.answers if a.sent], share)

    def rate(self) -> float:
        """Throughput, per second: answers with status 200 that arrived within the duration of the run."""
        return sum(a.done <= self.seconds for a in self.ok()) / self.seconds

    def statuses(self) -> dict[int, int]:
        """Number of requests by status; 0: no answer."""
        return dict(Counter(a.status for a in self.answers))


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of values at `share`, in [0, 1]; nan if there are no values."""
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
        """The answer once it is complete, or, with status 0, once the connection breaks; until then None.

        Raises ValueError for an answer without Content-Length.
        """
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
        _, has_length, rest = head.lower().partition(b"content-length:")
        if not has_length:
            raise ValueError(f"an answer without Content-Length: {head[:200]!r}")
        length = int(rest.split(b"\r\n", 1)[0])
        if len(body) < length:
            return None
        answer.status, answer.body, self._data = int(head[9:12]), body, b""
        return answer


def send_traffic(
    target: Target,
    samples: list[Sample],
    seconds: float,
    rate: float | Callable[[float], float] | None = None,
    connections: int = 16,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Run:
    """Send samples in order, repeatedly, for `seconds`.

    Args:
        rate: requests per second (open loop), or a function of the elapsed seconds that returns it; None: a closed
            loop over `connections`.
        connections: number of connections; an open loop opens more as needed, up to MAX_CONNECTIONS.
        seed: seed of the arrival times.
        progress: called about every 0.25 s with the elapsed seconds.

    Raises OSError if a connection cannot be opened, and ValueError for an answer without Content-Length. Ends early if
    more than MAX_BROKEN connections break.
    """
    cpu = _cpu()
    rate_at = rate if callable(rate) or rate is None else lambda _: rate
    generator = _Generator(target, samples, seconds, rate_at, connections, random.Random(seed))
    answers = generator.run(progress)
    offered = rate if rate is None or isinstance(rate, float | int) else len(answers) / seconds
    run = Run(samples, answers, seconds, offered, connections, _cpu() - cpu)
    run.labels = [_label(target, a) for a in answers]
    return run


class _Generator:
    """One run. A request that is due is pending until a connection is idle, then in flight until it is answered."""

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
        self._pending: deque[Answer] = deque()  # due, but every connection is busy
        self._answers: list[Answer] = []
        self._broken = 0
        self._next = rng.expovariate(rate(0.0)) if rate else 0.0
        self._start = perf_counter()

    def run(self, progress: Callable[[float], None]) -> list[Answer]:
        """Run to the end and return the results of all requests."""
        shown = 0.0
        while True:
            now = self._now()
            if now >= shown:
                progress(min(now, self._seconds))
                shown = now + 0.25
            self._add_due(now)
            self._send()
            done = now >= self._seconds and not self._pending and not self._busy
            if done or now >= self._seconds + GRACE_S or self._broken > MAX_BROKEN:
                break
            has_next = self._rate and now < self._seconds and not self._pending
            self._collect(max(0.0, self._next - now) if has_next else 0.1)
        for connection in [*self._idle, *self._busy]:
            connection.socket.close()
        return [*self._answers, *self._pending]  # pending requests were never sent: they count as unanswered

    def _now(self) -> float:
        return perf_counter() - self._start

    def _add_due(self, now: float) -> None:
        def add(due: float) -> None:
            number = len(self._answers) + len(self._pending)
            self._pending.append(Answer(number % len(self._requests), due, 0.0))

        if self._rate:
            while self._next <= min(now, self._seconds):
                add(self._next)
                self._next += self._rng.expovariate(self._rate(self._next))
        elif now < self._seconds:
            while len(self._pending) < len(self._idle):
                add(now)

    def _send(self) -> None:
        while self._pending and (self._idle or len(self._busy) < MAX_CONNECTIONS):
            connection = self._idle.popleft() if self._idle else _Connection(self._address)
            answer = self._pending.popleft()
            self._answers.append(answer)
            answer.sent = self._now()
            try:
                connection.send(self._requests[answer.sample], answer)
                self._busy.add(connection)
            except OSError:  # the server closed it
                self._replace(connection)

    def _collect(self, timeout: float) -> None:
        for connection in select.select(list(self._busy), [], [], timeout)[0]:
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
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "not an answer"


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ask_alone(target: Target, samples: Iterable[Sample]) -> list[str | None]:
    """The label of every sample, each sent alone, to compare with the labels under load.

    None for a sample that is not answered with 200.
    """
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
    """Number of answers with status 200 whose label differs from that of the same text sent alone."""
    pairs = zip(run.answers, run.labels, strict=True)
    return sum(label is not None and label != alone[answer.sample] for answer, label in pairs)


def differing(
    samples: list[Sample], labels: list[str | None], reference: list[str | None]
) -> dict[str, Any] | None:
    """The samples whose label is not that of `reference`: their number, their share of the answered ones, and a list.

    None if the two have no label in common, for example because a server uses other label names.
    """
    texts = [sample.text for sample in samples]
    both = [row for row in zip(texts, reference, labels, strict=True) if None not in row]
    if {row[1] for row in both}.isdisjoint(row[2] for row in both):
        return None
    differ = [
        dict(zip(("text", "full_depth", "label"), row, strict=True)) for row in both if row[1] != row[2]
    ]
    return {"count": len(differ), "of": len(both), "share": len(differ) / len(both), "texts": differ}


def accuracy(samples: list[Sample], labels: list[str | None]) -> float | None:
    """Accuracy of the answers to the samples with a known label; labels: None for a sample without an answer.

    None if there are no such samples, or if the server uses other label names.
    """
    both = zip(labels, (sample.label for sample in samples), strict=True)
    pairs = [pair for pair in both if None not in pair]
    if {a for a, _ in pairs}.isdisjoint(b for _, b in pairs):
        return None
    return sum(a == b for a, b in pairs) / len(pairs)
