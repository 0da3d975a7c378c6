"""The attacks of `python -m lab attack`; each is a script that its connections run."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat

MAX_BODY_BYTES = 2**20  # the server's default
CONSONANTS = "bcdfghjklmnpqrstvwxz"
WORDS = "the a film movie plot actor scene it is was and with of this one story very quite good bad".split()  # noqa: SIM905
TEXT_CHARACTERS = 51_200
FOREVER_S = 3600.0
ATTACKERS_KEY, OWN_KEY = "the-attackers-api-key", "the-well-behaved-api-key"


class Answer:
    """A step of an attack: wait for the server's answer."""


ANSWER = Answer()
# A step: send bytes, sleep for seconds, or wait for an answer.
Step = bytes | float | Answer
# The steps of one connection, by its number. After the last step the connection is closed and reopened.
Script = Callable[[int], Iterator[Step]]


@dataclass(frozen=True)
class Attack:
    """The script of an attack, and the settings it runs with.

    Attributes:
        what: a description in one sentence.
        script: the steps of one connection.
        connections: default number of connections.
        reads: the attacker reads the server's answers.
        may_refuse: share of the well-behaved client's requests that the server may refuse with 429 or 503.
        with_budgets: the well-behaved client also sends requests with a latency budget.
        networks: number of networks that the attack comes from, each with one address.
        options: further options of de3 serve.
        has_keys: users need keys; the attacker has ATTACKERS_KEY, and the well-behaved client OWN_KEY.
    """

    name: str
    what: str
    script: Script
    connections: int
    reads: bool
    may_refuse: float
    with_budgets: bool
    networks: int
    options: tuple[str, ...]
    has_keys: bool

    def address(self, number: int) -> str:
        """The attacker's address for a connection; the well-behaved client is in another network."""
        network = number % self.networks
        return f"127.{1 + network // 250}.{1 + network % 250}.1"


ATTACKS: dict[str, Attack] = {}


def _attack(
    connections: int = 64,
    reads: bool = True,
    may_refuse: float = 0.0,
    with_budgets: bool = False,
    networks: int = 8,
    options: tuple[str, ...] = (),
    has_keys: bool = False,
) -> Callable[[Script], Script]:
    def register(script: Script) -> Script:
        name, what = script.__name__, (script.__doc__ or "").strip().rstrip(".")
        ATTACKS[name] = Attack(
            *(name, what, script, connections, reads, may_refuse, with_budgets, networks, options, has_keys)
        )
        return script

    return register


def _head(length: int | str, path: str = "/classify", key: str = "") -> bytes:
    """The head of a POST whose body has this length, or this transfer encoding. key: an API key; empty: none."""
    fields = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
    fields += f"\r\nAuthorization: Bearer {key}" if key else ""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n".encode()


def _post(body: bytes) -> bytes:
    return _head(len(body)) + body


def _repeat(request: bytes) -> Iterator[Step]:
    """Send the same request again after each answer."""
    while True:
        yield request
        yield ANSWER


@cache
def _pair(text: str) -> bytes:
    return _post(json.dumps({"input": {"text": text, "text_pair": text}}).encode())


@_attack()
def pair_of_words(_: int) -> Iterator[Step]:
    """Pairs of two long texts of one-letter words, 102 KB."""
    return _repeat(_pair("a " * (TEXT_CHARACTERS // 2)))


@_attack()
def pair_of_dots(_: int) -> Iterator[Step]:
    """Pairs of two long texts of full stops, 102 KB."""
    return _repeat(_pair("." * TEXT_CHARACTERS))


@_attack()
def endless_header(_: int) -> Iterator[Step]:
    """One header whose value is 68 MB long."""
    yield b"POST /classify HTTP/1.1\r\nHost: localhost\r\nX: "
    yield from repeat(b"a" * 2**16, 68_000_000 // 2**16)
    yield b"\r\n\r\n"
    yield ANSWER


@_attack()
def endless_trailer(_: int) -> Iterator[Step]:
    """A chunked body whose trailer never ends, 1 MB/s on each connection."""
    body = b'{"input":"good"}'
    yield _head("chunked") + b"%x\r\n%s\r\n0\r\nX: " % (len(body), body)
    piece = b"a" * 2**16
    while True:
        yield piece
        yield len(piece) / 1e6


@_attack(connections=1200)
def unread_bodies(_: int) -> Iterator[Step]:
    """POST to an unknown path with a body of 1 GB, of which one byte is sent every second."""
    yield _head(1_000_000_000, "/nope")
    yield ANSWER
    while True:
        yield b"x"
        yield 1.0


@_attack(connections=1200)
def slow_bodies(_: int) -> Iterator[Step]:
    """Bodies sent at one byte per second, even after the 408."""
    yield _head(100_000)
    while True:
        yield b" "
        yield 1.0


@_attack(reads=False)
def pipelined(_: int) -> Iterator[Step]:
    """14,000 pipelined requests on each connection, whose answers are never read."""
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 14_000
    yield FOREVER_S


_GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@_attack(connections=200, options=("--audit-share", "1"))
def reports_for_nobody(number: int) -> Iterator[Step]:
    """GET of the metrics or an audit report on a connection that is closed at once."""
    path = "/metrics" if number % 2 else "/v1/models/sst2/audit"
    yield f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@_attack(connections=1200, networks=1200)
def idle_addresses(number: int) -> Iterator[Step]:
    """1,200 networks with one idle connection each; half of them have been answered once."""
    if number % 2:
        yield _GET_HEALTH
        yield ANSWER
    yield FOREVER_S


@_attack(connections=800)
def crowd(_: int) -> Iterator[Step]:
    """GET of /health without a pause."""
    return _repeat(_GET_HEALTH)


@_attack()
def many_headers(_: int) -> Iterator[Step]:
    """Requests with 30,000 empty headers."""
    return _repeat(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 30_000 + b"\r\n")


@cache
def _unknown_fields() -> bytes:
    fields = ",".join(f'"{i:05}":0' for i in range(100_000))
    return _post(f'{{"input":"good",{fields}}}'.encode())


@_attack()
def unknown_fields(_: int) -> Iterator[Step]:
    """Bodies of 1 MB with 100,000 unknown fields."""
    return _repeat(_unknown_fields())


@cache
def _user(part: str) -> bytes:
    """A request with a body of just under 1 MiB whose `user` is a list of copies of this part."""
    start, end = '{"input":"good","user":[', "]}"
    count = (MAX_BODY_BYTES - len(start) - len(end) + 1) // (len(part) + 1)
    body = start + ",".join([part] * count) + end
    return _post(body.encode())


@_attack()
def nested_user(number: int) -> Iterator[Step]:
    """Bodies of 1 MiB whose user is a list of lists, nested 200 deep on half of the connections."""
    return _repeat(_user("[]" if number % 2 else "[" * 200 + "]" * 200))


@cache
def _many_texts() -> bytes:
    start, end = '{"input":[', "]}"
    count = (MAX_BODY_BYTES - len(start) - len(end) + 1) // 4
    return _post((start + ",".join(['"a"'] * count) + end).encode())


@_attack()
def many_texts(_: int) -> Iterator[Step]:
    """Batches of 262,000 texts, as many as fit into 1 MiB."""
    return _repeat(_many_texts())


@cache
def _one_byte_chunks() -> bytes:
    body = b'{"input":"%s"}' % (b"a" * 100_000)
    return _head("chunked") + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@_attack()
def one_byte_chunks(_: int) -> Iterator[Step]:
    """Bodies of 100 KB in chunks of one byte."""
    return _repeat(_one_byte_chunks())


def _unfinished(length: int) -> Iterator[Step]:
    yield _head(length)
    yield b'{"input":"' + b"a" * (length - 11)
    yield ANSWER  # the server times out; then the connection is reopened


@_attack(connections=1200, may_refuse=0.1)
def small_unfinished(_: int) -> Iterator[Step]:
    """Bodies of 80 bytes without the last byte."""
    return _unfinished(80)


@_attack(connections=200, may_refuse=0.1)
def large_unfinished(_: int) -> Iterator[Step]:
    """Bodies of 1 MiB without the last byte."""
    return _unfinished(MAX_BODY_BYTES)


@_attack(connections=200, may_refuse=0.1)
def large_users(_: int) -> Iterator[Step]:
    """Bodies of 1 MiB with a short input; the rest is in user."""
    return _repeat(_user('"' + "x" * 1000 + '"'))


@cache
def _single_pieces(seed: int) -> bytes:
    """A request with six texts of words of 100 random consonants, which no vocabulary contains."""
    rng = random.Random(seed)

    def text() -> str:
        words = ["".join(rng.choices(CONSONANTS, k=100)) for _ in range(TEXT_CHARACTERS // 101)]
        return " ".join(words)

    return _post(json.dumps({"input": [text() for _ in range(6)]}).encode())


@_attack(with_budgets=True)
def single_pieces(number: int) -> Iterator[Step]:
    """Requests with six texts of 51,200 characters, in words that are tokenized letter by letter."""
    return _repeat(_single_pieces(number % 8))


@cache
def _long_texts(seed: int) -> bytes:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=20_000))[:48_000]

    return _post(json.dumps({"input": [text() for _ in range(20)], "tau": 0}).encode())


@_attack(connections=4, with_budgets=True)
def long_texts(number: int) -> Iterator[Step]:
    """Requests with twenty plain texts of 48 KB, at full depth."""
    return _repeat(_long_texts(number % 8))


@cache
def _contents(seed: int) -> bytes:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=20_000))[:48_000] for _ in range(20)]
    body = json.dumps({"contents": texts, "detector_params": {"threshold": 1.0, "tau": 0}}).encode()
    return _head(len(body), "/api/v1/text/contents") + body


@_attack(connections=4, with_budgets=True)
def windows_of_detectors(number: int) -> Iterator[Step]:
    """Requests to the detectors with twenty plain texts of 48 KB, all of whose windows run at full depth."""
    return _repeat(_contents(number % 8))


@_attack()
def too_long(_: int) -> Iterator[Step]:
    """Texts that are slow to tokenize and too long, without truncation: work that ends in a 422."""
    text = (("qxzj" * 25 + " ") * 11)[:1024]
    return _repeat(_post(json.dumps({"input": text, "truncate": False}).encode()))


@_attack(connections=40, with_budgets=True)
def deadlines(_: int) -> Iterator[Step]:
    """Requests with twenty long texts and a latency budget of a minute, which are scheduled before others."""
    texts = ["a " * (TEXT_CHARACTERS // 2)] * 20
    return _repeat(_post(json.dumps({"input": texts, "latency_budget_ms": 60_000}).encode()))


@_attack(connections=2, options=("--guarantee", "0.02"), has_keys=True)
def easy_texts(number: int) -> Iterator[Step]:
    """Batches of 256 copies or distinct easy texts, with another key than the well-behaved client's."""
    rng = random.Random(number)
    while True:
        texts = ["a lovely , funny , engaging film"] * 256
        if number:
            texts = [f"a lovely , funny , engaging film {rng.randrange(10**9)}" for _ in texts]
        body = json.dumps({"input": texts}).encode()
        yield _head(len(body), key=ATTACKERS_KEY) + body
        yield ANSWER
