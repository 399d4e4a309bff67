"""Writes the documentation as a web site: the API reference from the docstrings, by pdoc, and the Markdown pages.

`make docs` runs it: `python -m docs_site.build build/docs`. A warning, or a link that leads nowhere, is an error.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Final

import pdoc
from pdoc import render, render_helpers

from docs_site.public_api import PUBLIC_MODULES, constant_comment, public_names

ROOT: Final = Path(__file__).resolve().parents[1]


def documented(name: str) -> pdoc.doc.Module:
    """The module as pdoc is to show it: with all public names, also those that load when they are asked for."""
    module = importlib.import_module(name)
    names = public_names(module)
    comments = {each: comment for each in names if (comment := constant_comment(module, each))}
    for each in names:
        vars(module).setdefault(each, getattr(module, each))
    module.__all__ = names  # type: ignore[attr-defined]  # pdoc goes by it
    page = pdoc.doc.Module(module)
    for constant, comment in comments.items():
        # pdoc knows no `#:`, and takes a constant that is a module, or that has a class's docstring, for something else
        page.members[constant] = pdoc.doc.Variable(name, constant, taken_from=(name, constant), docstring=comment)
    return page


def markdown_pages() -> dict[Path, Path]:
    """The Markdown pages, and where they go: the README to the front page, `docs/guides/s3.md` to `guides/s3.html`."""
    pages = {ROOT / "README.md": Path("index.html"), ROOT / "CHANGELOG.md": Path("changelog.html")}
    for page in sorted((ROOT / "docs").rglob("*.md")):
        pages[page] = page.relative_to(ROOT / "docs").with_suffix(".html")
    return pages


def write_page(page: Path, pages: dict[Path, Path], output: Path) -> None:
    """Writes one Markdown page, with links to the other pages as HTML; other files that it links to are copied."""
    text = page.read_text()
    here = pages[page]

    def linked(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        source = (page.parent / path).resolve()
        if not source.is_file():
            raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {match[1]}, which is not there")
        target = pages.get(source)
        if target is None:
            target = source.relative_to(ROOT)
            (output / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, output / target)
        return f"]({os.path.relpath(target, here.parent)}{mark}{anchor})"

    # every second part is code, which stays as it is
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"\]\(([^)\s]+)\)", linked, part) for part in parts[::2]]
    body = render_helpers.to_html("".join(parts))
    title = re.search(r"^# (.*)$", text, flags=re.MULTILINE)
    html = render.env.get_template("page.html.jinja2").render(
        title=title[1] if title else page.stem,
        root="../" * (len(here.parts) - 1),
        body=body,
        modules=PUBLIC_MODULES,
    )
    (output / here).parent.mkdir(parents=True, exist_ok=True)
    (output / here).write_text(html)


def build(output: Path) -> None:
    """Writes everything into the directory `output`, over what is there.

    Raises UserWarning for what pdoc warns of, and FileNotFoundError for a link to a file that is not there.
    """
    warnings.simplefilter("error")
    render.configure(docformat="markdown", show_source=False, template_directory=Path(__file__).parent)
    modules = {name: documented(name) for name in PUBLIC_MODULES}
    for name, module in modules.items():
        page = output / (name.replace(".", "/") + ".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render.html_module(module, modules))
    (output / "search.js").write_text(render.search_index(modules))
    pages = markdown_pages()
    for source in pages:
        write_page(source, pages, output)
    print(f"{len(modules)} modules and {len(pages)} pages: {output / 'index.html'}")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
