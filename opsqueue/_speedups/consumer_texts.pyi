FEATURE_BITS: dict[str, int]
FAULTS: dict[int, bytes]
NEEDED_FEATURE: dict[int, tuple[int, bytes]]
DROP_TEXTS: dict[int, bytes]
