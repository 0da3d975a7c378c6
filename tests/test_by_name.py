"""Stock classifiers served by name, at full depth, read without PyTorch."""

import fcntl
import json
import os
import re
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from de3.data.examples import Example
from de3.export import cache, record, upstream, vocabulary
from de3.export.cache import artifact_of, evict, model_name
from de3.export.hub import fetch
from de3.export.original import original_of
from de3.model_store.architecture import Precision
from de3.model_store.families import FAMILIES
from de3.model_store.manifest import MIN_TOLERANCE
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Artifact, Store
from de3.runtime import prove
from de3.runtime.loading import load
from de3.server import int8
from de3.server.learn import fitting
from de3.server.service import Service
from de3.server.settings import Settings
from tests.commands import WITHOUT_TORCH
from tests.fixtures import TAGS, made_once, make_rows, save_encoder
from tests.hub import hub_of, offline, use_hub
from tests.serving import Server, process, running, until
from tests.stock import with_random_exits
from tests.upstream import chat, model_of


@pytest.fixture(scope="session")
def bert() -> Path:
    """The folder of a stock classifier with random weights."""
    return made_once("bert-by-name", lambda folder: save_encoder(folder, labels=3))


@pytest.fixture(scope="module")
def artifact(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of bert in int8, in a cache that no test changes."""
    return artifact_of(str(bert), "int8", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "copy"))


def edit(folder: Path, **values: Any) -> None:
    """Change fields of config.json; None removes the field."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Apply `change` to the tensors of model.safetensors, a dict by name."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


# OLD: as transformers 4 writes them.
OLD = {"global_attn_every_n_layers": 2, "global_rope_theta": 500.0, "local_rope_theta": 30.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
OWN = {"full_attention": {"type": "linear", "factor": 2.0}, "sliding_attention": {**YARN, "rope_theta": 9.0}}
BOTH = {"rope_parameters": {kind: YARN | {"factor": 2.0} for kind in OWN}, "rope_scaling": YARN}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        *(("modernbert", x) for x in (OLD, OLD | {"rope_scaling": YARN}, {"rope_parameters": OWN}, BOTH)),
    ],
)
def test_omitted_options_have_the_defaults_of_transformers(family: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"vocab_size": 100, **options}
    if family == "deberta-v2":
        given |= {"relative_attention": True, "pos_att_type": "c2p|p2c"}
    theirs, known = AutoConfig.for_model(family, **deepcopy(given)).to_dict(), FAMILIES[family]
    ours = known.complete({"model_type": family, **given})
    known.check(ours)
    assert known.of(ours, True) == known.of(theirs, True)
    assert known.head(ours) == known.head(theirs)
    assert ours.get("rope_parameters") == theirs.get("rope_parameters")
    if family in ("bert", "roberta", "distilbert", "mpnet"):  # transformers ignores it
        assert known.of(ours | {"embedding_size": 16}, True).width == 768


# Small guards with the options of published ones. mmBERT: as transformers 4 writes them.
MMBERT: dict[str, Any] = {"vocab_size": 400, "max_position_embeddings": 32_768, "local_attention": 128}
MMBERT |= {"hidden_size": 128, "num_attention_heads": 2, "layers": 4}
MMBERT_ROPE = {"rope_scaling": {**YARN, "original_max_position_embeddings": 2048}, "rope_parameters": None}
MMBERT_ROPE |= dict.fromkeys(("global_rope_theta", "local_rope_theta"), 160_000)
MDEBERTA: dict[str, Any] = {
    "max_position_embeddings": 512,
    "max_relative_positions": -1,
    "position_buckets": 256,
}
MDEBERTA |= {"pos_att_type": "p2c|c2p", "type_vocab_size": 0, "embedding_size": 128, "hidden_size": 128}
MDEBERTA |= {"pooler_hidden_size": 128, "legacy": True, "num_attention_heads": 2, "vocab_size": 400}


@pytest.mark.parametrize("tags", [(), TAGS], ids=["classes", "spans"])
@pytest.mark.parametrize(
    ("family", "options", "fields", "lengths"),
    [
        ("modernbert", MMBERT, MMBERT_ROPE, (25, 512)),
        pytest.param("modernbert", MMBERT, MMBERT_ROPE, (8192,), marks=pytest.mark.slow),
        ("deberta-v2", MDEBERTA, {"embedding_size": None}, (25, 512)),
    ],
)
def test_guards_as_they_are_published(
    family: str,
    options: dict[str, Any],
    fields: dict[str, Any],
    lengths: tuple[int, ...],
    tags: tuple[str, ...],
    tmp_path: Path,
) -> None:
    folder = save_encoder(tmp_path / "guard", family, labels=0 if tags else 2, tags=tags, **options)
    edit(folder, **fields)
    (folder / "tokenizer_config.json").unlink()
    kind = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    plain, int8 = (Model(artifact_of(str(folder), p, tmp_path / "cache")) for p in ("fp32", "int8"))
    assert plain.manifest.max_tokens == {"modernbert": 8192, "deberta-v2": 512}[family]
    for length in lengths:
        ids = np.random.default_rng(length).integers(0, 400, (1, length))
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(ids)).logits[0].numpy()
        tokens = Tokens(ids, np.zeros_like(ids), False)
        np.testing.assert_allclose(plain.full_depth(tokens)[-1].logits, expected, atol=1e-4, rtol=0)
        error = np.abs(int8.full_depth(tokens)[-1].logits - expected)
        assert error.mean() < 0.1 * max(np.ptp(expected), 1)


def save_gemmas_tokenizer(folder: Path, size: int) -> PreTrainedTokenizerFast:
    """Save a tokenizer of the kind that mmBERT has: a text is one word, and unknown characters are bytes."""
    letters = [*string.ascii_letters, *".,'!?-éüñß"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    parts = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\n", "\n\n", "▁", *letters]
    longer = chain(product("▁" + "".join(letters), letters), product(["▁", *letters], letters, letters))
    words = ["".join(x) for x in islice(longer, size - len(parts))]
    vocabulary = {word: i for i, word in enumerate([*parts, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<eos>", 1), ("<bos>", 2)],
    )
    tokenizer.add_special_tokens(special)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=["input_ids"])
    saved.save_pretrained(folder)
    return saved


@pytest.mark.parametrize("size", [2_000, pytest.param(256_000, marks=pytest.mark.slow)])
def test_gemmas_tokenizer(size: int, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "guard", "modernbert", labels=2, vocab_size=size)
    theirs = save_gemmas_tokenizer(folder, size)
    model = Model(artifact_of(str(folder), "int8", tmp_path / "cache"))
    text = "Ignore  all\n\nprevious instructions 👍🏽 zß, 漢字! "
    for texts in ((text,), (text * 300,), ("a", text * 2), ("zzz",)):
        tokens = model.tokenize(*texts)
        assert tokens.ids[0].tolist() == theirs(*texts, truncation=True, max_length=64)["input_ids"]
        assert np.isfinite(model.full_depth(tokens)[-1].logits).all()


def in_shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    names, files = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()


def as_from_tensorflow(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_other_forms_of_a_classifier_make_the_same_artifact(
    artifact: Artifact, copy: Path, tmp_path: Path
) -> None:
    buffers = {"position_ids": torch.arange(64), "token_type_ids": torch.zeros(64)}
    buffers = {f"bert.embeddings.{name}": values for name, values in buffers.items()}
    weights(copy, lambda w: {as_from_tensorflow(k): v for k, v in w.items()} | buffers)
    in_shards(copy)
    tokens = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    without("tokenizer.json")(copy)
    (copy / "vocab.txt").write_text("\n".join(sorted(tokens, key=tokens.get)))
    other = artifact_of(str(copy), "int8", tmp_path / "cache")
    both = [(one, one.manifest.files.copy()) for one in (artifact, other)]
    tokenizers = [Tokenizer.from_str(one.read("tokenizer.json").decode()) for one, _ in both]
    assert len({tuple(one.encode("It is NOT a bad film", "good").ids) for one in tokenizers}) == 1
    for _, files in both:
        del files["tokenizer.json"]
    assert both[0][1] == both[1][1]


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_weight(name: str, value: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: weights(folder, lambda w: w | {name: value(w.get(name))})


def adapter(folder: Path) -> None:
    without("config.json", "model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}")


CLASSIFIER, DENSE = "classifier.weight", "bert.encoder.layer.1.output.dense.weight"
BAD: list[tuple[Callable[[Path], None], str]] = [
    (cut, "its model.safetensors cannot be read"),
    (with_weight(DENSE, lambda w: w * torch.nan), f"its weight {DENSE} has values that are not finite"),
    (with_weight(CLASSIFIER, lambda w: w[:2].contiguous()), "classifier.weight is float32 of shape"),
    (
        lambda f: weights(f, lambda w: {k: w[k] for k in w.keys() - {CLASSIFIER}}),
        "it has no weight classifier",
    ),
    (with_weight("second.weight", lambda _: torch.zeros(3, 64)), "include 'second.weight', which a"),
    (with_weight(DENSE, lambda w: w.to(torch.float8_e4m3fn)), "its weights are F8_E4M3; de3 reads F32, F16"),
    (lambda f: edit(f, layer_norm_eps="small"), "an invalid value: epsilon: Input should be a valid number"),
    (lambda f: edit(f, id2label={"0": "a", "2": "b"}), "must have the keys 0 to 1"),
    (lambda f: edit(f, problem_type="regression"), "is a regression model with 3 outputs"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer.json cannot be used: not a tokenizer"),
    (without("config.json"), "has no config.json, so it is not a Hugging Face model"),
    (without("model.safetensors"), "has no model.safetensors: it has no weights"),
    (
        lambda f: weights(f, lambda w: w | {str(i): torch.zeros(0) for i in range(20_001)}),
        "it has more than 20000 weights",
    ),
    (lambda f: edit(f, architectures=["\x1b[2J" + "x" * 10**6]), r"it is a \\u001b\[2Jxxx"),
    (lambda f: edit(f, max_position_embeddings=32), r"position_embeddings.weight has the shape \(64, 64\)"),
    (with_weight(DENSE, lambda _: torch.zeros(2**28, 0)), r"has the shape \[268435456, 0\]"),
    (lambda f: edit(f, id2label={str(k): "x" * (1500 + k) for k in range(3)}), "labels.0: String should"),
    (lambda f: os.truncate(f / "model.safetensors", 2**34), r"its files have 171798\d+ bytes; at most"),
    (lambda f: os.truncate(f / "tokenizer.json", 2**26 + 1), r"its tokenizer\.json has 67108865 bytes; at"),
    (adapter, r"is an adapter \(LoRA\) without its model: merge it"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_a_bad_folder_is_a_one_line_error_and_leaves_nothing(copy: Path, tmp_path: Path, case: int) -> None:
    change, message = BAD[case]
    change(copy)
    with pytest.raises(ValueError, match=message) as caught:
        artifact_of(str(copy), "int8", tmp_path / "cache")
    assert str(caught.value).startswith(str(copy)) and str(caught.value).isprintable()
    assert len(str(caught.value)) <= cache.MAX_MESSAGE + 50
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock"]


def test_an_artifact_is_made_once_and_made_again_when_it_is_not_whole(bert: Path, tmp_path: Path) -> None:
    def made() -> int:
        """When the artifact's manifest was written."""
        return (artifact_of(str(bert), "int8", tmp_path / "cache").path / "manifest.json").stat().st_mtime_ns

    first, when = artifact_of(str(bert), "int8", tmp_path / "cache"), made()
    place, layer = first.path.parents[1], first.path / "layer_03.onnx"
    os.utime(place, (0, 0))
    assert made() == when
    assert place.stat().st_mtime > 0  # it was used last
    for damage in (
        (first.path / "manifest.json").unlink,
        layer.unlink,
        lambda: layer.write_bytes(b""),
        lambda: layer.open("ab").write(b"more"),
    ):
        damage()
        artifact_of(str(bert), "int8", tmp_path / "cache").verify()


@pytest.mark.parametrize("others_make_it", [False, True])
def test_an_artifact_that_is_removed_as_it_is_opened_is_made_again_and_kept(
    artifact: Artifact, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others_make_it: bool
) -> None:
    made = artifact.path.parents[1]
    place = Path(shutil.copytree(made, tmp_path / "cache" / made.name))
    flock, before = fcntl.flock, (place / cache.USED).stat()

    def lock(file: Any, how: int) -> None:
        if how == fcntl.LOCK_SH and os.path.samestat(before, os.fstat(file)):
            evict(tmp_path / "cache", 0)
            assert not place.exists()
            if others_make_it:
                shutil.copytree(made, place)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    again = artifact_of(str(bert), "int8", tmp_path / "cache")
    evict(tmp_path / "cache", 0)  # this process uses it
    again.verify()


def test_an_artifact_is_used_only_for_what_it_was_made_from(copy: Path, tmp_path: Path) -> None:
    def place(precision: Precision = "int8", folder: Path = copy) -> Path:
        return artifact_of(str(folder), precision, tmp_path / "cache").path.parents[1]

    def upstream_place(precision: Precision) -> Path:
        of = model_of(tmp_path, ["a", "b"], chat(), encoder=str(copy))
        folders = tmp_path / "tickets.toml", Store(tmp_path / "none")
        return upstream.artifact_of(of, *folders, precision, tmp_path / "cache").path.parents[1]

    places = [place(), place("fp32"), upstream_place("int8"), upstream_place("fp32")]
    (copy / "README.md").write_text("not read")
    assert [place(), upstream_place("int8")] == places[::2]
    places.append(place(folder=Path(shutil.copytree(copy, tmp_path / "other"))))
    vocabulary = copy / "vocab.txt"
    for change in (
        lambda: edit(copy, id2label={"0": "a", "1": "b", "2": "c"}),
        lambda: vocabulary.write_text("not read if there is a tokenizer.json"),
        lambda: vocabulary.rename(copy / "merges.txt"),
    ):
        change()
        places += [place(), upstream_place("int8")]
    assert len(set(places)) == len(places)


def test_the_least_recently_used_are_removed_until_the_rest_fits(tmp_path: Path) -> None:
    def places() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    for age, name in enumerate(("new", "used", "converting", "old", "oldest")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/file").write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    evict(tmp_path, 5000 / 1e9)
    assert len(places()) == 5
    evict(tmp_path, 4900 / 1e9)
    assert places() == ["converting", "new", "old", "used"]
    with (tmp_path / "used" / cache.USED).open("w") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        with FileLock(tmp_path / "converting.lock"):
            evict(tmp_path, 2000 / 1e9)
            assert places() == ["converting", "used"]
        evict(tmp_path, 0)
        assert places() == ["used"]
    evict(tmp_path / "none", 0)


def test_a_cache_that_cannot_be_written_is_named(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="DE3_CACHE"):
        artifact_of(str(bert), "int8", tmp_path / "file")


def test_the_name_under_which_a_classifier_is_served() -> None:
    names = ["my-org/My_Model@v1.0", "/models/Toxic BERT/", "x", "a/" + "b" * 90]
    assert [model_name(name) for name in names] == ["my_model", "toxic-bert", "x", "b" * 64]


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##ing", "##s", "film", "caf", "##e", *"abcfilmngx."]
SENTENCES = ("A café  films\n", "filming 電影 [MASK] x.", "[SEP] Films", "")


LETTERS = [*"abcdefghijklmnopqrstuvwxyz.", "Ġ", "Ã", "©", "fi", "lm", "film", "Ġfilm"]
IDS = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "<mask>"])}
VOCABULARY = {"vocab.txt": "\n".join(WORDS).encode()}
MERGES = {
    "vocab.json": json.dumps(IDS).encode(),
    "merges.txt": b"#version: 0.2\nf i\nl m\nfi lm\n\xc4\xa0 film\n",
}


@pytest.mark.parametrize(
    ("kind", "family", "files", "options"),
    [
        *(
            (BertTokenizer, "bert", VOCABULARY, x)
            for x in ({}, {"do_lower_case": False}, {"strip_accents": False})
        ),
        (RobertaTokenizer, "roberta", MERGES, {}),
    ],
)
def test_a_vocabularys_tokenizer_is_that_of_transformers(
    kind: Any, family: str, files: dict[str, bytes], options: dict[str, Any], tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    theirs = kind.from_pretrained(tmp_path, **options)
    ours = Tokenizer.from_str(vocabulary.tokenizer_of(files, options, FAMILIES[family]).decode())
    for text in SENTENCES:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        encoded, pair = ours.encode(text, "a film"), theirs(text, "a film", return_token_type_ids=True)
        assert encoded.ids == pair["input_ids"]
        assert family == "roberta" or encoded.type_ids == pair["token_type_ids"]


def test_a_vocabulary_is_limited() -> None:
    lines = b"\n" * (vocabulary.MAX_WORDS + 1)
    with pytest.raises(ValueError, match=f"more than {vocabulary.MAX_WORDS} lines"):
        vocabulary.tokenizer_of(MERGES | {"merges.txt": lines}, {}, FAMILIES["roberta"])


# On the hub


@pytest.fixture
def hub(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The handler class of a hub that serves org/model to this process and to new ones."""
    with hub_of(copy) as (handler, port):
        use_hub(monkeypatch, port, tmp_path / "hf")
        monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
        yield handler


def downloads(hub: Any) -> list[str]:
    """The revision and the name of each file that was downloaded, as REVISION/NAME."""
    start = "GET /org/model/resolve/"
    return [line.removeprefix(start) for line in hub.asked if line.startswith(start)]


def test_all_files_of_a_model_are_of_the_commit_that_was_checked(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"could run code")
    hub.moves, commit = True, hub.COMMIT
    folder = fetch("org/model")
    with offline():
        assert fetch("org/model") == folder  # as downloaded before
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(downloads(hub)) == sorted(f"{commit}/{file}" for file in wanted)
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / file).read_bytes() == (hub.folder / file).read_bytes() for file in wanted)


def test_the_commit_of_a_revision_is_noted_only_in_the_cache(hub: Any, tmp_path: Path) -> None:
    revisions = ("../../out", str(tmp_path / "out"), "../refs-too", "v/1")
    hub.REVISIONS = [hub.COMMIT, *(quote(revision, safe="") for revision in revisions)]
    before = set(tmp_path.rglob("*"))
    for revision in revisions:
        fetch(f"org/model@{revision}")
    (refs,) = (tmp_path / "hf").rglob("refs")
    assert [path for path in refs.rglob("*") if path.is_file()] == [refs / "v/1"]
    assert not [
        path for path in set(tmp_path.rglob("*")) - before if "out" in path.name or "too" in path.name
    ]


def test_old_files_are_rewritten_for_an_import_and_nothing_is_left(hub: Any, bert: Path) -> None:
    torch.save(load_file(bert / "model.safetensors"), hub.folder / "pytorch_model.bin")
    without("model.safetensors")(hub.folder)
    (hub.folder / "special_tokens_map.json").write_text("{}")
    for state in (nullcontext(), offline()):
        with state:
            with pytest.raises(ValueError, match="import it with de3 import"):
                fetch("org/model")
            with original_of("org/model") as source:
                ours, theirs = (load_file(folder / "model.safetensors") for folder in (source, bert))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and not source.exists()
    files = {"pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted = files | {"special_tokens_map.json"}
    assert sorted(downloads(hub)) == sorted(f"{hub.COMMIT}/{file}" for file in wanted)


def test_a_model_that_cannot_be_served_is_refused_before_its_weights_are_downloaded(hub: Any) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"is not read")
    hub.other = {"size": 2**34 // 4 + 1}
    with pytest.raises(ValueError, match=rf"^org/model: its \S+ has {2**32 + 1} bytes"):
        fetch("org/model")
    assert not downloads(hub)
    hub.other = {}
    edit(hub.folder, model_type="t5")
    with pytest.raises(ValueError, match=r"^org/model: encoders of type 't5'"):
        fetch("org/model")
    assert downloads(hub) == [f"{hub.COMMIT}/config.json"]
    without("tokenizer.json")(hub.folder)
    hub.asked.clear()
    with pytest.raises(ValueError, match=r"^org/model has no tokenizer\.json"):
        fetch("org/model")
    assert not downloads(hub)


def test_the_reason_for_which_the_hub_has_no_model(hub: Any) -> None:
    for name, reason in (
        ("org/other", "no such repository"),
        ("org/gated", "HF_TOKEN"),
        ("org/model@v2", "no such revision"),
        ("not a name!", "not a valid Hugging Face hub id"),
        ("~nobody/model", "no such folder$"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*{reason}"):
            fetch(name)
    with offline(), pytest.raises(ValueError, match=r"^org/third: .*the hub cannot be reached"):
        fetch("org/third")


# Requests


def test_changed_files_are_not_loaded_before_a_restart(copy: Path, tmp_path: Path) -> None:
    artifact = artifact_of(str(copy), "int8", tmp_path / "cache")
    key = "an-admin-key-of-some-length"
    keys: Any = f"root {key}"
    with running(Service(Settings(store=tmp_path / "none", port=0, admin_keys=keys), [artifact])) as server:

        def load() -> tuple[int, bool]:
            headers, url = {"Authorization": f"Bearer {key}"}, f"{server.url}/v1/models/copy/load"
            answer = httpx.post(url, json={}, headers=headers, timeout=60)
            return answer.status_code, "its files have changed" in answer.text

        assert load() == (200, False)
        os.utime(copy / "tokenizer.json", ns=(0, 0))
        assert load() == (409, True)
        (copy / "tokenizer.json").unlink()
        assert load() == (409, True)
        assert server.classify(input="good").status_code == 200


def test_only_full_depth_is_answered(artifact: Artifact, tmp_path: Path) -> None:
    early = {"tau": 0.1, "signal": "entropy", "lambda": 1.0, "max_layer": 1}
    early |= {"target_speedup": 2, "latency_budget_ms": 1000, "max_disagreement": 0.02}
    with running(Service(Settings(store=tmp_path, port=0, threads=1), [artifact])) as server:
        for field, value in early.items():
            answer = server.classify(input="good", **{field: value})
            assert answer.status_code == 422
            error = answer.json()["error"]
            assert error["param"] == field and "add exits with de3 import" in error["message"]
        for full in ({"tau": 0}, {"tau": 0, "signal": "entropy"}, {"max_layer": 3}, {"target_speedup": 1}):
            answer = server.classify(input="good", **full)
            assert answer.status_code == 200 and answer.json()["data"][0]["exit"]["layer"] == 3
    for options in ({"tau": 0.5}, {"target_speedup": 2.0}, {"latency_budget_ms": 5.0}):
        with pytest.raises(ValueError, match=r"a setting cannot be met: .*add exits with de3 import"):
            load(artifact, Settings(store=tmp_path, **options))


def test_a_proof_is_not_repeated(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, prover = replace(artifact, proof=tmp_path / "proof"), prove.Prover()
    prover.prove(artifact, "auto")
    monkeypatch.setattr(prove, "PROGRAM", "raise SystemExit(9)")
    prover.prove(artifact, "auto")
    with pytest.raises(ValueError, match="crashes the process that loads it"):
        prover.prove(artifact, "onnxruntime")  # another runtime needs its own proof
    (tmp_path / "proof").write_text("{}")
    with pytest.raises(ValueError, match="crashes the process that loads it"):
        prover.prove(artifact, "auto")


# Run at the priority of the tests: at the lowest one, it would wait for everything else on the machine.
INT8 = "from de3.export.int8_process import child; child()"


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The number of comparisons of int8 with fp32, each of 40 texts, that have ended, at the tests' priority."""
    ended = tmp_path / "ended"
    ended.touch()
    monkeypatch.setattr(int8, "TEXTS", 40)
    monkeypatch.setattr(int8, "PROGRAM", f"{INT8}; open({str(ended)!r}, 'a').write('.')")
    monkeypatch.setattr(fitting, "IDLE_CORES", -1.0)
    return lambda: len(ended.read_text())


def measured(server: Server) -> dict[str, Any]:
    """What the list of models says that int8 changes, by model, without those of which it says nothing."""
    rows = httpx.get(f"{server.url}/v1/models").json()["data"]
    return {row["id"]: row["int8"] for row in rows if row["int8"]}


def logged(caplog: pytest.LogCaptureFixture, part: str) -> list[tuple[str, str]]:
    return [(row.levelname, row.getMessage()) for row in caplog.records if part in row.getMessage()]


def test_the_spans_that_int8_changes_are_counted_once(
    compared: Callable[[], int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On distinct live texts; a longer one, a repeated one and a redacted one do not count."""
    caplog.set_level("INFO", "de3")
    folder = save_encoder(tmp_path / "stock", tags=["O", "B-A", "I-A"])
    artifact = artifact_of(str(folder), "int8", tmp_path / "cache")
    settings = Settings(store=tmp_path / "none", port=0, threads=1)
    texts = [f"{text} {number}" for number, (text, _) in enumerate(make_rows(40, 31))]
    with running(Service(settings, [artifact])) as server:
        assert server.classify(input=["long " * 1000, *texts[:30], *texts[:20]]).status_code == 200
        private = [f"private {text}" for text in texts]
        assert server.classify(input=private, redact=True).status_code == 200
        assert not measured(server)
        assert server.classify(input=texts[20:]).status_code == 200
        until(lambda: logged(caplog, "int8 changes"), "the message")
        (found,) = measured(server).values()
    examples = [Example(text, 0) for text in texts]
    plain = Model(artifact_of(str(folder), "fp32", tmp_path / "other"), "onnxruntime")
    theirs, ours = record.record(plain, examples), record.record(Model(artifact), examples)
    differ = int(ours.differs_from(theirs.answers[:, -1])[:, -1].sum())
    assert (found["texts"], found["differ"]) == (40, differ)
    assert found["lower"] <= found["share"] == round(differ / len(examples), 5) < found["upper"]
    ((level, message),) = logged(caplog, "int8 changes")
    assert level == ("WARNING" if found["share"] > 0.01 else "INFO") and "--quantize none" in message
    assert not list((tmp_path / "cache").glob("*/.fp32"))
    with running(Service(settings, [artifact])) as server:  # a restart repeats nothing
        assert server.metric("de3_int8_disagreement_ratio", model="stock:1") == found["share"]
        assert server.classify(input=texts).status_code == 200
        assert list(measured(server).values()) == [found] and compared() == 1
    assert artifact.proof is not None
    proved = json.loads(artifact.proof.read_text())
    for damaged in (
        {},
        5,
        found | {"share": "x"},
        found | {"upper": float("nan")},
        found | {"texts": 10**400},
    ):
        artifact.proof.write_text(json.dumps(proved | {"int8": damaged}))
        registry = CollectorRegistry()
        int8.Int8Check([artifact], "auto", registry)
        assert not next(iter(registry.collect())).samples  # it is measured again


def test_one_process_at_a_time_counts_what_int8_changes_in_classes(
    bert: Path, compared: Callable[[], int], tmp_path: Path
) -> None:
    """Values, fp32 and models of the store are left out."""
    value = artifact_of(str(save_encoder(tmp_path / "value", labels=1)), "int8", tmp_path / "cache")
    assert value.manifest.tolerance == MIN_TOLERANCE
    several = save_encoder(tmp_path / "plain", labels=2, problem_type="multi_label_classification")
    plain = artifact_of(str(several), "fp32", tmp_path / "cache")
    assert plain.manifest.thresholds == [0.5] * 2
    artifact = artifact_of(str(bert), "int8", tmp_path / "cache")
    others = [value, plain, with_random_exits(bert, Store(tmp_path / "store"), "stored", "int8")]
    parts = [[f"{part} {i}" for i in range(int8.TEXTS)] for part in "abc"]
    settings = Settings(store=tmp_path / "none", port=0, default_model=artifact.manifest.name)
    with running(Service(settings, [artifact, *others])) as server:
        for other in others:
            assert server.classify(input=parts[0], model=other.manifest.name).status_code == 200
        with FileLock(artifact.path.parents[1] / ".fp32.lock"):  # as another process would hold it
            server.classify(input=parts[0])
            server.classify(input=parts[1])  # starts no other process
            until(compared, "the end of the process")
        assert not measured(server)

        def found() -> dict[str, Any]:
            server.classify(input=parts[2])  # counts once the server knows that the first process has ended
            return measured(server)

        until(found, "the result")
        assert found().keys() == {artifact.full_name} and compared() == 2


def test_two_classifiers_with_one_name_are_refused(artifact: Artifact, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two models would be served as"):
        Service(Settings(store=tmp_path / "none"), [artifact, artifact_of(str(bert), "fp32", tmp_path)])


def test_kserves_runtime_and_a_hub_model_are_served_without_pytorch_and_with_only_json_in_the_log(
    hub: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of every process, from the first line to the last, whatever fails."""
    shutil.copytree(bert, tmp_path / "models")
    exits = with_random_exits(bert, Store(tmp_path / "store"), "exits", "int8")
    edit(hub.folder, id2label={"0": "a", "1": "b", "2": "c"})
    runtime = yaml.safe_load(Path("deploy/kubernetes/kserve.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["DE3_HOST"] == "0.0.0.0"
    local = {"DE3_HOST": "127.0.0.1", "DE3_CACHE": str(tmp_path / "cache"), "DE3_NOTHING": "0.5"}
    for name, value in (environment | local).items():
        monkeypatch.setenv(name, value)
    command, *arguments = [
        one.replace("/mnt/models", str(tmp_path / "models")).replace("{{.Name}}", "toxic")
        for one in container["args"]
    ]
    assert command == "serve"
    log, arguments = list[str](), [*arguments, "org/model@v1", str(exits.path), "--default-model", "model"]
    with process(tmp_path / "none", *arguments, code=WITHOUT_TORCH) as started:
        assert started.stderr is not None
        for line in started.stderr:
            log.append(json.loads(line)["message"])
            if "is replaced, after" in log[-1]:
                started.terminate()
            elif "2 processes" in log[-1]:
                ask_all(re.findall(r"running on (http://[0-9.:]+)", " ".join(log))[0])
                pids = re.findall(r"Started server process \[(\d+)\]", " ".join(log))
                os.kill(int(pids[0]), signal.SIGKILL)
        assert started.wait(60) == 0
    said = " ".join(log)
    assert said.count("curl http://") == 1 and said.count("converting it once") == 2
    assert "DE3_NOTHING: unknown" in said and "replacing it" in said
    assert sum("model.safetensors" in line for line in downloads(hub)) == 1
    for wrong, says in (
        ("--nonsense", "No such option: --nonsense"),
        ("./nothing", "./nothing: no such folder"),
    ):
        with process(tmp_path / "none", wrong) as started:
            assert started.stderr is not None
            rows = [json.loads(line) for line in started.stderr]
        assert rows[-1]["level"] == "CRITICAL" and rows[-1]["message"].startswith(says)


def ask_all(url: str) -> None:
    """Ask a server for answers of its models under all their names."""
    inputs = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}
    for path, body in (
        ("/v1/models/toxic:predict", {"instances": ["good"]}),
        ("/v2/models/toxic/infer", {"inputs": [inputs]}),
    ):
        assert httpx.post(url + path, json=body, timeout=60).status_code == 200
    assert httpx.get(f"{url}/v2/models/toxic/ready").status_code == 200
    rows = [
        httpx.post(f"{url}/classify", json={"input": "good", **more}, timeout=60).json()["data"][0]
        for more in ({}, {"model": "model"}, {"model": "org/model"}, {"model": "org/model@v1"})
    ]
    assert {row["label"] for row in rows} < {"a", "b", "c"} and len({str(row["probs"]) for row in rows}) == 1
    assert rows[0]["exit"]["layer"] == rows[0]["exit"]["num_layers"] == 3
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    found = {(row["id"], row["source"], *row["exit_layers"]) for row in listed}
    assert found == {("models:1", "models", 3), ("model:1", "org/model@v1", 3), ("exits:1", None, 0, 1, 2, 3)}
