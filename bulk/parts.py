"""The output of a run: a folder of parts, or one file joined from them. An interrupted run can be continued."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from de3.bulk.formats import KINDS, Format, Rows, new_draft, publish
from de3.bulk.source import Slice

RUN, REFUSED = "_run.json", "_refused.jsonl"  # programs that read a folder skip names that begin with _ or .


class Parts:
    """Numbered parts, each of which appears only once it is complete. Call close() at the end.

    Attributes:
        is_complete: an earlier run has written the whole output.
        summary: statistics of the run (Summary.json) once the output is complete; empty before.
        drops_refused: see __init__.
        types: the types of the answers' columns (see de3.columns), by their names in the output; empty before the
            first part, if no earlier run has written it.
        upstream: folder for the journal and the usage of upstreams, removed once the output is complete.
    """

    def __init__(self, out: Path, kind: str, run: Mapping[str, Any], drops_refused: bool = False) -> None:
        """Start or continue an output.

        Args:
            out: a file, whose suffix is `kind`, or a folder.
            kind: suffix of the parts, one of formats.KINDS.
            run: everything that determines the output, as a JSON object. An output that was started with a different
                object is refused.
            drops_refused: rows that cannot be classified are written to a file of their own, instead of the output.

        Raises ValueError for an output that cannot be started or continued.
        """
        self._file = out if out.suffix in KINDS and not out.is_dir() else None
        self._folder = out if self._file is None else out.with_name(f"{out.name}.parts")
        self.upstream = self._folder / ".upstream"
        noted = {**run, "format": kind, "drops_refused": drops_refused}
        self._run, self.is_complete = json.loads(json.dumps(noted)), False
        self.summary: dict[str, Any] = {}
        self._record = out.with_name(f"_{out.name}.run.json")  # where _run.json of a complete file is kept
        self.drops_refused, self.types = drops_refused, dict[str, str]()
        self._rows = dict[str, int]()  # by number of the part, perhaps of one that is not complete
        self._format = Format(
            kind, {name: run[name] for name in ("model", "models", "labels", "options") if name in run}
        )
        self._lock = FileLock(self._folder / ".lock", timeout=0)
        if self._file is not None and not (self._folder / RUN).exists() and not self._is_recorded(self._file):
            for one in (self._file, *([self._all_refused] if drops_refused else [])):
                if one.exists():
                    raise ValueError(f"{one}: already exists; remove it, or choose another --out")
        self._is_new = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"{out}: another run is writing to it") from None
        try:
            self._begin(out)
        except BaseException:
            self.close()
            raise

    def _is_recorded(self, file: Path) -> bool:
        """True if, by its record, an earlier run has written this file; then sets `is_complete` and `summary`."""
        if file.exists() and self._record.exists():
            before = json.loads(self._record.read_text())
            self.is_complete = before["run"] == self._run and before["bytes"] == file.stat().st_size
            self.summary = before["summary"]
        return self.is_complete

    def _begin(self, out: Path) -> None:
        file = self._folder / RUN
        if self.is_complete:
            shutil.rmtree(self._folder, ignore_errors=True)  # perhaps interrupted while removing the parts
            return
        if not file.exists():
            if any(one.name[0] != "." for one in self._folder.iterdir()):
                raise ValueError(f"{out}: contains other files; choose an empty folder, or a new one")
            return
        before = json.loads(file.read_text())
        if changed := [name for name in self._run if before["run"].get(name) != self._run[name]]:
            raise ValueError(
                f"{out}: was started with other settings ({', '.join(changed)}): use the same command, "
                f"or remove {self._folder} to start over"
            )
        self._format.names, self.types = before["names"], before["types"]
        self._rows = before.get("rows", {})
        self.is_complete, self.summary = before["is_complete"] and self._file is None, before["summary"]
        if self._file is not None and self._file.exists():  # interrupted once the file was complete
            self.is_complete = True
            self._keep_record()

    def _note(self, is_complete: bool) -> None:
        draft = new_draft(self._folder / RUN)
        columns = {"names": self._format.names, "types": self.types}
        noted = {
            "run": self._run,
            **columns,
            "rows": self._rows,
            "is_complete": is_complete,
            "summary": self.summary,
        }
        if self._file is not None and is_complete:
            noted["bytes"] = self._file.stat().st_size
        with draft.open("x") as opened:
            json.dump(noted, opened, indent=1)
        publish(draft, self._folder / RUN)

    def _keep_record(self) -> None:
        """Keep the record of the run next to the complete file, and remove the parts."""
        self._note(True)
        publish(self._folder / RUN, self._record)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06}{self._format.kind}"

    def _refused(self, number: int) -> Path:
        return self._folder / f"_refused-{number:06}.jsonl"

    @property
    def _all_refused(self) -> Path:
        """The file of all refused rows, once the output is complete."""
        if self._file is None:
            return self._folder / REFUSED
        return self._file.with_name(f"{self._file.name}.refused.jsonl")

    @property
    def kept(self) -> int:
        """The number of rows in the complete parts, including those of an earlier run."""
        return sum(rows for number, rows in self._rows.items() if self.has(int(number)))

    def has(self, number: int) -> bool:
        """True if an earlier run has written this part."""
        return self._path(number).exists()

    def write(self, number: int, slices: list[Slice], answers: dict[str, list[Any]]) -> None:
        """Write a part; raises ValueError if it does not fit the earlier parts, or the format cannot hold a value.

        answers: the columns `types` for the rows of all slices, in order.
        """
        rows = Rows([one for one in slices if len(one.kept)] or slices[:1], answers, self.types)
        self._format.prepare(rows, [self._path(n) for n in range(number)])
        self._rows[str(number)] = sum(one.rows for one in slices)
        self._note(False)
        draft = new_draft(self._refused(number))
        with draft.open("x", encoding="utf-8") as opened:
            for row in (row for one in slices for _, row in sorted(one.refused.items())):
                opened.write(json.dumps(vars(row), ensure_ascii=False) + "\n")
        publish(draft, self._refused(number))  # before the part, so that every part has this file
        self._format.write(self._path(number), rows)

    def reasons(self, count: int) -> Counter[str]:
        """The reasons of the rows that cannot be classified in the first `count` parts, with their numbers."""
        found = Counter[str]()
        for number in range(count):
            with self._refused(number).open("rb") as lines:
                found.update(json.loads(line)["reason"] for line in lines)
        return found

    def finish(self, count: int, summary: dict[str, Any]) -> Path | None:
        """Complete the output, which has `count` parts; returns the file of dropped rows, or None if there are none."""
        self.summary = summary
        refused = self._all_refused if self.drops_refused and summary["refused"] else None
        if refused is not None:
            Format(".jsonl", {}).join([self._refused(number) for number in range(count)], refused)
        if self._file is not None:
            self._note(False)
            self._format.join([self._path(number) for number in range(count)], self._file)
            self._keep_record()
        else:
            shutil.rmtree(self.upstream, ignore_errors=True)
            self._note(True)
            for number in range(count):
                self._refused(number).unlink(missing_ok=True)
        return refused

    def close(self) -> None:
        """Release the output, so that another run can write to it; if no part was written, remove what was created."""
        self._lock.release()
        if not (self._folder / RUN).exists():
            (self._folder / ".lock").unlink(missing_ok=True)
            if self._is_new:  # answers of an upstream stay
                with suppress(OSError):  # it contains other files, or is gone
                    self._folder.rmdir()
