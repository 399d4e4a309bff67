"""What /metrics promises: every counter has one public name, values are right, and the document is the table."""

from __future__ import annotations

import re
from pathlib import Path

from opsqueue._speedups.board import Board, SlotState
from opsqueue._speedups.counters import BOUNDS_SECONDS, Counter, observe_seconds
from opsqueue.server import metrics
from opsqueue.server.context import WRITER_SLOT, frontend_slot
from opsqueue.server.metrics import METRICS, Kind, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

#: WIRE section 6: the reference's names, which stay as aliases.
REFERENCE_NAMES = {
    "submissions_total_count",
    "submissions_completed_count",
    "submissions_failed_count",
    "submissions_cancelled_count",
    "chunks_total_count",
    "chunks_completed_count",
    "chunks_failed_count",
    "chunks_retried_count",
    "chunks_skipped_count",
    "reserver_reservations_succeeded_count",
    "reserver_reservations_failed_count",
    "chunks_in_backlog_count",
    "operations_in_backlog_count",
    "reserver_chunks_reserved_count",
    "consumers_connected_count",
    "submissions_complete_duration_seconds",
    "submissions_fail_duration_seconds",
    "submissions_cancel_duration_seconds",
    "chunks_duration_completed_seconds",
    "chunks_duration_failure_seconds",
    "consumer_fetch_and_reserve_chunks_duration_seconds",
    "consumer_complete_chunk_duration_seconds",
    "consumer_fail_chunk_duration_seconds",
}


def samples(text: bytes) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))


def test_every_counter_of_the_board_is_a_metric_exactly_once() -> None:
    assert sorted(metric.counter for metric in METRICS) == sorted(Counter)


def test_every_name_of_the_reference_is_an_alias() -> None:
    assert {metric.alias for metric in METRICS if metric.alias} == REFERENCE_NAMES


def test_names_are_unique_and_say_their_unit_and_type() -> None:
    names = [metric.name for metric in METRICS] + [name for name, _, _ in metrics.OTHERS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("opsqueue_")
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.name.endswith("_seconds") == (metric.kind is Kind.HISTOGRAM)


def test_docs_metrics_md_is_the_table() -> None:
    assert DOCUMENT.read_text() == metrics.document(), "run: python -m opsqueue.server.metrics > docs/metrics.md"


def test_a_counter_is_summed_over_all_processes_under_both_names() -> None:
    board = Board(4)
    board.add(WRITER_SLOT, Counter.CHUNKS_COMPLETED, 40)
    board.add(frontend_slot(1), Counter.CHUNKS_COMPLETED, 2)
    found = samples(render(board, "v1.2.3"))
    assert found["opsqueue_chunks_completed_total"] == found["chunks_completed_count"] == "42"


def test_front_ends_are_broken_down_and_the_alias_is_their_sum() -> None:
    board = Board(4)
    board.put(frontend_slot(0), Counter.CONSUMERS_CONNECTED, 3)
    board.put(frontend_slot(1), Counter.CONSUMERS_CONNECTED, 4)
    board.set_connections(frontend_slot(1), 9)
    found = samples(render(board, "v1.2.3"))
    assert found['opsqueue_consumers_connected{process="frontend-0"}'] == "3"
    assert found['opsqueue_consumers_connected{process="frontend-1"}'] == "4"
    assert found["consumers_connected_count"] == "7"
    assert found['opsqueue_connections{process="frontend-1"}'] == "9"


def test_a_histogram_is_cumulative_in_seconds() -> None:
    board = Board(3)
    for seconds in (0.00005, 0.0003, 0.0003, 5000.0):
        observe_seconds(board, WRITER_SLOT, Counter.HISTOGRAM_COMMIT, seconds)
    found = samples(render(board, "v1.2.3"))
    name = "opsqueue_commit_duration_seconds"
    assert found[name + '_bucket{le="0.0001"}'] == "1"
    assert found[name + '_bucket{le="0.0002"}'] == "1"
    assert found[name + '_bucket{le="0.0004"}'] == "3"
    assert found[name + f'_bucket{{le="{BOUNDS_SECONDS[-1]:.10g}"}}'] == "3"
    assert found[name + '_bucket{le="+Inf"}'] == found[name + "_count"] == "4"
    assert abs(float(found[name + "_sum"]) - 5000.00065) < 1e-6


def test_build_info_and_process_state_are_shown() -> None:
    board = Board(3)
    board.start(frontend_slot(0), SlotState.SERVING)
    found = samples(render(board, "v1.2.3"))
    assert any(key.startswith('opsqueue_build_info{version="v1.2.3"') for key in found)
    assert found['opsqueue_process_up{process="frontend-0"}'] == "1"
    assert found['opsqueue_process_up{process="writer"}'] == "0"
    assert 'opsqueue_process_progress_age_seconds{process="writer"}' not in found


def test_the_text_follows_the_exposition_format() -> None:
    text = render(Board(3), "v1.2.3").decode()
    assert text.endswith("\n")
    line = re.compile(r"(# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{[a-z]+=\"[^\"]*\"(,[a-z]+=\"[^\"]*\")*\})? [-0-9.e+]+)$")
    assert [found for found in text.splitlines() if not line.match(found)] == []
    declared = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(declared) == len(set(declared))
