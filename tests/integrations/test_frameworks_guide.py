"""The code of the section on training loops runs as it stands on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_runs import train, vit

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "frameworks.md"


def test_code_of_the_section_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text().partition("## In your training loop")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"train": train, "torch": torch}
    for code in blocks:  # each is a process of its own, with a fresh model
        model = vit()
        names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
        exec(code, names)
    assert [check.stage for check in names["watch"].checks] == ["checkpoint loaded", "end"]  # type: ignore[attr-defined]
