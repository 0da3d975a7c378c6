"""From a trained checkpoint to an artifact: ONNX segments, prototypes, calibration, proof."""
