"""The output of a run: a folder of parts or, made from them, a file. A run that was interrupted goes on with it."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from de3.bulk import formats
from de3.bulk.source import Slice

RUN, REFUSED = "_run.json", "_refused.jsonl"  # readers of folders skip names with _ or . at the start


class Parts:
    """Numbered parts, each written at once. Close it."""

    def __init__(self, out: Path, kind: str, run: Mapping[str, Any]) -> None:
        """Begin or continue an output.

        Args:
            out: a file, whose suffix is `kind`, or a folder.
            run: what determines the output, as JSON. An output that was begun with something else is refused.

        Raises ValueError for an output that cannot be continued.
        """
        self._file = out if out.suffix in formats.KINDS and not out.is_dir() else None
        self._folder = out if self._file is None else out.with_name(f"{out.name}.parts")
        self._kind = kind
        self.is_complete = False
        self._stack = ExitStack()
        if self._file is not None and self._file.exists():
            raise ValueError(f"{out}: exists already; remove it, or choose another --out")
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(FileLock(self._folder / ".lock", timeout=0))
        except Timeout:
            raise ValueError(f"{out}: another run writes to it") from None
        self._run = json.loads(json.dumps(run))
        try:
            self._begin(out, self._run)
        except BaseException:
            self.close()
            raise

    def _begin(self, out: Path, run: Any) -> None:
        file = self._folder / RUN
        if not file.exists():
            if any(one.name[0] != "." for one in self._folder.iterdir()):
                raise ValueError(f"{out}: has other files; choose an empty folder, or a new one")
            return
        before = json.loads(file.read_text())
        if changed := [name for name in run if before["run"].get(name) != run[name]]:
            raise ValueError(
                f"{out}: was begun with another {' and '.join(changed)}: use the same command, "
                f"or remove {self._folder} to begin anew"
            )
        self.is_complete = bool(before["is_complete"])

    def _note(self, is_complete: bool) -> None:
        draft = self._folder / f".{RUN}"
        draft.write_text(json.dumps({"run": self._run, "is_complete": is_complete}, indent=1))
        formats.publish(draft, self._folder / RUN)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06}{self._kind}"

    def has(self, number: int) -> bool:
        """True if an earlier run has written this part."""
        return self._path(number).exists()

    def write(
        self, number: int, slices: list[Slice], answers: dict[str, list[Any]], types: dict[str, str]
    ) -> None:
        """Write a part. answers: columns for the texts of all slices, in order."""
        if not (self._folder / RUN).exists():
            self._note(False)
        refused = [vars(one) for part in slices for one in part.refused]
        draft = self._folder / f".refused-{number:06}"
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in refused)
        # Before the part: if that exists, this does.
        formats.publish(draft, self._folder / f"_refused-{number:06}.jsonl")
        formats.write(self._path(number), [part.kept for part in slices], answers, types, self._path(0))

    def finish(self, count: int) -> Path | None:
        """Make the output from the first `count` parts; returns the file of refused rows, None if there are none."""
        refused = self._folder / REFUSED
        if self._file is not None:
            refused = self._file.with_name(f"{self._file.name}.refused.jsonl")
        if not self.is_complete:
            formats.join([self._folder / f"_refused-{n:06}.jsonl" for n in range(count)], refused)
            if self._file is not None:
                formats.join([self._path(n) for n in range(count)], self._file)
            else:
                self._note(True)
            for number in range(count):
                (self._folder / f"_refused-{number:06}.jsonl").unlink(missing_ok=True)
        has_some = refused.stat().st_size > 0
        if not has_some and self._file is not None:
            refused.unlink()
        if self._file is not None:
            self.close()
            shutil.rmtree(self._folder)
        return refused if has_some else None

    def close(self) -> None:
        """Let another run write to the output; nothing remains of one that wrote no part."""
        self._stack.close()
        if not (self._folder / RUN).exists():
            (self._folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it has other files, or is gone
                self._folder.rmdir()
