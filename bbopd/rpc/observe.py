"""What a server tells its operator: Prometheus metrics, and one log line an event. Neither holds a token id, a text or a secret."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from bbopd.errors import ConfigError
from bbopd.rpc.jobs import Job
from bbopd.types import SignalSpec

__all__ = ["JsonFormatter", "Observer", "TextFormatter", "client_hash", "shown_in_text"]

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_events = logging.getLogger("bbopd.serve.events")


def client_hash(name: str) -> str:
    """How a client is called in logs: the same for its whole life, and no address."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, severity, message, and the fields of an event."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "severity": record.levelname, "message": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    """For a person at a terminal; the fields of an event follow its message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return super().formatMessage(record) + fields


def shown_in_text(record: logging.LogRecord) -> bool:
    """Whether a terminal shows a record: not the events of every call, item and batch, unless something was refused."""
    return record.name != _events.name or record.levelno > logging.INFO


class Observer:
    """Counts what happens, in a registry of its own, and logs it to ``bbopd.serve.events``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"bbopd_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"bbopd_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"bbopd_{name}", what, labels, buckets=buckets, registry=self.registry)

        self._requests = counter(
            "requests", "Items by level and outcome: ok, a failure code, or dropped where the client left", "level", "outcome"
        )
        self._tokens = counter("tokens", "Response tokens scored, or written at level text", "level")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered items", "level")
        self._answer_bytes = counter("answer_bytes", "Bytes of answers sent", "level")
        self._replayed = counter("replayed", "Answers given again without running the model", "level")
        self._refusals = counter("refusals", "Calls and items turned away, by reason", "reason")
        self._request_seconds = histogram("request_seconds", "From an item's arrival to its last byte", _SECONDS, "level")
        self._queue_seconds = histogram("queue_seconds", "From an item's arrival to its batch", _SECONDS, "level")
        self._batch_seconds = histogram("batch_seconds", "One call of the model", _SECONDS, "level")
        self._batch_tokens = histogram("batch_tokens", "Tokens of one call of the model", _TOKENS)
        self._batch_items = histogram("batch_items", "Items of one call of the model", _ITEMS)
        self.queued_items = gauge("queued_items", "Items waiting for the model")
        self.queued_tokens = gauge("queued_tokens", "Their tokens")
        self._open_calls = gauge("open_calls", "Calls open", "kind")
        self.clients = gauge("clients", "Clients with a call open")
        self.inflight_bytes = gauge("inflight_answer_bytes", "Answers made, or being made, and not yet taken")
        self._series: dict[tuple[Any, ...], Any] = {}

    def serve_metrics(self, host: str, port: int) -> Callable[[], None]:
        """Answer ``GET /metrics`` over HTTP until the function returned is called. Raises `ConfigError` where the port is taken."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port} ({error.strerror or error}): set metrics_port to another") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    # ------------------------------------------------------------ calls

    def call_opened(self, kind: str, client: str, call: int) -> None:
        self._at(self._open_calls, kind).inc()
        self._log("call opened", kind=kind, client=client, call=call)

    def call_closed(self, kind: str, client: str, call: int, seconds: float, dropped: int) -> None:
        self._at(self._open_calls, kind).dec()
        self._log("call closed", kind=kind, client=client, call=call, seconds=round(seconds, 4), dropped=dropped)

    def call_refused(self, kind: str, client: str, reason: str) -> None:
        self._at(self._refusals, reason).inc()
        self._log("call refused", logging.WARNING, kind=kind, client=client, reason=reason)

    # ------------------------------------------------------------ items

    def item_ended(
        self, outcome: str, *, level: str, client: str, call: int, request: int, name: str, prompt_tokens: int, tokens: int, seconds: float
    ) -> None:
        """One item was answered (``ok``), refused (its failure code), or dropped with its call."""
        self._at(self._requests, level, outcome).inc()
        if outcome == "ok":
            self._at(self._tokens, level).inc(tokens)
            self._at(self._prompt_tokens, level).inc(prompt_tokens)
            self._at(self._request_seconds, level).observe(seconds)
        elif outcome != "dropped":
            self._at(self._refusals, outcome).inc()
        self._log(
            "item",
            outcome=outcome,
            level=level,
            client=client,
            call=call,
            request=request,
            name=name,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            seconds=round(seconds, 4),
        )

    def sent(self, level: str, count: int) -> None:
        self._at(self._answer_bytes, level).inc(count)

    def replayed(self, level: str) -> None:
        self._at(self._replayed, level).inc()

    # ------------------------------------------------------------ the model

    def batch_done(self, jobs: list[Job], seconds: float, waits: list[float]) -> None:
        kind = jobs[0].kind
        level, tokens = kind.level if isinstance(kind, SignalSpec) else "text", sum(job.tokens for job in jobs)
        self._at(self._batch_seconds, level).observe(seconds)
        self._batch_tokens.observe(tokens)
        self._batch_items.observe(len(jobs))
        for wait in waits:
            self._at(self._queue_seconds, level).observe(wait)
        self._log("batch", level=level, items=len(jobs), tokens=tokens, seconds=round(seconds, 4), longest_wait=round(max(waits), 4))

    def _at(self, metric: Any, *labels: str) -> Any:
        """One series of a metric; to look it up in the metric takes longer than to count."""
        key = (metric, *labels)
        if key not in self._series:
            self._series[key] = metric.labels(*labels)
        return self._series[key]

    def _log(self, message: str, severity: int = logging.INFO, **fields: Any) -> None:
        _events.log(severity, message, extra={"fields": fields})
