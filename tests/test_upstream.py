"""The parts of an upstream: its .toml file, the labels in replies, the breaker, and the counts of its use."""

import json
from collections import Counter
from pathlib import Path
from time import thread_time, time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.runtime.engine.request import Text
from de3.runtime.upstream.breaker import FAILURES, GOOD_S, MAX_CLIENTS, MAX_PAUSE_S, PAUSE_S, Breaker, Call
from de3.runtime.upstream.client import Reply, Usage
from de3.runtime.upstream.labels import MAX_CHARS, Labels
from de3.runtime.upstream.undelivered import KEPT_S, MAX_KEPT, Undelivered, key_of
from de3.runtime.upstream.upstreams import Upstreams
from de3.runtime.upstream.usage import HOUR_S, MAX_STATE_BYTES, SLOT_S, STALE_S, UpstreamUsage
from de3.runtime.upstream_settings import MAX_FILE_BYTES, read_upstream
from de3.server.settings import Settings
from tests.upstream import KEY, chat, model_of

LABELS = ["billing", "refund", "card lost", "other"]
CLASSIFY = {"kind": "classify", "url": "https://other/classify", "model": None, "prompt": None}


def test_a_bad_value_names_the_file_and_the_field(tmp_path: Path) -> None:
    def check(field: str, upstream: dict[str, Any], **fields: Any) -> None:
        with pytest.raises(ValueError, match=r"\.toml: ") as found:
            model_of(tmp_path, fields.pop("labels", LABELS), chat() | upstream, **fields)
        path, _, message = str(found.value).partition(".toml: ")
        assert path == f"{tmp_path}/{fields.get('name', 'tickets')}"
        assert message.startswith(field) and "secret" not in message

    urls = ["https://", "https://[llm/v1", "https://secret@llm/v1", "https://llm/v1#secret", "ftp://llm/v1"]
    urls += ["https://llm:none/v1", "https://llm/v 1", "https://llm/v1\n", "https://llm\u0662/v1"]
    bad: dict[str, list[Any]] = {
        "promt": ["x"],
        "url": [None, *urls],
        "model": [None],
        "prompt": [None, "Which of {labels}?", "{text} {labels} {text}", "{text} {text_pair} {text_pair}"],
        "api_key_env": ["A KEY"],
        "parameters": [{"n": 2}, {"seed": 2**64}, {"top_p": float("nan")}],
        "price_per_call": [-1, float("inf")],
        **{field: [0] for field in ("max_calls_per_hour", "concurrency", "timeout_s")},
    }
    for field, values in bad.items():
        for value in values:
            check(f"upstream.{field}: ", {field: value})
    check("upstream.prompt: ", {"kind": "classify"})  # only chat has one
    check("upstream.price_per_call: ", {"price_per_million_tokens": [1, 2], "price_per_call": 1})
    for labels in (["a"], ["a", "?!"], ["a b", "A-B!"], ["straße", "STRASSE"], ["a", "b" * 10_000]):
        check("labels", {}, labels=labels)
    for field, value in {"name": "Tickets of ours", "encoder": None, "encoders": "x"}.items():
        check(f"{field}: ", {}, **{field: value})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(FileNotFoundError):
        read_upstream(path)
    long = b"#" * (MAX_FILE_BYTES + 1)
    for content in (b"name = ", b'name = "\xff"', long, b"upstream = 3", b"x = " + b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.toml: "):
            read_upstream(path)


def test_plain_http_leaves_the_machine_only_if_allowed(tmp_path: Path) -> None:
    for host in ("llm.internal", "127.0.0.1.evil", "10.0.0.1", "127.1"):
        of = model_of(tmp_path, LABELS, chat(f"http://{host}/v1"))
        with pytest.raises(ValueError, match=r"tickets: upstream\.url: .*--allow-plain-http"):
            Settings(upstreams=[of])
        assert Settings(upstreams=[of], allow_plain_http=True).upstreams == [of]
    for url in ("http://127.0.0.2:8/v1", "http://localhost/v1", "http://[::1]/v1", "HTTPS://llm.internal/v1"):
        assert Settings(upstreams=[model_of(tmp_path, LABELS, chat(url))])


def test_a_bad_key_is_named_but_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model_of(tmp_path, LABELS, chat(api_key_env="LLM_KEY"))
    monkeypatch.delenv("LLM_KEY", raising=False)
    for key in (None, "  ", "schlüssel-secret", "secret\nX-Header: 1"):
        if key is not None:
            monkeypatch.setenv("LLM_KEY", key)
        with pytest.raises(ValueError, match=r"upstream\.api_key_env: .*LLM_KEY") as found:
            Upstreams(Settings(upstreams=[of]))
        assert "secret" not in str(found.value)
    monkeypatch.setenv("LLM_KEY", f" {KEY}\n")
    assert of.upstream.key() == KEY


def test_the_hash_is_of_what_determines_the_answers(tmp_path: Path) -> None:
    def hash_of(changed: dict[str, Any], **fields: Any) -> str:
        return model_of(tmp_path, fields.pop("labels", LABELS), {**chat(), **changed}, **fields).hash

    same: dict[str, Any] = {"price_per_call": 1.0, "max_calls_per_hour": 9, "concurrency": 3, "timeout_s": 3}
    same |= {"api_key_env": "OTHER", "url": "https://elsewhere/v1"}  # the same model
    others: list[dict[str, Any]] = [
        {},
        {"model": "other"},
        {"prompt": "{text}"},
        {"parameters": {"temperature": 0}},
        {"parameters": {"temperature": 0.5}},
        {"reply": "exact"},
        CLASSIFY,
        {**CLASSIFY, "url": "https://elsewhere/classify"},  # the URL is all that identifies it
        {**CLASSIFY, "model": "some-model"},
    ]
    one = hash_of({})
    assert hash_of(same) == hash_of({"price_per_million_tokens": [1, 2]}, encoder="another") == one
    hashes = [*map(hash_of, others), hash_of({}, labels=LABELS[::-1]), hash_of({}, labels=LABELS[:2])]
    assert len(set(hashes)) == len(hashes)


WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(" ".join)


@given(st.lists(WORDS, min_size=2, max_size=5, unique=True), st.lists(st.sampled_from("abcd"), max_size=8))
def test_a_reply_names_the_only_label_that_is_within_no_longer_one(
    names: list[str], words: list[str]
) -> None:
    reply, ends = " ".join(words), range(len(words) + 1)
    named = {
        (i, j): names.index(" ".join(words[i:j]))
        for j in ends
        for i in range(j)
        if " ".join(words[i:j]) in names
    }
    longest = {
        number
        for (i, j), number in named.items()
        if not any(k <= i and j <= m for k, m in named.keys() - {(i, j)})
    }
    is_alone = reply in names
    labels = Labels(names)
    number = longest.pop() if len(longest) == 1 else None
    assert labels.find(reply) == (number, number is not None and not is_alone)
    assert labels.find(reply, is_exact=True) == (number if is_alone else None, False)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" **Billing.** ", (0, False)),
        ("CARD_LOST", (2, False)),
        ("The label is: billing.", (0, True)),
        ("billings", (None, False)),
        ("", (None, False)),
        ("billing" + " " * MAX_CHARS, (None, False)),
        ("billing" + "\ufdfa" * (MAX_CHARS // 18 + 1), (None, False)),  # 18 characters each, once normalized
        ("यह कि है", (4, True)),  # vowel signs and accents are parts of words
        ("क", (None, False)),
        ("E\u0301 ✔\ufe0f", (6, False)),
    ],
)
def test_case_and_punctuation_do_not_matter(reply: str, expected: tuple[int | None, bool]) -> None:
    assert Labels([*LABELS, "कि", "कु", "é"]).find(reply) == expected


def test_no_long_reply_takes_much_longer_than_an_ordinary_one() -> None:
    labels = Labels([f"card {' '.join(map(str, range(n % 60)))} of {n}" for n in range(1000)])

    def cpu_s(reply: str) -> float:
        started = thread_time()
        labels.find(reply)
        return thread_time() - started

    def shortest_s(reply: str) -> float:
        return min(cpu_s(reply) for _ in range(5))

    ordinary_s = shortest_s("a " * (MAX_CHARS // 2))
    for unit in ("a", "\ufdfa", "card 1 ", "a" + "\u0301\u0316" * MAX_CHARS, "\u0f73", "\u0e33"):
        reply = unit * (2**20 // len(unit))
        assert max(shortest_s(reply), shortest_s(reply[: MAX_CHARS // 2])) < 10 * ordinary_s


def test_answers_of_failed_requests_are_kept_for_a_minute_and_used_once() -> None:
    now = [0.0]
    kept = Undelivered(lambda: now[0])
    kept.add({b"a": Reply(1), b"b": Reply(2)})
    assert (kept.take(b"a"), kept.take(b"a"), kept.take(b"c")) == (Reply(1), None, None)
    now[0] = KEPT_S
    assert kept.take(b"b") is None
    kept.add({str(i).encode(): Reply(i) for i in range(MAX_KEPT + 1)})
    assert (kept.take(b"0"), kept.take(b"1")) == (None, Reply(1))


def test_an_answer_is_kept_for_an_upstream_a_text_and_a_client() -> None:
    manifests: Any = [SimpleNamespace(upstream=one) for one in ("x", "y")]
    texts = Text("a"), Text("a", "b"), Text("a", "c"), Text("ab"), Text("b", "a")
    keys = {key_of(one, text, client) for one in manifests for text in texts for client in ("", "me", "you")}
    assert len(keys) == 2 * 5 * 3


class Clock:
    """A clock that stands still."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def call(breaker: Breaker, client: str, is_outage: bool | None = True, times: int = 1, **how: Any) -> None:
    """Calls of a client that are allowed, with this result."""
    for _ in range(times):
        assert breaker.wait_s(client) == 0
        breaker.end(breaker.begin(client), is_outage, **how)


def open_now(breaker: Breaker, **how: Any) -> None:
    """Outages that no text can cause, until the breaker is open."""
    while not breaker.is_open:
        call(breaker, "one", is_certain=True, **how)


def test_outages_in_a_row_open_it_and_one_call_at_a_time_is_tried(clock: Clock, breaker: Breaker) -> None:
    call(breaker, "one", is_certain=True, times=FAILURES - 1)
    call(breaker, "one", is_outage=False)  # a success in between
    call(breaker, "one", is_certain=True, times=FAILURES)
    assert breaker.is_open
    pause_s = PAUSE_S
    for _ in range(8):
        assert breaker.wait_s() == breaker.wait_s("other") == pytest.approx(pause_s)
        clock.now += breaker.wait_s()
        trial = breaker.begin("one")
        assert trial.period and breaker.wait_s("other") > 0  # one trial at a time
        breaker.end(trial, True, is_certain=True)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
    assert pause_s == MAX_PAUSE_S
    clock.now += pause_s
    call(breaker, "one", is_outage=False)
    assert not breaker.is_open
    # The pause is the first one again, unless the upstream asks for another one.
    for retry_after_s, pause_s in ((0.0, PAUSE_S), (7.0, 7.0), (3600.0, MAX_PAUSE_S)):
        open_now(breaker, retry_after_s=retry_after_s)
        assert breaker.wait_s() == pytest.approx(pause_s)
        clock.now += pause_s
        call(breaker, "one", is_outage=False)


def test_a_cancelled_or_slow_trial_keeps_no_other_client_from_trying(clock: Clock, breaker: Breaker) -> None:
    open_now(breaker)
    clock.now += PAUSE_S
    for _ in range(3):
        call(breaker, "leaves", is_outage=None)
        assert breaker.wait_s("leaves") == 2 * PAUSE_S and breaker.wait_s("other") == 0
        clock.now += 2 * PAUSE_S
    slow = breaker.begin("slow")
    assert breaker.wait_s("other") == PAUSE_S
    clock.now += PAUSE_S
    assert breaker.wait_s("slow") > breaker.wait_s("other") == 0
    call(breaker, "other", is_outage=False)
    breaker.end(slow, True)  # a trial of before: an outage like any other
    assert not breaker.is_open and breaker.wait_s("slow") == 0
    open_now(breaker)
    clock.now += PAUSE_S
    slow = breaker.begin("slow")
    clock.now += PAUSE_S
    call(breaker, "other", is_outage=False)
    open_now(breaker)
    wait_s = breaker.wait_s()
    breaker.end(slow, True, is_certain=True)
    assert breaker.wait_s() == wait_s


def test_a_client_that_always_leaves_extends_no_pause_of_another(clock: Clock, breaker: Breaker) -> None:
    open_now(breaker)
    clock.now += PAUSE_S
    call(breaker, "other")
    for _ in range(2):
        clock.now += max(breaker.wait_s("leaves"), PAUSE_S)
        call(breaker, "leaves", is_outage=None)
    assert breaker.wait_s("other") == 0


def test_outages_that_texts_of_one_client_may_cause_do_not_open_it(clock: Clock, breaker: Breaker) -> None:
    call(breaker, "bad", times=3 * FAILURES)
    call(breaker, "bad", is_outage=False)
    call(breaker, "bad", times=FAILURES - 1)
    assert not breaker.is_open
    before = breaker.begin("bad")
    call(breaker, "good")  # it does not work for both
    assert breaker.is_open
    assert breaker.wait_s("bad") == breaker.wait_s("good") == PAUSE_S
    breaker.end(before, True)
    assert breaker.wait_s("good") == PAUSE_S
    # A trial that fails for one client's text says nothing about others.
    clock.now += PAUSE_S
    call(breaker, "bad")
    assert breaker.wait_s("bad") > 0
    call(breaker, "good")
    assert breaker.wait_s("bad") == breaker.wait_s("good") == 2 * PAUSE_S
    clock.now += 2 * PAUSE_S
    call(breaker, "bad")
    call(breaker, "good", is_outage=False)
    assert not breaker.is_open
    # While the upstream answers a client, the texts of two others do not open it.
    for _ in range(3):
        call(breaker, "good", is_outage=False)
        for _ in range(FAILURES):
            call(breaker, "bad")
            call(breaker, "worse")
        clock.now += GOOD_S - 1
    clock.now += 1
    call(breaker, "bad")
    assert breaker.is_open  # it has answered nobody for long


def test_clients_whose_texts_fail_do_not_keep_it_open_for_others(clock: Clock, breaker: Breaker) -> None:
    for client in (FAILURES * ["bad", "worse"])[:FAILURES]:
        call(breaker, client)
    clock.now += breaker.wait_s("good")
    for _ in range(3):
        for client in ("bad", "worse"):  # after each pause, each client may try once
            call(breaker, client)
        assert breaker.wait_s("bad") == breaker.wait_s("worse") == breaker.wait_s() > 0
        call(breaker, "good")
        clock.now += breaker.wait_s()
    for number in range(MAX_CLIENTS - 2):
        call(breaker, str(number))
    assert breaker.wait_s("late") == breaker.wait_s("good") > 0
    clock.now += breaker.wait_s("good")
    call(breaker, "one", is_certain=True)
    assert breaker.wait_s("good") == breaker.wait_s("bad") > 0


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.booleans(), st.sampled_from([True, False, None]), st.floats(0, 40)
        ),
        max_size=60,
    )
)
def test_calls_that_overlap_never_block_the_breaker(
    steps: list[tuple[str, bool, bool | None, float]],
) -> None:
    """A call is allowed at most MAX_PAUSE_S after the last one has ended, whatever happened."""
    clock, running = Clock(), list[Call]()
    breaker = Breaker(clock)
    for client, begins, is_outage, seconds in steps:
        clock.now += seconds
        if begins and breaker.wait_s(client) == 0:
            running.append(breaker.begin(client))
        elif running:
            breaker.end(running.pop(0), is_outage)
        assert sum(one.period > 0 for one in running) <= 2 and breaker.wait_s(client) >= 0
    for one in running:
        breaker.end(one, None)
    clock.now += MAX_PAUSE_S
    assert breaker.wait_s("a") == 0


def usage_of(folder: Path, clock: Clock, state_dir: Path | None = None, **changed: Any) -> UpstreamUsage:
    return UpstreamUsage(model_of(folder, LABELS, chat(**changed)), state_dir, clock)


def test_the_use_survives_a_restart(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    state, changed = tmp_path / "state", {"max_calls_per_hour": 3, "price_per_million_tokens": [1.0, 100.0]}
    usage = usage_of(tmp_path, clock, state, **changed)
    for kind in ("learning", "audit", "repeat"):
        usage.called(kind)  # type: ignore[arg-type]
        usage.used(Usage(1000, 20))
    usage.failed("timeout")
    usage.answered(7, 2)
    usage.save()
    assert usage.local_share == pytest.approx(7 / 9)
    assert usage.totals.cost == pytest.approx(0.009)
    assert usage.saved == pytest.approx(0.003 * 5)  # seven local answers, one of them audited, with two calls
    again = usage_of(tmp_path, clock, state, **changed)
    assert again.totals == usage.totals
    assert again.quota_wait_s() == usage.quota_wait_s() > 0
    (path,) = (state / "upstream").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    # The limit is the server's, whatever the prompt; calls that were taken over count once.
    for _ in range(2):
        other = usage_of(tmp_path, clock, state, **changed, reply="exact")
        assert other.totals.calls["audit"] == 0
        assert other.totals.slots == usage.totals.slots
    assert json.loads(path.read_text())["slots"] == {}
    next(file for file in path.parent.iterdir() if file != path).unlink()
    content = json.loads(path.read_text())
    wrong = {"upstream": "f" * 64, "cost": -1, "local": 2**60, "calls": {"x": 1}, "slots": {"-x": 1}}
    fields = [json.dumps({**content, field: value}) for field, value in wrong.items()]
    for damaged in ("", "[]", " " * (MAX_STATE_BYTES + 1), *fields):
        path.write_text(damaged)
        caplog.clear()
        anew = usage_of(tmp_path, clock, state, **changed)
        assert (anew.totals.local, anew.quota_wait_s()) == (0, 0)
        assert str(path) in caplog.text


def test_latencies_are_those_of_the_last_minute_and_of_a_client(tmp_path: Path) -> None:
    usage = usage_of(tmp_path, clock := Clock())
    for seconds in (1.0, 9.0, 2.0):
        usage.took(seconds, "a")
    usage.took(30.0, "b")
    assert [usage.usual_s(client) for client in ("a", "b", "c", "")] == [2.0, 30.0, 0.0, 5.5]
    clock.now += STALE_S
    assert usage.usual_s("a") == usage.usual_s() == 0.0  # so that a short budget is tried again


def test_many_addresses_reserve_no_more_than_the_clients_remembered(tmp_path: Path) -> None:
    """Clients without a key count as one for each network; only calls, and refusals for the quota, count."""
    usage = usage_of(tmp_path, Clock(), max_calls_per_hour=2400)
    for i in range(600):
        assert not usage.quota_wait_s(f"key idle {i}")  # asks, but for another reason makes no call
        usage.called("uncertain", f"2001:db8:0:{i:x}::/64")
    for _ in range(1200):
        assert not usage.quota_wait_s("key victim")
        usage.called("uncertain", "key victim")
    usage = usage_of(tmp_path, Clock(), max_calls_per_hour=2400)
    for i in range(600):
        usage.called("uncertain", f"key {i}")
    for _ in range(1800 // (MAX_CLIENTS + 1)):
        assert not usage.quota_wait_s("key victim")
        usage.called("uncertain", "key victim")
    assert usage_of(tmp_path, Clock()).quota_wait_s("key victim") == 0


@settings(max_examples=50)
@given(
    most=st.integers(1, 30),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, HOUR_S / 4)), min_size=1, max_size=150),
)
def test_no_client_takes_the_share_of_another(
    tmp_path_factory: pytest.TempPathFactory, most: int, steps: list[tuple[str, float]]
) -> None:
    """A call is refused if the others could not make as many each, of the calls that are then left."""
    clock, calls, asked = Clock(), list[tuple[float, str]](), dict[str, float]()
    usage = usage_of(tmp_path_factory.mktemp("usage"), clock, max_calls_per_hour=most)
    for client, seconds in steps:
        clock.now += seconds
        calls = [(ends, name) for ends, name in calls if ends + HOUR_S > clock.now]
        made = Counter(name for _, name in calls)
        own = made.pop(client, 0) + 1
        asked[client] = clock.now
        active = [one for one, at in asked.items() if one != client and at >= clock.now - HOUR_S - SLOT_S]
        wait_s = usage.quota_wait_s(client)
        is_full = own + sum(made.values()) > most
        is_over = own > 1 and own + sum(max(made[one], own) for one in active) > most
        assert (wait_s > 0) == (is_full or is_over)
        assert wait_s <= HOUR_S + SLOT_S
        if not wait_s:
            usage.called("uncertain", client)
            calls.append(((clock.now // SLOT_S + 1) * SLOT_S, client))
    clock.now += usage.quota_wait_s() + 1e-6
    assert usage.quota_wait_s() == 0


def test_the_quota_does_not_follow_the_systems_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model_of(tmp_path, LABELS, chat(max_calls_per_hour=2))
    one = UpstreamUsage(of, tmp_path / "state")
    one.called("audit")
    one.called("audit")
    before = one.quota_wait_s()
    assert HOUR_S - SLOT_S < before <= HOUR_S + SLOT_S
    monkeypatch.setattr("de3.runtime.upstream.usage.time", lambda: 0.0)
    assert before - HOUR_S / 2 < one.quota_wait_s() <= before
    one.save()
    clock = Clock(time() - 1e6)  # of a server that starts after the clock was set back
    for state in (of, model_of(tmp_path, LABELS, chat(max_calls_per_hour=2, reply="exact"))):
        again = UpstreamUsage(state, tmp_path / "state", clock)
        assert HOUR_S <= again.quota_wait_s() <= HOUR_S + 10
        again.save()
    clock.now += HOUR_S + 10
    assert again.quota_wait_s() == 0


def test_no_reported_usage_makes_the_file_invalid(tmp_path: Path) -> None:
    """Else the counts, and with them the quota, would begin anew."""
    fields: dict[str, Any] = {"max_calls_per_hour": 3, "price_per_million_tokens": [1e300, 1e300]}
    usage = usage_of(tmp_path, clock := Clock(), tmp_path / "state", **fields)
    usage.called("audit")
    for _ in range(3):
        usage.used(Usage(2**53, 2**53 - 1))
    usage.save()
    assert usage_of(tmp_path, clock, tmp_path / "state", **fields).totals == usage.totals
