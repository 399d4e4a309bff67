"""The journal's thread: applies one batch at a time and cleans up in between. Decides nothing.

Owns the journal from its start to its end. Outcomes wait here until the loop takes them; `wake` tells the loop to look.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable

from opsqueue.server.writer.batch import Batch, Journal, Outcome

#: Looks for something to forget this often while there is nothing.
LOOK_AGAIN_S = 1.0
#: While batches come without a break, slices of the clean-up are this far apart.
BETWEEN_SLICES_S = 0.04


class JournalThread:
    """Used by one other thread, the loop's."""

    def __init__(self, journal: Journal, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._wake = wake
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._busy = False
        #: What ended the thread, other than `close`.
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="opsqueue-journal", daemon=True)
        # A thread inherits the mask: no signal of the process is ever delivered to it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def busy(self) -> bool:
        """A batch is with the journal, or its outcome has not been taken."""
        return self._busy

    def submit(self, batch: Batch) -> None:
        """Hand over a batch; not while busy."""
        if self._busy:
            raise RuntimeError(f"batch {batch.number} was handed over while another is in hand")
        self._busy = True
        self._batches.put(batch)

    def poll(self) -> Outcome | None:
        """The outcome of the batch in hand, once; None: not yet."""
        if self._outcomes.empty():  # asked at every turn; an exception costs five times as much
            return None
        outcome = self._outcomes.get()
        self._busy = False
        return outcome

    def close(self, timeout: float) -> bool:
        """Finish the batch in hand and close the journal; False: it has not ended within `timeout` seconds."""
        self._batches.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
            self._journal.close()
        except BaseException as error:
            self.failed = error
            self._wake()

    def _serve(self) -> None:
        more = False
        look_at = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                batch = self._batches.get(timeout=0 if more else max(0.0, look_at - now))
            except queue.Empty:
                more = self._journal.maintain()
                look_at = time.monotonic() + (BETWEEN_SLICES_S if more else LOOK_AGAIN_S)
                continue
            if batch is None:
                return
            self._outcomes.put(self._journal.apply(batch))
            self._wake()
            if time.monotonic() >= look_at:
                more = self._journal.maintain()
                look_at = time.monotonic() + (BETWEEN_SLICES_S if more else LOOK_AGAIN_S)
