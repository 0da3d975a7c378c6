"""`de3 deploy`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from de3.commands.options import say

SOURCE = Path(__file__).parents[1] / "deploy"
NOT_FILES = shutil.ignore_patterns("*.py", "*.env", "__pycache__")  # in a checkout
FILES = {
    "prometheus": "Prometheus configuration (set its target), recording rules and alerts",
    "grafana": "dashboards to import, and their provisioning",
    "kubernetes": "kubectl apply -f de3.yaml, or kserve.yaml; each begins with what it needs",
    "systemd": "a unit for a server without containers; it begins with the commands that install it",
}


def deploy(
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the files.")],
) -> None:
    """Write files for running a server: dashboards, alerts, Kubernetes manifests, a systemd unit.

    Example: de3 deploy ./deploy
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; give a new one")
    for name, meaning in FILES.items():
        shutil.copytree(SOURCE / name, folder / name, ignore=NOT_FILES)
        say(f"{folder / name}: {meaning}")
