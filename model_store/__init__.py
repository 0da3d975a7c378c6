"""The artifact format: schema, integrity, versions, lookup, and the opened model. No torch."""

import os

# ONNX Runtime's builds send telemetry unless told not to before they are imported. Who serves other people's
# texts must not; set the variable to 0 to allow it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
