"""Numbers for Prometheus: requests and their latency, sentences, tokens, the queue, slots, and what was refused."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

NAMESPACE = "flax_transformer"
LATENCIES_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server. None of them names a client, a key or a text.

    Attributes:
        registry: all of them.
    """

    def __init__(self) -> None:
        """Begins with zeros."""
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answers by route and status.", "route", "status")
        self.sentences = self._counter("sentences", "Sentences translated, by model.", "model")
        self.tokens = self._counter("tokens", "Target tokens of best translations, ends of sentences too.")
        self.refused = self._counter("refused", "Requests that were refused, by reason.", "reason")
        self.gone = self._counter("clients_gone", "Requests whose client went away before the answer.")
        self.running = self.gauge("requests_running", "Requests that are being answered.")
        self.latency = Histogram(
            "request_seconds",
            "Seconds from a request to the end of its answer.",
            ["route"],
            namespace=NAMESPACE,
            registry=self.registry,
            buckets=LATENCIES_S,
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, namespace=NAMESPACE, registry=self.registry)

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        """A number that goes up and down."""
        return Gauge(name, meaning, labels, namespace=NAMESPACE, registry=self.registry)
