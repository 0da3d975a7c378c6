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
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from de3.commands.options import say_published
from de3.exits.kinds import Spans
from de3.model_store.graph import stored
from de3.model_store.manifest import EXITS, OLD_VERSION, PROTOTYPES
from de3.model_store.model import Model, exit_weights, read_segments
from de3.model_store.regular_file import read_regular_file
from de3.model_store.segment_graph import build_old_segment, graph_name
from de3.model_store.store import Artifact, Store, StoreError, UnknownModelError, read_manifest
from tests.commands import invoke
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
    store.set_pin("tiny", 1)
    say_published(pinnable / "tiny/2", pinnable)
    assert "tiny stays pinned to version 1" in capsys.readouterr().err
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
    ["0", "two", "9" * 10, "../9", "1" * 100, os.mkfifo, Path.mkdir, "link", "7"],
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


def test_an_unknown_model_is_refused(store: Path) -> None:
    for name, message in (
        ("absent", "no model 'absent'.*available: tiny, tiny-int8"),
        ("tiny:2", "no version '2'.*available: 1"),
        ("tiny:", "no version ''"),
        ("tiny:01", "no version '01'"),
        ("../store/tiny", "no model"),
    ):
        with pytest.raises(UnknownModelError, match=message):
            Store(store).open(name)


def linked(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "layer_02.onnx",
            lambda file: os.truncate(file, file.stat().st_size - 1),
            "damaged: [0-9]+ bytes; the",
        ),
        (
            "exits.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xaa"),
            "damaged: its sha",
        ),
        ("prototypes.safetensors", Path.unlink, "missing"),
        ("tokenizer.json", lambda file: (file.unlink(), file.mkdir()), "not a file"),
        ("tokenizer.json", lambda file: (file.unlink(), os.mkfifo(file)), "not a file"),
        ("tokenizer.json", linked, "leads outside the artifact"),
    ],
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


def as_old(artifact: Artifact, store: Path) -> Artifact:
    """A copy of an artifact in a store, as schema 6, whose exits are in its segments."""
    architecture, exits = artifact.manifest.architecture, exit_weights(artifact)
    folder = Path(shutil.copytree(artifact.path, store / artifact.manifest.name / "1"))
    (folder / EXITS).unlink()
    edit(folder, lambda m: (m.update(schema_version=OLD_VERSION), m["files"].pop(EXITS)))
    for layer, (_, weights) in enumerate(read_segments(artifact)):
        segment = build_old_segment(architecture, layer, stored(weights | exits.get(layer, {})))
        name = architecture.segment_files()[layer]
        (folder / name).write_bytes(segment.model(graph_name(layer)).SerializeToString())
        rehash(folder, name)
    return Store(store).open(artifact.full_name)


def test_an_artifact_of_schema_6_is_the_same_model(store: Path, tmp_path: Path, kernels: Any) -> None:
    """With the same bits, whether its exits' file is read or its segments' branches. One has a head and a norm."""
    for new in (artifact_of("modernbert", True), Store(store).open("tiny-int8")):
        old = as_old(new, tmp_path / "old")
        assert (old.manifest.schema_version, new.manifest.schema_version) == (6, 7)
        for runtime in ("onnxruntime", "native"):
            model = Model(old, runtime)
            assert model.runtime == runtime and values_of(model) == values_of(Model(new, runtime))


def references(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["calibration"]["references"]


OTHER_FILES = ("../secret", "model.pkl", "layer_1.onnx")


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
        (lambda m: m["files"].pop("exits.safetensors"), "files must include 'exits.safetensors'"),
        *((partial(with_file, name=name), "files must not contain") for name in OTHER_FILES),
        (lambda m: m.update(labels=["a", "b", "c"]), r"layer_00 must be finite float32 of shape \(3, 64\)"),
        (lambda m: m.update(name="other"), "this is the manifest of other:1"),
        (lambda m: m.update(prototype_layers=[0]), "prototype_layers must be"),
        (lambda m: references(m).pop(), "references must have one entry for each exit layer"),
        (lambda m: references(m)[0].update(nearest=None), "nearest must be set at the exits with"),
        (lambda m: references(m)[0]["entropy"].reverse(), "entropy must have 28 ascending values"),
        (lambda m: m["calibration"].update(table=[]), "must have rows of the default signal"),
        (lambda m: m["risk"][0]["weights"].__setitem__(1, -1e300), "risk.0.weights.1"),
        (lambda m: m["risk"][0].update(weights=[0.0] * 4), "risk.0.weights"),
        (lambda m: m["risk"][0].update(weights=[0.0] * 6), "5 weights for each exit or, .* 64 more"),
        (lambda m: m.update(risk=None), "risk"),
        (lambda m: m["defaults"].update(signal="margin"), "defaults.signal"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": None}), "lambda"),
        (lambda m: m["defaults"].update({"signal": "edr", "lambda": 3.5}), "default signal"),
        (lambda m: m["calibration"]["table"][-1].update(disagreement_bound=0.0), "must ascend with τ"),
        (lambda m: m.update(special_tokens="yes"), "special_tokens: Input should be a valid boolean"),
        (lambda m: m.update(max_tokens="64"), "max_tokens: Input should be a valid integer"),
    ],
)
def test_an_unsound_manifest_is_refused_with_the_reason(copy: Path, change: Callable, message: str) -> None:
    edit(copy, change)
    with pytest.raises(StoreError, match=message) as refused:
        open_model(copy)
    assert len(str(refused.value)) < 10_000


def test_a_manifest_that_is_not_a_json_object_is_refused(copy: Path) -> None:
    twice = (copy / "manifest.json").read_text().replace("{", '{"name": "other",', 1)
    for text in ("", "[]", "\x00", "[" * 100_000, twice):
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
        (PROTOTYPES, lambda _: save_tensors({}), "has no tensor layer_00"),
        (PROTOTYPES, prototypes(lambda x: x * np.nan), "must be finite float32"),
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


@settings(max_examples=40)
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
    synced: list[str] = []
    fsync = os.fsync

    def sync(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        assert target.versions() == ({"tiny": [1]} if synced[-1] == "tiny" else {})
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    with target.new_version("tiny") as draft:
        assert draft.path.stat().st_mode & 0o777 == 0o700
        draft.write(files)
        published = draft.publish(source.manifest.model_copy(update={"version": draft.next_version()}))
    assert published == tmp_path / "new/tiny/1"
    target.open("tiny").verify()
    assert published.stat().st_mode & 0o777 == 0o755  # also for a server that runs as another user
    assert synced == [*files, "manifest.json", "tiny"]  # so a power failure loses nothing, either


def test_the_kind_of_a_manifest_is_computed_once(store: Path) -> None:
    manifest = Store(store).open("tiny").manifest
    for fields in ({"aggregation": "first"}, {"thresholds": [0.5, 0.25]}, {"tolerance": 0.5}):
        changed = manifest.model_copy(update=fields)
        assert changed.kind is changed.kind != manifest.kind
    relabelled = changed.model_copy(update={"aggregation": "first", "labels": ["O", "B-name"]})
    assert isinstance(relabelled.kind, Spans) and relabelled.kind.rule.names == ["name"]


def test_a_taken_version_is_never_replaced(copy: Path) -> None:
    found = Store(copy.parent.parent)
    manifest = found.open("tiny").manifest
    with pytest.raises(OSError, match=r"not empty|exists"), found.new_version("tiny") as draft:
        assert draft.next_version() == 2
        draft.write({"tokenizer.json": b"{}"})
        draft.publish(manifest)  # version 1 again
    found.open("tiny").verify()


def test_a_new_version_shares_the_files_that_another_has(copy: Path) -> None:
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


def test_an_invalid_name_is_refused(tmp_path: Path) -> None:
    for name in ("", "../x", "Upper", ".hidden", "x" * 65):
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
    (copy / "manifest.json").write_text("{")
    assert "not JSON" in models("list")[1]


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


def test_only_a_regular_file_of_the_expected_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"four")
    (tmp_path / "link").symlink_to(file)
    assert read_regular_file(file, 4) == b"four"
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for path, limit, message in (
        (file, 3, "4 bytes; at most 3 are expected"),
        (tmp_path / "link", 4, "symbolic links"),  # swapped in after a check
        (Path("/dev/zero"), 3, "not a file"),
        (Path("/proc/self/maps"), 2**20, "grows while it is read"),  # files of /proc have size 0
        (tmp_path, 3, "not a file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            read_regular_file(path, limit)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
