from collections.abc import Iterable, Iterator

def checked(
    rows: Iterable[tuple[int, int, int, bytes, bytes, int, int]], attempts_as_of: dict[tuple[int, int], int]
) -> Iterator[tuple[int, int, int, bytes, bytes, int]]: ...
