"""A ping on a queue where nothing else happens: it says when commits fail, and that they succeed again."""

from __future__ import annotations

import resource
from pathlib import Path

from opsqueue.server import requests
from tests.support.bare_writer import bare_writer
from tests.support.server import wait_until


def test_a_ping_finds_out_by_itself_that_commits_succeed_again(tmp_path: Path) -> None:
    with bare_writer(tmp_path / "q.db") as writer:
        resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        assert isinstance(writer.insert("p", 1), requests.Unavailable)
        assert isinstance(writer.call(requests.Ping()), requests.Unavailable)
        resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(lambda: writer.call(requests.Ping()) == requests.Done(), "a ping succeeds")
