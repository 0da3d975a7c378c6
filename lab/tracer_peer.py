# /// script
# dependencies = ["tracer-llm==0.3.3"]
# ///
"""Peer: TRACER routes a stream of texts, and is fitted again as it goes.

Usage: tracer_peer.py STREAM EMBEDDINGS OUT

STREAM is JSON: `texts`; `teacher`, the upstream's reply to each text; `target`, the target agreement; `refits`, the
numbers of texts after which it is fitted. EMBEDDINGS is an .npy file, (texts, dim). OUT gets JSON: `labels`, the label
with which TRACER handled each text (null: it was deferred to the upstream), and `fits`.

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


def main(stream: Path, embeddings: Path, out: Path) -> None:
    """Run the stream."""
    content, rows = json.loads(stream.read_text()), np.load(embeddings)
    texts, teacher, target = content["texts"], content["teacher"], content["target"]
    ends = [end for end in content["refits"] if end < len(texts)]
    labels: list[str | None] = [None] * len(texts)
    fits, start = [], 0
    with TemporaryDirectory(prefix="tracer-") as folder:
        artifact, router, has_fitted = Path(folder) / ".tracer", None, False
        for end in [*ends, len(texts)]:
            if router is not None:
                labels[start:end] = router.predict_batch(rows[start:end])["labels"]
            if end == len(texts):
                break
            deferred = [i for i in range(start, end) if labels[i] is None]
            traces = Path(folder) / "traces.jsonl"
            traces.write_text(
                "".join(json.dumps({"input": texts[i], "teacher": teacher[i]}) + "\n" for i in deferred)
            )
            config = tracer.FitConfig(
                target_teacher_agreement=target,
                frontier_targets=(target,),
                skip_candidates=TREES,
                verbose=False,
            )
            began = perf_counter()
            result = (update if has_fitted else fit)(traces, artifact, rows[deferred], config)
            has_fitted, manifest = True, result.manifest
            router = None if manifest.selected_method is None else tracer.load_router(artifact)
            row = {
                "texts": end,
                "traces": manifest.n_traces,
                "method": manifest.selected_method,
                "coverage": manifest.coverage_cal,
                "agreement": manifest.teacher_agreement_cal,
                "seconds": perf_counter() - began,
            }
            fits.append(row)
            start = end
    out.write_text(json.dumps({"labels": labels, "fits": fits}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
