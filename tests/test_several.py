"""Several models answer a request, those with one encoder on one pass, each bit for bit as it would alone."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from de3.export.classifier import Stock, convert
from de3.export.fit import Exits
from de3.export.publish import write_exits
from de3.model_store.manifest import Defaults
from de3.model_store.store import Store
from de3.runtime.classification import MAX_MODELS
from de3.runtime.engine.job import MAX_HEADS
from de3.runtime.options import OPTION_NAMES
from de3.server.http.access import TOKENS_PER_TEXT
from tests.commands import de3
from tests.fixtures import made_once, make_rows, save_encoder
from tests.jobs import job, stand_in
from tests.serving import Gate, Server, serving, until
from tests.stock import coarse_calibration
from tests.test_audit import audit
from tests.test_from_table import topics, write_table
from tests.test_long import words
from tests.test_models import KEY, change

# On the encoder of tiny: two labels; four topics, with fewer layers; several topics for a text; a value.
NAMES = ("tiny", "topics", "tags", "stars")
KINDS = {"kernels": "-int8", "onnxruntime": ""}  # the end of the names of the models that they run
TEXTS = [text for text, _ in (*make_rows(20, 5), *topics(20, 6))]
LONG = [words(150, 1), words(400, 2), words(90, 3), words(200, 4), "a good film"]
PAIRS = [{"text": one, "text_pair": other} for one, other in zip(TEXTS[:9], TEXTS[9:18], strict=True)]
Entry = str | dict[str, Any]


@pytest.fixture(scope="session")
def heads(store: Path, encoder: Path) -> Path:
    """A store with NAMES in fp32, and in int8 with the ending -int8; and other, which has another encoder."""

    def make(folder: Path) -> None:
        shutil.copytree(store, folder, dirs_exist_ok=True)
        some, others = topics(400, 2), topics(400, 3)
        pairs = zip(some, others, strict=True)
        both = [(f"{one} {two}", f"{a}|{b}") for (one, a), (two, b) in pairs if a != b]
        tables = {"topics": topics(1000, 1), "tags": [*both, *some]}
        files = {name: write_table(folder / f"{name}.csv", rows) for name, rows in tables.items()}
        for kind, quantize in (("", "none"), ("-int8", "int8")):
            with coarse_calibration():
                for name, file in files.items():
                    options = f"--encoder tiny{kind} --quantize {quantize} --name {name}{kind}"
                    de3(f"fit {file} --store {folder} {options}")
            publish_stars(Store(folder), f"tiny{kind}", f"stars{kind}")
        stock = Stock.open("other", save_encoder(folder / ".other", labels=2))
        convert(stock, Store(folder), "other", "fp32")

    return made_once("heads", make)


def publish_stars(store: Store, base: str, name: str) -> None:
    """Publish a regression model with random exits on the encoder of another model."""
    artifact, rng = store.open(base), np.random.default_rng(3)
    layers, width = artifact.manifest.num_layers, artifact.manifest.hidden_size
    rows = rng.normal(0, 0.2, (layers + 1, 1, width)).astype(np.float32)
    linear = [(weight, np.zeros(1, np.float32)) for weight in rows]
    risk = [{"layer": n, "weights": [*rng.normal(0, 1, 3), 0.0, 0.0]} for n in range(layers)]
    fields: dict[str, Any] = {"labels": ["stars"], "tolerance": 0.1, "source": None, "risk": risk}
    with store.new_version(name) as draft:
        exits, defaults = Exits("mean", linear, [], [], has_last=True), Defaults(tau=0, signal="risk")
        draft.publish(write_exits(artifact, exits, draft, name=name, defaults=defaults, **fields))


@pytest.fixture(scope="module")
def server(kernels: Any, heads: Path) -> Iterator[Server]:
    names = [name + kind for kind in KINDS.values() for name in NAMES]
    with serving(heads, models=[*names, "other"], threads=2) as running:
        yield running


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, server: Server) -> str:
    """The end of the names of the models that a runtime runs."""
    ending = KINDS[request.param]
    models = [server.service.models.get(name + ending).model for name in NAMES]
    assert {model.runtime for model in models} == {"native" if ending else "onnxruntime"}
    assert models[1].manifest.num_layers < models[0].manifest.num_layers == models[3].manifest.num_layers
    return ending


def named(entries: Sequence[Entry], kind: str) -> list[Entry]:
    """Entries for `models`, with the end of the models' names."""
    return [one + kind if isinstance(one, str) else one | {"model": one["model"] + kind} for one in entries]


def alone(server: Server, entry: Entry, body: dict[str, Any]) -> httpx.Response:
    """The response for one model; an entry's options replace those of the request."""
    if isinstance(entry, str):
        return server.classify(model=entry, **body)
    own = entry.keys() - {"model"}
    return server.classify(**entry, **{k: v for k, v in body.items() if not (own and k in OPTION_NAMES)})


def result(answer: dict[str, Any]) -> dict[str, Any]:
    """The part of an answer that is the model's."""
    return {key: value for key, value in answer.items() if key not in ("id", "object", "created", "usage")}


def counts(server: Server, name: str) -> dict[tuple[str, ...], float]:
    """The counts of a model in the metrics, but no times."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in server.service.metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("model") == name
        and "seconds" not in sample.name
        and sample.name.endswith(("_total", "_count", "_bucket", "_sum"))
    }


def gained(before: dict[Any, float], after: dict[Any, float]) -> dict[Any, float]:
    return {key: pytest.approx(value - before.get(key, 0), abs=1e-6) for key, value in after.items()}


CASES: dict[str, tuple[list[Entry], dict[str, Any]]] = {
    "defaults": ([*NAMES], {}),
    "logits": ([*NAMES], {"explain": True, "raw": True, "tau": 0.4}),
    "tau": (
        [
            {"model": "tiny", "tau": 0.1},
            {"model": "topics", "tau": 0},
            "tags",
            {"model": "tiny", "tau": 0.02, "signal": "entropy"},
            {"model": "tiny", "tau": 0.5, "signal": "edr", "lambda": 2.0},
            {"model": "stars", "tau": 0.3},
        ],
        {"tau": 0.3, "raw": True},
    ),
    "max_disagreement": (
        [{"model": "tiny", "max_disagreement": 0.1}, {"model": "tiny", "target_speedup": 1.5}, "tiny"],
        {"max_disagreement": 0.5, "explain": True},
    ),
    "max_layer": ([{"model": "tiny", "max_layer": 2, "tau": 0}, *NAMES], {"max_layer": 1, "tau": 0.01}),
    "top_k": (["tiny", "topics", "tags"], {"top_k": 2}),
    "thresholds": (
        ["topics", {"model": "tags", "thresholds": 0.9, "tau": 0.5}, {"model": "tags", "thresholds": {"anger": 0.1}}],
        {"explain": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_model_answers_as_it_would_alone(server: Server, kind: str, case: str) -> None:
    entries, body = CASES[case]
    entries = named(entries, kind)
    for given in (TEXTS[0], TEXTS):
        answer = server.described(models=entries, input=given, **body)
        whole = [alone(server, entry, body | {"input": given}).json() for entry in entries]
        assert answer["results"] == [result(one) for one in whole]
        assert [answer["usage"]] * len(entries) == [one["usage"] for one in whole]  # not once for each model
        assert answer.keys() == {"id", "object", "created", "usage", "results"}
    if case == "max_disagreement":
        bounds = [one.get("certificate", {}).get("max_disagreement") for one in answer["results"]]
        assert bounds == [0.1, None, 0.5]
    elif "max_layer" not in body:
        exits = {tuple(row["exit"]["layer"] for row in one["data"]) for one in answer["results"]}
        assert len(exits) > 1  # the models decide apart


@pytest.mark.parametrize("body", [{}, {"latency_budget_ms": 6e4}, {"input": LONG, "long": "windows"}])
def test_models_with_different_encoders_have_a_pass_each(server: Server, body: dict[str, Any]) -> None:
    body = {"input": TEXTS} | body
    entries: list[Entry] = ["stars", "topics-int8", "tags"]
    if "latency_budget_ms" not in body:
        entries += ["other", {"model": "tiny-int8", "tau": 0.4}]
    before = counts(server, "tags:1")
    whole = [alone(server, entry, body).json() for entry in entries]
    between = counts(server, "tags:1")
    answer = server.described(models=entries, **body)
    assert answer["results"] == [result(one) for one in whole]
    after = counts(server, "tags:1")
    assert {k: v - between[k] for k, v in after.items()} == gained(before, between)
    if not body.keys() & {"latency_budget_ms", "long"}:
        fp32, int8, _, other, _ = (one["usage"]["prompt_tokens"] for one in whole)
        assert answer["usage"]["prompt_tokens"] == fp32 + int8 + other


@pytest.mark.parametrize("body", [{"tau": 0.5, "explain": True}, {"flag": "praise", "flag_threshold": 0.5}])
def test_the_windows_of_each_model_are_its_own(server: Server, kind: str, body: dict[str, Any]) -> None:
    body = body | {"input": LONG, "long": "windows"}
    entries = named(["topics", "tags", {"model": "tags", "tau": 0}] + ["tiny"] * ("flag" not in body), kind)
    names = {entry if isinstance(entry, str) else str(entry["model"]) for entry in entries}
    before = {name: counts(server, f"{name}:1") for name in names}
    whole = [alone(server, entry, body).json() for entry in entries]
    between = {name: counts(server, f"{name}:1") for name in names}
    answer = server.described(models=entries, **body)
    assert answer["results"] == [result(one) for one in whole]
    for name in names:  # the tokens and layers of the windows until its answer was settled
        after = counts(server, f"{name}:1")
        assert after.keys() >= between[name].keys() > set()
        assert {k: v - between[name][k] for k, v in after.items()} == gained(before[name], between[name])
    ran = [[row["windows"]["run"] for row in one["data"][:4]] for one in answer["results"]]
    assert any(len(set(runs)) > 1 for runs in zip(*ran, strict=True))  # for a text, not all ran as many
    tokens = [one["usage"]["prompt_tokens"] for one in whole]
    assert max(tokens) <= answer["usage"]["prompt_tokens"] < sum(tokens)


def test_pairs_and_truncated_texts(server: Server, kind: str) -> None:
    entries = named(["tiny", "stars", {"model": "tiny", "tau": 0.3}], kind)
    for body in ({"input": PAIRS}, {"input": LONG}, {"input": PAIRS[0], "explain": True}):
        answer = server.described(models=entries, **body)
        assert answer["results"] == [result(alone(server, entry, body).json()) for entry in entries]
    # Of two texts that are too long, either may be found first.
    body = {"input": [TEXTS[0], LONG[0]], "truncate": False}
    refused = server.classify(models=entries, **body)
    assert refused.status_code == 422 and refused.json() == alone(server, entries[0], body).json()
    assert refused.json()["error"]["param"] == "input[1]"


def test_each_model_counts(heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rate limit, for the texts in flight and for the engine's time."""
    keys = {name: {"Authorization": f"Bearer {name * 20}"} for name in "abc"}
    lines = "\n".join(f"{name} {name * 20}" for name in keys)
    settings: dict[str, Any] = {"api_keys": lines, "rate_limit": "40/hour", "max_queue": 24, "max_texts": 24}
    with serving(heads, models=[*NAMES], threads=1, **settings) as limited, ThreadPoolExecutor(1) as pool:

        def post(key: str, models: int, texts: int) -> httpx.Response:
            body = {"models": ["tiny"] * models, "input": TEXTS[:texts]}
            return httpx.post(f"{limited.url}/classify", json=body, headers=keys[key], timeout=60)

        gate = Gate(monkeypatch)
        asked = pool.submit(post, "a", 16, 2)
        texts = limited.service.admission.texts
        until(lambda: texts.total == 24, "the texts to be in flight")  # a client alone may send them
        assert post("a", 2, 1).status_code == 503
        refused = post("b", 16, 1)
        assert refused.status_code == 429 and "over your share" in refused.text
        gate.open()
        assert asked.result().status_code == 200
        until(lambda: texts.total == 0, "the end")
        over = post("a", 8, 1)
        assert over.status_code == 429 and "over your rate limit" in over.text
        assert post("c", 16, 3).json()["error"]["message"].startswith("this request costs 48 texts")
        assert post("c", 16, 1).status_code == 200


def test_the_tokens_of_a_long_text_count_for_each_model(heads: Path) -> None:
    settings: dict[str, Any] = {"api_keys": f"a {'a' * 20}", "rate_limit": "40/hour"}
    with serving(heads, models=[*NAMES], **settings) as limited:

        def cost(texts: list[str]) -> httpx.Response:
            body = {"models": ["tiny", "tiny"], "input": texts, "long": "windows"}
            return httpx.post(
                f"{limited.url}/classify",
                json=body,
                headers={"Authorization": f"Bearer {'a' * 20}"},
                timeout=60,
            )

        long = cost(["good film " * 250])
        texts = -(-long.json()["usage"]["prompt_tokens"] // TOKENS_PER_TEXT)
        left = 40 - 2 * texts
        assert texts > 2 and cost(["a"] * (left // 2 + 1)).status_code == 429
        assert cost(["a"] * (left // 2)).status_code == 200


def test_the_calibrated_texts_of_each_model_are_counted(server: Server) -> None:
    counted = partial(server.metric, "de3_calibrated_texts_total", model="tiny:1")
    before = counted()
    assert server.classify(models=["topics", "tiny"], input=TEXTS[:3]).status_code == 200
    assert counted() - before == 3


def test_out_of_distribution_texts_go_deeper_for_each_model(kernels: Any, heads: Path) -> None:
    far = "zzz qqq xxx "
    repeated = (" ".join([word] * 30) for word in ("the", "good", "plot"))
    body = {"input": [*TEXTS[:10], far, *repeated, far * 30 + words(100)], "explain": True, "long": "windows"}
    names = named(NAMES, "-int8")
    with serving(heads, models=names, threads=1, ood_policy="deepen", tau=0.5) as server:
        answer = server.classify(models=names, **body).json()
        whole = [server.classify(model=name, **body).json() for name in names]
    assert answer["results"] == [result(one) for one in whole]
    flags = [[row.get("out_of_distribution", False) for row in one["data"]] for one in whole]
    assert len({tuple(one) for one in flags}) > 1 and any(flags[0])
    last = whole[0]["data"][-1]  # its first windows were far, so the last one's τ is lower
    assert flags[0][-1] and last["windows"]["run"] > 1 and last["exit"]["tau"] == 0.25


def test_each_model_is_audited_as_it_would_be_alone(heads: Path) -> None:
    names, reports = ["tiny-int8", "topics-int8", "tags-int8"], list[Any]()
    for requests in ([names], [[name] for name in names]):
        with serving(heads, models=names, threads=1, audit_share=1.0, tau=0.3) as server:
            for models in requests:
                assert server.classify(models=models, input=TEXTS).status_code == 200
                own = [{"model": name, "tau": 0.1} for name in models]  # not audited
                assert server.classify(models=own, input=TEXTS).status_code == 200
            for name in names:
                until(lambda name=name: audit(server, name)["texts"] == len(TEXTS), f"the audits of {name}")
            found = [audit(server, name) for name in names]
            reports.append([{k: v for k, v in one.items() if k not in ("since", "seconds")} for one in found])
    assert reports[0] == reports[1] and all(one["audits"] == len(TEXTS) for one in reports[0])


def test_the_request_log_has_a_line_for_each_model(heads: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "de3.requests")
    with serving(heads, models=["tiny", "topics"], log_requests=True, log_format="json") as server:
        server.classify(models=["topics", {"model": "tiny", "tau": 0}], input=TEXTS[:3])
        server.classify(models=["topics", "unknown"], input=TEXTS[:3])
        until(lambda: len([r for r in caplog.records if r.name == "de3.requests"]) == 3, "three lines")
    one, other, failed = (vars(r) for r in caplog.records if r.name == "de3.requests")
    assert one["request_id"] == other["request_id"] != failed["request_id"]
    assert (one["model"], other["model"], failed["model"]) == ("topics:1", "tiny:1", "none")
    assert other["tau"] == 0 != one["tau"] and other["exit_layers"] == [3] * 3 != one["exit_layers"]


def test_a_pass_has_at_most_as_many_heads_as_the_kernels() -> None:
    model = stand_in(has_kernels=True)
    more = [job(["a"], [0.0] * 2, model=model) for _ in range(MAX_HEADS)]
    both = job(["a"], [0.0] * 2, model=model, others=more)
    assert [len(one.parts) for one in both.passes] == [len(one.heads) for one in both.items] == [MAX_HEADS, 1]
    assert [both.rows(part) for part in both.parts] == [
        [(item, head)] for item in both.items for head in item.heads
    ]


def test_the_budget_of_a_pass_is_the_shortest_of_its_models() -> None:
    for own, others, expected in ((None, 0.2, 0.2), (0.1, 0.2, 0.1), (0.3, 0.2, 0.2), (None, None, None)):
        other = job(["a"], [1.0], first_exit_s=[0.1] * 2, budget_s=others)
        both = job(["a"], [1.0], first_exit_s=[0.1], budget_s=own, others=[other])
        assert both.plan.budget_s == expected
        # So that each has an answer at any time.
        assert [head.asks_all_exits for head in both.items[0].heads] == [expected is not None] * 2


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"models": ["tiny", "unknown"]}, 404, "models[1].model", "no model 'unknown' is served"),
    ({"models": ["tiny"] * (MAX_MODELS + 1)}, 422, "models", "17 models; give 1 to 16"),
    ({"models": ["tiny"], "model": "tiny"}, 422, "models", "cannot be combined with model"),
    ({"models": ["tiny", {"model": "tiny", "latency_budget_ms": 9}]}, 422, "models[1].latency_budget_ms", "a budget"),
    ({"models": ["tiny", {"model": "tiny", "tau": 0.1}], "latency_budget_ms": 9}, 422, "models[1].latency_budget_ms",
     "cannot be combined with tau"),
    ({"models": ["tiny", {"model": "tiny", "tua": 0.1}]}, 422, "models[1].tua", "unknown field; known fields: tau"),
    ({"models": ["tiny", 3]}, 422, "models[1]", "must be a name, or an object with model and exit options"),
    ({"models": ["tiny", "topics"], "max_layer": 3}, 422, "models[1].max_layer", "must be from 0 to "),
    ({"models": ["tiny", "topics"], "flag": "positive"}, 422, "flag", "'positive' is not a label of topics"),
    ({"models": ["tiny", "tags"], "input": ["good", PAIRS[0]]}, 422, "input[1]", "tags:1 takes single texts"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "message"), REFUSED)
def test_errors_name_the_model(
    server: Server, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    refused = server.classify(**{"input": "good"} | body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (status, param), error
    assert error["message"].startswith(f"{param}: {message}")


def test_an_entry_without_options_has_those_of_the_request(server: Server) -> None:
    entries = [{"model": "tiny"}, {"model": "tiny", "tau": None}, {"model": "tiny", "tau": 0}]
    answer = server.classify(models=entries, input=TEXTS[0], tau=0.123).json()
    assert [one["data"][0]["exit"]["tau"] for one in answer["results"]] == [0.123, 0.123, 0]


@pytest.mark.parametrize(
    ("names", "kind"),
    [(["tiny", "topics"], "kernels"), (["topics", "tiny"], "onnxruntime")],
    ids=["deep first", "shallow first"],
)
def test_models_share_an_encoder(kernels: Any, heads: Path, names: list[str], kind: str) -> None:
    names = [name + KINDS[kind] for name in names]
    with serving(heads, models=names, admin_keys=f"root {KEY}") as server:

        def encoders() -> list[Any]:
            return [server.service.models.get(name).model.encoder for name in names]

        encoder = encoders()[0]
        assert encoders() == [encoder] * 2 and encoder.layers.num_layers == 3
        expected = [result(server.classify(model=name, input=TEXTS).json()) for name in names]
        assert change(server, "load", names[0]).status_code == 200  # once more
        assert encoders() == [encoder] * 2
        assert change(server, "unload", names[0]).status_code == 200
        assert result(server.classify(models=[names[1]], input=TEXTS).json()["results"][0]) == expected[1]
        assert change(server, "load", names[0]).status_code == 200
        assert encoders() == [encoder] * 2
        assert server.classify(models=names, input=TEXTS).json()["results"] == expected


def test_a_deeper_model_that_is_loaded_later_runs_the_pass(kernels: Any, heads: Path) -> None:
    names = ["topics-int8", "tiny-int8"]
    with serving(heads, models=names[:1], admin_keys=f"root {KEY}") as server:
        assert change(server, "load", names[1]).status_code == 200
        expected = [result(server.classify(model=name, input=TEXTS, tau=0).json()) for name in names]
        for order in (1, -1):
            answer = server.classify(models=names[::order], input=TEXTS, tau=0).json()
            assert answer["results"] == expected[::order]
