"""Export of checkpoints and stock classifiers as artifacts: ONNX segments, prototypes, calibration and checks."""
