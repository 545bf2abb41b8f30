"""The guide's code runs, and prints the findings that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "before-you-train.md"


def findings_in(text: str) -> list[tuple[str, ...]]:
    """Return severity, layer and check of every row of a printed table."""
    return re.findall(r"^(error|warning|note) +(\S+(?: \(\d+×\))?) +(\S+)", text, re.MULTILINE)


def test_code_runs_and_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown, printed = [], ""
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            printed = capsys.readouterr().out
        else:
            assert findings_in(printed) == findings_in(text)
            shown.append(findings_in(text))
    assert [len(rows) for rows in shown] == [4, 1, 2]
