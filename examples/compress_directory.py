"""Compresses every file of a directory, by as many consumers as you start.

opsqueue serve &
opsqueue consume examples.compress_directory:compress --object-store file:///tmp/compress-store &
python examples/compress_directory.py localhost:3999 file:///tmp/compress-store ~/photos ~/photos.gz

The operation is a pair of paths: consumers and producer must see the same files. See docs/tutorial.md.
"""

import gzip
import os
import shutil
import sys
from pathlib import Path

from opsqueue.producer import ProducerClient


def compress(paths: list[str]) -> list[int]:
    """Writes one file compressed; gives its sizes before and after. Doing it twice does no harm."""
    source, target = map(Path, paths)
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target first: a consumer that dies in the middle leaves no half of a file
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    with source.open("rb") as original, gzip.open(unfinished, "wb") as compressed:
        shutil.copyfileobj(original, compressed)
    unfinished.replace(target)
    return [source.stat().st_size, target.stat().st_size]


def main() -> None:
    address, store_url, directory, output = sys.argv[1:]
    root, target = Path(directory).resolve(), Path(output).resolve()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    operations = [[str(path), str(target / path.relative_to(root)) + ".gz"] for path in files]
    client = ProducerClient(address, store_url)
    sizes = list(client.run_submission(operations, chunk_size=8, progress=True))
    before, after = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    print(f"{len(files):,} files, {before:,} bytes before, {after:,} bytes after")


if __name__ == "__main__":
    main()
