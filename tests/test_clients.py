"""Existing clients against a running server, with only the address changed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from de3.runtime.errors import RequestError
from de3.server.http.app import PROTOCOLS, create_api
from de3.server.http.errors import STATUSES
from de3.server.http.frontend import Frontend
from de3.server.http.tei import PREDICT
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import Server, serving

TEXTS = ["a good film", "dull and boring", "it is not bad"]
# From the documentation of vLLM (docs/models/pooling_models/classify.md), as the fields that the tests send.
CAFE, BROKEN = "Loved the new café—coffee was great.", "This update broke everything. Frustrating."


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny", "tiny-int8"], default_model="tiny", max_texts=8) as running:
        yield running


def ours(server: Server, **body: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = server.classify(**body).json()["data"]
    return rows


def ranked(row: dict[str, Any]) -> list[tuple[str, float]]:
    """The labels and probabilities of a row, the most probable first."""
    return sorted(zip(["negative", "positive"], row["probs"], strict=True), key=lambda pair: -pair[1])


# A client generated from the OpenAPI schema


def test_a_client_generated_by_openapi_python_client_reads_typed_answers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")  # do not format the code
    command = f"{sys.executable} -m openapi_python_client generate --meta none --fail-on-warning "
    command += f"--url {server.url}/openapi.json --config {tmp_path}/config.yaml "
    command += f"--output-path {tmp_path}/de3_generated"
    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "arning" not in done.stdout, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    classify: Any = import_module("de3_generated.api.classify.classify")
    models: Any = import_module("de3_generated.models")
    client = import_module("de3_generated").Client(server.url)
    pair = models.TextPair(text="a good film", text_pair="dull")
    body = models.ClassifyRequest(input_=[*TEXTS, pair], model="tiny", tau=0.1, explain=True)
    answer = classify.sync(client=client, body=body)
    expected = ours(server, input=[*TEXTS, pair.to_dict()], model="tiny", tau=0.1, explain=True)
    for row, raw in zip(answer.data, expected, strict=True):
        assert (row.label, row.probs, row.exit_.lambda_) == (
            raw["label"],
            raw["probs"],
            raw["exit"]["lambda"],
        )
        assert row.exit_.reason == models.ExitReason(raw["exit"]["reason"])
        assert row.to_dict().items() >= raw.items()
    refused = classify.sync(client=client, body=models.ClassifyRequest(input_="good", tau=2.0))
    assert (refused.error.code, refused.error.param) == (422, "tau")
    metadata = import_module("de3_generated.api.open_inference_protocol.model_metadata")
    assert "no model 'x' is served" in metadata.sync("x", client=client).error


def test_the_schema_is_valid(store: Path) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    keys: dict[str, Any] = {"api_keys": f"alice {'a' * 20}", "admin_keys": f"root {'r' * 20}"}
    api = create_api(Frontend(Service(Settings(store=store, **keys)), PROTOCOLS), lambda: None)
    schema = json.loads(json.dumps(api.openapi()))
    assert [error.message for error in OpenAPIV31SpecValidator(schema).iter_errors()] == []
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) > 15


def test_the_schema_lists_the_path_of_every_protocol_with_an_example(server: Server) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    for path in PROTOCOLS:
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        example = content["examples"]["one text"]["value"] if path == "/classify" else content["example"]
        answer = httpx.post(server.url + path.format(model="tiny", version=1), json=example)
        needs_pairs = "needs a model of pairs" in answer.text and ("rerank" in path or "score" in path)
        needs_spans = "is not a token classifier" in answer.text and path == "/v1/extract"
        needs_names = "labels do not show which mean safe" in answer.text
        needs_labels = "it does not fit tiny" in answer.text
        is_refused = needs_pairs or needs_spans or needs_names or needs_labels
        assert answer.status_code == 200 or is_refused, (path, answer.text)


# vLLM and SGLang


def test_the_documented_request_of_vllm(server: Server) -> None:
    model = httpx.get(server.url + "/v1/models").json()["data"][0]["id"]  # as vLLM's example does
    body = httpx.post(server.url + "/v1/classify", json={"model": model, "input": [CAFE, BROKEN]}).json()
    assert body["id"].startswith("classify-") and body["created"] > 1_700_000_000
    assert (body["object"], body["model"]) == ("list", model)
    for index, row in enumerate(body["data"]):
        assert (row["index"], row["num_classes"], row["label"]) == (index, 2, ranked(row)[0][0])
    usage = body["usage"]
    assert 0 == usage["completion_tokens"] < usage["prompt_tokens"] == usage["total_tokens"]


def test_every_documented_field_of_vllm_works(server: Server) -> None:
    plain = ours(server, input=CAFE)
    # A client that sends vLLM's defaults explicitly.
    names = "model user truncate_prompt_tokens padding truncation_side mm_processor_kwargs cache_salt use_activation"
    defaults = dict.fromkeys(names.split()) | {"priority": 0, "add_special_tokens": True}
    for fields in (
        defaults,
        {"truncate_prompt_tokens": -1, "truncation_side": "right", "use_activation": True, "user": "u-1"}
        | {"padding": "max_length", "cache_salt": "c2FsdA", "priority": -1, "rid": "r-1"},
    ):
        assert ours(server, input=CAFE, **fields) == plain, fields
    for fields in ({"use_activation": False}, {"activation": False}, {"raw": True}):
        (raw,) = ours(server, input=CAFE, explain=True, **fields)
        weights = np.exp(raw["probs"])
        assert plain[0]["label"] == raw["label"]
        assert weights / weights.sum() == pytest.approx(plain[0]["probs"], abs=1e-6)
        assert raw["layers"][-1]["probs"] == raw["probs"]
    assert server.classify(input=CAFE, request_id="mine").json()["id"] == "classify-mine"


def test_the_most_probable_labels(server: Server) -> None:
    for count, raw in ((1, False), (2, True), (5, False)):
        (row,) = ours(server, input=CAFE, top_k=count, raw=raw)
        assert [(entry["label"], entry["prob"]) for entry in row["top"]] == ranked(row)[:count]
    assert "top" not in ours(server, input=CAFE)[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: input should be -1 or null"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1"),
        ({"use_activation": "no"}, "use_activation: input should be a valid boolean"),
        ({"input": [[9707, 11, 847], [791]]}, "input[0]: must be a text, or an object with text and"),
        ({"thresholds": 0.3}, "thresholds: tiny:1 is not a multi-label model"),
    ],
)
def test_unsupported_fields_of_vllm_are_named(server: Server, fields: dict[str, Any], says: str) -> None:
    answer = server.classify(**{"input": CAFE, **fields})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["message"].startswith(says) and error["param"] == says.partition(":")[0].partition("[")[0]


def test_sglangs_own_classify(server: Server) -> None:
    """SGLang's example reads the `embedding` of each response."""
    rows = ours(server, input=[CAFE, BROKEN])
    answer = server.classify(model="tiny", text=[CAFE, BROKEN], rid="r-1")
    for one, row in zip(answer.json(), rows, strict=True):
        weights = np.exp(one["embedding"])
        assert weights / weights.sum() == pytest.approx(row["probs"], abs=1e-6)
        assert one["meta_info"].keys() == {"id", "prompt_tokens"}
        assert one["meta_info"]["id"] == answer.headers["x-request-id"]
    single = server.classify(text=CAFE, tau=0).json()
    assert len(single["embedding"]) == 2 and single["meta_info"]["prompt_tokens"] > 2


# tritonclient


@pytest.fixture
def triton(server: Server) -> Iterator[Any]:
    from tritonclient.http import InferenceServerClient

    client = InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def tensor(name: str, texts: list[str], binary: bool = True, shape: tuple[int, ...] = (-1,)) -> Any:
    from tritonclient.http import InferInput

    values = np.array([text.encode() for text in texts], dtype=np.object_).reshape(shape)
    found = InferInput(name, list(values.shape), "BYTES")
    found.set_data_from_numpy(values, binary_data=binary)
    return found


def test_triton_infers(server: Server, triton: Any) -> None:
    rows = ours(server, input=TEXTS, model="tiny")
    for binary, shape in ((True, (3,)), (False, (3, 1))):
        result = triton.infer("tiny", [tensor("text", TEXTS, binary, shape)], request_id="r1")
        assert result.as_numpy("label").tolist() == [row["label"] for row in rows]
        assert result.as_numpy("exit_layer").tolist() == [row["exit"]["layer"] for row in rows]
        np.testing.assert_array_equal(result.as_numpy("probs"), [row["probs"] for row in rows])
        response = result.get_response()
        assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "r1")


def test_triton_sets_tau_asks_for_outputs_and_sends_pairs(server: Server, triton: Any) -> None:
    from tritonclient.http import InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    inputs = [tensor("text", TEXTS), tensor("text_pair", TEXTS[::-1])]
    outputs = [InferRequestedOutput("exit_layer"), InferRequestedOutput("label", binary_data=False)]
    result = triton.infer("tiny-int8", inputs, "1", outputs=outputs, parameters={"tau": 0.0})
    assert result.as_numpy("exit_layer").tolist() == [3, 3, 3] and result.as_numpy("probs") is None
    pairs = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    rows = ours(server, input=pairs, model="tiny-int8", tau=0)
    assert result.as_numpy("label").tolist() == [row["label"] for row in rows]
    with pytest.raises(InferenceServerException, match="no model 'other' is served"):
        triton.infer("other", [tensor("text", TEXTS)])


def test_triton_asks_about_the_server(triton: Any) -> None:
    assert triton.is_server_live() and triton.is_server_ready()
    assert triton.is_model_ready("tiny") and triton.is_model_ready("tiny-int8", "1")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["name"] == "de3"
    metadata = triton.get_model_metadata("tiny")
    assert metadata["versions"] == ["1"]
    found = {x["name"]: (x["datatype"], x["shape"]) for x in metadata["inputs"] + metadata["outputs"]}
    words = dict.fromkeys(("text", "text_pair", "label"), ("BYTES", [-1]))
    assert found == {**words, "probs": ("FP64", [-1, 2]), "exit_layer": ("INT64", [-1])}


def test_binary_tensors_that_do_not_fit(server: Server) -> None:
    def infer(binary: bytes, size: Any, beyond: int | str = 0) -> httpx.Response:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        length = beyond if isinstance(beyond, str) else str(len(head) + beyond)
        headers = {"Inference-Header-Content-Length": length}
        return httpx.post(server.url + "/v2/models/tiny/infer", content=head + binary, headers=headers)

    good, bad = b"\x04\x00\x00\x00good", b"\x03\x00\x00\x00bad"
    assert infer(good + bad, 15).status_code == 200
    for binary, size in (
        (good, 8),  # fewer texts than its shape says
        (good + b"\x01", 9),
        (b"\xff\xff\xff\xffgood", 8),
        (good + bad + b"\x00", 16),  # more texts
        (b"\x01\x00\x00\x00\xff" + bad, 12),  # not UTF-8
        (good, 9),
        (b"", -1),
        (b"x", True),
        (good + bad + b"more", 15),  # bytes that belong to no tensor
    ):
        answer = infer(binary, size)
        assert answer.status_code == 422 and answer.json()["error"].startswith("inputs: "), answer.text
    for beyond in ("9" * 5000, 16, "-1"):
        assert infer(good + bad, 15, beyond).status_code == 400, beyond


def test_tensors_in_json_that_do_not_fit(server: Server) -> None:
    text = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["good", "bad"]}
    pair = text | {"name": "text_pair"}

    def infer(*inputs: dict[str, Any]) -> httpx.Response:
        return httpx.post(server.url + "/v2/models/tiny/infer", json={"inputs": inputs})

    wrong: list[list[Any]] = [[text, text], [pair], [], [text, pair | {"shape": [1], "data": ["good"]}]]
    shapes: tuple[list[int], ...] = ([1, 2], [2, 1, 1], [], [3])
    changes: list[dict[str, Any]] = [{"datatype": "FP32"}, {"name": "words"}, {"shape": [0], "data": []}]
    for change in [*changes, *({"shape": shape} for shape in shapes)]:
        wrong += [[text | change], [text, pair | change]]
    for inputs in wrong:
        refused = infer(*inputs)
        assert refused.status_code == 422 and refused.json()["error"].startswith("inputs"), inputs
    assert infer(text, pair).status_code == 200


# Hugging Face; its client is in test_span_doors.py


def test_scores_for_bodies_with_inputs(server: Server) -> None:
    (row,) = ours(server, input=TEXTS[0])
    flat = [{"label": label, "score": score} for label, score in ranked(row)]
    for path, expected in (("/classify", flat), ("/", [flat])):
        answer = httpx.post(server.url + path, json={"inputs": TEXTS[0], "options": {"use_cache": False}})
        assert answer.json() == expected, path
    answer = server.classify(inputs=TEXTS[:1], parameters={"tau": 0})
    assert [len(scores) for scores in answer.json()] == [2]  # a list gets a list of lists
    for truncation in (None, True, "only_first", "longest_first"):
        answer = server.classify(inputs="good film " * 100, parameters={"truncation": truncation})
        assert answer.status_code == 200, truncation
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    (row,) = ours(server, input=pair, tau=0)
    answer = server.classify(inputs=pair, parameters={"tau": 0, "top_k": 1}).json()
    assert answer == [{"label": row["label"], "score": max(row["probs"])}]
    raw, score = (
        server.classify(inputs=pair, parameters={"function_to_apply": function}).json()[0]["score"]
        for function in ("none", "sigmoid")
    )
    assert score == pytest.approx(1 / (1 + np.exp(-raw)))
    for wrong in ({"text_pair": "a"}, {"text": "a", "other": "b"}, {"text": "a", "text_pair": " "}):
        assert server.classify(inputs=wrong).json()["error"]["param"] == "inputs"


# Text Embeddings Inference


def test_info_has_the_fields_of_teis_openapi_json(server: Server) -> None:
    info = httpx.get(server.url + "/info").json()
    assert {"model_id", "model_dtype", "auto_truncate", "tokenization_workers", "version"} <= info.keys()
    names = {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}
    assert info["model_type"]["classifier"] == names
    limits = {name: info[name] for name in info if name.startswith("max_")}
    assert limits.pop("max_concurrent_requests") == server.service.settings.max_queue
    texts = dict.fromkeys(("max_batch_requests", "max_client_batch_size"), 8)
    assert limits == {"max_input_length": 64, "max_batch_tokens": 512, **texts}


def test_each_cause_of_an_error_has_teis_type() -> None:
    kinds = {429: "overloaded", 503: "overloaded", 500: "backend", 502: "backend", 504: "backend"}
    for cause, status in STATUSES.items():
        if cause not in ("busy", "client_gone"):  # not of classification requests, or never sent
            body = json.loads(PREDICT.error(RequestError("refused", cause=cause)))
            assert body == {"error": "refused", "error_type": kinds.get(status, "validation")}, cause


def test_tei_predicts(server: Server) -> None:
    pair = [{"text": "good", "text_pair": "bad"}]
    cases: tuple[tuple[Any, list[Any], bool], ...] = (
        ("a good film", ["a good film"], False),
        (["a good film"], ["a good film"], False),
        (["good", "bad"], pair, False),
        ([["a good film"], ["dull"]], ["a good film", "dull"], True),
        ([["good", "bad"]], pair, True),
    )
    for inputs, texts, is_batch in cases:
        body = {"inputs": inputs, "raw_scores": False, "truncate": True, "truncation_direction": "right"}
        answer = httpx.post(server.url + "/predict", json=body).json()
        rows = [ranked(row) for row in ours(server, input=texts)]
        expected = [[{"score": score, "label": label} for label, score in row] for row in rows]
        assert answer == (expected if is_batch else expected[0]), inputs


def test_tei_truncates_if_told_and_gives_raw_scores(server: Server) -> None:
    long = {"inputs": "good film " * 500, "truncate": True}
    assert httpx.post(server.url + "/predict", json=long).status_code == 200
    raw = httpx.post(server.url + "/predict", json={"inputs": "good", "raw_scores": True, "tau": 0}).json()
    (row,) = ours(server, input="good", tau=0)
    assert ranked(row)[0][1] == pytest.approx(1 / (1 + np.exp(raw[1]["score"] - raw[0]["score"])), abs=1e-6)
    for inputs in (None, [[]], [["a", "b", "c"]], ["a", "b", "c"], {"text": "a"}):
        answer = httpx.post(server.url + "/predict", json={"inputs": inputs})
        assert answer.status_code == 422 and answer.json()["error"].startswith("inputs"), inputs
