# cython: language_level=3
"""Counter indices for Python code; the declarations are in counters.pxd."""

#: Upper bounds of every histogram in seconds; one more bucket takes what is above.
BOUNDS_SECONDS = tuple(100e-6 * 2**k for k in range(HISTOGRAM_BOUNDS))


def observe_seconds(board, int slot, int base, double seconds):
    """Add a duration in seconds to the histogram at `base` of the board's `slot`."""
    bucket = next((k for k, bound in enumerate(BOUNDS_SECONDS) if seconds <= bound), HISTOGRAM_BOUNDS)
    board.add(slot, base + bucket, 1)
    board.add(slot, base + HISTOGRAM_BOUNDS + 1, int(seconds * 1e9))
