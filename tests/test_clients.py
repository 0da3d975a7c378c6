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
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from de3.server.errors import RequestError
from de3.server.http.app import PROTOCOLS, create_api
from de3.server.http.errors import STATUSES
from de3.server.http.frontend import Frontend
from de3.server.http.tei import PREDICT
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import Server, serving

TEXTS = ["a good film", "dull and boring", "it is not bad"]
KEY = "alice-has-a-long-key"


# The request bodies below are from the projects' documentation: vLLM's docs/models/pooling_models/classify.md and
# example classification_online.py; SGLang's classify_models.md and native_api.ipynb; and, for vLLM's semantic router,
# the contract in http_classifier_inference.go.
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
    assert isinstance(answer, models.ClassifyResponse)
    assert (answer.model, answer.usage.total_tokens > 0, len(answer.data)) == ("tiny:1", True, 4)
    expected = ours(server, input=[*TEXTS, pair.to_dict()], model="tiny", tau=0.1, explain=True)
    for row, raw in zip(answer.data, expected, strict=True):
        assert (row.label, row.probs, row.exit_.layer) == (raw["label"], raw["probs"], raw["exit"]["layer"])
        assert row.exit_.reason == models.ExitReason(raw["exit"]["reason"])
        assert (row.exit_.tau, row.exit_.lambda_) == (0.1, raw["exit"]["lambda"]) and not row.truncated
        assert [passed.edr for passed in row.layers] == [passed["edr"] for passed in raw["layers"]]
        assert row.to_dict().items() >= raw.items()

    refused = classify.sync(client=client, body=models.ClassifyRequest(input_="good", tau=2.0))
    assert isinstance(refused, models.ErrorResponse)
    assert (refused.error.code, refused.error.param) == (422, "tau")
    listed = import_module("de3_generated.api.models.models").sync(client=client).data
    assert [one.id for one in listed] == ["tiny:1", "tiny-int8:1"]
    metadata = import_module("de3_generated.api.open_inference_protocol.model_metadata")
    assert "no model 'x' is served" in metadata.sync("x", client=client).error


def test_the_schema_is_valid(store: Path) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    settings = Settings(store=store, api_keys=f"alice {KEY}", admin_keys="root root-has-a-long-key")  # type: ignore[arg-type]
    api = create_api(Frontend(Service(settings), PROTOCOLS), lambda: None)
    schema = json.loads(json.dumps(api.openapi()))
    assert [error.message for error in OpenAPIV31SpecValidator(schema).iter_errors()] == []
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) > 15


def test_the_schema_lists_the_path_of_every_protocol_with_an_example(server: Server) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    for path in PROTOCOLS:
        operation = paths[path]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        example = content["examples"]["one text"]["value"] if path == "/classify" else content["example"]
        answer = httpx.post(server.url + path.format(model="tiny", version=1), json=example)
        needs_pairs = "needs a model of pairs" in answer.text and ("rerank" in path or "score" in path)
        needs_spans = "is not a token classifier" in answer.text and path == "/v1/extract"
        assert operation["summary"] and (answer.status_code == 200 or needs_pairs or needs_spans), (
            path,
            answer.text,
        )


# vLLM and SGLang


@pytest.mark.parametrize(("path", "texts"), [("/classify", CAFE), ("/v1/classify", [CAFE, BROKEN])])
def test_the_documented_request_of_vllm_and_sglang(server: Server, path: str, texts: Any) -> None:
    model = httpx.get(server.url + "/v1/models").json()["data"][0]["id"]  # as vLLM's example does
    answer = httpx.post(server.url + path, json={"model": model, "input": texts})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    count = len(texts) if isinstance(texts, list) else 1
    assert body["id"].startswith("classify-") and body["object"] == "list" and body["model"] == model
    assert isinstance(body["created"], int) and body["created"] > 1_700_000_000
    for index, row in enumerate(body["data"]):
        assert row.keys() >= {"index", "label", "probs", "num_classes"}
        assert (row["index"], row["num_classes"], len(row["probs"])) == (index, 2, 2)
        assert sum(row["probs"]) == pytest.approx(1) and row["label"] in ("negative", "positive")
    usage = body["usage"]
    assert len(body["data"]) == count and usage["completion_tokens"] == 0
    assert 0 < usage["prompt_tokens"] == usage["total_tokens"]


def test_every_documented_field_of_vllm_works(server: Server) -> None:
    plain = ours(server, input=CAFE)
    for fields in (
        # A client that sends vLLM's defaults explicitly.
        {
            **dict.fromkeys(("model", "user", "truncate_prompt_tokens", "padding", "truncation_side")),
            **dict.fromkeys(("mm_processor_kwargs", "cache_salt", "use_activation")),
            "priority": 0,
            "add_special_tokens": True,
        },
        {"truncate_prompt_tokens": -1, "truncation_side": "right", "use_activation": True, "user": "u-1"},
        {"padding": "max_length", "cache_salt": "c2FsdA", "priority": -1, "activation": True, "rid": "r-1"},
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
        values = sorted(row["probs"], reverse=True)[:count]
        assert [entry["prob"] for entry in row["top"]] == values and row["top"][0]["label"] == row["label"]
    assert "top" not in ours(server, input=CAFE)[0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: input should be -1 or null"),
        ({"truncation_side": "left"}, "truncation_side: input should be 'right' or null"),
        ({"add_special_tokens": False}, "add_special_tokens: input should be True or null"),
        ({"top_k": 0}, "top_k: input should be greater than or equal to 1"),
        ({"raw": 1}, "raw: input should be a valid boolean"),
        ({"use_activation": "no"}, "use_activation: input should be a valid boolean"),
        ({"request_id": 7}, "request_id: input should be a valid string"),
        ({"messages": [{"role": "user", "content": CAFE}]}, "messages: unknown field; known fields: "),
        ({"input": [[9707, 11, 847], [791]]}, "input[0]: must be a text, or an object with text and"),
        ({"input": [9707, 11, 847]}, "input[0]: must be a text"),
        ({"text": CAFE}, "text: unknown field"),
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
    assert [len(one["embedding"]) for one in answer.json()] == [2, 2]
    for one, row in zip(answer.json(), rows, strict=True):
        weights = np.exp(one["embedding"])
        assert weights / weights.sum() == pytest.approx(row["probs"], abs=1e-6)
        assert one["meta_info"].keys() == {"id", "prompt_tokens"}
        assert one["meta_info"]["id"] == answer.headers["x-request-id"]
    assert len(server.classify(text=[CAFE]).json()) == 1  # a list, as the request has one
    single = server.classify(text=CAFE, tau=0).json()
    assert len(single["embedding"]) == 2 and single["meta_info"]["prompt_tokens"] > 2
    for wrong, says in (
        ({"text": ""}, "text: must not be empty"),
        ({"text": []}, "text: must not be an empty list"),
        ({"text": ["good", 1]}, "text[1]: must be a text"),
        ({"text": ["good", "good film " * 100]}, "text[1]: has 202 tokens"),
        ({"text": "good", "sampling_params": {}}, "sampling_params: unknown field; known fields:"),
    ):
        refused = server.classify(**wrong)
        assert refused.status_code == 422, wrong
        assert refused.json()["error"]["message"].startswith(says)


# tritonclient


@pytest.fixture
def triton(server: Server) -> Iterator[Any]:
    from tritonclient.http import InferenceServerClient

    client = InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def tensor(name: str, texts: list[str], binary: bool, shape: tuple[int, ...] | None = None) -> Any:
    from tritonclient.http import InferInput

    values = np.array([text.encode() for text in texts], dtype=np.object_).reshape(shape or (len(texts),))
    found = InferInput(name, list(values.shape), "BYTES")
    found.set_data_from_numpy(values, binary_data=binary)
    return found


@pytest.mark.parametrize(("binary", "shape"), [(True, (3,)), (True, (3, 1)), (False, (3,)), (False, (3, 1))])
def test_triton_infers(server: Server, triton: Any, binary: bool, shape: tuple[int, ...]) -> None:
    result = triton.infer("tiny", [tensor("text", TEXTS, binary, shape)], request_id="r1")
    rows = ours(server, input=TEXTS, model="tiny")
    assert result.as_numpy("label").tolist() == [row["label"] for row in rows]
    assert result.as_numpy("exit_layer").tolist() == [row["exit"]["layer"] for row in rows]
    np.testing.assert_array_equal(result.as_numpy("probs"), [row["probs"] for row in rows])
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "r1")


def test_triton_sets_tau_asks_for_outputs_and_sends_pairs(server: Server, triton: Any) -> None:
    from tritonclient.http import InferRequestedOutput

    inputs = [tensor("text", TEXTS, True), tensor("text_pair", TEXTS[::-1], True)]
    outputs = [InferRequestedOutput("exit_layer"), InferRequestedOutput("label", binary_data=False)]
    result = triton.infer("tiny-int8", inputs, "1", outputs=outputs, parameters={"tau": 0.0})
    assert result.as_numpy("exit_layer").tolist() == [3, 3, 3] and result.as_numpy("probs") is None
    pairs = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    rows = ours(server, input=pairs, model="tiny-int8", tau=0)
    assert result.as_numpy("label").tolist() == [row["label"] for row in rows]


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


def test_triton_reports_errors(triton: Any) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="no model 'other' is served"):
        triton.infer("other", [tensor("text", TEXTS, True)])
    with pytest.raises(InferenceServerException, match=r"tau: .*allowed: 0 to 1"):
        triton.infer("tiny", [tensor("text", TEXTS, False)], parameters={"tau": 2.0})


@pytest.mark.parametrize(
    ("binary", "size"),
    [
        (b"\x04\x00\x00\x00good", 8),  # fewer texts than its shape says
        (b"\x04\x00\x00\x00good\x01", 9),
        (b"\xff\xff\xff\xffgood", 8),
        (b"\x04\x00\x00\x00good\x03\x00\x00\x00bad\x00", 16),  # more texts
        (b"\x01\x00\x00\x00\xff\x03\x00\x00\x00bad", 12),  # not UTF-8
        (b"", 8),
        (b"", -1),
        (b"x", True),
        (b"\x04\x00\x00\x00good\x03\x00\x00\x00badmore", 15),  # bytes that belong to no tensor
    ],
)
def test_binary_tensors_that_do_not_fit(server: Server, binary: bytes, size: Any) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()

    def infer(length: str) -> httpx.Response:
        headers = {"Inference-Header-Content-Length": length}
        return httpx.post(server.url + "/v2/models/tiny/infer", content=head + binary, headers=headers)

    answer = infer(str(len(head)))
    assert answer.status_code == 422 and answer.json()["error"].startswith("inputs: "), answer.text
    for length in ("9" * 5000, str(len(head + binary) + 1), "-1"):
        assert infer(length).status_code == 400, length


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "FP32"},
        {"shape": [2, 2]},
        {"shape": [2, 1, 1]},
        {"shape": []},
        {"shape": [0], "data": []},
        {"shape": [3]},
        {"data": ["good", 1]},
        {"data": ["good", " "]},
        {"name": "words"},
    ],
)
def test_tensors_in_json_that_do_not_fit(server: Server, change: dict[str, Any]) -> None:
    text = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["good", "bad"]}

    def infer(*inputs: dict[str, Any]) -> httpx.Response:
        return httpx.post(server.url + "/v2/models/tiny/infer", json={"inputs": inputs})

    pair = text | {"name": "text_pair"}
    for inputs in ([text | change], [text, pair | change], [text, text], [pair], []):
        refused = infer(*inputs)
        assert refused.status_code == 422 and refused.json()["error"].startswith("inputs"), inputs
    assert infer(text, pair).status_code == 200
    refused = infer(text, pair | {"shape": [1], "data": ["good"]})
    assert refused.status_code == 422  # one second text for two


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("GET", "/predict", 405),
        ("DELETE", "/info", 405),
        ("PUT", "/v1/models/tiny:predict", 405),
        ("GET", "/v1/models/other/calibration", 404),
    ],
)
def test_errors_have_their_protocols_format(server: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.headers.get("allow") == {404: None, 405: "GET" if path == "/info" else "POST"}[status]
    error = answer.json()["error"]
    if path.startswith("/v2"):
        assert answer.json().keys() == {"error"} and isinstance(error, str)
    elif path in ("/predict", "/info"):
        assert answer.json() == {"error": error, "error_type": "validation"} and isinstance(error, str)
    else:
        assert error["code"] == status and error["message"]


# huggingface_hub


def test_hugging_face_classifies(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # fixtures.py sets it
    client = InferenceClient(server.url)
    (row,) = ours(server, input=TEXTS[0])
    result = client.text_classification(TEXTS[0])
    assert [(one.label, one.score) for one in result] == ranked(row)
    assert len(client.text_classification(TEXTS[0], top_k=1)) == 1
    raw, p = (client.text_classification(TEXTS[0], function_to_apply=f)[0].score for f in ("none", "sigmoid"))  # type: ignore[arg-type]
    assert p == pytest.approx(1 / (1 + np.exp(-raw)))
    with pytest.raises(HfHubHTTPError, match="422"):
        client.text_classification("")


def test_bodies_with_inputs_on_classify_get_a_flat_list(server: Server) -> None:
    (row,) = ours(server, input=TEXTS[0])
    flat = [{"label": label, "score": score} for label, score in ranked(row)]
    for path, expected in (("/classify", flat), ("/", [flat])):
        answer = httpx.post(server.url + path, json={"inputs": TEXTS[0], "options": {"use_cache": False}})
        assert answer.json() == expected, path
    for texts in (TEXTS[:1], TEXTS[:2]):  # a list of texts gets a list of lists, even if it has one text
        answer = server.classify(inputs=texts, parameters={"tau": 0}).json()
        for scores, row in zip(answer, ours(server, input=texts, tau=0), strict=True):
            assert [(one["label"], one["score"]) for one in scores] == ranked(row)
    for truncation in (None, True, "only_first", "longest_first"):
        answer = server.classify(inputs="good film " * 100, parameters={"truncation": truncation})
        assert answer.status_code == 200, truncation
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    (row,) = ours(server, input=pair, tau=0)
    answer = server.classify(inputs=pair, parameters={"tau": 0, "top_k": 1}).json()
    assert answer == [{"label": row["label"], "score": max(row["probs"])}]
    for wrong in (
        {"text_pair": "good"},
        {"text": "good", "other": "bad"},
        {"text": "good", "text_pair": " "},
    ):
        assert server.classify(inputs=wrong).json()["error"]["param"] == "inputs"


# Text Embeddings Inference


def test_info_has_the_fields_of_teis_openapi_json(server: Server) -> None:
    required = {"model_id", "model_dtype", "model_type", "max_concurrent_requests", "max_input_length"}
    required |= {
        "max_batch_tokens",
        "max_client_batch_size",
        "auto_truncate",
        "tokenization_workers",
        "version",
    }
    optional = {"docker_label", "max_batch_requests", "model_sha", "sha"}
    info = httpx.get(server.url + "/info").json()
    assert required <= info.keys() <= required | optional
    assert info["model_type"]["classifier"] == {
        "id2label": {"0": "negative", "1": "positive"},
        "label2id": {"negative": 0, "positive": 1},
    }
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


@pytest.mark.parametrize(
    ("inputs", "texts", "is_batch"),
    [
        ("a good film", ["a good film"], False),
        (["a good film"], ["a good film"], False),
        (["a good film", "it is"], [{"text": "a good film", "text_pair": "it is"}], False),
        ([["a good film"], ["dull"]], ["a good film", "dull"], True),
        ([["good", "bad"]], [{"text": "good", "text_pair": "bad"}], True),
    ],
)  # fmt: skip
def test_tei_predicts(server: Server, inputs: Any, texts: list[Any], is_batch: bool) -> None:
    body = {"inputs": inputs, "raw_scores": False, "truncate": True, "truncation_direction": "right"}
    answer = httpx.post(server.url + "/predict", json=body)
    rows = [
        [{"score": score, "label": label} for label, score in ranked(row)]
        for row in ours(server, input=texts)
    ]
    assert answer.status_code == 200 and answer.json() == (rows if is_batch else rows[0])


def test_tei_refuses_long_texts_unless_told_to_truncate(server: Server) -> None:
    long = "good film " * 500
    refused = httpx.post(server.url + "/predict", json={"inputs": long})
    assert refused.status_code == 422 and refused.json()["error_type"] == "validation"
    assert httpx.post(server.url + "/predict", json={"inputs": long, "truncate": True}).status_code == 200
    raw = httpx.post(server.url + "/predict", json={"inputs": "good", "raw_scores": True, "tau": 0}).json()
    (row,) = ours(server, input="good", tau=0)
    assert ranked(row)[0][1] == pytest.approx(1 / (1 + np.exp(raw[1]["score"] - raw[0]["score"])), abs=1e-6)


@pytest.mark.parametrize("inputs", [None, [[]], [["a", "b", "c"]], ["a", "b", "c"], "", {"text": "a"}])
def test_tei_says_what_is_wrong(server: Server, inputs: Any) -> None:
    answer = httpx.post(server.url + "/predict", json={"inputs": inputs})
    assert answer.status_code == 422 and answer.json()["error"].startswith("inputs")
