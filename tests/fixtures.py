"""Small real models, made and trained here, so that every test runs on a fresh machine."""

import gc
import hashlib
import importlib.util
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from httpx._transports import default as transports

from de3.model_store.proof import int8_saturates
from tests.commands import de3

if path := os.environ.get("SANITIZED_KERNELS"):  # the kernels that tests/sanitize.sh built
    spec = importlib.util.spec_from_file_location("de3.native.kernels", path)
    assert spec is not None and spec.loader is not None
    sys.modules["de3.native.kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import de3.native as native

    native.kernels = module
    os.environ.pop("LD_PRELOAD", None)  # other processes run without the sanitizers

# One thread: on models this small, more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine may take longer than hypothesis (0.2 s an example) and httpx (5 s) allow by default.
hypothesis.settings.register_profile(
    "de3", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("de3")
for phase in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, phase, 60.0)
# httpx loads the certificates for each request, which takes longer than most requests.
transports.create_ssl_context = cache(transports.create_ssl_context)  # type: ignore[attr-defined]

GOOD = "good great lovely superb fine warm funny charming bright fresh".split()  # noqa: SIM905
BAD = "bad awful dull poor weak cold boring tired messy stale".split()  # noqa: SIM905
FILLER = "the a film movie plot actor scene it is was and with of this one story very quite".split()  # noqa: SIM905
OTHER = "not never but ##s".split()  # noqa: SIM905
TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y")  # labels of a token classifier


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The extension module, set to the fastest kernels that this machine supports, or else to the reference.

    Skips the test if the module was not built.
    """
    module = pytest.importorskip("de3.native.kernels", reason="the kernels were not built: no C compiler")
    if not module.supported():
        module.use("reference")
    yield module
    module.use("")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use the kernels with this name instead of the fastest ones."""
    from de3.native import kernels

    before = kernels.supported()
    kernels.use(name)
    try:
        yield
    finally:
        kernels.use(before)


def make_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a text and its label, "0" for praise or "1" for blame; some words are negated, others are filler."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.randrange(2)
        negated = rng.random() < 0.25
        words = rng.choices((GOOD, BAD)[label != negated], k=rng.randint(1, 3))
        if negated:
            words = [x for word in words for x in ("not", word)]
        fillers = rng.choices(FILLER, k=rng.randint(0, 12))
        cut = rng.randint(0, len(fillers))
        rows.append((" ".join(fillers[:cut] + words + fillers[cut:]), str(label)))
    return rows


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write rows to a .jsonl file, with labels 0 and 1 as "negative" and "positive"; returns the path.

    So praise, which make_rows labels "0", is "negative". Other labels stay as they are.
    """
    names = {"0": "negative", "1": "positive"}
    path.write_text("".join(json.dumps({"text": t, "label": names.get(x, x)}) + "\n" for t, x in rows))
    return path


def save_tokenizer(folder: Path, token_types: bool = True, first: Sequence[str] = ("[PAD]", "[UNK]")) -> int:
    """Save a small WordPiece tokenizer; returns the size of its vocabulary.

    It pads and truncates to 32 tokens, as the tokenizers in some model packages do. token_types: True if it
    returns token types. first: the tokens 0 and 1.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*first, "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER, *OTHER]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(32)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"][:: 1 if token_types else 2],
    ).save_pretrained(folder)
    return len(vocabulary)


def save_family_tokenizer(folder: Path, family: str) -> int:
    """Save a small tokenizer of the kind that a family uses; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [text for text, _ in make_rows(400, 3)]
    if family in ("roberta", "modernbert"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=340, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=alphabet
        )
    elif family in ("camembert", "xlm-roberta", "deberta-v2"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>"
        )
    else:  # MPNet's positions count the tokens that are not token 1
        first = ("[UNK]", "[PAD]") if family == "mpnet" else ("[PAD]", "[UNK]")
        return save_tokenizer(folder, family in ("bert", "electra"), first)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        *(("</s>", 2), ("<s>", 0)), trim_offsets=True, add_prefix_space=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 64},
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_encoder(
    folder: Path,
    family: str = "bert",
    layers: int = 3,
    activation: str = "gelu",
    labels: int = 0,
    tags: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Save a small encoder with random weights, and its tokenizer; returns the folder.

    labels: number of labels of a stock classifier; 0: an encoder without a classifier. tags: labels of a token
    classifier, which has a tokenizer of the kind that its family uses. options: further fields of the configuration.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    torch.manual_seed(7)
    if tags:
        vocabulary = save_family_tokenizer(folder, family)
    else:
        vocabulary = save_tokenizer(folder, token_types=family in ("bert", "electra", "deberta-v2"))
    like_roberta = family in ("roberta", "xlm-roberta", "camembert", "mpnet")
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,  # sizes that the kernels in native/ support
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 66 if like_roberta else 64,
        "hidden_act": activation,
        "pad_token_id": 1 if like_roberta else 0,
    }
    if like_roberta:
        settings["type_vocab_size"] = 1
    if family == "electra":
        settings["embedding_size"] = 16
    if family == "distilbert":
        settings |= {"dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64, "activation": activation}
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
        ):
            del settings[key]
    if family == "deberta-v2":
        settings |= {"embedding_size": 48, "type_vocab_size": 2, "position_biased_input": False}
        settings |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
        # Fewer buckets than the maximum number of tokens.
        settings |= {"position_buckets": 8, "max_relative_positions": 24, "norm_rel_ebd": "layer_norm"}
    if family == "modernbert":
        settings |= {
            "hidden_activation": settings.pop("hidden_act"),
            "local_attention": 10,  # shorter than the longest texts, which have 64 tokens
            "classifier_pooling": "mean",
            "layer_types": [("full_attention", "sliding_attention")[i % 2] for i in range(layers)],
            **{f"{token}_token_id": 2 + i % 2 for i, token in enumerate(("bos", "eos", "cls", "sep"))},
        }
    if labels:
        settings["num_labels"] = labels
    if tags:
        settings |= {"id2label": dict(enumerate(tags)), "label2id": {tag: k for k, tag in enumerate(tags)}}
    config = AutoConfig.for_model(family, **settings | options)
    kind = AutoModelForSequenceClassification if labels else AutoModel
    model = (AutoModelForTokenClassification if tags else kind).from_config(config)
    with torch.no_grad():  # nonzero biases and norms, so that parity tests cover them
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


# The slowest first, so that no pytest-xdist worker starts a slow file when the others are done.
SLOW_FILES = (  # noqa: SIM905
    "docker ray kernels wheel attacks learn trouble examples fuzz hostile_graphs import page models audit processes "
    "export budgets regression server_life training_studies dashboards loadtest modernbert multi_label deberta reports "
    "training hostile_models studies bulk connection signal_choice native calibration"
).split()


def pytest_collection() -> None:
    gc.disable()  # importing all tests allocates much and frees little, so collecting takes half of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(item.config.rootpath / "lab"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(900))
    order = {f"test_{name}.py": number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


ROOT = Path(__file__).resolve().parent.parent
MADE = ROOT / "build" / "made"  # what made_once keeps from one run to the next
MAKERS = "exits native model_store data training export tests/native".split()  # noqa: SIM905
OTHERS = (
    "pyproject.toml",
    "requirements.lock",
    "runtime/child.py",
    "runtime/fit.py",
    "runtime/upstream_settings.py",
    "tests/fine_tune.py",
)


@cache
def digest(path: Path) -> str:
    """The hash of a file, or of the source files in a folder."""
    files = sorted(f for f in path.rglob("*") if f.suffix in (".py", ".c", ".h")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all pytest-xdist workers and all later runs; tests must not change it.

    It is made again if a source file has changed that trains or exports, or a test file that asks for it. If `make`
    fails, the next caller tries again.
    """
    asking = {Path(frame.filename) for frame in inspect.stack(0)}
    sources = [ROOT / part for part in (*MAKERS, *OTHERS)]
    sources += sorted(path for path in asking if path.is_relative_to(ROOT / "tests"))
    machine = [sys.version, int8_saturates(), os.environ.get("SANITIZED_KERNELS", "")]
    made_from = hashlib.sha256(repr([machine, *map(digest, sources)]).encode())
    folder = MADE / f"{name}-{made_from.hexdigest()[:16]}"
    MADE.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(folder)
        os.utime(folder)
    return folder


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove what no run has used for a week."""
    if not hasattr(session.config, "workerinput"):
        for path in MADE.glob("*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > 7 * 86400:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def installed(folder: Path, packages: str) -> Path:
    """Install packages, without their dependencies, into a folder; skips the test if that fails. Returns the folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*command, *packages.split()], capture_output=True, text=True, timeout=200, check=False
    )
    if done.returncode:
        pytest.skip(f"{folder.name} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def few_taus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate with fewer values of τ, which takes a third of the time."""
    from de3.exits.calibration import FINE_TAUS

    monkeypatch.setattr("de3.export.calibrate.FINE_TAUS", FINE_TAUS[::24])


@pytest.fixture(scope="session")
def encoder() -> Path:
    return made_once("encoder", save_encoder)


@pytest.fixture(scope="session")
def data_file() -> Path:
    def make(folder: Path) -> None:
        rows = "".join(f"{text}\t{label}\n" for text, label in make_rows(2400, 1))
        (folder / "train.tsv").write_text("sentence\tlabel\n" + rows)

    return made_once("data", make) / "train.tsv"


@pytest.fixture(scope="session")
def checkpoint(encoder: Path, data_file: Path) -> Path:
    """The checkpoint folder of a small DE3-BERT, trained by the command a user types."""
    epochs = 1 if "SANITIZED_KERNELS" in os.environ else 4  # with sanitizers, its answers do not matter
    command = (
        f"train {data_file} --text-column sentence --label-names negative,positive --encoder {encoder} "
        f"--epochs {epochs} --lr 2e-3 --batch-size 32 --held-back 300 --no-bf16 --out"
    )
    return made_once("checkpoint", lambda folder: de3(f"{command} {folder}"))


@pytest.fixture(scope="session")
def store(checkpoint: Path) -> Path:
    """A store with tiny:1 (fp32) and tiny-int8:1, exported by the command a user types.

    As in earlier releases, the manifests do not say whether a model takes single texts or pairs, so it takes both.
    """

    def make(folder: Path) -> None:
        for name, quantize in (("tiny", "none"), ("tiny-int8", "int8")):
            de3(
                f"export {checkpoint} --name {name} --store {folder} --quantize {quantize} --max-loss 3 "
                "--max-int8-loss 3"
            )
            manifest = folder / name / "1/manifest.json"
            manifest.write_text(manifest.read_text().replace('"input": "text"', '"input": null'))

    return made_once("store", make)


@pytest.fixture(scope="session")
def several(store: Path) -> Path:
    """A store with the models of `store`, and mood:1 and mood-int8:1: two layers of their encoders, with other exits.

    The exits are random; mood and tiny are in fp32.
    """
    import numpy as np

    from de3.export.fit import Exits
    from de3.export.publish import write_exits
    from de3.model_store.store import Store

    def make(folder: Path) -> None:
        shutil.copytree(store, folder, dirs_exist_ok=True)
        made = Store(folder)
        for name, base in (("mood", "tiny"), ("mood-int8", "tiny-int8")):
            rng = np.random.default_rng(3)

            def random(*shape: int) -> Any:
                return rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: B023

            exits = Exits(
                "mean",
                [(random(3, 64), random(3)) for _ in range(3)],
                [(random(64, 64), random(64)) for _ in range(2)],
                [random(3, 64) for _ in range(2)],
                has_last=True,
            )
            with made.new_version(name) as draft:
                fields = {"name": name, "labels": ["calm", "glad", "sad"], "source": None}
                draft.publish(write_exits(made.open(base), exits, draft, **fields))

    return made_once("several", make)


# For tests that compare ONNX Runtime's int8 layers with exact ones.
exact_int8 = pytest.mark.skipif(int8_saturates(), reason="ONNX Runtime's int8 products saturate here")


@pytest.fixture(scope="session")
def kinds(store: Path) -> Path:
    """A store with a model of each kind of answer, by its name."""
    from de3.export.classifier import Stock, convert
    from de3.model_store.store import Store
    from tests.stock import token_classifier, with_random_exits

    def make(folder: Path) -> None:
        made = Store(folder)
        shutil.copytree(store / "tiny-int8", folder / "tiny-int8")
        manifest = folder / "tiny-int8/1/manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"labels": ["safe", "blame"]}))
        for name, labels, problem in (
            ("labels", 3, "multi_label_classification"),
            ("value", 1, "regression"),
        ):
            source = save_encoder(folder / f".{name}", labels=labels)
            config = json.loads((source / "config.json").read_text()) | {"problem_type": problem}
            (source / "config.json").write_text(json.dumps(config))
            convert(Stock.open("stock", source), made, name, "int8")
        with_random_exits(token_classifier("bert"), made, "spans", "int8")

    return made_once("kinds", make)
