"""Attack our own server, whose memory and files are limited, and measure a well-behaved client meanwhile."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

from de3.loadtest.servers import Running, ours, running
from lab.attacks import ATTACKERS_KEY, ATTACKS, OWN_KEY, Attack
from lab.limits import limits
from lab.well_behaved import Phase, WellBehavedClient

if TYPE_CHECKING:
    from rich.table import Table

MEMORY_BYTES = 2**30
FILES = 1024
BUDGET_MS = 50.0
SAMPLE_S = 0.25  # between samples of the memory
VALID = {"input": {"text": "a warm , funny , engaging film", "text_pair": "good"}, "explain": True}
ANSWER_TIMEOUT_S = 30.0  # of the valid request
# The memory has recovered if it is at most 10% above its level before the attack, or 16 MB if that is more: small heaps
# vary by more than 10%.
BACK_SHARE, BACK_MB = 0.1, 16.0
P99_MS, P99_RATIO = 50.0, 5.0
COLUMNS = (
    *("attack", "p50, ms", "p99, ms", "max, ms", "requests", "refused", "errors", "unanswered"),
    *("budgets kept", "memory, MB", "back, s", "result"),
)


@dataclass(frozen=True)
class Memory:
    """The server's memory (PSS) around an attack, MB.

    Attributes:
        limited: a control group limits the memory; if not, the peak is compared with the limit.
        back_s: seconds after the attack until the memory recovered; None: it did not.
    """

    limited: bool
    before_mb: float
    peak_mb: float = 0.0
    after_mb: float = 0.0
    back_s: float | None = None

    def is_back(self, now_mb: float) -> bool:
        """True if the memory has recovered: at most BACK_SHARE, or BACK_MB if that is more, above the level before."""
        return now_mb <= self.before_mb + max(BACK_SHARE * self.before_mb, BACK_MB)


@dataclass
class Row:
    """The result of one attack.

    Attributes:
        sent: the attack's traffic; see lab.attacker.Sent.
        phases: the well-behaved client's phases "before", "during" and "after".
        budgets: number of requests with a latency budget during the attack, and number of those answered within it;
            None if the attack is measured without such requests.
        survived: the process still runs and answers a valid request as before.
        problems: reasons why the server failed; empty if it passed.
    """

    attack: str
    what: str
    connections: int
    seconds: float
    sent: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    budgets: tuple[int, int] | None = None
    memory: Memory | None = None
    survived: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Arena:
    """Runs attacks on servers that it starts on a port.

    Attributes:
        seconds: duration of an attack.
        connections: number of connections of each attack; None: the attack's default.
        memory_wait_s: time limit for the memory to recover.
    """

    store: Path
    model: str
    port: int
    folder: Path
    seconds: float = 20.0
    connections: int | None = None
    memory_wait_s: float = 60.0

    @property
    def quiet_s(self) -> float:
        """Duration of the phases before and after an attack, in seconds."""
        return min(5.0, max(0.5, self.seconds / 4))

    def attack(self, attack: Attack) -> Row:
        """Start a server and attack it; returns the result.

        Raises ValueError if the server does not start, or if the attacking process fails.
        """
        row = Row(attack.name, attack.what, self.connections or attack.connections, self.seconds)
        own, command = "", ours(self.store, self.model, options=attack.options)
        if attack.has_keys:
            own, keys = OWN_KEY, f"DE3_API_KEYS=attacker {ATTACKERS_KEY};client {OWN_KEY}"
            command = replace(command, command=["env", keys, *command.command])
        with (
            limits(f"de3-attack-{self.port}", MEMORY_BYTES, FILES) as limit,
            running(
                limit.apply(command),
                self.port,
                self.folder / "server.log",
            ) as server,
            self._attacker(row) as attacker,
        ):
            expected = self._answer(own)
            budget = BUDGET_MS if attack.with_budgets else None
            with WellBehavedClient(self.port, budget, own) as client:
                start = time.monotonic()
                time.sleep(self.quiet_s)
                memory = Memory(limit.group is not None, server.memory_mb())
                begin = time.monotonic()
                row.sent, peak = self._run_attack(row, attacker, server)
                end = time.monotonic()
                time.sleep(self.quiet_s)
                last = time.monotonic()
            times = {"before": (start, begin), "during": (begin, end), "after": (end, last)}
            row.phases = {name: Phase.of(client.between(*span)) for name, span in times.items()}
            if attack.with_budgets:
                row.budgets = client.budgets(begin, end)
            row.survived = self._answer(own) == expected and server.process.poll() is None
            row.memory = self._await_memory(memory, server, peak, end)
            was_killed = limit.killed()
        row.problems = problems(row, attack.may_refuse)
        if was_killed:
            row.problems.insert(0, "killed for lack of memory")
        return row

    def _answer(self, key: str) -> Any:
        """The answer to a valid request, with the τ of each text; None if the request fails. key: see post()."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = Request(f"http://127.0.0.1:{self.port}/classify", json.dumps(VALID).encode(), headers)
        try:
            with urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except (OSError, HTTPException, ValueError, KeyError):
            return None

    @contextmanager
    def _attacker(self, row: Row) -> Iterator["subprocess.Popen[str]"]:
        """The attacking process, which waits for a line on stdin; it is killed at the end of the block."""
        command = [sys.executable, "-m", "lab.attacker", row.attack, str(self.port)]
        command += [str(row.seconds), str(row.connections)]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        ) as attacker:
            try:
                assert attacker.stdout is not None
                attacker.stdout.readline()
                yield attacker
            finally:
                attacker.kill()

    def _run_attack(
        self, row: Row, attacker: "subprocess.Popen[str]", server: Running
    ) -> tuple[dict[str, Any], float]:
        """Run the attack; returns its traffic, and the server's peak memory in MB.

        Raises ValueError if the attacking process fails.
        """
        assert attacker.stdin is not None and attacker.stdout is not None
        attacker.stdin.write("go\n")
        attacker.stdin.flush()
        peak, deadline = 0.0, time.monotonic() + row.seconds + ANSWER_TIMEOUT_S
        while attacker.poll() is None and time.monotonic() < deadline:
            peak = max(peak, server.memory_mb())
            time.sleep(SAMPLE_S)
        attacker.kill()
        output = attacker.stdout.read()
        if not output:
            raise ValueError(f"the attacking process failed with {attacker.returncode}")
        return json.loads(output), peak

    def _await_memory(self, memory: Memory, server: Running, peak: float, end: float) -> Memory:
        """Wait for the memory to recover, until `memory_wait_s` after the attack; returns all measurements."""
        back_s = None
        while True:
            now_mb, elapsed = server.memory_mb(), time.monotonic() - end
            if server.process.poll() is not None:
                break
            peak = max(peak, now_mb)
            if memory.is_back(now_mb):
                back_s = round(elapsed, 1)
                break
            if elapsed > self.memory_wait_s:
                break
            time.sleep(SAMPLE_S)
        return Memory(memory.limited, round(memory.before_mb, 1), round(peak, 1), round(now_mb, 1), back_s)


def problems(row: Row, may_refuse: float) -> list[str]:
    """Reasons why the server failed an attack; may_refuse: share of the well-behaved requests that may be refused."""
    before, during, memory = row.phases["before"], row.phases["during"], row.memory
    assert memory is not None
    messages = []
    if not row.survived:
        messages.append("did not survive: a valid request is no longer answered as before")
    allowed_ms = max(P99_MS, P99_RATIO * before.p99_ms)
    if math.isnan(during.p99_ms):
        messages.append("no well-behaved request was answered 200")
    elif during.p99_ms > allowed_ms:
        messages.append(f"p99 of {during.p99_ms:g} ms during the attack, at most {allowed_ms:g} allowed")
    if during.refused > may_refuse * during.requests:
        messages.append(f"{during.refused} of {during.requests} well-behaved requests were refused")
    for name, phase in row.phases.items():
        if phase.errors or phase.unanswered:
            messages.append(
                f"{name}: {phase.unanswered} well-behaved requests unanswered, {phase.errors} errors"
            )
    if row.survived and memory.back_s is None:
        messages.append(f"memory {memory.after_mb:g} MB after, {memory.before_mb:g} before")
    if not memory.limited and memory.peak_mb > MEMORY_BYTES / 1e6:
        messages.append(f"memory peak {memory.peak_mb:g} MB, above the limit")
    return messages


def attack_all(
    arena: Arena, only: Sequence[str] = (), on_row: Callable[[Row], None] = lambda _: None
) -> list[Row]:
    """Run every attack, or those named, each on its own server. Raises ValueError for an unknown name.

    An attack that cannot be run gets a row with the reason in `problems`.
    """
    if unknown := [name for name in only if name not in ATTACKS]:
        raise ValueError(f"no attack {unknown[0]!r}; there are: {', '.join(ATTACKS)}")
    rows = []
    for attack in ATTACKS.values():
        if only and attack.name not in only:
            continue
        try:
            row = arena.attack(attack)
        except (ValueError, OSError) as error:  # such as a server that does not start
            row = Row(attack.name, attack.what, arena.connections or attack.connections, arena.seconds)
            row.problems.append(f"not tested: {error}")
        rows.append(row)
        on_row(row)
    return rows


def table(rows: Sequence[Row]) -> "Table":
    """The rows as a table; cells with three numbers: before, during (memory: the peak) and after the attack."""
    from rich.table import Table

    table = Table(*COLUMNS, title="the well-behaved client before / during / after the attack, or during it")
    for row in rows:
        phases, memory = list(row.phases.values()), row.memory
        if not phases or memory is None:
            table.add_row(row.attack, *[""] * (len(COLUMNS) - 2), "FAILED")
            continue
        during = row.phases["during"]
        cells = [_triple([phase.p50_ms for phase in phases]), _triple([phase.p99_ms for phase in phases])]
        counts = (during.requests, during.refused, during.errors, during.unanswered)
        cells += [f"{during.max_ms:.0f}", *map(str, counts)]
        cells.append("" if row.budgets is None else f"{row.budgets[1]} of {row.budgets[0]}")
        cells.append(_triple([memory.before_mb, memory.peak_mb, memory.after_mb]))
        cells.append("" if memory.back_s is None else f"{memory.back_s:g}")
        result = "FAILED" if row.problems else "passed"
        table.add_row(row.attack, *cells, result if row.survived else "DIED")
    return table


def _triple(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in values)


def as_json(rows: Sequence[Row]) -> str:
    """The rows as JSON, with null for NaN and infinity."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([clean(asdict(row)) for row in rows], indent=1, ensure_ascii=False) + "\n"
