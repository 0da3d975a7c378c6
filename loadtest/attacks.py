"""The attacks of `de3 loadtest attack`: what each of their connections does."""

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
FOR_EVER_S = 3600.0


class Answer:
    """A step of an attack: wait until the server has answered."""


ANSWER = Answer()
# What a connection does next: send these bytes, wait for so many seconds, or wait for an answer.
Step = bytes | float | Answer
# The steps of one connection, by its number; after the last it is closed and opened again.
Script = Callable[[int], Iterator[Step]]


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        what: what it does, in a sentence.
        script: the steps of one connection.
        connections: how many, unless the user says another number.
        reads: whether what the server sends is read at all.
        may_refuse: share of the innocent client's requests that the server may refuse with 429 or 503.
        with_budgets: whether the innocent client also asks for a latency budget.
    """

    name: str
    what: str
    script: Script
    connections: int
    reads: bool
    may_refuse: float
    with_budgets: bool


ATTACKS: dict[str, Attack] = {}


def _attack(
    connections: int = 64, reads: bool = True, may_refuse: float = 0.0, with_budgets: bool = False
) -> Callable[[Script], Script]:
    def register(script: Script) -> Script:
        name, what = script.__name__, (script.__doc__ or "").strip().rstrip(".")
        ATTACKS[name] = Attack(name, what, script, connections, reads, may_refuse, with_budgets)
        return script

    return register


def _head(length: int | str, path: str = "/classify") -> bytes:
    """The head of a POST with so long a body, or with chunks."""
    framing = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()


def _post(body: bytes) -> bytes:
    return _head(len(body)) + body


def _ask(request: bytes) -> Iterator[Step]:
    """Send a request again and again, each after the answer to the last."""
    while True:
        yield request
        yield ANSWER


@cache
def _pair(text: str) -> bytes:
    return _post(json.dumps({"input": {"text": text, "text_pair": text}}).encode())


@_attack()
def pair_of_words(_: int) -> Iterator[Step]:
    """Pairs of two long texts of one-letter words, 102 KB."""
    return _ask(_pair("a " * (TEXT_CHARACTERS // 2)))


@_attack()
def pair_of_dots(_: int) -> Iterator[Step]:
    """Pairs of two long texts of full stops, 102 KB."""
    return _ask(_pair("." * TEXT_CHARACTERS))


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
    """POST to a path that does not exist, with a body of 1 GB of which a byte is sent now and then."""
    yield _head(1_000_000_000, "/nope")
    yield ANSWER
    while True:
        yield b"x"
        yield 1.0


@_attack(connections=1200)
def slow_bodies(_: int) -> Iterator[Step]:
    """Bodies of a byte a second, which go on after the 408."""
    yield _head(100_000)
    while True:
        yield b" "
        yield 1.0


@_attack(reads=False)
def pipelined(_: int) -> Iterator[Step]:
    """14,000 requests at once on each connection, whose answers are never read."""
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 14_000
    yield FOR_EVER_S


@_attack()
def many_headers(_: int) -> Iterator[Step]:
    """Heads of 30,000 empty headers."""
    return _ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 30_000 + b"\r\n")


@cache
def _unknown_fields() -> bytes:
    fields = ",".join(f'"{i:05}":0' for i in range(100_000))
    return _post(f'{{"input":"good",{fields}}}'.encode())


@_attack()
def unknown_fields(_: int) -> Iterator[Step]:
    """Bodies of 1 MB with 100,000 unknown fields."""
    return _ask(_unknown_fields())


@cache
def _user(part: str) -> bytes:
    """A body of just under 1 MiB whose `user` is a list of this part."""
    start, end = '{"input":"good","user":[', "]}"
    count = (MAX_BODY_BYTES - len(start) - len(end) + 1) // (len(part) + 1)
    body = start + ",".join([part] * count) + end
    return _post(body.encode())


@_attack()
def nested_user(number: int) -> Iterator[Step]:
    """Bodies of 1 MiB whose user is a list of lists, on half of the connections 200 deep."""
    return _ask(_user("[]" if number % 2 else "[" * 200 + "]" * 200))


@cache
def _many_texts() -> bytes:
    start, end = '{"input":[', "]}"
    count = (MAX_BODY_BYTES - len(start) - len(end) + 1) // 4
    return _post((start + ",".join(['"a"'] * count) + end).encode())


@_attack()
def many_texts(_: int) -> Iterator[Step]:
    """262,000 texts in one list, as many as 1 MiB holds."""
    return _ask(_many_texts())


@cache
def _one_byte_chunks() -> bytes:
    body = b'{"input":"%s"}' % (b"a" * 100_000)
    return _head("chunked") + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@_attack()
def one_byte_chunks(_: int) -> Iterator[Step]:
    """Bodies of 100 KB in chunks of one byte."""
    return _ask(_one_byte_chunks())


def _unfinished(length: int) -> Iterator[Step]:
    yield _head(length)
    yield b'{"input":"' + b"a" * (length - 11)
    yield ANSWER  # it closes and begins again once the server gave up


@_attack(connections=1200, may_refuse=0.1)
def small_unfinished(_: int) -> Iterator[Step]:
    """Bodies of 80 bytes whose last byte never comes."""
    return _unfinished(80)


@_attack(connections=200, may_refuse=0.1)
def large_unfinished(_: int) -> Iterator[Step]:
    """Bodies of 1 MiB whose last byte never comes."""
    return _unfinished(MAX_BODY_BYTES)


@_attack(connections=200, may_refuse=0.1)
def large_users(_: int) -> Iterator[Step]:
    """Bodies of 1 MiB of which a short text is in the input and the rest in user."""
    return _ask(_user('"' + "x" * 1000 + '"'))


@cache
def _single_pieces(seed: int) -> bytes:
    """Six texts of words of 100 random consonants, which no vocabulary has."""
    rng = random.Random(seed)

    def text() -> str:
        words = ["".join(rng.choices(CONSONANTS, k=100)) for _ in range(TEXT_CHARACTERS // 101)]
        return " ".join(words)

    return _post(json.dumps({"input": [text() for _ in range(6)]}).encode())


@_attack(with_budgets=True)
def single_pieces(number: int) -> Iterator[Step]:
    """Six texts a request of 51,200 characters, in words that fall into single letters."""
    return _ask(_single_pieces(number % 8))


@cache
def _long_texts(seed: int) -> bytes:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=20_000))[:48_000]

    return _post(json.dumps({"input": [text() for _ in range(20)], "tau": 0}).encode())


@_attack(connections=4, with_budgets=True)
def long_texts(number: int) -> Iterator[Step]:
    """Twenty plain texts of 48 KB a request, at full depth."""
    return _ask(_long_texts(number % 8))


@_attack()
def too_long(_: int) -> Iterator[Step]:
    """Texts that are slow to tokenize, too long and not to be cut: work that ends in a 422."""
    text = (("qxzj" * 25 + " ") * 11)[:1024]
    return _ask(_post(json.dumps({"input": text, "truncate": False}).encode()))


@_attack(connections=40, with_budgets=True)
def promises(_: int) -> Iterator[Step]:
    """Twenty long texts a request, with a latency budget of a minute: promised work goes before other."""
    texts = ["a " * (TEXT_CHARACTERS // 2)] * 20
    return _ask(_post(json.dumps({"input": texts, "latency_budget_ms": 60_000}).encode()))
