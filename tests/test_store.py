"""The store: versions, lookup, atomic writes, and every kind of damage refused by name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from de3.commands.models import models_list
from de3.commands.options import say_published
from de3.model_store.manifest import EXITS, PROTOTYPES
from de3.model_store.model import Model, unit_prototypes
from de3.model_store.regular_file import read_regular_file
from de3.model_store.segments import session_options
from de3.model_store.store import Artifact, Store, StoreError, UnknownModelError, read_manifest
from tests.commands import invoke
from tests.old_schema import as_new, as_old
from tests.test_hostile_graphs import artifact_of
from tests.test_hostile_models import edit, rehash

# A tokenizer on which the tokenizers library panics: the second token of the merge is shorter than the prefix.
BPE = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}
PANICS = json.dumps({"model": {"type": "BPE", **BPE}}).encode()


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """The folder of tiny:1 in a copy of the store, which the test may damage."""
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store" / "tiny" / "1"


def open_model(folder: Path) -> Model:
    return Model(Store(folder.parent.parent).open_path(folder))


def test_versions_are_numbers(pinnable: Path) -> None:
    # Neither in this order nor in reverse, and not by their first digits.
    for name in ("3", "10", "4", "9", "11-broken", ".draft-x"):
        (pinnable / "tiny" / name).mkdir()
    (pinnable / "tiny/12").write_text("")
    store = Store(pinnable)
    assert store.versions()["tiny"] == [1, 2, 3, 4, 9, 10]
    shutil.copytree(pinnable / "tiny/1", pinnable / "tiny/10", dirs_exist_ok=True)
    edit(pinnable / "tiny/10", lambda m: m.update(version=10))
    assert [store.open(name).full_name for name in ("tiny", "tiny:2")] == ["tiny:10", "tiny:2"]


@pytest.fixture
def pinnable(copy: Path) -> Path:
    """A store with tiny:1 and tiny:2."""
    shutil.copytree(copy, copy.parent / "2")
    edit(copy.parent / "2", lambda m: m.update(version=2))
    return copy.parent.parent


def test_a_name_is_its_pinned_version(pinnable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(pinnable)
    store.set_pin("tiny", None)
    assert not (pinnable / "tiny/pinned").exists()
    say_published(pinnable / "tiny/2", pinnable)
    store.set_pin("tiny", 1)
    say_published(pinnable / "tiny/2", pinnable)
    before, after = capsys.readouterr().err.splitlines()
    assert "stays pinned" not in before and "tiny stays pinned to version 1" in after
    assert (pinnable / "tiny/pinned").read_text() == "1\n"
    assert [store.open(name).full_name for name in ("tiny", "tiny:2")] == ["tiny:1", "tiny:2"]
    assert store.open("tiny", unpinned=True).full_name == "tiny:2"
    rows = invoke(f"models list --store {pinnable}").output
    assert "tiny:1 (pinned)" in rows and "tiny:2 (pinned)" not in rows
    store.set_pin("tiny", None)
    assert (store.pin("tiny"), store.open("tiny").full_name) == (None, "tiny:2")


def test_a_pin_that_the_store_cannot_hold_is_in_the_state_folder(pinnable: Path, tmp_path: Path) -> None:
    store, other = Store(pinnable, tmp_path / "state"), Store(pinnable)
    other.set_pin("tiny", 2)
    (pinnable / "tiny/pinned.new").mkdir()  # stands in for a folder that cannot be written, also by root
    with pytest.raises(OSError):
        other.set_pin("tiny", 1)
    store.set_pin("tiny", 1)
    assert (tmp_path / "state/pins/tiny").read_text() == "1\n"
    assert (store.pin("tiny"), other.pin("tiny")) == (1, 2)
    store.set_pin("tiny", None)  # although the store's pin remains
    assert (store.pin("tiny"), other.pin("tiny")) == (None, 2)
    (pinnable / "tiny/pinned.new").rmdir()
    store.set_pin("tiny", 1)
    assert not (tmp_path / "state/pins/tiny").exists() and other.pin("tiny") == 1
    store.set_pin("elsewhere", 3)  # a model that is not in the store
    assert store.pin("elsewhere") == 3 and not (pinnable / "elsewhere").exists()


@pytest.mark.parametrize(
    "damage",
    ["", "0", "-1", "two", "1 2", "9" * 10, "\0", "../9", "1" * 100, os.mkfifo, Path.mkdir, "link", "7"],
)
def test_a_pin_that_names_no_version_is_ignored_with_a_warning(
    pinnable: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    pin = pinnable / "tiny/pinned"
    if damage == "link":
        pin.symlink_to("/dev/zero")
    elif isinstance(damage, str):
        pin.write_text(damage)
    else:
        damage(pin)
    store = Store(pinnable)
    for _ in range(2):
        assert store.open("tiny").full_name == "tiny:2"
    (line,) = caplog.messages
    says = "version 7, which does not exist" if damage == "7" else f"{pin}: this pin is ignored"
    assert says in line and "de3 models load tiny" in line
    if damage != Path.mkdir:
        store.set_pin("tiny", 1)
        assert store.open("tiny").full_name == "tiny:1"


def test_a_model_that_cannot_be_read_is_left_out_with_a_warning(
    pinnable: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pinnable / "closed/1").mkdir(parents=True)
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:  # the tests may run as root, to whom nothing is closed
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for _ in range(2):
        assert Store(pinnable).open("tiny").full_name == "tiny:2"
    assert caplog.messages == [f"{pinnable / 'closed'}: this model is left out: Permission denied"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no model 'absent'.*available: tiny, tiny-int8"),
        ("tiny:2", "no version '2'.*available: 1"),
        ("tiny:", "no version ''"),
        ("tiny:01", "no version '01'"),
        ("../store/tiny", "no model"),
    ],
)
def test_an_unknown_model_is_refused(store: Path, name: str, message: str) -> None:
    with pytest.raises(UnknownModelError, match=message):
        Store(store).open(name)


def linked(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), "damaged: [0-9]+ bytes; the manifest says"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xaa"), "damaged: its sha256 differs"),
        (Path.unlink, "missing"),
        (lambda file: (file.unlink(), file.mkdir()), "not a file"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "not a file"),
        (linked, "leads outside the artifact"),
    ],
)
@pytest.mark.parametrize(
    "name", ["layer_02.onnx", "exits.safetensors", "prototypes.safetensors", "tokenizer.json"]
)
def test_a_damaged_file_is_named(copy: Path, name: str, damage: Callable[[Path], Any], message: str) -> None:
    damage(copy / name)
    with pytest.raises(StoreError, match=f"{name}: {message}"):
        open_model(copy)


def test_a_version_that_is_a_link_out_of_the_store_is_refused(copy: Path, tmp_path: Path) -> None:
    copy.rename(tmp_path / "elsewhere")
    copy.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="leads outside the store"):
        Store(copy.parent.parent).open("tiny")


TEXTS = ["good", "a dull plot , and yet a good film", "bright " * 40]


def values_of(model: Model) -> list[bytes | None]:
    """Hidden states, logits and distances of every layer, for each text."""
    steps = [step for text in TEXTS for step in model.full_depth(model.tokenize(text))]
    return [None if x is None else x.tobytes() for s in steps for x in (s.hidden, s.logits, s.distances)]


def values_of_files(artifact: Artifact, model: Model) -> list[bytes | None]:
    """The same as ONNX Runtime computes it with the segments of schema 6, as they are."""
    values: list[bytes | None] = []
    for text in TEXTS:
        tokens = model.tokenize(text)
        feed = {"input_ids": tokens.ids, "token_type_ids": tokens.type_ids, "with_exit": np.array(True)}
        for layer, name in enumerate(artifact.manifest.segment_files()):
            session = InferenceSession(artifact.read(name), session_options())
            feed |= {"prototypes": unit_prototypes(artifact).get(layer)}
            found = session.run(None, {x.name: feed[x.name] for x in session.get_inputs()})
            feed["hidden"] = found[0]
            values += [x.tobytes() for x in found] + [None] * (3 - len(found))
    return values


@pytest.mark.parametrize("name", ["tiny", "tiny-int8", "m", "sst2"])
def test_an_artifact_of_schema_6_is_the_same_model(
    store: Path, tmp_path: Path, kernels: Any, name: str
) -> None:
    """With the same bits, whether its exits' file is read or its segments' branches. m has a head and a final norm."""
    if name == "sst2":  # was exported as schema 6
        old = Store(Path("models")).open(name)
        new = as_new(old, tmp_path / "new")
    else:
        new = artifact_of("modernbert", True) if name == "m" else Store(store).open(name)
        old = as_old(new, tmp_path / "old")
        again = as_new(old, tmp_path / "again")
        for file in new.manifest.required_files():
            if file != EXITS:  # in which the tensors may have another order
                assert again.read(file) == new.read(file)
    assert (old.manifest.schema_version, new.manifest.schema_version) == (6, 7)
    for runtime in ("onnxruntime", "native")[: 1 if name == "tiny" else 2]:
        model = Model(old, runtime)
        values = values_of(model)
        assert model.runtime == runtime and values == values_of(Model(new, runtime))
        assert runtime == "native" or values == values_of_files(old, model)


def references(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["calibration"]["references"]


OTHER_FILES = ("../secret", "/etc/passwd", "sub/layer_01.onnx", "model.pkl", "layer_1.onnx")


def with_file(manifest: dict[str, Any], name: str) -> None:
    manifest["files"][name] = manifest["files"]["layer_01.onnx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=5), "schema version 5; this release reads 6 and 7"),
        (lambda m: m.update(schema_version=8), "schema version 8; this release reads 6 and 7"),
        (lambda m: m.update(schema_version=6), "files must not contain 'exits.safetensors'"),
        (lambda m: m.pop("labels"), "labels: Field required"),
        (lambda m: m.update(labels=["same", "same"]), "labels must be distinct"),
        (lambda m: m.update(exit_layers=[0, 2]), "exit_layers must ascend"),
        (lambda m: m["defaults"].update(tau=1.5), "defaults.tau"),
        (lambda m: m["files"].pop("layer_02.onnx"), "files must include 'layer_02.onnx'"),
        (lambda m: m["files"].pop("exits.safetensors"), "files must include 'exits.safetensors'"),
        *((partial(with_file, name=name), "files must not contain") for name in OTHER_FILES),
        (lambda m: m.update(labels=["a", "b", "c"]), r"layer_00 must be finite float32 of shape \(3, 64\)"),
        (lambda m: m.update(name="other"), "this is the manifest of other:1"),
        (lambda m: m.update(prototype_layers=[0]), "prototype_layers must be"),
        (lambda m: references(m).pop(), "references must have one entry for each exit layer"),
        (lambda m: references(m)[0].update(nearest=None), "nearest must be set at the exits with"),
        (lambda m: references(m)[0]["entropy"].reverse(), "entropy must have 28 ascending values"),
        (lambda m: m["calibration"].update(table=[]), "must have rows of the default signal"),
        (lambda m: m["risk"][0].update(weights=[float("nan")] * 5), "risk.0.weights"),
        (lambda m: m["risk"][0]["weights"].__setitem__(1, -1e300), "risk.0.weights.1"),
        (lambda m: m["risk"][0]["weights"].pop(), "risk.0.weights"),
        (lambda m: m["risk"].reverse(), "risk"),
        (lambda m: m["risk"].pop(), "risk"),
        (lambda m: m.update(risk=None), "risk"),
        (lambda m: m["defaults"].update(signal="margin"), "defaults.signal"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": None}), "lambda"),
        (lambda m: m["defaults"].update({"signal": "risk", "lambda": 2}), "lambda"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": 3.5}), "default signal"),
        (lambda m: m["calibration"]["table"][-1].update(disagreement_bound=0.0), "must ascend with τ"),
    ],
)
def test_an_unsound_manifest_is_refused_with_the_reason(copy: Path, change: Callable, message: str) -> None:
    edit(copy, change)
    with pytest.raises(StoreError, match=message) as refused:
        open_model(copy)
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000])
def test_a_manifest_that_is_not_a_json_object_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest.json: "):
        open_model(copy)


def prototypes(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        tensors = load_tensors(data)
        return save_tensors(tensors | {"layer_01": np.ascontiguousarray(change(tensors["layer_01"]))})

    return changed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda _: b"{}", "not a tokenizer"),
        ("tokenizer.json", lambda _: PANICS, "not a tokenizer"),
        ("layer_01.onnx", lambda _: b"not onnx", "not an ONNX model"),
        ("exits.safetensors", lambda _: b"not safetensors", "not a safetensors file"),
        ("exits.safetensors", lambda _: b"\xff" * 8, "not a safetensors file"),
        (PROTOTYPES, lambda _: save_tensors({}), "has no tensor layer_00"),
        (PROTOTYPES, prototypes(lambda x: x * np.nan), "must be finite float32"),
        (PROTOTYPES, prototypes(lambda x: x.astype(float)), "must be finite float32"),
        (
            PROTOTYPES,
            prototypes(lambda x: x * np.array([[1], [0]], np.float32)),
            "no prototype for label 'positive'",
        ),
    ],
)
def test_damage_that_the_hash_does_not_show(
    copy: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    """A file may match its hash and still have invalid content."""
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    rehash(copy, name)
    with pytest.raises(StoreError, match=f"{name}: .*{message}"):
        open_model(copy)


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_of_a_manifest_is_refused_or_harmless(
    store: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Reading the manifest raises no error other than StoreError."""
    text = (store / "tiny" / "1" / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 4)) :]
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_bytes(changed)
    try:
        read_manifest(folder)
    except StoreError as error:
        assert "manifest.json" in str(error)


def test_a_version_appears_whole_or_not_at_all(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Store(store).open("tiny"), Store(tmp_path / "new")
    files = {name: source.read(name) for name in source.manifest.files}
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*full\.onnx'"),
        target.new_version("tiny") as draft,
    ):
        (draft.path / "full.onnx").symlink_to("/dev/full")
        draft.write({"full.onnx": b"1"})
    with pytest.raises(RuntimeError, match="stop"), target.new_version("tiny") as draft:
        draft.write(files)
        raise RuntimeError("stop")
    assert target.versions() == {} and list((tmp_path / "new/tiny").iterdir()) == []
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(file: int) -> None:
        events.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    def renamed(path: Path, to: Path) -> Path:
        assert target.versions() == {}
        result = rename(path, to)
        # From its first moment on, the version is complete, and readable by a server that runs as another user.
        target.open("tiny").verify()
        assert to.stat().st_mode & 0o777 == 0o755
        events.append("published")
        return result

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with target.new_version("tiny") as draft:
        assert draft.path.stat().st_mode & 0o777 == 0o700
        draft.write(files)
        published = draft.publish(source.manifest.model_copy(update={"version": draft.next_version()}))
    assert published == tmp_path / "new/tiny/1" and target.versions() == {"tiny": [1]}
    # So a power failure loses nothing, either.
    assert events == [*files, "manifest.json", "published", "tiny"]


def test_a_taken_version_is_never_replaced(copy: Path) -> None:
    found = Store(copy.parent.parent)
    manifest = found.open("tiny").manifest
    with pytest.raises(OSError, match=r"not empty|exists"), found.new_version("tiny") as draft:
        assert draft.next_version() == 2
        draft.write({"tokenizer.json": b"{}"})
        draft.publish(manifest)  # version 1 again
    found.open("tiny").verify()


def test_a_new_version_shares_the_files_that_another_has(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(copy.parent.parent)
    artifact = store.open_path(copy)
    contents = {name: artifact.read(name) for name in artifact.manifest.files}

    def shared() -> set[str]:
        """Names of the files that a further version shares; it is removed."""
        with store.new_version(copy.parent.name) as draft:
            draft.write(contents)
            version = draft.next_version()
            path = draft.publish(artifact.manifest.model_copy(update={"version": version}))
        store.open(f"{copy.parent.name}:{version}").verify()
        assert {one.name for one in path.iterdir()} == {*contents, "manifest.json"}
        names = {name for name in contents if (path / name).stat().st_ino == (copy / name).stat().st_ino}
        shutil.rmtree(path)
        return names

    assert shared() == contents.keys()
    (copy / "layer_01.onnx").chmod(0o600)
    (copy / "layer_02.onnx").write_bytes(contents["layer_02.onnx"][:-1] + b"x")  # damaged
    (copy / "tokenizer.json").rename(copy / "other")
    (copy / "tokenizer.json").symlink_to("other")
    assert shared() == contents.keys() - {"layer_01.onnx", "layer_02.onnx", "tokenizer.json"}

    def fails(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", fails)
    assert not shared()


@pytest.mark.parametrize("name", ["", "../x", "Upper", "a b", ".hidden", "x" * 65])
def test_an_invalid_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="must match"), Store(tmp_path).new_version(name):
        pass


def test_models_commands(copy: Path) -> None:
    root = str(copy.parent.parent)

    def models(arguments: str) -> tuple[int, str]:
        result = invoke(f"models {arguments} --store {root}")
        return result.exit_code, result.output

    assert "tiny:1" in models("list")[1]
    shown = json.loads(models("show tiny")[1])
    assert shown["labels"] == ["negative", "positive"] and "table" not in shown["calibration"]
    for do, output in (("verify", "tiny:1  valid\n"), ("show", models("show tiny")[1])):
        by_folder = invoke(f"models {do} {copy} --store {root}/none")
        assert (by_folder.exit_code, by_folder.output) == (0, output)
    assert "not the folder of a version or model" in models(f"verify {root}/tiny/9")[1]
    (copy / "layer_01.onnx").write_bytes(b"")
    code, text = models("verify")
    assert code == 1 and "DAMAGED" in text and "layer_01.onnx" in text and "tiny-int8:1  valid\n" in text
    (copy / "manifest.json").write_text("{")
    assert "not JSON" in models("list")[1]


def test_a_list_has_whole_names_and_tells_agreement_from_accuracy(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "sentiment-of-english-film-reviews"
    edit(copy, lambda m: m.update(name=name, calibration=m["calibration"] | {"self_labelled": True}))
    copy.parent.rename(copy.parent.parent / name)
    monkeypatch.setenv("COLUMNS", "80")
    models_list(copy.parent.parent)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert f"{name}:1tiny-int8:1" in "".join(row[1].strip() for row in rows)
    assert [row[6].strip() == "agree" for row in rows if row[6].strip()] == [False, True, False]  # after a %


def test_a_process_keeps_no_telemetry_and_does_not_use_folders_with_our_packages_names(
    store: Path, tmp_path: Path
) -> None:
    """Builds of ONNX Runtime that send telemetry keep a device id and a database of events in the home folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    for package in ("server", "exits", "model_store", "training"):
        (here / package).mkdir(parents=True)
        (here / package / "__init__.py").write_text("raise RuntimeError('not mine')")
    code = "import sys, de3, de3.server, de3.exits, de3.training; de3.load('tiny', store=sys.argv[1])"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    subprocess.run([sys.executable, "-c", code, str(store)], env=env, check=True, cwd=here)
    assert list(home.rglob("*")) == []


def test_only_abandoned_drafts_are_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / "m" / f".draft-{name}" for name in ("old", "new"))
    for draft in (old, new):
        draft.mkdir(parents=True)
    os.utime(old, (0, 0))
    with Store(tmp_path).new_version("m"):
        assert new.exists() and not old.exists()


def test_an_artifact_may_be_as_large_as_the_limit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Store(store).open("tiny")
    size = artifact.size()
    monkeypatch.setattr("de3.model_store.store.MAX_ARTIFACT_BYTES", size)
    assert artifact.size() == size


def test_a_link_swapped_in_after_the_check_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def swapped(path: Any, flags: int, *mode: int) -> int:
        if Path(path).name == "tokenizer.json":
            linked(Path(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(StoreError, match=r"tokenizer.json: cannot be read"):
        open_model(copy)


def test_only_a_regular_file_of_the_expected_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"four")
    assert read_regular_file(file, 4) == b"four"
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for path, limit, message in (
        (file, 3, "4 bytes; at most 3 are expected"),
        (Path("/dev/zero"), 3, "not a file"),
        (Path("/proc/self/maps"), 2**20, "grows while it is read"),  # files of /proc have size 0
        (tmp_path, 3, "not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_regular_file(path, limit)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
