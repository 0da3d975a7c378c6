"""Classifies files: reads them in slices, has processes answer, and writes the answers in parts."""
