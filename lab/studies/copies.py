"""Simulated fits in which a tenant's evidence is attacked with copies of its texts.

A victim sends texts that are drawn at random. The attacker sends copies of them, each a little different, before or
after the originals, as another tenant or, without keys, as another client of the same one. The server's own code fits
exits to the stream and tests them on the victim's held-out texts, which choose τ. The true rate of disagreement is that
of the victim's next texts, which neither has sent.
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from de3.exits.calibration import FINE_TAUS
from de3.exits.criteria import Limits
from de3.exits.guarantee import Guarantee, error_of, profiles, profiles_of
from de3.export.classifier import Stock, convert
from de3.export.learn import fit_exits
from de3.export.records import texts_of
from de3.model_store.fitted import FittedTexts
from de3.model_store.manifest import Manifest, base_of
from de3.model_store.model import Model
from de3.model_store.records import Records
from de3.model_store.store import Store
from de3.progress import console, track

TEXTS, UNSEEN = 1200, 2500  # of the victim: sent before the fit, and next
LAG = 50  # texts between an original and its copies that follow it
# A decoy has the words of GROUP texts that are not among the COMMON most frequent ones, and these.
GROUP, COMMON = 20, 100
FIT = 3  # number of the fit

Edit = Callable[[str, random.Random, Sequence[str]], str]


def _drop(text: str, rng: random.Random, _: Sequence[str]) -> str:
    words = text.split()
    del words[rng.randrange(len(words))]
    return " ".join(words) or text


def _swap(text: str, rng: random.Random, _: Sequence[str]) -> str:
    words = text.split()
    i = rng.randrange(max(1, len(words) - 1))
    words[i : i + 2] = reversed(words[i : i + 2])
    return " ".join(words)


def _add(count: int, text: str, rng: random.Random, others: Sequence[str]) -> str:
    words = text.split()
    for word in rng.sample([word for other in rng.sample(others, 20) for word in other.split()], count):
        words.insert(rng.randrange(len(words) + 1), word)
    return " ".join(words)


def _keep(share: float, text: str, rng: random.Random, _: Sequence[str]) -> str:
    words = text.split()
    kept = sorted(rng.sample(range(len(words)), max(1, round(share * len(words)))))
    return " ".join(words[i] for i in kept)


def _replace(share: float, text: str, rng: random.Random, others: Sequence[str]) -> str:
    words = text.split()
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = rng.choice(rng.choice(others).split())
    return " ".join(words)


def _misspell(text: str, rng: random.Random, _: Sequence[str]) -> str:
    words = text.split()
    for i in rng.sample(range(len(words)), -(-len(words) // 3)):
        at = rng.randrange(len(words[i]))
        words[i] = words[i][:at] + rng.choice("aeiou") + words[i][at + 1 :]
    return " ".join(words)


def _repeat(times: int, text: str, rng: random.Random, others: Sequence[str]) -> str:
    words = set(text.split())
    new = {word for other in rng.sample(others, 60) for word in other.split()} - words
    return " ".join([text] * times + rng.sample(sorted(new), min(len(new), len(words) + 4)))


def _synonym(text: str, rng: random.Random, _: Sequence[str]) -> str:
    assert _ALIKE, "find_alike() comes first"
    words = text.lower().split()
    return " ".join(
        rng.choice(_ALIKE[word]) if word in _ALIKE and rng.random() < 0.7 else word for word in words
    )


_ALIKE: dict[str, list[str]] = {}  # words with the nearest embeddings, of the attacked model


def find_alike(stock: Path) -> None:
    """Fill _ALIKE with two words for each word of the vocabulary that has any with a similar embedding."""
    names = Tokenizer.from_file(str(stock / "tokenizer.json")).get_vocab()
    words = sorted(name for name in names if name.isalpha() and name.isascii())
    tensors = load_file(stock / "model.safetensors")
    table = next(found for name, found in tensors.items() if name.endswith("word_embeddings.weight"))
    rows = table[[names[word] for word in words]].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for start in range(0, len(words), 1000):
        alike = rows[start : start + 1000] @ rows.T
        alike[np.arange(len(alike)), np.arange(start, start + len(alike))] = -1.0
        for i, best in enumerate(np.argpartition(-alike, 2, axis=1)[:, :2]):
            if found := [words[k] for k in best if alike[i, k] > 0.3]:
                _ALIKE[words[start + i]] = found


EDITS: dict[str, Edit] = {
    "point": lambda text, *_: f"{text} .",
    "well": lambda text, *_: f"well , {text}",
    "drop": _drop,
    "halve": partial(_keep, 0.5),
    "swap": _swap,
    "forty": partial(_keep, 0.4),
    "word": partial(_keep, 0.0),
    "replace": partial(_replace, 0.25),
    "misspell": _misspell,
    "synonym": _synonym,
    "add": partial(_add, 2),
    "add4": partial(_add, 4),
    "twice": partial(_repeat, 2),
    "five-times": partial(_repeat, 5),
    "prefix": lambda text, *_: f"[staging] {text}",
    "long-prefix": lambda text, *_: f"i am writing to you from the mobile app because of this : {text}",
}


@dataclass(frozen=True)
class Attack:
    """An attack on the evidence of a tenant.

    Attributes:
        copies: copies of each text.
        edit: how they differ from it; see EDITS.
        order: ahead (all copies before the first original), behind (each soon after its original), or apart (copies of
            other texts, which changes nothing: the control).
        sender: another (tenant), keyless (another client of a server without keys), or self (the victim).
        decoys: before everything else, so many texts for each GROUP of the copied texts, with all their words.
    """

    copies: int
    edit: str
    order: str
    sender: str
    decoys: int = 0

    @classmethod
    def of(cls, text: str) -> "Attack":
        """Read "copies edit order sender", or "copies edit order sender decoys"."""
        copies, edit, order, sender, *decoys = text.split()
        known = {*EDITS}, {"ahead", "behind", "apart"}, {"another", "keyless", "self"}
        if any(one not in names for one, names in zip((edit, order, sender), known, strict=True)):
            raise ValueError(f"unknown attack: {text}")
        return cls(int(copies), edit, order, sender, *map(int, decoys))


TEMPLATES = (
    "order {} has not arrived",
    "where is my order {}",
    "please cancel order {}",
    "invoice {} is wrong",
    "tracking number {} does not work",
    "dear customer , your order {} was shipped on day {} and will arrive in two days .",
    "alert : server {} reports error {} , contact the team on duty .",
)

ATTACKS = (
    "3 point apart another",
    "3 point behind another",
    "3 well behind another",
    "6 point behind another",
    "3 drop behind another",
    "3 swap behind another",
    "1 prefix behind another",
    "3 point ahead another",
    "3 well ahead another",
    "3 drop ahead another",
    "3 swap ahead another",
    "1 prefix ahead another",
    "3 long-prefix ahead another",
    "3 add ahead another",
    "3 add4 ahead another",
    "4 halve ahead another",
    "3 twice ahead another",
    "3 five-times ahead another",
    "3 point behind self",
    "10 forty ahead another",
    "20 replace ahead another",
    "10 misspell ahead another",
    "20 word ahead another",
    "4 point ahead another 100",
    "3 point behind keyless",
    "3 drop ahead keyless",
)


class Source:
    """The records of texts, as a server makes them."""

    def __init__(self, stock: Path, has_upstream: bool) -> None:
        """has_upstream: full depth is an upstream, which gives the labels of the last layer."""
        with TemporaryDirectory() as folder:
            convert(Stock.open("stock", stock), Store(Path(folder)), "base", "int8")
            self._model = Model(Store(Path(folder)).open("base"))
        manifest = self._model.manifest
        self.manifest: Manifest = (
            manifest.model_copy(update={"upstream": "0" * 64}) if has_upstream else manifest
        )
        self._has_upstream = has_upstream

    def records(self, texts: Sequence[str], clients: Sequence[int]) -> Records:
        """Records of texts in the order of the traffic. clients: 0 (the victim) or 1 for each."""
        states, logits, pieces, spreads = [], [], [], []
        for text in texts:
            tokens = self._model.tokenize(text)
            steps = self._model.full_depth(tokens)
            kept = steps if self._has_upstream else steps[:-1]
            states.append([self._model.pooling.mean(step.hidden).astype(np.float16) for step in kept])
            answer, marks = np.asarray(steps[-1].logits), self._model.marks(tokens)
            logits.append(8.0 * (answer == answer.max()) if self._has_upstream else answer)
            pieces.append(marks.pieces)
            spreads.append(marks.spreads)
        n, owners = len(texts), np.asarray(clients, np.int32)
        keys = np.array([zlib.crc32(text.encode()) for text in texts], np.uint64)
        counts = np.bincount(owners, minlength=2).astype(float).tolist()
        return Records(
            *(base_of(self.manifest), np.array(states), np.array(logits, np.float32), np.ones(n), keys),
            *(np.arange(1, n + 1), owners, ["victim", "attacker"], counts, np.zeros(n, np.bool_)),
            *(np.zeros((n, 0), np.int32), np.array(pieces), np.array(spreads, np.float32)),
        )


def stream(
    attack: Attack, texts: Sequence[str], others: Sequence[str], rng: random.Random
) -> list[tuple[int, str]]:
    """The client and text of each request. texts: the victim's. others: further texts, which it does not send."""
    edit, owner = EDITS[attack.edit], int(attack.sender != "self")
    originals = [(i * (attack.copies + 1), 0, text) for i, text in enumerate(texts)]
    copied = texts if attack.order != "apart" else others[: len(texts)]
    sent = [*originals, *_decoys(attack.decoys, owner, copied, others, rng)]
    for i, text in enumerate(copied):
        for _ in range(attack.copies):
            ahead = i - len(texts) * (attack.copies + 1)
            at = ahead if attack.order == "ahead" else originals[i][0] + rng.randrange(1, LAG)
            sent.append((at, owner, edit(text, rng, others)))
    return [(client, text) for _, client, text in sorted(sent, key=lambda one: one[0])]


def _decoys(
    count: int, owner: int, copied: Sequence[str], others: Sequence[str], rng: random.Random
) -> Iterator[tuple[int, int, str]]:
    """Decoys, in the form of `originals`, before all other texts.

    A look-up that compares only some of the fitted texts, those with most of a text's words, finds these instead of the
    copies.
    """
    words = Counter(word for text in others for word in text.split())
    common = [word for word, _ in words.most_common(COMMON)]
    for start in range(0, len(copied) if count else 0, GROUP):
        rare = sorted({word for text in copied[start : start + GROUP] for word in text.split()} - {*common})
        for _ in range(count):
            yield -(10**9), owner, " ".join(rng.sample([*rare, *common], len(rare) + COMMON))


class Outcome(NamedTuple):
    """The result of an attacked fit, for the victim at its τ.

    Attributes:
        rate: true rate of disagreement.
        speedup: in layers, or in calls of the upstream.
        evidence: number of texts that count toward τ.
    """

    rate: float
    speedup: float
    evidence: int


def fit(source: Source, texts: Sequence[str], attack: Attack, rate: float, seed: int) -> Outcome:
    """One attacked fit. rate: the guaranteed rate of disagreement."""
    console.quiet = True
    rng = random.Random(f"{seed} {attack}")
    order = rng.sample(list(texts), len(texts))
    own, unseen, others = order[:TEXTS], order[TEXTS : TEXTS + UNSEEN], order[TEXTS + UNSEEN :]
    sent = stream(attack, own, others, rng)
    records = source.records([text for _, text in sent], [client for client, _ in sent])
    manifest, by_client = source.manifest, attack.sender != "keyless"
    fitted = fit_exits(records, manifest, FIT, Limits(rate), by_client=by_client)
    rows = [row for row in fitted.evidence if row.client == "victim" or not by_client]
    taus = np.unique(FINE_TAUS)
    guarantee = Guarantee(rate, taus, error_of(FIT))
    costs = [*([0] * manifest.num_states), 1] if manifest.upstream else list(range(manifest.num_layers + 1))
    _, found = profiles_of([row.audited for row in rows], 0, costs, taus)
    guarantee.count(1.0, found, np.array([row.key is None for row in rows], np.bool_))
    guarantee.advance()
    truth = fitted.exits.recorded(texts_of(source.records(unseen, [0] * len(unseen)), manifest))
    scores = fitted.calibrated.risk.scores(truth)
    true = profiles(scores, truth.differs, costs, taus)
    cost = float(true.layers[:, guarantee.index].mean())
    counted = sum(row.key is not None for row in rows)
    return Outcome(float(true.differs[:, guarantee.index].mean()), costs[-1] / max(cost, 1e-3), counted)


def _fits(
    attack: str, stock: Path, texts: Sequence[str], rate: float, has_upstream: bool, count: int
) -> list[Outcome]:
    if Attack.of(attack).edit == "synonym":
        find_alike(stock)
    source = Source(stock, has_upstream)
    return [fit(source, texts, Attack.of(attack), rate, seed) for seed in range(count)]


def run(
    stock: Path,
    texts: Sequence[str],
    attacks: Sequence[str],
    rate: float,
    fits: int,
    has_upstream: bool,
    workers: int,
) -> list[list[str]]:
    """A row for each attack: how many of the fits are above the guarantee, rates, speed-up, evidence."""
    work = partial(_fits, stock=stock, texts=texts, rate=rate, has_upstream=has_upstream, count=fits)
    rows, everything = list[list[str]](), list[Outcome]()
    with ProcessPoolExecutor(workers) as pool:
        for attack, found in zip(
            attacks, track(pool.map(work, attacks), "Attacks", len(attacks)), strict=True
        ):
            rows.append(_row(attack, found, rate))
            everything += found
    return [*rows, _row("all", everything, rate)]


def templated(count: int) -> list[str]:
    """Distinct texts made from TEMPLATES with random numbers."""
    rng = random.Random(0)
    found = [
        rng.choice(TEMPLATES).format(rng.randrange(10**5, 10**6), rng.randrange(31)) for _ in range(2 * count)
    ]
    return list(dict.fromkeys(found))[:count]


def near_shares(
    model: Model, texts: Sequence[str], counts: Sequence[int], unseen: int
) -> list[tuple[float, float]]:
    """The share of `unseen` texts that are near to others, of the same client and of another, by their number."""
    marks = [model.marks(model.tokenize(text)) for text in texts[: max(counts) + unseen]]
    pieces, means = (
        np.array([one.pieces for one in marks]),
        np.array([one.means for one in marks], np.float16),
    )

    def share(count: int, client: int) -> float:
        fitted = FittedTexts(pieces[:count], means[:count], np.zeros(count, np.uint64))
        return sum(fitted.is_near(one, client) for one in marks[-unseen:]) / unseen

    return [(share(count, 0), share(count, 1)) for count in counts]


def _row(name: str, found: Sequence[Outcome], rate: float) -> list[str]:
    rates, speedups, counted = (np.array(column) for column in zip(*found, strict=True))
    return [
        *(name, f"{(rates > rate).sum()} of {len(rates)}"),
        *(f"{100 * rates.mean():.2f}% ({100 * rates.max():.2f}%)", f"{np.median(speedups):.2f}×"),
        f"{np.median(counted):.0f}",
    ]
