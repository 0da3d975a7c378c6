"""Texts and labels: tables and files of rows, examples, and their split into parts. Does not import PyTorch."""
