"""Whether two servers, such as those of two commits, answer alike: every protocol, many options, bad requests too.

The bodies come from the servers' own OpenAPI examples, with the texts of a file in place of theirs.
"""

import http.client
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from de3.progress import track

SEED = 0
# What differs between two answers to one request: ids and times.
VOLATILE = ("id", "created", "request_id")
HEADERS = ("content-type", "de3-truncated", "retry-after", "allow", "www-authenticate")
# Of /classify: fields beside the input; some are invalid.
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"tau": tau} for tau in (0, 0.02, 0.3, 1)),
    *({"max_disagreement": 0.02}, {"target_speedup": 2}, {"max_disagreement": 0.05, "explain": True}),
    *({"explain": True}, {"ood": True}, {"top_k": 1}, {"max_layer": 3}, {"signal": "entropy", "tau": 0.2}),
    *({"long": "windows"}, {"long": "error"}, {"truncate": False}, {"flag": "negative"}),
    *({"tau": 2}, {"tau": "1"}, {"tau": True}, {"unknown": 1}, {"long": "all"}, {"flag": "x"}, {"top_k": 0}),
    *({"model": "nobody"}, {"tau": 0.1, "target_speedup": 2}, {"max_missed": 0.02}, {"labels": ["positive"]}),
)


@dataclass(frozen=True)
class Difference:
    """A request that two servers answered differently."""

    path: str
    body: str
    answers: tuple[str, str]


def bodies(schema: dict[str, Any], texts: Sequence[str], count: int, model: str) -> Iterator[tuple[str, str]]:
    """Yield about `count` requests, as a path and a body, in an order that depends only on the arguments.

    schema: of OpenAPI. model: fills the paths that name one.
    """
    rng, routes = random.Random(SEED), dict[str, list[Any]]()
    for path, methods in schema["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None and not path.startswith("/v1/models/{name}"):
            examples = [one["value"] for one in content.get("examples", {}).values()] or [content["example"]]
            routes[path.replace("{model}", model).replace("{version}", "1")] = examples
    for _ in range(-(-count // (len(routes) + len(OPTIONS) + 1))):
        for path, examples in routes.items():
            yield path, json.dumps(_with_texts(rng.choice(examples), texts, rng))
        for options in OPTIONS:
            given = rng.choices(texts, k=rng.choice((1, 1, 1, 2, 5)))
            given[0] += " and so on" * rng.choice((0, 0, 0, 0, 300))  # some are longer than one window
            yield "/classify", json.dumps({"input": given[0] if len(given) == 1 else given, **options})
        broken = json.dumps({"input": rng.choice(texts)})
        yield rng.choice([*routes]), broken[: rng.randrange(len(broken))]


def _with_texts(value: Any, texts: Sequence[str], rng: random.Random) -> Any:
    """An example with other texts; strings of one word are names, and stay."""
    if isinstance(value, dict):
        return {name: _with_texts(one, texts, rng) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_texts(one, texts, rng) for one in value]
    return rng.choice(texts) if isinstance(value, str) and " " in value else value


def compare(
    urls: Sequence[str], texts: Sequence[str], count: int, model: str
) -> tuple[int, dict[int, int], list[Difference]]:
    """Send the same requests to two servers, one after the other.

    Returns their number, how many had which status, and the differences, of which the first is that of the OpenAPI
    schemas or of the metrics' names, if they differ.
    """
    sides = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=120) for url in urls]
    schemas = [_send(side, "GET", "/openapi.json") for side in sides]
    found = [Difference("/openapi.json", "", _pair(schemas))] * (schemas[0] != schemas[1])
    statuses, requests = dict[int, int](), list(bodies(json.loads(schemas[0][2]), texts, count, model))
    for path, body in track(requests, "comparing answers"):
        answers = [_send(side, "POST", path, body) for side in sides]
        statuses[answers[0][0]] = statuses.get(answers[0][0], 0) + 1
        if answers[0] != answers[1]:
            found.append(Difference(path, body, _pair(answers)))
    names = [_names(_send(side, "GET", "/metrics")[2]) for side in sides]
    if names[0] != names[1]:
        found.append(Difference("/metrics", "", (str(names[0] - names[1]), str(names[1] - names[0]))))
    return len(requests), statuses, found


def _send(
    side: http.client.HTTPConnection, method: str, path: str, body: str | None = None
) -> tuple[int, dict[str, str | None], str]:
    """The status, headers and body of an answer, without ids and times."""
    side.request(method, path, body, {"Content-Type": "application/json"})
    response = side.getresponse()
    headers, text = {name: response.headers.get(name) for name in HEADERS}, response.read().decode()
    if path != "/metrics":
        for name in VOLATILE:
            text = re.sub(rf'("{name}": ?)("[^"]*"|[0-9]+)', r"\1null", text)
    return response.status, headers, text


def _pair(answers: Sequence[object]) -> tuple[str, str]:
    first, second = (str(one) for one in answers)
    return first, second


def _names(metrics: str) -> set[str]:
    return {line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE ")}
