"""Access: API keys, rate limits, origins, and the headers sent to browsers."""

import asyncio
import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.runtime.errors import RequestError
from de3.server.http.access import MAX_FILE_BYTES, MAX_KEYS, Access, Charge, Keys, RateLimit
from de3.server.settings import Settings
from de3.server.shared import Leases
from tests.serving import Server, in_event_loop, serving

ALICE, BOB = "alice-has-a-long-key", "bob-has-another-key-too"
DIGEST = hashlib.sha256(BOB.encode()).hexdigest()
PAGE = "https://page.example"


def key_of(name: str) -> str:
    return f"{name}-has-a#long-key"  # the sign of a comment, but not at the start of a word


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    others = "".join(f"{name} {key_of(name)}\n" for name in ("carol", "dave", "erin"))
    others += f"carol {key_of('carols-new')}\n"
    file.write_text(f"# who may ask\nalice {ALICE}\n\nbob sha256:{DIGEST}  # only the digest\n{others}")
    with serving(store, models=["tiny"], api_keys_file=file, rate_limit="20/hour") as running:
        yield running


@pytest.fixture(scope="module")
def open_server(store: Path) -> Iterator[Server]:
    """A server without keys."""
    with serving(store, models=["tiny"], cors_origins=[PAGE], allowed_hosts=["Proxy.example"]) as running:
        yield running


def post(server: Server, headers: dict[str, str], **body: Any) -> httpx.Response:
    return httpx.post(server.url + "/classify", json=body, headers=headers, timeout=30)


def test_only_a_valid_key_classifies(server: Server) -> None:
    for headers in (
        {},
        bearer(ALICE + "x"),
        bearer(DIGEST),  # the digest in the file is not accepted as a key
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
    ):
        for answer in (
            post(server, headers, input="good"),
            httpx.post(server.url + "/v1/classify", content=b"{", headers=headers),
            httpx.get(server.url + "/v1/models", headers=headers),
        ):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["type"] == "AuthenticationError"
    for key in (ALICE, BOB):
        assert post(server, bearer(key), input="good").status_code == 200
        assert httpx.get(server.url + "/v1/models", headers=bearer(key)).status_code == 200
    assert post(server, {"authorization": f"bearer {ALICE}"}, input="good").status_code == 200


def test_only_health_metrics_and_docs_need_no_key(server: Server) -> None:
    opened = dict.fromkeys(("/health", "/ready", "/metrics", "/docs", "/openapi.json"), 200)
    for path, status in (opened | dict.fromkeys(("/v1/models%0A", "/nothing", "/health%0A"), 401)).items():
        answer = httpx.get(server.url + path)
        assert answer.status_code == status, path
        assert ALICE not in answer.text and DIGEST not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_each_name_has_its_own_limit_whatever_key_it_uses(server: Server) -> None:
    carol, new, dave = (bearer(key_of(name)) for name in ("carol", "carols-new", "dave"))
    before = server.metric("de3_rejected_total", cause="rate_limited")
    assert post(server, carol, input=["good"] * 14).status_code == 200
    assert post(server, new, input="good").status_code == 200
    over = post(server, carol, input=["good"] * 6)
    assert over.status_code == 429 and over.json()["error"]["type"] == "RateLimitError"
    assert 1 <= int(over.headers["retry-after"]) <= 3600
    assert post(server, dave, input=["good"] * 6).status_code == 200
    assert post(server, new, input=["good"] * 5).status_code == 200  # the rest of the limit
    path = "/beta/litellm_basic_guardrail_api"  # a request without texts costs as much as one
    empty = httpx.post(server.url + path, json={}, headers=carol)
    assert (empty.status_code, empty.json()["error"]["type"]) == (429, "RateLimitError")
    never = post(server, dave, input=["good"] * 21)
    assert never.status_code == 429 and "retry-after" not in never.headers
    assert server.metric("de3_rejected_total", cause="rate_limited") == before + 3


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("# only a comment", "contains no key"),
        ("alice short", "at least 16 characters"),
        (f"bob {BOB}\nbob sha256:{DIGEST}", "line 2: bob already has this key"),
        (f"al/ice {ALICE}", "line 1: a name has"),
        (f"alice {ALICE} #{BOB}\nbob short#comment", "line 2: a key has"),
        ("\n".join(f"alice {ALICE}{i}" for i in range(MAX_KEYS + 1)), f"at most {MAX_KEYS}"),
    ],
)
def test_invalid_keys_are_refused_with_their_line(lines: str, says: str) -> None:
    with pytest.raises(ValueError, match="where") as error:
        Keys.read(lines, "where")
    assert says in str(error.value)
    assert ALICE not in str(error.value) and "short" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate_limit": "10/second"}, "rate_limit: applies to API keys"),
        ({"rate_limit": "0/second", "api_keys": f"alice {ALICE}"}, "rate_limit: '0/second' is not a rate"),
        ({"api_keys_file": Path("no-such-file")}, "DE3_API_KEYS_FILE: cannot be read"),
        ({"api_keys": f"a {BOB};a {ALICE}", "admin_keys": f"b {ALICE}"}, "admin_keys: a key cannot be both"),
        ({"api_keys": f"alice {ALICE}", "api_keys_file": Path("x")}, "DE3_API_KEYS: "),
        *(({"cors_origins": [wrong]}, "cors_origins") for wrong in ("page.example", f"{PAGE}/path", "")),
    ],
    ids=range(8),
)
def test_invalid_settings_prevent_the_start(store: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Access(Settings(store=store, **options))


def test_settings_do_not_show_keys() -> None:
    options: dict[str, Any] = {"api_keys": f"alice {ALICE}"}
    assert ALICE not in repr(Settings(**options))
    with pytest.raises(ValueError, match=r"--max-texts \(9\) must not exceed --max-queue \(8\)") as error:
        Settings(max_texts=9, max_queue=8, **options)
    assert ALICE not in str(error.value)


def test_as_many_keys_as_are_allowed_and_as_short(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(f"n{i} {i:016}\n" for i in range(MAX_KEYS)))
    assert (
        Keys.from_file(file).owner({"headers": [(b"authorization", b"Bearer " + b"0" * 15 + b"7")]}) == "n7"
    )
    file.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ValueError, match="larger than"):
        Keys.from_file(file)


OWN = ("localhost:8000", "LOCALHOST.", "app.localhost", "[::1]:8000", "127.0.0.1:", "proxy.Example")
OTHERS = (  # noqa: SIM905
    "evil.example:8000 127.0.0.1.evil.example [::1]evil.example [::1%25evil.example] [127.0.0.1] "
    "127.0.0.1:evil.example localhost:80@evil.example evil.example/.localhost :8000"
).split()


@pytest.mark.parametrize(
    ("host", "is_own"), [*((host, True) for host in OWN), *((host, False) for host in OTHERS)]
)
def test_dns_rebinding_is_refused(open_server: Server, host: str, is_own: bool) -> None:
    """DNS rebinding: the requests that a page at evil.example sends to this server are same-origin."""
    answer = post(open_server, {"Host": host, "Origin": f"http://{host}"}, input="good")
    assert answer.status_code == (200 if is_own else 403), answer.text


def test_any_host_name_is_accepted_where_a_page_could_do_no_harm(store: Path, server: Server) -> None:
    headers = {"Host": "shop.example"}
    assert httpx.get(server.url + "/health", headers=headers).status_code == 200  # others need keys
    with serving(store, models=["tiny"], host="0.0.0.0") as public:
        assert httpx.get(public.url + "/health", headers=headers).status_code == 200


def test_a_page_of_another_origin_cannot_use_a_server_without_keys(open_server: Server) -> None:
    """A page can POST text/plain anywhere without a preflight; it cannot read the answer, but it causes work."""

    def ask(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Content-Type": "text/plain"} if origin else {}
        return httpx.post(open_server.url + "/classify", content=b'{"input": "good"}', headers=headers)

    before = open_server.metric("de3_rejected_total", cause="other_origin")
    for allowed in ("", PAGE, open_server.url):
        assert ask(allowed).status_code == 200
    for other in ("https://other.example", "null", f"{PAGE}.evil", "http://127.0.0.1"):
        refused = ask(other)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "Origin")
    assert open_server.metric("de3_rejected_total", cause="other_origin") == before + 4
    headers = {"Origin": "https://other.example"}
    assert httpx.get(open_server.url + "/health", headers=headers).status_code == 200


def test_only_configured_origins_may_read_answers(server: Server, open_server: Server) -> None:
    answer = post(open_server, {"Origin": PAGE}, input="good")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(open_server.url + "/classify", headers=headers)
    assert preflight.headers["access-control-allow-origin"] == PAGE
    headers["Origin"] = "https://other.example"
    assert httpx.options(open_server.url + "/classify", headers=headers).status_code == 400
    answer = post(server, bearer(ALICE) | {"Origin": PAGE}, input="good")  # it has configured none
    assert "access-control-allow-origin" not in answer.headers


def test_refusals_are_counted_on_every_route(store: Path) -> None:
    root, load = "root-has-a-long-key-too", "/v1/models/tiny/load"
    calls: list[tuple[str, str, str, bytes, int, str]] = [
        ("GET", "/v1/models", "", b"", 401, "no_key"),
        ("PUT", load, ALICE, b"{}", 403, "forbidden"),
        ("POST", load, root, b'{"role": "\xff"}', 400, "not_json"),
        ("POST", load, root, b"x" * 2001, 413, "too_large"),
        ("DELETE", "/health", "", b"", 405, "wrong_method"),
        ("POST", "/classify", "", b"{}", 401, "no_key"),  # counted once, not again elsewhere
        ("GET", "/health", "", b"", 200, ""),
    ]
    keys = {"api_keys": f"alice {ALICE}", "admin_keys": f"root {root}", "max_body_bytes": 2000}
    expected = Counter[str]()
    with serving(store, models=["tiny"], **keys) as server:
        for method, path, key, body, status, cause in calls:
            headers = {"Content-Type": "application/json"} | (bearer(key) if key else {})
            answer = httpx.request(method, server.url + path, content=body, headers=headers)
            assert answer.status_code == status, (method, path, answer.text)
            expected[cause] += bool(cause)
        causes = {name: server.metric("de3_rejected_total", cause=name) for name in expected}
        assert causes == expected and server.metric("de3_rejected_total") == expected.total()
        assert server.metric("de3_requests_total", status="401") == 1  # classification requests only


def test_the_cost_of_a_request(server: Server) -> None:
    """The cost is the largest of: the number of texts, the body in units of 4 KiB, and the tokens in units of 128.

    Both units are rounded up, tokens for each text separately.
    """

    def cost(content: bytes, status: int) -> int:
        before = server.frontend.access.limit.remaining("erin")
        answer = httpx.post(server.url + "/classify", content=content, headers=bearer(key_of("erin")))
        assert answer.status_code == status, answer.text
        return int(before - server.frontend.access.limit.remaining("erin"))

    assert cost(b'{"input": ["good", "bad", "fine"]}', 200) == 3
    assert cost(b'{"input": ""}', 422) == cost(b"{", 400) == 1
    assert cost(b'{"input": "good", "user": "' + b"x" * 10_000 + b'"}', 200) == 3
    assert cost(b'{"input": "' + b"x" * 20_000, 400) == 5
    assert [cost(b"{", 400) for _ in range(7)] == [1] * 7
    assert cost(b"{", 429) == 0
    limit = RateLimit("10/hour")
    charge = Charge(limit, "alice")
    for texts, then in ((4, 6), (2, 6), (5, 5)):
        asyncio.run(charge.raise_to(texts))
        assert limit.remaining("alice") == then
    for texts, then in ((7, 3), (7, 3), (30, 0)):  # 30 is more than is left
        charge.settle(texts)
        assert limit.remaining("alice") == then


@in_event_loop
async def test_processes_lease_a_fiftieth_of_a_limit_in_advance() -> None:
    whole = RateLimit("400/day")
    asked: list[int] = []

    async def lease(owner: str, texts: int) -> None:
        asked.append(texts)
        await asyncio.sleep(0)
        whole.hit(owner, texts)

    options: dict[str, Any] = {"api_keys": f"me {ALICE}", "rate_limit": "400/day", "processes": 2}
    leases = Leases(lease, whole.drain)
    one, other = (Access(Settings(**options), leases).limit for _ in range(2))
    assert one is not None and other is not None

    async def take(limit: RateLimit, *texts: int) -> list[bool]:
        results = await asyncio.gather(*(limit.take("me", n) for n in texts), return_exceptions=True)
        assert all(result is None or isinstance(result, RequestError) for result in results)
        return [result is None for result in results]

    left = partial(whole.remaining, "me")
    assert await take(one, 1) == [True] and (asked, left()) == ([4], 396)
    assert await take(one, 3) == [True] and left() == 396  # the rest of the block
    assert await take(one, *[1] * 20) == [True] * 20 and left() == 396 - 4 - 19  # only one block at a time
    one.drain("me", 5)  # three from its lease, two from the shared limit
    assert left() == 371
    assert await take(one, 3) == [True]
    assert await take(one, 2, 1) == [True] * 2 and left() == 363  # 2 leases, 1 uses the first lease
    assert await take(other, 3, 3, 354) == [True] * 3 and left() == 2
    assert await take(other, 3) == [False] and await take(other, 1) == [True]  # the lease remains
    asked.clear()
    assert await take(other, 1) == [True] and (asked, left()) == ([4, 1], 1)  # too few for a block
    assert await take(one, 3, 2, 1) == [False, True, True] and left() == 0


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_texts_beyond_the_limit_count_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limit = Clock(monkeypatch), RateLimit("100/second")
    limit.hit("me", 60)
    clock.now += 0.5
    limit.drain("me", 240)  # 200 more than the limit, which need two seconds
    clock.now += 0.25
    limit.drain("me", 10)  # another tenth of a second
    assert limit.remaining("me") == 0
    clock.now += 0.25
    limit.drain("me", 1)  # the first 60 have expired, but it is still beyond the limit
    for seconds in (1.0, 1.0, 0.49):
        clock.now += seconds
        with pytest.raises(RequestError) as refused:
            limit.hit("me", 1)
    assert refused.value.retry_after_s == 1
    left = []
    for seconds in (0.06, 0.055, 0.01):
        clock.now += seconds
        left.append(limit.remaining("me"))
    assert left == [89, 99, 100]


@pytest.mark.parametrize(("rate", "period_s"), [("200/second", 1.0), (" 07 PER 2 minutes", 120.0)])
def test_no_period_exceeds_the_limit(rate: str, period_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rng, limit = Clock(monkeypatch), random.Random(1), RateLimit(rate)
    amount, counted = limit.remaining("me"), list[tuple[float, int]]()

    def texts_of_the_last(seconds: float) -> int:
        return sum(texts for at, texts in counted if at > clock.now - seconds)

    for _ in range(1000):
        # Powers of two, so that there are no rounding errors.
        clock.now += period_s * rng.choices((0, 2**-10, 2**-7, 0.25, 0.9375), (90, 300, 90, 3, 3))[0]
        texts = rng.choices((1, amount // 3, amount - 1), (90, 1, 1))[0]
        try:
            limit.hit("me", texts)
        except RequestError as refused:
            assert texts_of_the_last(1.01 * period_s) + texts > amount
            assert refused.retry_after_s is not None and 1 <= refused.retry_after_s <= math.ceil(period_s)
            clock.now += refused.retry_after_s
            limit.hit("me", texts)
        counted.append((clock.now, texts))
        assert texts_of_the_last(period_s) <= amount
