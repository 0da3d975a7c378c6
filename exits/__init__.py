"""The exit rule of DE3-BERT in Python and NumPy: signals, decision, calibration. Imports neither torch nor server."""
