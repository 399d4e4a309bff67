"""Results that are written while the submission is running, chunk by chunk. See docs/guides/large-results.md.

opsqueue consume examples.large_results:blow_up --object-store file:///tmp/large-store &
python examples/large_results.py localhost:3999 file:///tmp/large-store result.txt
"""

import sys

from opsqueue.producer import ProducerClient


def blow_up(number: int) -> str:
    """A result that is much larger than its operation."""
    return f"{number:07d} " * 1_000


def main() -> None:
    address, store_url, output = sys.argv[1:]
    client = ProducerClient(address, store_url)
    submission = client.insert_submission(range(2_000), chunk_size=50)
    with open(output, "w") as file:
        # in order, as soon as all before are done; ordered=False gives each as it comes
        for index, results in client.stream_submission(submission, ordered=True):
            file.writelines(result + "\n" for result in results)
            print(f"\rchunk {index + 1} of 40", end="", file=sys.stderr)
    print("\nwritten", file=sys.stderr)


if __name__ == "__main__":
    main()
