"""`make docs`: the site is built without a warning, has every public name, and no link of it leads nowhere."""

from __future__ import annotations

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs_site.public_api import PUBLIC_MODULES, public_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a process of its own as `make docs` does it."""
    output = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-W", "error", "-m", "docs_site.build", str(output)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return output


def anchors(page: Path) -> set[str]:
    return {html.unescape(found) for found in re.findall(r'\bid="([^"]+)"', page.read_text())}


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_name_is_on_its_modules_page(site: Path, name: str) -> None:
    module = importlib.import_module(name)
    names = public_names(module)
    assert set(module.__all__) <= set(names)
    assert set(names) <= anchors(site / (name.replace(".", "/") + ".html"))


def test_names_outside_all_are_public_when_they_are_meant_to_be() -> None:
    producer = public_names(importlib.import_module("opsqueue.producer"))
    consumer = public_names(importlib.import_module("opsqueue.consumer"))
    assert {"AsyncProducerClient", "SubmissionPage"} <= set(producer)
    assert {"AsyncConsumerClient", "DEFAULT_STRATEGY", "RetryLater", "chunk_context"} <= set(consumer)
    assert "packing" not in producer


def test_the_page_of_a_method_says_what_its_docstring_says(site: Path) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / "opsqueue/producer.html").read_text())
    assert "there is one submission for a key (1 to 255 ASCII characters)" in " ".join(shown.split())


def test_every_markdown_page_is_there(site: Path) -> None:
    assert "A batch-processing queue for heavy loads" in (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_no_link_leads_nowhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    ids = {page.resolve(): anchors(page) for page in pages}
    followed = 0
    for page in pages:
        text = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]+)"', text):
            path, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page.resolve()
            assert target.exists(), f"{page.relative_to(site)} links to {link}"
            assert not anchor or unquote(anchor) in ids[target], f"{page.relative_to(site)} links to {link}"
            followed += 1
    assert followed > 500
