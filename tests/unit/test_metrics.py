"""The metrics that dashboards rely on are all there, under their names and labels."""

from __future__ import annotations

import re
from pathlib import Path

from mover.core.states import Status
from mover.metrics import Metrics

CONTRACT = """
migrations{status} migrations_total{outcome,source_tier,target_tier} migration_duration_seconds
phase_duration_seconds{phase} copy_rows_total copy_bytes_total changes_applied_total{kind}
replication_lag_bytes{migration} replication_lag_seconds{migration} slot_retained_bytes{migration}
change_log_bytes{migration}
cutover_pause_seconds cutover_attempts_total{outcome} verify_rows_total verify_mismatches_total
integrity_failures_total rollbacks_total{trigger} refused_writes_total active_migrations
queued_migrations infrastructure_cost_eur_per_month cost_per_migration_eur
"""


def test_every_metric_is_exposed_with_its_labels() -> None:
    metrics = Metrics()
    labels = dict(re.findall(r"(\w+)(?:{([\w,]+)})?", CONTRACT))
    for name, names in labels.items():
        metric = getattr(metrics, name, None)
        if names and metric is not None:
            metric.labels(**dict.fromkeys(names.split(","), "x"))
    text = metrics.exposition().decode()
    for name, names in labels.items():
        assert f"# TYPE mover_{name} " in text
        for label in filter(None, names.split(",")):
            assert re.search(rf'^mover_{name}(_bucket|_sum)?{{.*{label}="', text, re.MULTILINE), name


def test_counts_are_those_of_the_queue() -> None:
    metrics = Metrics()
    metrics.status_counts.set({status: 3 if status is Status.QUEUED else 0 for status in Status})
    text = metrics.exposition().decode()
    assert 'mover_migrations{status="queued"} 3.0' in text
    assert "mover_queued_migrations 3.0" in text


def test_a_migration_that_ended_leaves_no_series() -> None:
    metrics = Metrics()
    metrics.replication_lag_bytes.labels(migration="one").set(5)
    metrics.forget("one")
    assert 'migration="one"' not in metrics.exposition().decode()


def test_dashboards_use_no_other_name() -> None:
    known = set(re.findall(r"# TYPE (\w+)", Metrics().exposition().decode()))
    for file in Path("grafana").rglob("*.*"):
        for name in re.findall(r"\bmover_\w+", file.read_text()):
            assert name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known, (file, name)
