"""Every metric of the daemon, its name and its labels, in one list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mover.core.migration import Migration
from mover.core.states import Phase, Status
from mover.engine.site import Kept

# From a quick retry to a tenant of a terabyte.
_DURATION_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 7 * 24 * 3600)
# The goal is a worst pause of 0.1 s, the default budget 1 s.
_PAUSE_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)


class StatusCounts(Collector):
    """How many migrations have each status, read from the queue when somebody scrapes.

    A collector of its own: `mover_migrations` beside the counter `mover_migrations_total` is a name that
    the library would refuse for a plain gauge."""

    def __init__(self) -> None:
        self._counts: Mapping[Status, int] = dict.fromkeys(Status, 0)

    def set(self, counts: Mapping[Status, int]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        by_status = GaugeMetricFamily("mover_migrations", "Migrations by status", labels=["status"])
        for status, count in self._counts.items():
            by_status.add_metric([status.value], count)
        yield by_status
        yield GaugeMetricFamily(
            "mover_queued_migrations", "Waiting for a daemon", value=self._counts[Status.QUEUED]
        )


class Metrics:
    """One registry for one daemon; hand it to whoever measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.status_counts = StatusCounts()
        self.registry.register(self.status_counts)
        self.active_migrations = self._gauge("active_migrations", "Worked on by this daemon")
        self.migrations_total = self._counter(
            "migrations_total", "Migrations that ended", "outcome", "source_tier", "target_tier"
        )
        self.migration_duration_seconds = self._histogram(
            "migration_duration_seconds", "From the first claim to the end", _DURATION_BUCKETS
        )
        self.phase_duration_seconds = self._histogram(
            "phase_duration_seconds", "One pass through a phase", _DURATION_BUCKETS, "phase"
        )
        self.copy_rows_total = self._counter("copy_rows_total", "Rows copied")
        self.copy_bytes_total = self._counter("copy_bytes_total", "Bytes copied")
        self.changes_applied_total = self._counter(
            "changes_applied_total", "Changes applied to targets", "kind"
        )
        self.replication_lag_bytes = self._gauge(
            "replication_lag_bytes", "WAL between source and target", "migration"
        )
        self.replication_lag_seconds = self._gauge(
            "replication_lag_seconds", "Age of the newest change on the target", "migration"
        )
        self.slot_retained_bytes = self._gauge(
            "slot_retained_bytes", "WAL that a slot of ours keeps on the source", "migration"
        )
        self.change_log_bytes = self._gauge(
            "change_log_bytes", "What triggers of ours have written down on the source", "migration"
        )
        self.cutover_pause_seconds = self._histogram(
            "cutover_pause_seconds", "How long writers were held", _PAUSE_BUCKETS
        )
        self.cutover_attempts_total = self._counter(
            "cutover_attempts_total", "Attempts to cut over", "outcome"
        )
        self.fence_held_seconds = self._gauge(
            "fence_held_seconds",
            "How long a fence has been closed while its outcome is not known; 0: none is",
        )
        self.verify_rows_total = self._counter("verify_rows_total", "Rows compared")
        self.verify_mismatches_total = self._counter("verify_mismatches_total", "Rows that differed")
        self.integrity_failures_total = self._counter(
            "integrity_failures_total", "Migrations stopped because a promise may be broken"
        )
        self.rollbacks_total = self._counter("rollbacks_total", "Rollbacks", "trigger")
        self.refused_writes_total = self._counter(
            "refused_writes_total", "Writes refused at a place that the tenant has left"
        )
        self.infrastructure_cost_eur_per_month = self._gauge(
            "infrastructure_cost_eur_per_month", "Cost of the databases that the mover provisioned"
        )
        self.cost_per_migration_eur = self._gauge("cost_per_migration_eur", "Mean cost of a migration")

    def forget(self, migration: str) -> None:
        """Drop the series of a migration that has ended: their label would grow without bound."""
        lags = (self.replication_lag_bytes, self.replication_lag_seconds)
        for gauge in (*lags, self.slot_retained_bytes, self.change_log_bytes):
            gauge.remove_by_labels({"migration": migration})

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mover_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"mover_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"mover_{name}", text, labels, buckets=buckets, registry=self.registry)


class MetricsObserver:
    """Implements engine.observer.Observer and engine.daemon.DaemonMetrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def active(self, count: int) -> None:
        self._metrics.active_migrations.set(count)

    def ended(self, migration: Migration, status: Status, seconds: float) -> None:
        tiers = (migration.source_tier.value, migration.target_tier.value)
        self._metrics.migrations_total.labels(status.value, *tiers).inc()
        self._metrics.migration_duration_seconds.observe(seconds)
        self._metrics.forget(str(migration.id))

    def measured(self, migration: Migration, lag_bytes: int, lag_seconds: float, kept: Kept) -> None:
        label = str(migration.id)
        self._metrics.replication_lag_bytes.labels(label).set(lag_bytes)
        self._metrics.replication_lag_seconds.labels(label).set(lag_seconds)
        self._metrics.slot_retained_bytes.labels(label).set(kept.wal_bytes)
        self._metrics.change_log_bytes.labels(label).set(kept.log_bytes)

    def phase_took(self, phase: Phase, seconds: float) -> None:
        self._metrics.phase_duration_seconds.labels(phase.value).observe(seconds)

    def chunk_copied(self, rows: int, size: int) -> None:
        self._metrics.copy_rows_total.inc(rows)
        self._metrics.copy_bytes_total.inc(size)

    def changes_applied(self, kinds: Mapping[str, int]) -> None:
        for kind, count in kinds.items():
            self._metrics.changes_applied_total.labels(kind).inc(count)

    def rows_verified(self, rows: int) -> None:
        self._metrics.verify_rows_total.inc(rows)

    def integrity_failed(self, rows: int) -> None:
        self._metrics.integrity_failures_total.inc()
        self._metrics.verify_mismatches_total.inc(rows)

    def cutover(self, outcome: str, pause_ms: float | None) -> None:
        self._metrics.cutover_attempts_total.labels(outcome).inc()
        if pause_ms is not None:
            self._metrics.cutover_pause_seconds.observe(pause_ms / 1000)

    def rolled_back(self, trigger: str) -> None:
        self._metrics.rollbacks_total.labels(trigger).inc()

    def fence_held(self, seconds: float) -> None:
        self._metrics.fence_held_seconds.set(seconds)

    def writes_refused(self, count: int) -> None:
        self._metrics.refused_writes_total.inc(count)
