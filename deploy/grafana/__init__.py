"""Grafana dashboards: panels.py defines them, generate.py writes them."""
