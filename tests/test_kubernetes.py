"""The Kubernetes manifests: valid by Kubernetes' own schemas, and in agreement with the image."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.settings import Settings

FILE = Path("deploy/kubernetes/de3.yaml")
DOCUMENTS: dict[str, dict[str, Any]] = {d["kind"]: d for d in yaml.safe_load_all(FILE.read_text())}


@pytest.mark.parametrize("version", ["1.28", "1.31", "1.33"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_manifests_are_valid(kind: str, version: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


def test_the_check_can_fail() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(DOCUMENTS["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_they_fit_together_and_the_image() -> None:
    pod = DOCUMENTS["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    for selector in (
        DOCUMENTS["Deployment"]["spec"]["selector"]["matchLabels"],
        DOCUMENTS["Service"]["spec"]["selector"],
        DOCUMENTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (port,) = container["ports"]
    settings = {e["name"].removeprefix("DE3_").lower(): e["value"] for e in container["env"]}
    assert settings["port"] == str(port["containerPort"])
    assert pod["spec"]["enableServiceLinks"] is False  # DE3_PORT would be tcp://...
    assert f"USER {pod['spec']['securityContext']['runAsUser']}" in Path("Dockerfile").read_text()
    # It must have time to answer what it accepted, after the pause before its stop.
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= pause + Settings().timeout_s + 5
    Settings(**settings)
    assert settings["threads"] == container["resources"]["limits"]["cpu"]


def test_the_autoscaler_asks_for_a_metric_that_there_is() -> None:
    names = [
        m["pods"]["metric"]["name"]
        for m in DOCUMENTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
        if m["type"] == "Pods"
    ]
    adapter = yaml.safe_load((FILE.parent / "adapter.yaml").read_text())
    queries = " ".join(rule["seriesQuery"] for rule in adapter["rules"]["custom"])
    for name in names:
        assert name in queries
        assert f'"{name}"' in Path("server/metrics.py").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: prometheus)")
def test_prometheus_can_scrape_the_pods() -> None:
    subprocess.run(["promtool", "check", "config", FILE.parent / "scrape.yaml"], check=True)
    (job,) = yaml.safe_load((FILE.parent / "scrape.yaml").read_text())["scrape_configs"]
    assert f'job="{job["job_name"]}"' in Path("deploy/prometheus/alerts.yml").read_text()
    targets = {relabeling.get("target_label") for relabeling in job["relabel_configs"]}
    assert {"namespace", "pod"} <= targets  # by which the adapter finds them
