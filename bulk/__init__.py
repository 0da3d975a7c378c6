"""Classifies files: reads them in slices, classifies the slices in parallel, and writes the answers in parts."""
