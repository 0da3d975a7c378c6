"""Audits: a sample of live texts also runs to full depth, to measure how often early answers differ from it."""
