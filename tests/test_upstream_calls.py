"""The calls for one upstream: their limits, retries and pauses, against a real service."""

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.upstream import breaker, upstreams
from de3.runtime.upstream.breaker import FAILURES
from de3.runtime.upstream.client import Reply
from de3.runtime.upstream.upstreams import Caller, Upstreams
from de3.runtime.upstream.usage import Kind, Query
from de3.server.settings import Settings
from tests.serving import in_event_loop, until
from tests.upstream import Service, chat, model_of, reply, send, service

LABELS = ["positive", "negative"]
TEXT = Text("a text")
KINDS: tuple[Kind, ...] = ("audit", "uncertain")


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with service() as one:
        yield one


@pytest.fixture
def upstream(running: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(upstreams, "BACKOFF_S", 0.01)
    running.gate.set()
    until(lambda: not running.running, "the calls of earlier tests to end")
    running.requests.clear()
    running.respond, running.most = None, 0
    return running


def caller(folder: Path, upstream: Service, max_queue: int = 1024, **fields: Any) -> Caller:
    of = model_of(folder, LABELS, chat(upstream.url, **fields))
    return Caller(of, Settings(upstreams=[of], max_queue=max_queue, max_texts=min(max_queue, 256)))


async def error_of(asking: Any) -> RequestError:
    with pytest.raises(RequestError) as found:
        await asking
    return found.value


async def soon(condition: Any, what: str) -> None:
    await asyncio.to_thread(until, condition, what)


@in_event_loop
async def test_audits_leave_room_for_texts_that_are_waited_for(tmp_path: Path, upstream: Service) -> None:
    one = caller(tmp_path, upstream, max_queue=4, concurrency=2)

    def ask(kind: Kind) -> asyncio.Task[Reply]:
        return asyncio.create_task(one.ask(Query(TEXT, kind), 30))

    for _ in range(2):  # the room is there again
        upstream.gate.clear()
        audits = [ask("audit") for _ in range(5)]
        await soon(lambda: upstream.running == 1, "an audit")  # audits use half of the calls at a time
        dropped = await error_of(audits[4])
        assert (dropped.cause, dropped.retry_after_s) == ("upstream", 1)
        assert dropped.message == "tickets: its upstream cannot be asked: 4 texts wait for it"
        texts = [ask("uncertain") for _ in range(8)]
        await soon(lambda: upstream.running == 2, "a text, although audits wait")
        assert (await error_of(ask("uncertain"))).retry_after_s == 1
        texts[3].cancel()
        await asyncio.wait([texts[3]])
        texts[3] = ask("uncertain")
        upstream.gate.set()
        assert {answer.label for answer in await asyncio.gather(*audits[:4], *texts)} == {1}
    assert upstream.most == 2


@in_event_loop
async def test_no_client_takes_all_room_or_slots(tmp_path: Path, upstream: Service) -> None:
    """Free slots go to the client whose calls have taken the least time; so do those of audits."""
    one = caller(tmp_path, upstream, max_queue=16, concurrency=2)

    def ask(client: str) -> list[asyncio.Task[Reply]]:
        queries = (Query(Text(f"{client} {kind}"), kind, client) for kind in KINDS)
        return [asyncio.create_task(one.ask(query, 30)) for query in queries]

    upstream.gate.clear()
    many = [task for _ in range(40) for task in ask("many")]
    await soon(lambda: upstream.running == 2, "the first calls")
    assert sum(task.done() for task in many) == 40 - 16 + 40 - 32  # all of the room, as it is alone
    few = ask("few")
    await asyncio.sleep(0)
    next(task for task in many if not task.done()).cancel()
    upstream.gate.set()
    assert [answer.label for answer in await asyncio.gather(*few)] == [1, 1]
    await asyncio.wait(many)
    assert sum("few" in text for text in upstream.texts[:16]) == 2


def failing(times: int, status: int = 503, **headers: str) -> Any:
    """Fails so many times, then answers."""
    left = iter(range(times))

    def respond(handler: Any, _: dict[str, Any]) -> None:
        if next(left, None) is None:
            send(handler, reply("positive"))
        else:
            send(handler, {}, status, **headers)

    return respond


@in_event_loop
async def test_a_failed_call_is_tried_twice_more(tmp_path: Path, upstream: Service) -> None:
    one = caller(tmp_path, upstream)
    upstream.respond = failing(2)
    assert (await one.ask(Query(TEXT, "audit"), 30)).label == 0
    assert one.usage.totals.calls == {"learning": 0, "uncertain": 0, "audit": 1, "repeat": 0, "retry": 2}
    upstream.respond = failing(3)
    found = await error_of(one.ask(Query(TEXT, "audit"), 30))
    assert found.message == "tickets: its upstream failed: it answers with HTTP 503"
    assert (found.cause, found.retry_after_s) == ("upstream", 1)
    assert one.usage.totals.failures["server_error"] == 5
    # A wrong key is not tried again, nor is anything for which there is no time.
    for status, headers, retry_after_s in ((429, {"Retry_After": "100"}, 100), (401, {}, 1)):
        upstream.respond = failing(1, status, **headers)
        found = await error_of(one.ask(Query(TEXT, "audit"), 30))
        assert (found.cause, found.retry_after_s) == ("upstream", retry_after_s)
    assert len(upstream.requests) == 8


@in_event_loop
async def test_the_quota_holds_for_retries_and_for_all_clients(tmp_path: Path, upstream: Service) -> None:
    one = caller(tmp_path, upstream, max_calls_per_hour=4)
    upstream.respond = failing(1)
    for client in ("b", "a"):
        await one.ask(Query(TEXT, "uncertain", client), 30)
    found = await error_of(one.ask(Query(TEXT, "uncertain", "b"), 30))  # which has used two of them
    assert found.message.endswith("a client's share of max_calls_per_hour (4) is reached")
    assert one.is_available
    asking = [one.ask(Query(TEXT, "audit", "a"), 30) for _ in range(5)]
    answers = await asyncio.gather(*asking, return_exceptions=True)
    refused = [error for error in answers if isinstance(error, RequestError)]
    assert (len(upstream.requests), len(refused)) == (4, 4)
    assert all(" asked: max_calls_per_hour (4) is reached" in error.message for error in refused)
    assert not one.is_available


@in_event_loop
async def test_a_pause_before_a_retry_holds_no_slot(tmp_path: Path, upstream: Service) -> None:
    upstream.respond = failing(1, 429, Retry_After="50")
    one = caller(tmp_path, upstream, concurrency=1)
    pausing = asyncio.create_task(one.ask(Query(TEXT, "uncertain", "many"), 100))
    await soon(lambda: one.usage.totals.failures["rate_limited"] == 1, "the failure")
    assert (await one.ask(Query(TEXT, "uncertain", "few"), 30)).label == 0
    assert not pausing.done()
    pausing.cancel()
    await asyncio.wait([pausing])


@in_event_loop
async def test_without_time_there_is_no_call(tmp_path: Path, upstream: Service) -> None:
    one = caller(tmp_path, upstream)
    for is_budget in (True, False):
        found = await error_of(one.ask(Query(TEXT, "uncertain"), 0.0, is_budget))
        assert (found.cause, found.retry_after_s) == ("upstream_timeout", 1)
    one.usage.took(50.0, "slow")
    await error_of(one.ask(Query(TEXT, "uncertain", "slow"), 40.0, True))
    assert upstream.requests == []
    # Texts of another client may take less time, and the time limit of a request is no budget.
    for client, is_budget in (("quick", True), ("slow", False)):
        assert (await one.ask(Query(TEXT, "uncertain", client), 40.0, is_budget)).label == 1


@in_event_loop
async def test_slow_calls_open_the_breaker_but_not_short_budgets(tmp_path: Path, upstream: Service) -> None:
    upstream.gate.clear()
    one = caller(tmp_path, upstream, timeout_s=0.2)
    for _ in range(FAILURES + 1):
        assert (await error_of(one.ask(Query(TEXT, "uncertain"), 0.05, True))).cause == "upstream_timeout"
    assert one.is_available
    found = await asyncio.gather(*(error_of(one.ask(Query(TEXT, "uncertain"), 30)) for _ in range(FAILURES)))
    assert {error.cause for error in found} <= {"upstream_timeout", "upstream"}
    assert not one.is_available
    upstream.gate.set()


@in_event_loop
async def test_texts_of_one_client_do_not_pause_calls_of_others(
    tmp_path: Path, upstream: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a client that is alone do, and so do those that no text can cause."""

    def respond(handler: Any, body: dict[str, Any]) -> None:
        status = next((int(word) for word in ("401", "500") if word in str(body)), 200)
        send(handler, b"{" if "bad" in str(body) else reply("positive"), status)

    upstream.respond = respond
    one = caller(tmp_path, upstream)
    await one.ask(Query(TEXT, "uncertain", "good"), 30)
    for _ in range(4 * FAILURES):
        error = await error_of(one.ask(Query(Text("bad"), "uncertain", "bad"), 30))
        assert error.message.endswith("the response does not have the expected format")
    await error_of(one.ask(Query(Text("500"), "uncertain", "bad"), 30))
    assert (await one.ask(Query(TEXT, "uncertain", "good"), 30)).label == 0
    monkeypatch.setattr(breaker, "PAUSE_S", 60.0)  # however slow this machine is, the next call comes earlier
    await one.ask(Query(TEXT, "uncertain", "good"), 30)  # a success sets the pause
    for _ in range(FAILURES):
        await error_of(one.ask(Query(Text("401"), "uncertain", "bad"), 30))
    monkeypatch.undo()
    paused = await error_of(one.ask(Query(TEXT, "uncertain", "good"), 30))
    assert paused.message.endswith("its last calls have failed")
    alone = caller(tmp_path, upstream)
    for _ in range(FAILURES):
        await error_of(alone.ask(Query(Text("bad"), "uncertain", "bad"), 30))
    assert not alone.is_available
    assert (await alone.ask(Query(TEXT, "uncertain", "good"), 30)).label == 0


def test_the_state_folder_is_written_by_one_thread_at_a_time(
    tmp_path: Path, upstream: Service, caplog: pytest.LogCaptureFixture
) -> None:
    models = [model_of(tmp_path, LABELS, chat(upstream.url), name=name) for name in ("one", "two")]
    both = Upstreams(Settings(upstreams=models, state_dir=tmp_path / "state"))

    def save(_: int) -> None:
        for name in both.all:
            both.answered(name, 1, 0)
        both.stop()

    with caplog.at_level(logging.ERROR), ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(50)))
    assert caplog.text == ""
    (path,) = (tmp_path / "state/upstream").glob("one*")
    path.unlink()
    path.mkdir()  # cannot be replaced by a file
    for number in range(3):
        save(number)
    assert caplog.text.count("state_dir: cannot save the calls of upstreams") == 1
    again = Upstreams(Settings(upstreams=models[1:], state_dir=tmp_path / "state"))
    assert again.all["two"].usage.totals.local == 53


@in_event_loop
async def test_the_addresses_of_a_network_are_one_client(tmp_path: Path, upstream: Service) -> None:
    one = caller(tmp_path, upstream, max_queue=16, concurrency=2)

    def ask(client: str) -> asyncio.Task[Reply]:
        return asyncio.create_task(one.ask(Query(Text(client), "uncertain", client), 30))

    upstream.gate.clear()
    other = ask("other")
    await soon(lambda: upstream.running == 1, "the first call")
    many = [ask(f"2001:db8:0:{number:x}::1") for number in range(40)]
    await soon(lambda: upstream.running == 2, "a call of the network")
    refused = await error_of(many[-1])
    assert refused.cause == "upstream" and not other.done()
    last = [ask("other") for _ in range(3)]  # a network leaves room for others
    await asyncio.sleep(0)
    upstream.gate.set()
    assert [answer.label for answer in await asyncio.gather(other, *last)] == [1] * 4
    await asyncio.wait(many)
    assert sum(task.exception() is None for task in many) < 32
