"""The servers to compare: ours and its peers, each started by a command in its own environment."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from de3.loadtest.client import Target, label_of
from de3.model_store.store import Artifact

PEERS = Path(__file__).parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "de3-peers"
START_S = 180.0
CONVERT_S = 1800.0
CALIBRATION_TEXTS = 300
STOCK_NOTE = (
    "the stock model of --stock: the same amount of work, but different weights unless ours was made from it"
)


@dataclass(frozen=True)
class Server:
    """A server that can be started, and the format of its requests.

    Attributes:
        command: the command line, in which {port} is replaced by the port.
        ready: path that answers 200 once the server is ready.
        note: how it differs from ours, for the report.
        script: a peer's script in `peers`, whose environment `prepare` creates; empty for our server.
        conversion: arguments with which a peer's script converts its model.
    """

    name: str
    command: list[str]
    ready: str = "/health"
    path: str = "/classify"
    body: Callable[[str], dict[str, Any]] = lambda text: {"input": text}
    label: Callable[[Any], str] = lambda answer: str(answer["label"])
    note: str = ""
    script: str = ""
    conversion: Sequence[str] = ()

    def target(self, port: int) -> Target:
        """The server as a target of the load generator."""
        return Target(f"http://127.0.0.1:{port}", self.path, self.body, self.label)

    def prepare(self) -> None:
        """Create a peer's environment and convert its model, unless done before.

        Raises ValueError if either fails; for a failed conversion, the message includes the end of its output.
        """
        if not self.script:
            return
        try:
            command = peer_command(self.script)
            if self.conversion:
                subprocess.run(
                    [*command, *self.conversion], check=True, capture_output=True, timeout=CONVERT_S
                )
        except subprocess.CalledProcessError as error:
            output = (error.stderr or b"").decode(errors="replace").strip()
            raise ValueError(f"{self.name} cannot be prepared: {output[-2000:] or error}") from None
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{self.name} cannot be prepared: {error}") from None

    def measuring(self, texts: Path, seconds: float) -> list[str]:
        """The command that measures a lean peer without HTTP; texts: file with a JSON list."""
        command = [part.replace("{port}", "0") for part in self.command]
        return [*command, "--measure", str(texts), "--seconds", f"{seconds:g}"]


def ours(
    store: Path, model: str, runtime: str = "auto", options: Sequence[str] = (), **fields: Any
) -> Server:
    """Our server. model: as for de3 serve. fields: added to every request, such as tau.

    runtime, options: options of de3 serve.
    """
    variant = ", ".join(f"{k} = {v:g}" for k, v in fields.items()) or "default τ"
    variant = "full depth" if variant == "tau = 0" else variant
    variant += ", ONNX Runtime" if runtime == "onnxruntime" else ""
    command = [sys.executable, "-P", "-m", "de3.cli", "serve", model, "--store", str(store)]
    command += ["--runtime", runtime, *options]
    return Server(
        f"de3 ({variant})",
        [*command, "--port", "{port}"],
        ready="/ready",
        body=lambda text: {"input": text, **fields},
        label=label_of,
    )


def peer(name: str, script: str, *arguments: str, **fields: Any) -> Server:
    """The peer that a script in `peers` starts; call `prepare` first. `fields`: other fields of Server."""
    command = [str(python_of(script)), str(PEERS / f"{script}.py"), *arguments, "--port", "{port}"]
    return Server(name, command, script=script, **fields)


def fingerprint(file: Path) -> str:
    """A prefix of a file's hash, for the names of models converted from it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:8]


def peer_models(artifact: Artifact, texts: list[str], out: Path) -> tuple[Path, Path, Path]:
    """Write the files for the peers into `out`: the full-depth graph in int8 and in fp32, and calibration texts.

    Returns the folders of the two graphs and the file of the texts.
    """
    from de3.export.full_depth import export_full_depth

    out.mkdir(parents=True, exist_ok=True)
    graphs = []
    for quantize in ("int8", "none"):
        # The manifest has the files' hashes: another model of this name and version has another fingerprint.
        name = f"{artifact.full_name.replace(':', '-')}-{fingerprint(artifact.path / 'manifest.json')}"
        graphs.append(out / f"full-depth-{name}-{quantize}")
        if not graphs[-1].exists():
            export_full_depth(artifact.path, graphs[-1], quantize == "int8")
    calibration = out / "calibration.json"
    calibration.write_text(json.dumps(texts[:: max(1, len(texts) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]))
    return graphs[0], graphs[1], calibration


def lean_peers(int8: Path, fp32: Path, calibration: Path, stock: Path | None) -> list[Server]:
    """Peers with another engine in our minimal app, in int8 or bf16; they can also be measured without HTTP.

    Args:
        int8, fp32: folders of the full-depth graph.
        calibration: file with a JSON list of texts for calibrating the quantization.
        stock: folder of a stock BERT classifier, for CTranslate2; None: without CTranslate2.

    Raises ValueError if `stock` has no files.
    """
    openvino = [str(fp32), "--convert", str(calibration)]
    servers = [
        peer("fused graph, FastAPI, int8", "fused_app", str(int8)),
        peer("OpenVINO, int8", "openvino_app", str(fp32), conversion=openvino),
        peer("OpenVINO, bf16", "openvino_app", str(fp32), "--precision", "bf16"),
    ]
    if stock is not None:
        files = [file for file in stock.iterdir() if file.is_file()]
        if not files:
            raise ValueError(
                f"--stock {stock}: the folder has no files; it must be a transformers classifier"
            )
        weights = max(files, key=lambda file: file.stat().st_size)
        converted = calibration.parent / f"ctranslate2-{stock.name}-{fingerprint(weights)}"
        arguments = [str(stock), "--converted", str(converted)]
        servers.append(
            peer(
                "CTranslate2, int8",
                "ctranslate2_app",
                *arguments,
                conversion=[*arguments, "--convert"],
                note=STOCK_NOTE,
            )
        )
    return servers


def peers(int8: Path, fp32: Path, calibration: Path, stock: Path | None) -> list[Server]:
    """The common alternatives to our server, at full depth.

    Args:
        int8, fp32: folders of the full-depth graph.
        calibration: file with a JSON list of texts for calibrating the quantization.
        stock: folder of a stock sequence classification model, for peers that support no other; None: without them.

    Raises ValueError if `stock` has no files.
    """
    servers = [
        *lean_peers(int8, fp32, calibration, stock),
        peer("fused graph, FastAPI, fp32", "fused_app", str(fp32)),
        peer("LitServe, int8", "litserve_app", str(int8), "--batch", "4"),  # the best of the tested sizes
        peer("BentoML, int8", "bentoml_app", str(int8), ready="/readyz"),
        peer(
            "MLServer, int8",
            "mlserver_app",
            str(int8),
            ready="/v2/models/peer/ready",
            path="/v2/models/peer/infer",
            body=lambda text: {
                "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]
            },
            label=lambda answer: str(answer["outputs"][0]["data"][0]),
        ),
    ]
    if stock is not None:
        servers += [
            peer("transformers, FastAPI, fp32", "transformers_app", str(stock), note=STOCK_NOTE),
            peer(
                "Infinity, fp32",
                "infinity_app",
                str(stock),
                body=lambda text: {"model": "peer", "input": [text]},
                label=lambda answer: str(max(answer["data"][0], key=lambda c: c["score"])["label"]),
                note=STOCK_NOTE,
            ),
        ]
    return servers


def peer_command(script: str) -> list[str]:
    """The command that starts a peer's script; creates the peer's environment on first use."""
    path = PEERS / f"{script}.py"
    python = environment(script, dependencies(path))
    return [str(python), str(path)]


def dependencies(script: Path) -> list[str]:
    """The packages that a script needs, from its inline metadata (PEP 723); raises ValueError if it has none."""
    metadata = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.M)
    if metadata is None:
        raise ValueError(f"{script}: has no inline script metadata")
    text = "".join(line.removeprefix("# ").removeprefix("#") for line in metadata[1].splitlines(True))
    return list(tomllib.loads(text)["dependencies"])


def python_of(name: str) -> Path:
    """Path of the Python interpreter in the virtual environment with this name, which need not exist yet."""
    return CACHE / name / "bin" / "python"


def environment(name: str, packages: list[str]) -> Path:
    """The Python interpreter in the virtual environment with this name.

    Creates the environment if it is missing, and creates it anew if it has other packages.
    """
    folder, python = CACHE / name, python_of(name)
    installed = folder / "installed"
    if not installed.exists() or installed.read_text() != "\n".join(packages):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        # Without --quiet, pip shows its progress.
        subprocess.run([str(python), "-m", "pip", "install", *packages], check=True, stdout=sys.stderr)
        installed.write_text("\n".join(packages))
    return python


@dataclass
class Running:
    """A started server."""

    target: Target
    process: subprocess.Popen[bytes]

    def memory_mb(self) -> float:
        """Current memory of the server's processes, MB: their proportional set size, which counts shared pages once."""
        return pss_mb(self.process.pid)


def pss_mb(pid: int) -> float:
    """Current memory of a process and of all its descendants, MB: their proportional set size (PSS)."""
    total = 0
    for one in process_tree(pid):
        with suppress(OSError):  # it has ended
            pss = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)
            total += int(pss[1]) if pss else 0
    return total / 1000


def process_tree(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in task.read_text().split():
                pids += process_tree(int(child))
    return pids


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(server: Server, port: int, log: Path, in_session: bool = False) -> Iterator[Running]:
    """Start a server, wait until it is ready, and stop it at the end of the block.

    in_session: start it in this process's session. Linux divides CPU time between sessions (autogroup), so the
    server's threads at the lowest priority are preempted by a load generator only if both are in the same session.

    Raises ValueError if the port is taken, or if the server does not start; the message then has the end of its log.
    """
    target = server.target(port)
    if _answers(target.url + server.ready):
        raise ValueError(f"a server already answers on port {port}; stop it, or choose another with --port")
    command = [part.replace("{port}", str(port)) for part in server.command]
    with log.open("wb") as output:
        group: Any = {"process_group": 0} if in_session else {"start_new_session": True}
        process = subprocess.Popen(command, stdout=output, stderr=output, **group)
    started = Running(target, process)
    is_main = threading.current_thread() is threading.main_thread()
    # SIGTERM stops the server, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if is_main else None
    try:
        end = time.monotonic() + START_S
        while not _answers(started.target.url + server.ready):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-2000:]
                raise ValueError(f"{server.name} did not start: {' '.join(command)}\n{tail}")
            time.sleep(0.1)
        yield started
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):  # workers that outlive the server would keep the port
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
