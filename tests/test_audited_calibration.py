"""A new calibration from the audit log: the rows that are read, the refusals, and the published version."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from de3.export import audited
from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact, Store
from tests.commands import de3, refusal
from tests.serving import serving

Row = dict[str, Any]


def make_audits(manifest: Manifest, count: int, seed: int = 1, **fields: Any) -> list[Row]:
    """`count` rows of an audit log, with more noise at earlier exits. fields: values for every row."""
    rng = np.random.default_rng(seed)
    exits, classes = manifest.exit_layers, len(manifest.labels)
    rows = []
    for i in range(count):
        full = rng.normal(0, 3, classes)
        logits = [full + rng.normal(0, 0.3 * (exits[-1] - layer), classes) for layer in exits]
        rows.append(
            {
                "time": 1e9 + i,
                "model": f"{manifest.name}:{manifest.version}",
                "share": 1.0,
                "tokens": int(rng.integers(3, 30)),
                "layers": exits,
                "logits": [[round(float(x), 6) for x in values] for values in logits],
                "distances": [
                    [round(1 / (1 + np.exp(x)), 6) for x in values.tolist()]
                    if layer in manifest.prototype_layers
                    else None
                    for layer, values in zip(exits, logits, strict=True)
                ],
            }
            | fields
        )
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens_of(artifact: Artifact, *files: Path) -> list[int]:
    """The number of tokens of each audit that is read, in ascending order."""
    tokens = [p.samples.recorded.tokens for p in audited.parts(artifact, files)]
    return sorted(np.concatenate([t for t in tokens if t is not None]).tolist())


@pytest.fixture
def tiny(store: Path) -> Artifact:
    return Store(store).open("tiny")


@pytest.fixture
def mine(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store / "tiny", tmp_path / "store/tiny").parent)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings given during the test, collected instead of printed."""
    warnings: list[str] = []
    monkeypatch.setattr(audited, "warn", warnings.extend)
    return warnings


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("[1]", "not a JSON object"),
        ("", "not JSON"),
        ("\ud800", "not JSON"),
        ({"share": 0}, "share"),
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "not JSON"),
        ({"model": "tiny:1\n"}, "model"),
        ({"tokens": 0}, "tokens"),
        ({"layers": [0, 1, 2]}, "layers"),
        ({"logits": [[0.0, 1.0]]}, "logits"),
        ({"logits": [[0.0] * 20_000] * 4}, "logits"),
        ({"logits": [[1e39, 0.0]] * 4}, "logits"),
        ({"distances": [[0.0, 1.0]] * 4}, "distances"),
        ({"distances": [[0.0, 3.0]] * 3 + [None]}, "distances"),
    ],
)
def test_a_broken_line_is_named(broken: Row | str, problem: str, tiny: Artifact, tmp_path: Path) -> None:
    good, bad = make_audits(tiny.manifest, 2)
    line = broken if isinstance(broken, str) else json.dumps(bad | broken)
    log = tmp_path / "audits.jsonl"
    log.write_bytes(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n".encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=f"^{log}:2: {problem}"):
        audited.parts(tiny, [log])


def test_an_overlong_line_is_refused(tiny: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "MAX_LINE", 1000)
    (tmp_path / "log").write_text(" " * 1001)
    with pytest.raises(ValueError, match="log:1: a line has more than 1000 bytes"):
        audited.parts(tiny, [tmp_path / "log"])


def test_a_torn_last_line_is_skipped(tiny: Artifact, tmp_path: Path, said: list[str]) -> None:
    rows = make_audits(tiny.manifest, 600)
    whole = write(tmp_path / "whole", rows).read_text()
    for torn in (json.dumps(rows[0])[:-1], '{"text": "\u00e9'):
        (tmp_path / "torn").write_bytes((whole + torn).encode()[: -1 if torn.endswith("\u00e9") else None])
        assert len(tokens_of(tiny, tmp_path / "torn")) == 600
    assert len(said) == 2 and all(one.startswith(f"{tmp_path}/torn:601: ") for one in said)
    (tmp_path / "torn").write_text(whole.rstrip("\n"))  # only the newline is missing
    assert len(tokens_of(tiny, tmp_path / "torn")) == 600
    (tmp_path / "torn").write_text(whole + "{}")
    with pytest.raises(ValueError, match="torn:601: time: Field required"):
        audited.parts(tiny, [tmp_path / "torn"])


def test_rows_of_other_versions_are_skipped(tiny: Artifact, tmp_path: Path, said: list[str]) -> None:
    rows = make_audits(tiny.manifest, 600)
    others = [{**row, "model": f"tiny:{2 + i % 9}", "layers": [5]} for i, row in enumerate(rows[:100])]
    log = write(tmp_path / "log", [*others, *rows])
    assert len(tokens_of(tiny, log)) == 600
    assert len(said) == 1 and "100 rows" in said[0] and "tiny:6)" in said[0]  # five are named
    write(log, others[:1])
    with pytest.raises(ValueError, match=r"no audits of tiny:1: only 1 rows of other .* \(tiny:2\)"):
        audited.parts(tiny, [log])
    write(log, [])
    with pytest.raises(ValueError, match=f"^{log}: no audits of tiny:1: it is empty"):
        audited.parts(tiny, [log])


def test_too_few_different_texts_are_refused(tiny: Artifact, tmp_path: Path) -> None:
    rows = make_audits(tiny.manifest, 499)
    log = write(tmp_path / "log", rows + rows)
    wanted = "^499 different texts, from 998 audits of tiny:1, are too few to calibrate on: at least 500"
    with pytest.raises(ValueError, match=wanted):
        audited.parts(tiny, [log])


def test_equal_texts_stay_in_one_part(tiny: Artifact, tmp_path: Path) -> None:
    rows = make_audits(tiny.manifest, 600)
    log = write(tmp_path / "log", rows + rows[:200] + rows[:100])
    tune, certify = audited.parts(tiny, [log])
    parts = [{row.tobytes() for row in p.samples.recorded.logits} for p in (tune, certify)]
    assert [len(part) for part in parts] == [300, 300] and not parts[0] & parts[1]
    assert [p.samples.num_groups for p in (tune, certify)] == [300, 300]
    assert len(tune.samples.groups) + len(certify.samples.groups) == 900
    assert tune.is_whole.all() and certify.is_whole.all()


def test_texts_that_were_drawn_more_often_are_thinned(
    tiny: Artifact, tmp_path: Path, said: list[str]
) -> None:
    usual = make_audits(tiny.manifest, 2000, 1, share=0.05, tokens=5)
    start = make_audits(tiny.manifest, 1900, 2, share=1.0, tokens=6)
    busy = make_audits(tiny.manifest, 60, 3, share=0.025, tokens=7)
    log = write(tmp_path / "log", [*start, *usual, *busy])

    def kept() -> list[int]:
        return np.bincount(tokens_of(tiny, log))[5:].tolist()

    first = kept()
    assert first[0] == 2000 and first[2] == 60
    assert 60 <= first[1] <= 135  # 95 ± 4 standard deviations
    assert kept() == first and not said
    write(log, [*usual, *make_audits(tiny.manifest, 200, 3, share=0.025, tokens=7)])
    assert kept() == [2000, 0, 200]
    assert len(said) == 1 and "9% of the audits" in said[0]


def test_only_the_newest_are_kept(
    tiny: Artifact, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audited, "MAX_AUDITS", 700)
    rows = make_audits(tiny.manifest, 1000)
    old, new = write(tmp_path / "log.1", rows[:500]), write(tmp_path / "log", rows[500:])
    for files in ([new, old], [old, new]):
        assert tokens_of(tiny, *files) == sorted(row["tokens"] for row in rows[300:])
    assert said[0].endswith("1000 audits: only the newest 700 are used")
    with pytest.raises(ValueError, match="--from-audits: the same file is given twice"):
        audited.parts(tiny, [new, tmp_path / "." / "log"])


@pytest.mark.parametrize(
    "kind",
    [{"labels": ["a", "b", "c"], "thresholds": [0.5, 0.3, 0.8]}, {"labels": ["praise"], "tolerance": 0.5}],
)
def test_models_of_every_kind(kind: dict[str, Any], tiny: Artifact, tmp_path: Path) -> None:
    plain = {**tiny.manifest.model_dump(), "calibration": None, "prototype_layers": []}
    plain["defaults"] = {"tau": 0.1, "signal": "risk"}
    plain["risk"] = [{"layer": layer, "weights": [0.0] * 5} for layer in range(3)]
    manifest = Manifest.model_validate({**plain, **kind})
    log = write(tmp_path / "log", make_audits(manifest, 1000))
    _, certify = audited.parts(Artifact(tiny.path, manifest), [log])
    recorded = certify.samples.recorded
    assert recorded.correct[:, -1].all() and not recorded.differs[:, -1].any()
    assert 0.1 < recorded.differs[:, 0].mean() < 0.9


@pytest.mark.usefixtures("few_taus")
def test_disagreement_of_an_imported_model_is_with_full_depth(
    tiny: Artifact, mine: Path, tmp_path: Path
) -> None:
    file = mine / "tiny/1/manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"original_disagreement": null', '"original_disagreement": 0.01'))
    assert file.read_text() != text
    log = write(tmp_path / "log", make_audits(tiny.manifest, 1000))
    output = de3(f"calibrate tiny --from-audits {log} --store {mine} --max-loss 5")
    assert "agreement with full depth" in output and "accuracy" not in output
    assert "tiny:1 was imported, and audits do not have the original's answers" in output
    calibration = Store(mine).open("tiny:2").manifest.calibration
    assert calibration is not None and calibration.original_disagreement is None and calibration.self_labelled
    assert calibration.certify_size == 1000 and calibration.groups == 1000  # few texts, so both parts certify
    assert calibration.exit_accuracy[-1] == 1
    with serving(mine) as server:
        listed = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        assert listed["id"] == "tiny:2" and listed["self_labelled"]
        assert listed["calibration"] == json.loads(calibration.default.model_dump_json(by_alias=True))


def test_audits_or_samples_but_not_both(mine: Path, tmp_path: Path) -> None:
    log = write(tmp_path / "log", [])
    message = "--from-audits cannot be combined with --tune or --certify"
    for more in ("--tune", "--certify"):
        assert message in refusal(f"calibrate tiny --from-audits {log} {more} {log} --store {mine}")
    assert "--tune is required, or --from-audits" in refusal(f"calibrate tiny --store {mine}")
    assert [p.name for p in (mine / "tiny").iterdir()] == ["1"]
