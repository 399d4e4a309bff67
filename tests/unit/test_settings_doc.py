"""docs/configuration.md says what the declarations say."""

from __future__ import annotations

from pathlib import Path

from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.settings import declarations
from opsqueue.server.settings_doc import document

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_declarations_generate() -> None:
    assert PAGE.read_text() == document(), "run: python -m opsqueue.server.settings_doc > docs/configuration.md"


def test_every_setting_and_every_exit_code_of_the_server_is_on_the_page() -> None:
    page = PAGE.read_text()
    for declared in declarations():
        assert f"{declared.flag} " in page or f"{declared.flag}`" in page
        assert f"`{declared.variable}`" in page
    for code in ExitCode:
        assert f"| {int(code)} |" in page
