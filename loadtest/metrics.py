"""The metrics of a running server, scraped from /metrics."""

from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 60.0


class Metrics:
    """The samples of one scrape."""

    def __init__(self, url: str) -> None:
        """Scrape the server at url; raises OSError if it does not answer."""
        with urlopen(url + "/metrics", timeout=TIMEOUT_S) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())
