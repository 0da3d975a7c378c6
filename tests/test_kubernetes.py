"""The Kubernetes manifests: valid against Kubernetes' own schemas, and consistent with each other and the image."""

import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from de3.server.settings import Settings

FILE = Path("deploy/kubernetes/de3.yaml")
UNITS = {"Mi": 2**20, "Gi": 2**30}
Documents = dict[str, dict[str, Any]]


def container_of(documents: Documents) -> tuple[dict[str, Any], dict[str, str]]:
    """The container of the server, and its variables."""
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container, {e["name"]: e["value"] for e in container["env"]}


@pytest.fixture(scope="module")
def documents() -> Documents:
    """The objects of the manifest, by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}


def test_manifests_are_valid(documents: Documents) -> None:
    import kubernetes_validate

    for document in documents.values():
        for version in ("1.28", "1.33"):
            kubernetes_validate.validate(document, version, strict=True)


def test_manifests_match_each_other_and_the_image(documents: Documents) -> None:
    pod = documents["Deployment"]["spec"]["template"]
    container, env = container_of(documents)
    labels = pod["metadata"]["labels"]
    for selector in (
        documents["Deployment"]["spec"]["selector"]["matchLabels"],
        documents["Service"]["spec"]["selector"],
        documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (port,) = container["ports"]
    settings = {name.removeprefix("DE3_").lower(): value for name, value in env.items()}
    assert settings["port"] == str(port["containerPort"])
    assert pod["spec"]["enableServiceLinks"] is False  # Kubernetes would set DE3_PORT to tcp://…
    assert f"USER {pod['spec']['securityContext']['runAsUser']}" in Path("Dockerfile").read_text()
    for name in ("cache", "cache_gb", "hf_home"):  # not settings of the server
        settings.pop(name)
    # The server must have time to answer accepted requests after the drain.
    checked = Settings(**settings)
    assert pod["spec"]["terminationGracePeriodSeconds"] >= checked.drain_s + checked.timeout_s + 5
    assert checked.drain_s and checked.host == "0.0.0.0"  # an image made from the wheel has no DE3_HOST
    assert settings["threads"] == container["resources"]["limits"]["cpu"]


def test_the_network_policy_admits_named_peers_and_blocks_egress(documents: Documents) -> None:
    policy = documents["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    container, _ = container_of(documents)
    assert rule["ports"] == [{"protocol": "TCP", "port": container["ports"][0]["containerPort"]}]
    # A peer without selectors, or with an empty one, would admit everyone.
    for peer in rule["from"]:
        assert peer and all(selector["matchLabels"] for selector in peer.values()), peer
    # Prometheus is admitted from the namespace that is in the adapter's URL.
    adapter = yaml.safe_load((FILE.parent / "adapter.yaml").read_text())
    namespace = re.match(r"http://[\w-]+\.([\w-]+)\.svc", adapter["prometheus"]["url"])
    assert namespace is not None
    wanted = {"matchLabels": {"kubernetes.io/metadata.name": namespace[1]}}
    assert {"namespaceSelector": wanted} in rule["from"]


def test_keys_come_as_files_that_the_server_can_read(documents: Documents) -> None:
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container, env = container_of(documents)
    assert not {"DE3_API_KEYS", "DE3_ADMIN_KEYS"} & set(env)
    (volume,) = (v for v in pod["volumes"] if "secret" in v)
    (mount,) = (m for m in container["volumeMounts"] if m["name"] == volume["name"])
    assert mount["readOnly"] is True
    secret = volume["secret"]
    assert not secret.get("optional", False)  # the pod waits for it, and does not start without keys
    # The files of a Secret belong to root, and to the group in fsGroup.
    assert secret["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    # The command at the top of the file creates the files that are mounted here.
    (command,) = re.findall(r"kubectl create secret generic .*", FILE.read_text())
    assert f"generic {secret['secretName']} " in command
    made = set(re.findall(r"--from-file=([\w-]+)=", command))
    for name in ("DE3_API_KEYS_FILE", "DE3_ADMIN_KEYS_FILE"):
        path = PurePosixPath(env[name])
        assert str(path.parent) == mount["mountPath"]
        made.remove(path.name)
    assert not made


def test_the_memory_limit_covers_what_the_server_admits(documents: Documents) -> None:
    """The limit is above a calculated upper bound, which leaves out the kernel's socket buffers."""

    def size(text: str) -> int:
        return int(text[:-2]) * UNITS[text[-2:]]

    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container, env = container_of(documents)
    memory = {kind: size(amounts["memory"]) for kind, amounts in container["resources"].items()}
    (tmp,) = (size(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v.get("emptyDir", {}).get("medium"))
    reload = 410_000_000  # measured with the demo model: the server and the process that proves a new model
    assert memory["requests"] > reload + tmp
    # Each body as bytes, and as a string with up to 4 bytes a character.
    bodies = Settings().max_inflight_bytes * 9 // 8 * 5
    connections = int(env["DE3_MAX_CONNECTIONS"]) * 48 * 1024  # a head, and the bytes read ahead
    unread = 2**26  # answers that clients have not read
    assert memory["limits"] > reload + tmp + bodies + connections + unread


def test_the_autoscaler_asks_for_an_existing_metric(documents: Documents) -> None:
    metrics = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    adapter = yaml.safe_load((FILE.parent / "adapter.yaml").read_text())
    queries = " ".join(rule["seriesQuery"] for rule in adapter["rules"]["custom"])
    for name in (m["pods"]["metric"]["name"] for m in metrics if m["type"] == "Pods"):
        assert name in queries
        assert f'"{name}"' in Path("server/metrics.py").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here: tests/docker/packages.sh")
def test_prometheus_can_scrape_the_pods() -> None:
    subprocess.run(["promtool", "check", "config", FILE.parent / "scrape.yaml"], check=True)
    (job,) = yaml.safe_load((FILE.parent / "scrape.yaml").read_text())["scrape_configs"]
    assert f'job="{job["job_name"]}"' in Path("deploy/prometheus/alerts.yml").read_text()
    targets = {relabeling.get("target_label") for relabeling in job["relabel_configs"]}
    assert {"namespace", "pod"} <= targets  # the labels that the adapter queries
