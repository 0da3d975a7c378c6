"""Grafana dashboards: panels.py says what they show, generate.py writes them, pictures.py draws them."""
