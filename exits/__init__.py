"""The exit rule of DE3-BERT in NumPy: signals, decision, calibration. No torch, no server."""
