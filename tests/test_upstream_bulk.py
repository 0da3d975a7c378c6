"""`de3 classify` and `de3.load` with an upstream: a real HTTP server, which counts its calls."""

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from httpx import Headers

import de3
from de3.loadtest.servers import process_tree
from de3.runtime.engine.request import Text
from de3.runtime.errors import RequestError
from de3.runtime.upstream.calls import Calls
from de3.runtime.upstream.client import Reply
from de3.runtime.upstream.usage import Query
from de3.runtime.upstream_settings import read_upstream
from de3.server.settings import Settings
from tests import files
from tests.commands import invoke, refusal
from tests.fixtures import make_rows
from tests.serving import until
from tests.upstream import Service, chat, reply, send, text_of, write_toml

TEXTS = list(dict.fromkeys(text.strip() for text, _ in make_rows(300, 23) if text.strip()))[:200]
KEY, CONCURRENCY = "secret-key-of-the-upstream", 4


class Upstream(Service):
    """A service with a model that asks it, tickets.toml; `reply` maps a text to a status and a reply."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str)
        self.reply, self._folder = by_text, folder
        self.respond = self._respond

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        status, content = self.reply(text_of(body))
        send(handler, reply(content), status)

    @property
    def calls(self) -> int:
        return len(self.requests)

    def model(self, encoder: str = "tiny-int8", **more: Any) -> Path:
        """The .toml file of the model."""
        fields = {
            "api_key_env": "LLM_KEY",
            "concurrency": CONCURRENCY,
            "price_per_million_tokens": [1000, 2000],
        }
        about = {"name": "tickets", "encoder": encoder, "labels": ["negative", "positive"]}
        return write_toml(self._folder / "tickets.toml", chat(self.url, **fields | more), **about)

    def command(self, store: Path, texts: list[str], tau: float, *more: str) -> list[str]:
        """The arguments of `de3 classify` for these texts."""
        file = files.write(self._folder / "in.jsonl", [{"text": text} for text in texts])
        paths = f"--file {file} --out {self._folder}/out.jsonl --store {store} --model {self._folder}/tickets.toml"
        return ["classify", *paths.split(), "--tau", str(tau), "--threads", "2", *more]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the output."""
        return files.read(self._folder / "out.jsonl")


def by_text(text: str) -> tuple[int, str]:
    return 200, "Negative." if "film" in text else "I think it is positive!"


def done(command: list[str], code: int = 0) -> str:
    """What a command logs, which has no key."""
    found = invoke(command)
    assert found.exit_code == code, found.output
    assert KEY not in found.output
    return found.stderr


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Upstream]:
    monkeypatch.setenv("LLM_KEY", KEY)
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    one = Upstream(tmp_path)
    one.model()
    yield one
    one.stop()


class Sure(dict[str, Any]):
    """The answers of the model alone to those texts of which an exit is sure: half of them, with this τ."""

    tau: float


@pytest.fixture(scope="module")
def sure(store: Path) -> Sure:
    found = Sure()
    with de3.load("tiny-int8", store=store, threads=1) as model:
        rows = model.classify(TEXTS, tau=0, signal="risk", explain=True)
        lowest = sorted(min(one["score"] for one in row.raw["layers"][:-1]) for row in rows)
        # In the largest gap near the middle: scores are rounded, and two processes may differ in the last bit.
        middle = range(len(TEXTS) // 2 - 20, len(TEXTS) // 2 + 20)
        count = max(middle, key=lambda i: lowest[i] - lowest[i - 1])
        found.tau = (lowest[count - 1] + lowest[count]) / 2
        rows = model.classify(TEXTS, tau=found.tau, signal="risk")
    found.update((text, row) for text, row in zip(TEXTS, rows, strict=True) if row.exit.reason == "threshold")
    assert len(found) == count
    return found


def check(rows: list[dict[str, Any]], texts: list[str], sure: Sure) -> None:
    """Check that rows have the model's answers where it is sure, and the upstream's to the other texts."""
    assert [row["text"] for row in rows] == texts
    for row in rows:
        if (one := sure.get(row["text"])) is not None:
            expected = (one.label, one.exit.layer, "threshold")
            assert row["probs"] == pytest.approx(one.probs, abs=1e-6)
        else:
            number = "film" not in row["text"]
            expected = (["negative", "positive"][number], 3, "upstream")
            assert row["probs"] == [float(not number), float(number)] and row["exit_score"] is None
        assert (row["label"], row["exit_layer"], row["exit_reason"]) == expected and row["error"] is None
        assert row["exit_tau"] == sure.tau


def test_texts_of_which_no_exit_is_sure_are_asked_for_once(
    store: Path, tmp_path: Path, upstream: Upstream, sure: Sure
) -> None:
    texts = [*TEXTS, *TEXTS[:30]]
    command = upstream.command(store, texts, sure.tau, "--part-rows", "16")
    found = done(command)
    check(upstream.rows(), texts, sure)
    unsure = [text for text in TEXTS if text not in sure]
    assert Counter(upstream.texts) == Counter(unsure)
    assert {Headers(one)["authorization"] for one in upstream.headers} == {f"Bearer {KEY}"}
    local, calls = sum(text in sure for text in texts), len(unsure)
    line = (
        f"tickets: {local} of 230 texts answered without its upstream in this run; {calls} calls for this output "
        f"({calls} uncertain), which cost {0.12 * calls:.6g}; saved about {0.12 * local:.6g}"
    )
    assert line in found.splitlines() and "certified" not in found
    assert not (tmp_path / "out.jsonl.parts").exists()
    assert "out.jsonl is complete: nothing to do" in done(command)
    assert upstream.calls == calls


def saved(folder: Path) -> int:
    """The number of calls in the saved usage."""
    files = [json.loads(file.read_text()) for file in folder.glob(".upstream/upstream/*.json")]
    return sum(sum(one["calls"].values()) for one in files)


def test_a_killed_run_leaves_no_process_and_does_not_pay_again(
    store: Path, tmp_path: Path, upstream: Upstream, sure: Sure, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, hold = 60, threading.Event()

    def held(text: str) -> tuple[int, str]:
        if upstream.calls > answered:
            hold.wait(60)
        return by_text(text)

    upstream.reply = held
    upstream.model(price_per_call=1, price_per_million_tokens=None)
    small = "from de3.bulk import source; source.SLICE_ROWS = 8; from de3.runtime.upstream import upstreams"
    small += "; upstreams.SAVE_S = 0.01; from de3.cli import main; main()"
    command = upstream.command(store, TEXTS, sure.tau, "--part-rows", "16")
    running = subprocess.Popen([sys.executable, "-c", small, *command], stderr=subprocess.PIPE, text=True)
    until(lambda: upstream.calls == answered + CONCURRENCY, "calls in flight")
    folder = tmp_path / "out.jsonl.parts"
    until((folder / "part-000000.jsonl").exists, "a part")
    until(lambda: saved(folder) == upstream.calls, "the calls to be saved")
    pids = process_tree(running.pid)
    running.kill()
    errors = running.communicate()[1]
    hold.set()
    assert len(pids) >= 3  # the command, the fork server and a worker process
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "the processes to end")
    journal = folder / ".upstream" / "answers.jsonl"
    lines = journal.read_text().split("\n")[1:]
    assert len(lines) == answered
    assert all(re.fullmatch(r'\["[0-9a-f]{32}",[01],null\]', line) for line in lines)
    assert KEY not in errors
    assert all(KEY not in file.read_text() for file in folder.rglob("*") if file.is_file())
    journal.write_text(journal.read_text() + '\n["0123')  # an incomplete line
    monkeypatch.setattr("de3.bulk.source.SLICE_ROWS", 8)
    found = done(command)
    check(upstream.rows(), TEXTS, sure)
    distinct = len(TEXTS) - len(sure)
    assert upstream.calls == distinct + CONCURRENCY
    said = f"; {upstream.calls} calls for this output ({upstream.calls} uncertain), which cost {upstream.calls}; saved"
    assert said in found and not folder.exists()


def test_a_run_waits_while_the_upstream_is_away(
    store: Path, upstream: Upstream, sure: Sure, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text for text in TEXTS if text not in sure][:8]
    # It fails until calls are paused. A fixed number of failures may not pause them, as calls overlap.
    upstream.reply = lambda text: by_text(text) if "its upstream does not work" in caplog.text else (503, "")
    found = done(upstream.command(store, texts, sure.tau))
    check(upstream.rows(), texts, sure)
    assert found.count("HTTP 503; texts wait, and are tried again in 1 s") == 1


def test_texts_to_which_the_upstream_has_no_answer(
    several: Path, upstream: Upstream, sure: Sure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.runtime.upstream.calls.GIVE_UP_S", 0.0)
    texts = [text for text in TEXTS if text not in sure][:6] + list(sure)[:2]
    replies = {texts[1]: (200, "Neither."), texts[2]: (400, ""), texts[3]: (500, "")}
    upstream.reply = lambda text: replies.get(text) or by_text(text)
    file = upstream.model()
    options = ("--model", f"mood-int8,{file}", "--max-refused", "0.1")
    found = done(upstream.command(several, [*texts, texts[1]], sure.tau, *options), 3)
    assert "4 rows cannot be classified: error has the reasons" in found
    rows = upstream.rows()
    assert [bool(row["error"]) for row in rows] == [i in (1, 2, 3, 8) for i in range(9)]
    for row, reason in ((1, "its reply names no label"), (2, "400"), (3, "500")):
        error = rows[row]["error"]
        assert error.startswith("tickets: its upstream failed: ") and reason in error
    assert rows[8]["error"] == rows[1]["error"]
    assert rows[1]["mood-int8_label"] is None and rows[0]["mood-int8_label"] in ("calm", "glad", "sad")
    assert upstream.texts.count(texts[1]) == 2  # a reply without a label is tried once more
    with de3.load([file, "mood-int8"], store=several, threads=1) as both:
        answers = both.answers(texts, tau=sure.tau)
        assert [row["tickets_label"] for row in answers] == [row["tickets_label"] for row in rows[:8]]
        assert answers[1]["error"] == rows[1]["error"]
        with pytest.raises(de3.InputError, match=r"input\[2\]: tickets: its upstream failed: .* HTTP 400"):
            both.classify([texts[0], texts[0], texts[2]])


def test_a_text_that_always_fails_is_given_up_while_others_are_answered(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.runtime.upstream.upstreams.BACKOFF_S", 0.01)
    upstream.reply, said = lambda text: (500, "") if text == "bad" else (200, "positive"), list[str]()
    of = read_upstream(upstream.model())
    calls = Calls(Settings(upstreams=[of]), said.append)

    async def both() -> None:
        def ask(text: str) -> Coroutine[Any, Any, Reply]:
            return calls.ask("tickets", Query(Text(text), "uncertain"), 0.0, False)

        bad = asyncio.ensure_future(ask("bad"))
        while not bad.done():
            assert (await ask("good")).label == 1
            await asyncio.wait([bad], timeout=0.05)
        with pytest.raises(RequestError, match="HTTP 500"):
            await bad

    calls.submit(both()).result(120)
    calls.close(waits=True)
    assert any("HTTP 500; texts wait" in line for line in said)


def test_one_text_and_the_library(store: Path, upstream: Upstream, sure: Sure) -> None:
    file = upstream.model()
    options = ["--store", str(store), "--model", str(file)]
    one = next(text for text in TEXTS if text not in sure)
    found = invoke(["classify", one, *options, "--tau", str(sure.tau)])
    assert f"{'negative' if 'film' in one else 'positive'}  1.000  layer 3  {one}" in found.stdout
    with de3.load(file, store=store, threads=1) as model:
        rows = model.answers(TEXTS, tau=sure.tau)
        check([{"text": text, **row} for text, row in zip(TEXTS, rows, strict=True)], TEXTS, sure)
        assert upstream.calls == 1 + len(TEXTS) - len(sure)
        again = pickle.loads(pickle.dumps(model))
        assert KEY not in str(pickle.dumps(model))
        # Without τ, all texts are asked for.
        assert again.classify(next(iter(sure)))[0].exit.reason == "upstream"
        again.close()
        assert model.classify(one, max_layer=3)[0].exit.reason != "upstream"
        before, hold = upstream.calls, threading.Event()
        upstream.reply = lambda _: (200, "positive") if hold.wait(60) else (500, "")
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(model.classify, one)
            until(lambda: upstream.calls > before, "the call")
            model.close()
            with pytest.raises(RuntimeError, match="the classifier is closed"):
                running.result()
        hold.set()


def test_refusals(
    store: Path, tmp_path: Path, encoder: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [one for one in upstream.command(store, TEXTS[:3], 0) if one not in ("--tau", "0")]
    says = refusal([*command, "--target-speedup", "2"])
    assert says.startswith("target_speedup: ") and "give tau or max_disagreement" in says
    upstream.model(str(encoder))  # without exits
    assert "tickets:1 has no exits yet, so only its upstream answers" in refusal([*command, "--tau", "0.1"])
    assert "; 3 calls for this output (3 learning)" in done([*command, "--prefix", "a_"])
    (tmp_path / "out.jsonl").unlink()
    upstream.reply = lambda _: (401, "")
    says = refusal(command)  # the run ends at once
    assert "it answers with HTTP 401: check the key in LLM_KEY" in says and KEY not in says
    monkeypatch.delenv("LLM_KEY")
    assert refusal(command) == "upstream.api_key_env: the environment variable LLM_KEY has no key"
    upstream.model(url2=1)
    assert "tickets.toml: upstream.url2: " in refusal(command)


def test_a_run_that_is_terminated_says_what_is_kept_and_leaves_nothing(
    store: Path, tmp_path: Path, upstream: Upstream, sure: Sure
) -> None:
    """By SIGTERM to all of its processes, as a service manager sends it."""
    hold = threading.Event()
    upstream.reply = lambda text: by_text(text) if upstream.calls <= 60 or hold.wait(60) else (500, "")
    small = "from de3.bulk import source; source.SLICE_ROWS = 8; from de3.cli import main; main()"
    command = upstream.command(store, TEXTS, sure.tau, "--part-rows", "16")
    with subprocess.Popen(
        [sys.executable, "-c", small, *command], stderr=subprocess.PIPE, text=True
    ) as running:
        until((tmp_path / "out.jsonl.parts" / "part-000000.jsonl").exists, "a part")
        pids = process_tree(running.pid)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        errors = running.communicate()[1]
        hold.set()
    assert running.returncode == 143
    assert re.search(r"stopped; \d+ rows kept; the same command continues after the last of them", errors)
    assert "leaked" not in errors and "Traceback" not in errors
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), "the processes to end")
