# /// script
# dependencies = ["tracer-llm==0.3.3"]
# ///
"""Peer: TRACER routes a stream of texts, and is fitted again as it goes.

Usage: tracer_peer.py STREAM EMBEDDINGS OUT

STREAM is JSON: `texts`; `teacher`, the upstream's reply to each text; `target`, the target agreement; `schedules`, each
a list of numbers of texts after which TRACER is fitted. EMBEDDINGS is an .npy file, (texts, dim). OUT gets JSON, for
each schedule: `labels`, the label with which TRACER handled each text (null: it was deferred to the upstream), and
`fits`.

Until a first policy is deployed, every text is deferred. As its README says, the deferred texts are the traces of the
next fit (tracer.update). Its settings are those of the command `tracer fit`, whose surrogates are the linear and neural
ones, but that frontier_targets is the target alone: other targets only make other policies, which are not deployed.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import tracer
from tracer.api import fit, update

TREES = ("dt", "et", "gbt", "rf")  # what `tracer fit` skips without --trees


def route(
    texts: list[str], teacher: list[str], target: float, ends: list[int], rows: np.ndarray
) -> dict[str, object]:
    """Run the stream, with a fit after each of these numbers of texts. rows: the embeddings."""
    labels: list[str | None] = [None] * len(texts)
    fits, start, router = [], 0, None
    with TemporaryDirectory(prefix="tracer-") as folder:
        artifact, traces = Path(folder) / ".tracer", Path(folder) / "traces.jsonl"
        for end in [*(end for end in ends if end < len(texts)), len(texts)]:
            if router is not None:
                labels[start:end] = router.predict_batch(rows[start:end])["labels"]
            if end == len(texts):
                break
            deferred = [i for i in range(start, end) if labels[i] is None]
            start = end
            if not deferred:
                continue
            lines = (json.dumps({"input": texts[i], "teacher": teacher[i]}) + "\n" for i in deferred)
            traces.write_text("".join(lines))
            config = tracer.FitConfig(
                target_teacher_agreement=target,
                frontier_targets=(target,),
                skip_candidates=TREES,
                verbose=False,
            )
            began = perf_counter()
            manifest = (update if fits else fit)(traces, artifact, rows[deferred], config).manifest
            router = None if manifest.selected_method is None else tracer.load_router(artifact)
            fits.append(
                {
                    "texts": end,
                    "traces": manifest.n_traces,
                    "method": manifest.selected_method,
                    "coverage": manifest.coverage_cal,
                    "agreement": manifest.teacher_agreement_cal,
                    "seconds": perf_counter() - began,
                }
            )
    return {"labels": labels, "fits": fits}


def main(stream: Path, embeddings: Path, out: Path) -> None:
    """Run the stream with each schedule."""
    content, rows = json.loads(stream.read_text()), np.load(embeddings)
    given = content["texts"], content["teacher"], content["target"]
    out.write_text(json.dumps([route(*given, ends, rows) for ends in content["schedules"]]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
