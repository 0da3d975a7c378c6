"""The parts of an upstream: its .toml file, the labels in replies, the breaker, and the counts of its use."""

import json
import logging
from collections import Counter
from pathlib import Path
from time import monotonic, thread_time, time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.server.engine.request import Text
from de3.server.settings import Settings
from de3.server.upstream.breaker import FAILURES, GOOD_S, MAX_CLIENTS, MAX_PAUSE_S, PAUSE_S, Breaker, Call
from de3.server.upstream.client import Reply, Usage
from de3.server.upstream.labels import MAX_CHARS, Labels
from de3.server.upstream.undelivered import KEPT_S, MAX_KEPT, Undelivered, key_of
from de3.server.upstream.upstreams import Upstreams
from de3.server.upstream.usage import HOUR_S, MAX_STATE_BYTES, SLOT_S, UpstreamUsage
from de3.server.upstream_settings import MAX_FILE_BYTES, UpstreamModel, folded, read_upstream
from tests.upstream import KEY, chat, model_of, write_toml

LABELS = ["billing", "refund", "card lost", "other"]
CLASSIFY = {"kind": "classify", "url": "https://other/classify", "model": None, "prompt": None}


def refusal_of(folder: Path, changed: dict[str, Any], **fields: Any) -> str:
    """The message for a file with these fields, after the file's path; changed: fields of the upstream."""
    with pytest.raises(ValueError, match=r"\.toml: ") as found:
        model_of(folder, fields.pop("labels", LABELS), {**chat(), **changed}, **fields)
    path, _, message = str(found.value).partition(".toml: ")
    assert path == f"{folder}/{fields.get('name', 'tickets')}"
    return message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "complete"}, "upstream.kind: Input should be 'chat' or 'classify'"),
        ({"promt": "x"}, "upstream.promt: unknown field"),
        ({"url": None}, "upstream.url: Field required"),
        ({"model": None}, "upstream.model: is required for chat"),
        ({"prompt": None}, "upstream.prompt: is required for chat"),
        ({"kind": "classify"}, "upstream.prompt: only chat has one"),
        ({"prompt": "Which of {labels}?"}, "upstream.prompt: must contain {text} once"),
        ({"prompt": "{text} {labels} {text}"}, "upstream.prompt: must contain {text} once"),
        ({"prompt": "{text} {text_pair} {text_pair}"}, "and {text_pair} at most once"),
        ({"reply": "regex"}, "upstream.reply: Input should be 'contains' or 'exact'"),
        ({"api_key_env": "A KEY"}, "upstream.api_key_env: String should match pattern"),
        (
            {"parameters": {"stream": True}},
            "upstream.parameters: must not contain stream, which the server sets",
        ),
        ({"parameters": {"n": 2}}, "upstream.parameters: must not contain n, which the server sets"),
        ({"parameters": {"seed": 2**64}}, "upstream.parameters: must be values that JSON has"),
        ({"parameters": {"top_p": float("nan")}}, "upstream.parameters: must be values that JSON has"),
        ({"price_per_call": -1}, "upstream.price_per_call: Input should be greater than or equal to 0"),
        ({"price_per_call": float("inf")}, "upstream.price_per_call: Input should be a finite number"),
        (
            {"price_per_call": 1, "price_per_million_tokens": [1, 2]},
            "upstream.price_per_call: cannot be combined with price_per_million_tokens",
        ),
        (
            {"max_calls_per_hour": 0},
            "upstream.max_calls_per_hour: Input should be greater than or equal to 1",
        ),
        ({"concurrency": 0}, "upstream.concurrency: Input should be greater than or equal to 1"),
        ({"timeout_s": 0}, "upstream.timeout_s: Input should be greater than 0"),
        *(
            (
                {"url": url},
                "upstream.url: must be http:// or https://, with a host and without a user name or #",
            )
            for url in (
                "llm.internal/v1",
                "ftp://llm.internal/v1",
                "https://",
                "https://user:secret@llm.internal/v1",
                "https://secret@llm.internal/v1",
                "https://llm.internal/v1#secret",
                "https://llm.internal:none/v1",
                "https://llm.internal/v 1",
                "https://[llm.internal/v1",
                "https://llm.internal/v1\n",
                "https://llm\u0662.internal/v1",
            )
        ),
    ],
)
def test_a_bad_value_names_the_file_the_field_and_what_is_allowed(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    found = refusal_of(tmp_path, changed)
    assert message in found
    assert "secret" not in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ["billing"]}, "labels: List should have at least 2 items"),
        ({"labels": ["billing", "?!"]}, "labels: '?!' has no letter or digit"),
        ({"labels": ["card lost", "Card-Lost!"]}, "labels: 'card lost' and 'Card-Lost!' differ only in case"),
        ({"labels": ["straße", "STRASSE"]}, "labels: 'straße' and 'STRASSE' differ only in case"),
        ({"labels": ["a", "b" * 10_000]}, "labels.1: String should have at most"),
        ({"name": "Tickets of ours"}, "name: String should match pattern"),
        ({"encoder": None}, "encoder: Field required"),
        ({"encoders": "x"}, "encoders: unknown field"),
    ],
)
def test_a_bad_field_of_the_model_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    assert refusal_of(tmp_path, {}, **fields).startswith(message)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(FileNotFoundError):
        read_upstream(path)
    for content, message in (
        (b"name = ", "Invalid value"),
        (b'name = "\xff"', "'utf-8' codec"),
        (b"#" * (MAX_FILE_BYTES + 1), f"it has more than {MAX_FILE_BYTES} bytes"),
        (b"upstream = 3", "name: Field required"),
        (b"x = " + b"[" * 100_000, "recursion"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.toml: ") as found:
            read_upstream(path)
        assert message in str(found.value)


def test_plain_http_leaves_the_machine_only_if_allowed(tmp_path: Path) -> None:
    for url in (
        "http://llm.internal/v1",
        "http://127.0.0.1.evil/v1",
        "http://10.0.0.1/v1",
        "http://127.1/v1",
    ):
        of = model_of(tmp_path, LABELS, chat(url))
        with pytest.raises(
            ValueError, match=r"tickets: upstream\.url: would send texts unencrypted"
        ) as found:
            Settings(upstreams=[of])
        assert "--allow-plain-http" in str(found.value)
        assert Settings(upstreams=[of], allow_plain_http=True).upstreams == [of]
    for url in ("http://127.0.0.2:8/v1", "http://localhost/v1", "http://[::1]/v1", "HTTPS://llm.internal/v1"):
        assert Settings(upstreams=[model_of(tmp_path, LABELS, chat(url))])


@pytest.mark.parametrize("key", [None, "", "  ", "schlüssel-secret", "secret\nX-Header: 1", "secret\x00"])
def test_a_missing_or_unusable_key_is_named_but_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    of = model_of(tmp_path, LABELS, chat(api_key_env="LLM_KEY"))
    assert KEY not in repr(of)
    if key is None or "\0" in key:
        monkeypatch.delenv("LLM_KEY", raising=False)
    else:
        monkeypatch.setenv("LLM_KEY", key)
    with pytest.raises(ValueError, match=r"upstream\.api_key_env: .*LLM_KEY") as found:
        Upstreams(Settings(upstreams=[of]))
    assert "secret" not in str(found.value)
    monkeypatch.setenv("LLM_KEY", f" {KEY}\n")
    assert of.upstream.key() == KEY


def test_the_hash_is_of_what_determines_the_answers(tmp_path: Path) -> None:
    def hash_of(changed: dict[str, Any], **fields: Any) -> str:
        return model_of(tmp_path, fields.pop("labels", LABELS), {**chat(), **changed}, **fields).hash

    one = hash_of({})
    same: list[dict[str, Any]] = [
        {"price_per_call": 1.0},
        {"price_per_million_tokens": [1, 2]},
        {"max_calls_per_hour": 9},
        {"concurrency": 3},
        {"timeout_s": 3},
        {"api_key_env": "OTHER"},
        {"url": "https://elsewhere/v1"},  # the same model
    ]
    others: list[dict[str, Any]] = [
        {"model": "other"},
        {"prompt": "{text}"},
        {"parameters": {"temperature": 0}},
        {"parameters": {"temperature": 0.5}},
        {"reply": "exact"},
        CLASSIFY,
        {
            **CLASSIFY,
            "url": "https://elsewhere/classify",
        },  # without a model, the URL is all that identifies it
        {**CLASSIFY, "model": "some-model"},
    ]
    assert {hash_of(changed) for changed in same} == {one}
    assert hash_of({}, encoder="another") == one
    hashes = [one, *map(hash_of, others), hash_of({}, labels=LABELS[::-1]), hash_of({}, labels=LABELS[:2])]
    assert len(set(hashes)) == len(hashes)


# Words of any script; "ß" and "İ" change their length when folded.
WORDS = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6).filter(
    lambda w: len(folded(w)) == 1
)
SPACES = st.sampled_from([" ", "-", "_", "\n", " (", ". ", "/"])


@st.composite
def labels_and_reply(draw: Any) -> tuple[list[str], int, str, bool]:
    """Labels, the number of one, a reply that names it, and true if other words are around it."""
    words = draw(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=2, max_size=5))
    labels = {folded(" ".join(one)): " ".join(one) for one in words}
    names = {word for one in labels for word in one}
    around = [word for word in draw(st.lists(WORDS, max_size=5)) if folded(word)[0] not in names]
    number = draw(st.integers(0, len(labels) - 1))
    label = list(labels.values())[number]
    label = draw(st.sampled_from([label, label.upper(), label.replace(" ", "--")]))
    cut, space = draw(st.integers(0, len(around))), draw(SPACES)
    reply = space.join([*around[:cut], label, *around[cut:]])
    return list(labels.values()), number, f"{draw(SPACES)}{reply}{draw(SPACES)}", bool(around)


@given(labels_and_reply())
def test_a_label_is_found_among_words_that_are_no_label(case: tuple[list[str], int, str, bool]) -> None:
    names, number, reply, has_words = case
    if len(names) < 2 or folded(reply) == () or folded(names[number].upper()) != folded(names[number]):
        return  # the capitals of a few letters, such as İ, do not fold to what they are the capitals of
    labels = Labels(names)
    found, is_extracted = labels.find(reply)
    shorter = [one for one in map(folded, names) if one != folded(names[number])]
    overlaps = any(set(one) & set(folded(names[number])) for one in shorter)
    if not overlaps:
        assert (found, is_extracted) == (number, has_words)
        assert labels.find(reply, is_exact=True) == (None if has_words else number, False)
    elif found is not None:  # the words of the label may be those of others, too, but it is the longest
        assert found == number


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("billing", (0, False)),
        (" **Billing.** ", (0, False)),
        ("CARD_LOST", (2, False)),
        ("The label is: billing.", (0, True)),
        ("billing billing", (0, True)),
        ("card lost or stolen", (2, True)),
        ("lost card", (None, False)),
        ("billings", (None, False)),
        ("billing, not refund", (None, False)),
        ("", (None, False)),
        ("?", (None, False)),
        ("billing" + " " * MAX_CHARS, (None, False)),
        ("billing" + "\ufdfa" * (MAX_CHARS // 18 + 1), (None, False)),  # 18 characters each, once normalized
    ],
)
def test_a_reply_names_one_label(reply: str, expected: tuple[int | None, bool]) -> None:
    assert Labels(LABELS).find(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "\ufdfa" * 2**18,
        "a" * 2**20,
        "a " * 2**19,
        "a " * (MAX_CHARS // 2),
        "a" + "\u0301\u0316" * (MAX_CHARS // 2),
        "\u0f73" * (MAX_CHARS // 2),
        "card " * (MAX_CHARS // 5),
        "card 1 " * (MAX_CHARS // 7),
        "\u0e33" * (MAX_CHARS // 2),
    ],
)
def test_the_longest_reply_takes_a_few_milliseconds(reply: str) -> None:
    labels = Labels([f"card {' '.join(map(str, range(n % 60)))} of {n}" for n in range(1000)])

    def cpu_s() -> float:
        started = thread_time()
        labels.find(reply)
        return thread_time() - started

    assert min(cpu_s() for _ in range(5)) < 0.01


def test_the_longest_label_matches_and_two_that_overlap_are_two() -> None:
    labels = Labels(["card", "card lost", "lost card abroad"])
    assert labels.find("my card lost") == (1, True)
    assert labels.find("the lost card abroad") == (2, True)
    assert labels.find("card, card lost") == (None, False)
    assert Labels(["a rate", "rate", "one of many words"]).find("it is a rate") == (0, True)  # not cut off
    assert labels.find("a card lost card abroad") == (None, False)
    assert Labels(["card lost", "lost abroad"]).find("my card lost abroad") == (None, False)


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


def test_vowel_signs_are_parts_of_words() -> None:
    labels = Labels(["कि", "कु", "é"])
    assert labels.find("यह कि है") == (0, True)
    assert labels.find("कु") == (1, False)
    assert labels.find("क") == (None, False)
    assert labels.find("E\u0301 ✔\ufe0f") == (2, False)


@given(st.text(), st.booleans())
def test_any_reply_is_read(reply: str, is_exact: bool) -> None:
    Labels(LABELS).find(reply, is_exact)


class Clock:
    """A clock that stands still."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def call(
    breaker: Breaker, client: str = "one", is_outage: bool | None = True, is_certain: bool = False, **how: Any
) -> None:
    """A call of a client that is allowed, with this result."""
    assert breaker.wait_s(client) == 0
    breaker.end(breaker.begin(client), is_outage, is_certain=is_certain, **how)


def test_the_breaker_opens_after_outages_in_a_row_and_tries_one_call_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES - 1):
        call(breaker, is_certain=True)
    call(breaker, is_outage=False)  # a success in between
    for _ in range(FAILURES):
        assert not breaker.is_open
        call(breaker, is_certain=True)
    assert breaker.is_open
    assert breaker.wait_s() == pytest.approx(PAUSE_S)
    pause_s = PAUSE_S
    for _ in range(8):
        clock.now += breaker.wait_s()
        trial = breaker.begin("one")
        assert trial.period and breaker.wait_s("other") > 0  # one trial at a time
        breaker.end(trial, True, is_certain=True)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
        assert breaker.wait_s() == breaker.wait_s("other") == pytest.approx(pause_s)
    assert pause_s == MAX_PAUSE_S
    clock.now += pause_s
    call(breaker, is_outage=False)
    assert not breaker.is_open
    for _ in range(FAILURES):
        call(breaker, is_certain=True)
    assert breaker.wait_s() == pytest.approx(PAUSE_S)  # the pause is the first one again


def test_a_trial_that_is_cancelled_or_takes_long_keeps_no_other_client_from_trying() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        call(breaker, is_certain=True)
    clock.now += PAUSE_S
    for _ in range(3):
        call(breaker, "leaves", is_outage=None)
        assert breaker.wait_s("leaves") == 2 * PAUSE_S and breaker.wait_s("other") == 0
        clock.now += 2 * PAUSE_S
    slow = breaker.begin("slow")
    assert breaker.wait_s("other") == PAUSE_S
    clock.now += PAUSE_S
    assert breaker.wait_s("slow") > breaker.wait_s("other") == 0
    clock.now += 10 * PAUSE_S
    assert breaker.wait_s("other") == 0
    call(breaker, "other", is_outage=False)
    breaker.end(slow, True)  # a trial of before: an outage like any other
    assert not breaker.is_open and breaker.wait_s("slow") == 0
    while not breaker.is_open:
        call(breaker, is_certain=True)
    clock.now += PAUSE_S
    slow = breaker.begin("slow")
    clock.now += PAUSE_S
    call(breaker, "other", is_outage=False)
    while not breaker.is_open:
        call(breaker, is_certain=True)
    wait_s = breaker.wait_s()
    breaker.end(slow, True, is_certain=True)
    assert breaker.wait_s() == wait_s


def test_a_client_that_always_leaves_does_not_extend_the_pause_of_one_whose_trial_failed() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    while not breaker.is_open:
        call(breaker, is_certain=True)
    clock.now += PAUSE_S
    call(breaker, "other")
    for _ in range(2):
        clock.now += max(breaker.wait_s("leaves"), PAUSE_S)
        call(breaker, "leaves", is_outage=None)
    assert breaker.wait_s("other") == 0


def test_the_breaker_heeds_retry_after_up_to_its_longest_pause() -> None:
    for retry_after_s, pause_s in ((7.0, 7.0), (0.0, PAUSE_S), (3600.0, MAX_PAUSE_S)):
        breaker = Breaker(Clock())
        for _ in range(FAILURES):
            call(breaker, is_certain=True, retry_after_s=retry_after_s)
        assert breaker.wait_s() == pytest.approx(pause_s)


def test_outages_that_may_be_due_to_texts_of_one_client_do_not_open_the_breaker() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(3 * FAILURES):
        call(breaker, "bad")
    call(breaker, "bad", is_outage=False)
    for _ in range(FAILURES - 1):
        call(breaker, "bad")
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


def test_while_the_upstream_answers_a_client_the_texts_of_two_others_do_not_open_the_breaker() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(3):
        call(breaker, "good", is_outage=False)
        for number in range(3 * FAILURES):
            call(breaker, ("bad", "worse")[number % 2])
        clock.now += GOOD_S - 1
    clock.now += 1
    call(breaker, "bad")
    assert breaker.is_open  # it has answered nobody for long
    clock.now += PAUSE_S
    for number in range(2 * MAX_CLIENTS):
        call(breaker, str(number), is_outage=False)
    assert len(breaker._good) == MAX_CLIENTS


def test_clients_whose_texts_fail_do_not_keep_the_breaker_open_for_others() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for client in (FAILURES * ["bad", "worse"])[:FAILURES]:
        call(breaker, client)
    clock.now += breaker.wait_s("good")
    for _ in range(3):
        for client in ("bad", "worse"):  # after each pause, each client may try once
            call(breaker, client)
        assert breaker.wait_s("bad") == breaker.wait_s("worse") == breaker.wait_s() > 0
        call(breaker, "good")
        clock.now += breaker.wait_s()
    for number in range(MAX_CLIENTS - 3):
        call(breaker, str(number))
    call(breaker, "one more")
    assert not breaker._suspects and breaker.wait_s("late") == breaker.wait_s("good") > 0
    clock.now += breaker.wait_s("good")
    call(breaker, is_certain=True)
    assert breaker.wait_s("good") == breaker.wait_s("bad") > 0


def test_a_client_need_not_wait_for_the_failures_of_one_that_was_alone() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(2 * FAILURES):
        clock.now += breaker.wait_s("bad")
        call(breaker, "bad", is_alone=True)
    assert breaker.is_open and breaker.wait_s("bad") == breaker.wait_s() == MAX_PAUSE_S
    call(breaker, "good", is_outage=False)
    assert not breaker.is_open


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


@given(
    most=st.integers(1, 30),
    steps=st.lists(
        st.one_of(st.floats(0, 30), st.floats(0, HOUR_S + 30), st.none()), min_size=1, max_size=150
    ),
)
def test_no_hour_has_more_calls_than_allowed(
    tmp_path_factory: pytest.TempPathFactory, most: int, steps: list[float | None]
) -> None:
    """None: wait as long as reported; then a call is allowed."""
    clock, begun = Clock(), list[float]()
    usage = usage_of(tmp_path_factory.mktemp("usage"), clock, max_calls_per_hour=most)
    for seconds in steps:
        if seconds is None:
            wait_s = usage.quota_wait_s()
            assert wait_s <= HOUR_S + 10
            clock.now += wait_s + (1e-6 if wait_s else 0)
            assert usage.quota_wait_s() == 0
        else:
            clock.now += seconds
        if not usage.quota_wait_s():
            usage.called("uncertain")
            begun.append(clock.now)
    for i, at in enumerate(begun[most:]):
        assert at - begun[i] >= HOUR_S


def test_the_use_survives_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, state = Clock(), tmp_path / "state"
    changed: dict[str, Any] = {"max_calls_per_hour": 3, "price_per_million_tokens": [1.0, 100.0]}
    usage = usage_of(tmp_path, clock, state, **changed)
    for kind in ("learning", "audit", "audit"):
        usage.called(kind)  # type: ignore[arg-type]
        usage.used(Usage(1000, 20))
    usage.failed("timeout")
    usage.answered(7, 2)
    usage.save()
    assert usage.local_share == pytest.approx(7 / 9)
    assert usage.totals.cost == pytest.approx(0.009)
    assert usage.saved == pytest.approx(0.003 * 5)  # seven local answers, two of them audited
    again = usage_of(tmp_path, clock, state, **changed)
    assert again.totals == usage.totals
    assert again.quota_wait_s() == usage.quota_wait_s() > 0
    (path,) = (state / "upstream").iterdir()
    other = usage_of(tmp_path, clock, state, **changed, reply="exact")
    assert other.totals.calls["audit"] == 0
    # The limit is the server's, whatever the prompt; calls that were taken over count once.
    assert other.quota_wait_s() == usage.quota_wait_s()
    assert usage_of(tmp_path, clock, state, **changed, reply="exact").totals.slots == usage.totals.slots
    assert json.loads(path.read_text())["slots"] == {}
    next(file for file in path.parent.iterdir() if file != path).unlink()
    assert path.stat().st_mode & 0o077 == 0
    content = json.loads(path.read_text())
    for damaged in ("", "{", "[]", json.dumps(content | {"upstream": "f" * 64}), " " * (MAX_STATE_BYTES + 1)):
        path.write_text(damaged)
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            anew = usage_of(tmp_path, clock, state, **changed)
        assert anew.totals.local == 0
        assert f"{path} cannot be used, so its counts begin anew" in caplog.text
        assert anew.quota_wait_s() == 0
    for field, value in (
        ("cost", -1),
        ("local", 2**60),
        ("calls", {"x": 1}),
        ("slots", {"-x": 1}),
        ("more", 1),
    ):
        path.write_text(json.dumps(content | {field: value}))
        assert usage_of(tmp_path, clock, state, **changed).totals.local == 0


def test_a_clients_share_of_the_quota(tmp_path: Path) -> None:
    """A client alone may use all of it; one that is not alone leaves the others their equal shares."""
    clock = Clock()
    usage = usage_of(tmp_path, clock, tmp_path / "state", max_calls_per_hour=12)

    def call(client: str) -> None:
        assert usage.quota_wait_s(client) == 0
        usage.called("uncertain", client)

    def use(client: str) -> int:
        """Make as many calls as are allowed; returns their number."""
        calls = 0
        while not usage.quota_wait_s(client):
            usage.called("uncertain", client)
            calls += 1
        return calls

    call("b")
    assert (use("a"), use("b"), use("c")) == (6, 5, 0)
    assert 0 < usage.quota_wait_s() == usage.quota_wait_s("c") <= HOUR_S + SLOT_S
    clock.now += HOUR_S + 2 * SLOT_S
    assert use("a") == 12  # the others have not asked for an hour
    clock.now += HOUR_S / 2
    assert use("b") == 0
    clock.now += HOUR_S / 2 + SLOT_S
    call("a")
    assert (use("a"), use("b")) == (5, 6)  # b has asked, so a must leave it its share
    usage.save()
    assert usage_of(tmp_path, clock, tmp_path / "state", max_calls_per_hour=12).quota_wait_s("b") > 0
    usage = usage_of(tmp_path, clock, tmp_path / "state", max_calls_per_hour=20)
    call("a")
    call("b")
    assert (use("a"), use("b")) == (3, 3)  # of the 8 that are left after the restart
    usage = usage_of(tmp_path, clock, max_calls_per_hour=12)
    for client in 8 * "x" + "yz":
        call(client)
    assert (use("x"), use("y"), use("z")) == (0, 1, 1)  # what one has used while it was alone is gone


def test_many_addresses_reserve_no_more_than_the_clients_remembered(tmp_path: Path) -> None:
    """Clients without a key count as one for each network; only calls, and refusals for the quota, count."""
    usage = usage_of(tmp_path, Clock(), max_calls_per_hour=20_000)
    for i in range(5000):
        assert not usage.quota_wait_s(f"key idle {i}")  # asks, but for another reason makes no call
        address = f"2001:db8:0:{i:x}::/64"
        assert not usage.quota_wait_s(address)
        usage.called("uncertain", address)
    for _ in range(7500):
        assert not usage.quota_wait_s("key victim")
        usage.called("uncertain", "key victim")
    usage = usage_of(tmp_path, Clock(), max_calls_per_hour=20_000)
    for i in range(5000):
        usage.called("uncertain", f"key {i}")
    for _ in range(15_000 // (MAX_CLIENTS + 1)):
        assert not usage.quota_wait_s("key victim")
        usage.called("uncertain", "key victim")
    assert len(usage._asked) == MAX_CLIENTS
    assert usage_of(tmp_path, Clock()).quota_wait_s("key victim") == 0


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


def test_the_quota_does_not_follow_changes_of_the_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = model_of(tmp_path, LABELS, chat(max_calls_per_hour=2))
    one = UpstreamUsage(of, tmp_path / "state")
    one.called("audit")
    one.called("audit")
    before = one.quota_wait_s()
    assert HOUR_S - SLOT_S < before <= HOUR_S + SLOT_S
    # It follows the monotonic clock alone.
    monkeypatch.setattr("de3.server.upstream.usage.time", lambda: 0.0)
    monkeypatch.setattr("de3.server.upstream.usage.monotonic", lambda: monotonic() + 1000)
    assert before - 1060 < one.quota_wait_s() <= before - 1000
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


def test_a_scrape_changes_no_count(tmp_path: Path) -> None:
    """Scrapes run in another thread: they must not replace the slots while a call is counted."""
    usage = usage_of(tmp_path, clock := Clock(), max_calls_per_hour=3)
    usage.called("audit")
    slots = usage.totals.slots
    clock.now += 2 * HOUR_S
    assert usage.quota_wait_s() == 0
    assert usage.totals.slots is slots


def test_the_file_is_that_of_the_readme(tmp_path: Path) -> None:
    of = UpstreamModel.model_validate(
        {"name": "tickets", "encoder": "x", "labels": LABELS, "upstream": chat(parameters={"max_tokens": 8})}
    )
    path = write_toml(
        tmp_path / "t.toml", chat(parameters={"max_tokens": 8}), name="tickets", encoder="x", labels=LABELS
    )
    assert read_upstream(path) == of
    assert of.upstream.takes_pairs is False
    assert model_of(tmp_path, LABELS, chat(prompt="{text} {text_pair}")).upstream.takes_pairs is True
    assert model_of(tmp_path, LABELS, {**chat(), **CLASSIFY}).upstream.takes_pairs is None
