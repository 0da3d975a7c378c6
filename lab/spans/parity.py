"""A server's spans at full depth, compared with those of transformers' token-classification pipeline."""

import http.client
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from de3.exits.spans import AGGREGATIONS, OUTSIDE, Aggregation
from de3.exits.spans import Span as Found
from de3.loadtest.servers import Server, free_port, running
from de3.training.pretrained import quiet
from lab.spans import Spans, rates, recall

BATCH = 64  # texts in a request
TOLERANCE = 1e-3  # of scores
ODD_SHARE = 0.1  # of the texts: something odd is put into them
ODD = ("🙂", "👩‍👩‍👧", "e\u0301", "\r\n", "\t", "  ", "ﬁ", "İ", "ß", "漢字", "\u200d", "١٢")
VOCABULARY = 4000  # tokens of a trained tokenizer
TAGS = (OUTSIDE, "B-NAME", "I-NAME", "B-PLACE", "I-PLACE", "DATE")


@dataclass(frozen=True)
class Parity:
    """The spans of one model with one aggregation.

    Attributes:
        found: number of spans that transformers finds.
        unlike: number of texts whose spans differ from transformers' in fp32, in place, label, or score by TOLERANCE.
        largest: largest difference of the scores of equal spans.
        int8_unlike, int8_missed: of int8 against fp32: share of texts whose spans differ, and of the characters in
            spans that are in none.
    """

    model: str
    aggregation: str
    texts: int
    found: int
    unlike: int
    largest: float
    int8_unlike: float
    int8_missed: float


def with_odd(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The texts, with odd characters put into a share of ODD_SHARE."""
    rng = random.Random(seed)

    def changed(text: str) -> str:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(ODD) + text[at:]

    return [changed(text) if rng.random() < ODD_SHARE else text for text in texts]


def compare(name: str, folder: Path, texts: Sequence[str]) -> Iterator[Parity]:
    """Compare a checkpoint's spans with each aggregation. Raises ValueError if a server does not start."""
    with _serving(folder, "none") as fp32, _serving(folder, "int8") as int8:
        for aggregation in AGGREGATIONS:
            theirs = _transformers(folder, texts, aggregation)
            ours = _ours(fp32, texts, aggregation)
            gaps = [_gap(a, b) for a, b in zip(theirs, ours, strict=True)]
            full, small = _sets(ours), _sets(_ours(int8, texts, aggregation))
            yield Parity(
                *(name, aggregation, len(texts), sum(map(len, theirs)), sum(gap > TOLERANCE for gap in gaps)),
                max((gap for gap in gaps if gap != float("inf")), default=0.0),
                rates(full, small)[0],
                1 - recall(full, small),
            )


def _gap(one: Sequence[Found], other: Sequence[Found]) -> float:
    """Largest difference of scores; infinite if the spans differ."""
    if [span[:3] for span in one] != [span[:3] for span in other]:
        return float("inf")
    return max((abs(a.score - b.score) for a, b in zip(one, other, strict=True)), default=0.0)


def _sets(found: Sequence[Sequence[Found]]) -> list[Spans]:
    return [frozenset(span[:3] for span in spans) for spans in found]


def _transformers(folder: Path, texts: Sequence[str], aggregation: Aggregation) -> list[list[Found]]:
    from transformers import pipeline

    quiet()
    run = pipeline("token-classification", str(folder), aggregation_strategy=aggregation, device="cpu")
    label = "entity" if aggregation == "none" else "entity_group"
    return [
        [Found(one["start"], one["end"], one[label], float(one["score"])) for one in row]
        for row in map(run, texts)
    ]


@contextmanager
def _serving(folder: Path, quantize: str) -> Iterator[str]:
    command = [sys.executable, "-P", "-m", "de3.cli", "serve", str(folder.absolute()), "--quantize", quantize]
    server = Server(f"de3, {quantize}", [*command, "--port", "{port}"], ready="/ready")
    with TemporaryDirectory() as place, running(server, free_port(), Path(place) / "log") as started:
        yield started.target.url


def _ours(url: str, texts: Sequence[str], aggregation: Aggregation) -> list[list[Found]]:
    """The server's spans at full depth; raises ValueError if the text of one is not the slice of the text as sent."""
    bodies = [
        {"input": list(texts[i : i + BATCH]), "tau": 0, "aggregation": aggregation}
        for i in range(0, len(texts), BATCH)
    ]
    rows = [row for answer in ask(url, bodies) for row in answer["data"]]
    for text, row in zip(texts, rows, strict=True):
        for span in row["spans"]:
            if span["text"] != text[span["start"] : span["end"]]:
                raise ValueError(f"the span {span} is not a slice of {text!r}")
    return [[Found(*(span[key] for key in Found._fields)) for span in row["spans"]] for row in rows]


def ask(url: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the JSON of the answer to each body, sent one after the other. Raises ValueError for an error."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    for body in bodies:
        connection.request("POST", "/classify", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = json.loads(response.read())
        if response.status != 200:
            raise ValueError(f"status {response.status}: {data}")
        yield data


def random_model(folder: Path, family: str, texts: Sequence[str]) -> Path:
    """Write a token classifier with random weights, and a tokenizer trained on the texts; returns its folder.

    family: roberta, with byte-level BPE, or xlm-roberta, with a unigram model. Neither marks the tokens within words.
    """
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedTokenizerFast

    quiet()
    special: Any = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "roberta":
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        after: Any = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        after = processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)]
        )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = after
    names = {
        f"{name}_token": token for name, token in zip(("bos", "pad", "eos", "unk"), special, strict=True)
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **names).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=tokenizer.get_vocab_size(),
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=1026,
        type_vocab_size=1,
        id2label=dict(enumerate(TAGS)),
        label2id={tag: i for i, tag in enumerate(TAGS)},
    )
    model = AutoModelForTokenClassification.from_config(config)
    with torch.no_grad():
        model.classifier.weight *= 20  # so that few labels are nearly equal
    model.save_pretrained(folder)
    return folder


def table(results: Sequence[Parity]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table."""
    columns = ["model", "aggregation", "texts", "spans", "unlike in fp32", "scores differ by at most"]
    return [*columns, "int8: unlike", "int8: characters missed"], [
        [
            *(
                one.model,
                one.aggregation,
                f"{one.texts}",
                f"{one.found}",
                f"{one.unlike}",
                f"{one.largest:.1g}",
            ),
            *(f"{100 * share:.2f}%" for share in (one.int8_unlike, one.int8_missed)),
        ]
        for one in results
    ]
