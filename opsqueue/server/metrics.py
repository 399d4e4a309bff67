"""Every metric, once: where it is on the board, its public name, its type, its help and the reference's name for it.

Renders the board as Prometheus text and the table as docs/metrics.md. Counts nothing itself.
"""

from __future__ import annotations

import enum
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from opsqueue._speedups.board import Board, SlotState
from opsqueue._speedups.counters import BOUNDS_SECONDS, Counter
from opsqueue.server.context import WRITER_SLOT, frontend_slot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Kind(enum.Enum):
    """A metric's Prometheus type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `alias` is the reference's name, kept beside ours; `per_process`: one series for each front-end."""

    counter: Counter
    name: str
    kind: Kind
    help: str
    alias: str | None = None
    per_process: bool = False


def _counter(counter: Counter, name: str, text: str, alias: str | None = None, per_process: bool = False) -> Metric:
    return Metric(counter, name, Kind.COUNTER, text, alias, per_process)


def _gauge(counter: Counter, name: str, text: str, alias: str | None = None, per_process: bool = False) -> Metric:
    return Metric(counter, name, Kind.GAUGE, text, alias, per_process)


def _histogram(counter: Counter, name: str, text: str, alias: str | None = None) -> Metric:
    return Metric(counter, name, Kind.HISTOGRAM, text, alias)


METRICS: tuple[Metric, ...] = (
    # submissions
    _counter(
        Counter.SUBMISSIONS_TOTAL,
        "opsqueue_submissions_inserted_total",
        "Submissions inserted.",
        "submissions_total_count",
    ),
    _counter(
        Counter.SUBMISSIONS_COMPLETED,
        "opsqueue_submissions_completed_total",
        "Submissions whose chunks are all done.",
        "submissions_completed_count",
    ),
    _counter(
        Counter.SUBMISSIONS_FAILED,
        "opsqueue_submissions_failed_total",
        "Submissions that failed because a chunk reached its limit of retries or crashes, or a consumer said so.",
        "submissions_failed_count",
    ),
    _counter(
        Counter.SUBMISSIONS_CANCELLED,
        "opsqueue_submissions_cancelled_total",
        "Submissions that a producer cancelled.",
        "submissions_cancelled_count",
    ),
    _counter(
        Counter.SUBMISSIONS_FORGOTTEN,
        "opsqueue_submissions_forgotten_total",
        "Ended submissions removed after --max-submission-age.",
    ),
    _gauge(
        Counter.SUBMISSIONS_IN_PROGRESS,
        "opsqueue_submissions_in_progress",
        "Submissions in progress, paused ones included.",
    ),
    _gauge(
        Counter.SUBMISSIONS_COMPLETED_KEPT,
        "opsqueue_submissions_completed_kept",
        "Completed submissions that are not forgotten yet.",
    ),
    # chunks
    _counter(
        Counter.CHUNKS_TOTAL, "opsqueue_chunks_inserted_total", "Chunks of inserted submissions.", "chunks_total_count"
    ),
    _counter(Counter.CHUNKS_COMPLETED, "opsqueue_chunks_completed_total", "Chunks done.", "chunks_completed_count"),
    _counter(
        Counter.CHUNKS_FAILED,
        "opsqueue_chunks_failed_total",
        "Chunks that made their submission fail.",
        "chunks_failed_count",
    ),
    _counter(
        Counter.CHUNKS_RETRIED,
        "opsqueue_chunks_retried_total",
        "Failures and expiries of chunks that counted as a retry.",
        "chunks_retried_count",
    ),
    _counter(
        Counter.CHUNKS_SKIPPED,
        "opsqueue_chunks_skipped_total",
        "Chunks that were not done when their submission failed or was cancelled, the failed chunk left out.",
        "chunks_skipped_count",
    ),
    _counter(
        Counter.CHUNKS_EXPIRED, "opsqueue_chunks_expired_total", "Reservations that outlived --reservation-expiration."
    ),
    _counter(
        Counter.CHUNKS_CRASHED, "opsqueue_chunks_crashed_total", "Chunks whose consumer died while it worked on them."
    ),
    _counter(Counter.CHUNKS_RELEASED, "opsqueue_chunks_released_total", "Chunks that a consumer gave back undone."),
    _counter(
        Counter.COMPLETIONS_IGNORED,
        "opsqueue_completions_ignored_total",
        "Completions of chunks that were done already, or whose submission is unknown or ended.",
    ),
    _counter(
        Counter.FAILURES_IGNORED,
        "opsqueue_failures_ignored_total",
        "Failures reported by a consumer that does not hold the chunk.",
    ),
    _gauge(
        Counter.CHUNKS_BACKLOG,
        "opsqueue_chunks_backlog",
        "Chunks that are not done, of submissions in progress, paused ones included.",
        "chunks_in_backlog_count",
    ),
    _gauge(
        Counter.OPERATIONS_BACKLOG,
        "opsqueue_operations_backlog",
        "Operations in those chunks: chunks times their submission's chunk_size.",
        "operations_in_backlog_count",
    ),
    _gauge(
        Counter.CHUNKS_RESERVED,
        "opsqueue_chunks_reserved",
        "Chunks that consumers hold now.",
        "reserver_chunks_reserved_count",
    ),
    # reservations
    _counter(
        Counter.RESERVATIONS_SUCCEEDED,
        "opsqueue_reservations_succeeded_total",
        "Requests for chunks that were answered with chunks.",
        "reserver_reservations_succeeded_count",
    ),
    _counter(
        Counter.RESERVATIONS_FAILED,
        "opsqueue_reservations_failed_total",
        "Requests for chunks that were refused, or asked for none.",
        "reserver_reservations_failed_count",
    ),
    _gauge(
        Counter.REQUESTS_PARKED,
        "opsqueue_requests_parked",
        "Requests for chunks, and credits not used up, that wait for work.",
    ),
    # journal
    _counter(Counter.COMMITS, "opsqueue_commits_total", "Transactions committed to the database."),
    _counter(
        Counter.COMMITS_FAILED,
        "opsqueue_commits_failed_total",
        "Transactions that failed; their changes were kept or refused.",
    ),
    _counter(
        Counter.COMMITTED_EVENTS_BYTES,
        "opsqueue_committed_events_bytes_total",
        "Bytes of packed completions, retries and crashes committed.",
    ),
    _counter(Counter.FSYNCS, "opsqueue_fsyncs_total", "Times that the disk was told to keep what was written."),
    _counter(Counter.CHECKPOINTS, "opsqueue_checkpoints_total", "Checkpoints of the write-ahead log that finished."),
    _gauge(Counter.COMMIT_HEALTHY, "opsqueue_commit_healthy", "1 when the last commit succeeded, 0 when it failed."),
    _gauge(Counter.WAL_BYTES, "opsqueue_wal_bytes", "Size of the write-ahead log."),
    _gauge(
        Counter.MEMORY_PROMISED,
        "opsqueue_memory_promised_bytes",
        "Worst case of what the submissions in progress may take of --memory-limit.",
    ),
    # processes
    _counter(
        Counter.RECORDS_RECEIVED,
        "opsqueue_writer_records_received_total",
        "Records that the writer took from front-ends.",
    ),
    _counter(Counter.RECORDS_SENT, "opsqueue_writer_records_sent_total", "Records that the writer sent to front-ends."),
    _counter(Counter.WRITER_WAKEUPS, "opsqueue_writer_wakeups_total", "Times that the writer was woken."),
    _counter(Counter.BAD_RINGS, "opsqueue_bad_rings_total", "Front-ends cut off because their ring held nonsense."),
    _counter(
        Counter.PROCESSES_REPLACED,
        "opsqueue_processes_replaced_total",
        "Processes that died or hung and were replaced.",
    ),
    # front-ends
    _counter(Counter.HTTP_REQUESTS, "opsqueue_http_requests_total", "HTTP requests answered.", per_process=True),
    _counter(
        Counter.HTTP_ERRORS_4XX,
        "opsqueue_http_client_errors_total",
        "HTTP requests answered with 4xx.",
        per_process=True,
    ),
    _counter(
        Counter.HTTP_ERRORS_5XX,
        "opsqueue_http_server_errors_total",
        "HTTP requests answered with 5xx.",
        per_process=True,
    ),
    _counter(
        Counter.CONSUMERS_OPENED, "opsqueue_consumers_opened_total", "Consumer connections opened.", per_process=True
    ),
    _counter(
        Counter.CONSUMERS_LOST,
        "opsqueue_consumers_lost_total",
        "Consumer connections that ended without a close frame.",
        per_process=True,
    ),
    _counter(
        Counter.CONSUMERS_REJECTED,
        "opsqueue_consumers_rejected_total",
        "Consumer connections that the server closed: malformed messages, refusals, missed heartbeats.",
        per_process=True,
    ),
    _counter(
        Counter.FRAMES_RECEIVED,
        "opsqueue_consumer_frames_received_total",
        "WebSocket frames from consumers.",
        per_process=True,
    ),
    _counter(
        Counter.BYTES_RECEIVED, "opsqueue_consumer_received_bytes_total", "Bytes from consumers.", per_process=True
    ),
    _counter(Counter.BYTES_SENT, "opsqueue_consumer_sent_bytes_total", "Bytes to consumers.", per_process=True),
    _counter(
        Counter.FRONTEND_WAKEUPS,
        "opsqueue_frontend_wakeups_total",
        "Times that the writer woke a front-end.",
        per_process=True,
    ),
    _gauge(
        Counter.CONSUMERS_CONNECTED,
        "opsqueue_consumers_connected",
        "Consumers connected now.",
        "consumers_connected_count",
        per_process=True,
    ),
    _gauge(
        Counter.WAITS_PARKED,
        "opsqueue_waits_parked",
        "Producers' requests that wait for a submission (?wait=).",
        per_process=True,
    ),
    # durations
    _histogram(
        Counter.HISTOGRAM_SUBMISSION_COMPLETE,
        "opsqueue_submission_complete_duration_seconds",
        "From a submission's insert to its completion.",
        "submissions_complete_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_SUBMISSION_FAIL,
        "opsqueue_submission_fail_duration_seconds",
        "From a submission's insert to its failure.",
        "submissions_fail_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_SUBMISSION_CANCEL,
        "opsqueue_submission_cancel_duration_seconds",
        "From a submission's insert to its cancellation.",
        "submissions_cancel_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_CHUNK_COMPLETED,
        "opsqueue_chunk_completed_duration_seconds",
        "From a chunk's reservation to its completion.",
        "chunks_duration_completed_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_CHUNK_FAILURE,
        "opsqueue_chunk_failure_duration_seconds",
        "From a chunk's reservation to a failure that counted.",
        "chunks_duration_failure_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_RESERVE,
        "opsqueue_reserve_duration_seconds",
        "From a request for chunks to its answer, waiting for work included.",
        "consumer_fetch_and_reserve_chunks_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_COMPLETE_MESSAGE,
        "opsqueue_complete_chunk_duration_seconds",
        "The writer's time for a completion.",
        "consumer_complete_chunk_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_FAIL_MESSAGE,
        "opsqueue_fail_chunk_duration_seconds",
        "The writer's time for a failure.",
        "consumer_fail_chunk_duration_seconds",
    ),
    _histogram(
        Counter.HISTOGRAM_COMMIT, "opsqueue_commit_duration_seconds", "A transaction, reaching the disk included."
    ),
    _histogram(
        Counter.HISTOGRAM_CHECKPOINT, "opsqueue_checkpoint_duration_seconds", "A checkpoint of the write-ahead log."
    ),
)

#: What is rendered besides METRICS: (name, type, help).
OTHERS: tuple[tuple[str, Kind, str], ...] = (
    ("opsqueue_build_info", Kind.GAUGE, "Always 1; the labels say the server's version and its Python."),
    ("opsqueue_connections", Kind.GAUGE, "Open TCP connections of each front-end, producers and consumers."),
    ("opsqueue_process_up", Kind.GAUGE, "1 when the process serves and has moved within the last 5 seconds."),
    ("opsqueue_process_progress_age_seconds", Kind.GAUGE, "Seconds since the process last went round its loop."),
)

#: Seconds without progress after which the supervisor replaces a process.
_HANG_S = 5.0


def process_names(board: Board) -> Iterator[tuple[int, str]]:
    """Slots with the names of their processes, without the supervisor's: when it is gone, nobody serves."""
    yield WRITER_SLOT, "writer"
    first = frontend_slot(0)
    for slot in range(first, board.size):
        yield slot, f"frontend-{slot - first}"


def render(board: Board, version: str) -> bytes:
    """All metrics as Prometheus text (format 0.0.4)."""
    lines: list[str] = []
    _render_info(lines, version)
    _render_processes(lines, board)
    frontends = [(slot, name) for slot, name in process_names(board) if slot >= frontend_slot(0)]
    for metric in METRICS:
        for name, note in _names(metric):
            lines.append(f"# HELP {name} {metric.help}{note}")
            lines.append(f"# TYPE {name} {metric.kind.value}")
            if metric.kind is Kind.HISTOGRAM:
                _render_histogram(lines, board, metric.counter, name)
            elif metric.per_process and not note:
                lines.extend(
                    f'{name}{{process="{process}"}} {board.get(slot, metric.counter)}' for slot, process in frontends
                )
            else:
                lines.append(f"{name} {board.total(metric.counter)}")
    lines.append("")
    return "\n".join(lines).encode()


def _names(metric: Metric) -> Iterator[tuple[str, str]]:
    yield metric.name, ""
    if metric.alias is not None:
        yield metric.alias, f" The same as {metric.name}, all processes together."


def _render_info(lines: list[str], version: str) -> None:
    name, kind, text = OTHERS[0]
    lines.append(f"# HELP {name} {text}")
    lines.append(f"# TYPE {name} {kind.value}")
    implementation = f"{platform.python_implementation()} {'.'.join(map(str, sys.version_info[:3]))}"
    lines.append(f'{name}{{version="{version}",python="{implementation}"}} 1')


def _render_processes(lines: list[str], board: Board) -> None:
    processes = list(process_names(board))
    first = frontend_slot(0)
    series = (
        [(process, str(board.connections(slot))) for slot, process in processes if slot >= first],
        [(process, "1" if _is_up(board, slot) else "0") for slot, process in processes],
        [
            (process, f"{board.seconds_since_progress(slot):.3f}")
            for slot, process in processes
            if board.state(slot) != SlotState.ABSENT
        ],
    )
    for (name, kind, text), values in zip(OTHERS[1:], series, strict=True):
        lines.append(f"# HELP {name} {text}")
        lines.append(f"# TYPE {name} {kind.value}")
        lines.extend(f'{name}{{process="{process}"}} {value}' for process, value in values)


def _is_up(board: Board, slot: int) -> bool:
    return board.state(slot) == SlotState.SERVING and board.seconds_since_progress(slot) < _HANG_S


def _render_histogram(lines: list[str], board: Board, base: int, name: str) -> None:
    count = 0
    for bucket, bound in enumerate(BOUNDS_SECONDS):
        count += board.total(base + bucket)
        lines.append(f'{name}_bucket{{le="{bound:.10g}"}} {count}')
    count += board.total(base + len(BOUNDS_SECONDS))
    lines.append(f'{name}_bucket{{le="+Inf"}} {count}')
    lines.append(f"{name}_sum {board.total(base + len(BOUNDS_SECONDS) + 1) / 1e9:.9g}")
    lines.append(f"{name}_count {count}")


_DOCUMENT_HEAD = """\
# Metrics

`GET /metrics` gives these as Prometheus text; any front-end answers for all processes. Durations are histograms in
seconds with bounds doubling from 0.1 ms to 839 s. The names in the last column are those of the reference
implementation: the same values under a second name, so that existing dashboards go on. Counters are kept when a process
is replaced, and start at zero with the server.

This file is generated: `python -m opsqueue.server.metrics > docs/metrics.md`.

| metric | type | meaning | labels | reference's name |
| --- | --- | --- | --- | --- |
"""


def document() -> str:
    """docs/metrics.md."""
    rows: list[str] = []
    for name, kind, text in OTHERS:
        labels = "`version`, `python`" if name == "opsqueue_build_info" else "`process`"
        rows.append(f"| `{name}` | {kind.value} | {text} | {labels} | |")
    for metric in METRICS:
        alias = f"`{metric.alias}`" if metric.alias else ""
        labels = "`process`" if metric.per_process else ""
        rows.append(f"| `{metric.name}` | {metric.kind.value} | {metric.help} | {labels} | {alias} |")
    return _DOCUMENT_HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
