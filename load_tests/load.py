"""`make load`: locust against a server of its own, or against one that runs elsewhere with `--host URL`.

Everything else on the command line is locust's: `--headless -u 20 -r 20 -t 1m` runs without the web page. Measures
nothing itself.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from load_tests.server_process import running_server

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def locust(*arguments: str) -> int:
    """Run locust with our users; its exit code: 1 when a request failed."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--web-host", "127.0.0.1", *arguments]
    return subprocess.run(command, cwd=LOCUSTFILE.parent.parent, check=False).returncode


def main(given: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if given is None else given)
    if any(each in ("-H", "-h", "--help") or each.startswith("--host") for each in arguments):
        return locust(*arguments)
    with running_server() as server:
        print(f"the server under load: {server.address}", file=sys.stderr)
        return locust("--host", f"http://{server.address}", *arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
