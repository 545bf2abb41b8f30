"""The page of a run on images says which classes its network tells apart, by counts that another reader can repeat."""

from __future__ import annotations

import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from espalier.cli.main import main
from espalier.report import write_report
from espalier.train import load_run
from photos import COLOURS, TINY, write_photos


class Cells(HTMLParser):
    """The cells of every table, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def test_every_class_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    # A class whose name is markup: pages quote it.
    shutil.move(write_photos(tmp_path / "photos")[0].parent, tmp_path / "photos" / "<b>&apple")
    command = ["train", "digits_vit", "--dataset", "folder", "--data", str(tmp_path / "photos"), *TINY]
    assert main([*command, "--data-args.test-share", "0.4", "--quiet", "--out", str(tmp_path / "run")]) == 0
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    rows = {row[0]: row[1:] for row in Cells(page).rows if row and row[0] in {"<b>&apple", *COLOURS}}
    run = load_run(tmp_path / "run")
    names = sorted({*COLOURS, "<b>&apple"} - {"apple"})
    pairs: Counter[tuple[str, str]] = Counter()
    for images, labels in run.source().eval_batches("test", 5):
        for image, label in zip(images, labels.tolist(), strict=True):
            with torch.no_grad():
                pairs[names[label], names[int(run.model()(image[None]).argmax())]] += 1
    assert set(rows) == set(names)
    for name in names:
        total = sum(count for (true, _), count in pairs.items() if true == name)
        assert rows[name][0] == str(total)
        assert rows[name][1].startswith(f"{100 * pairs[name, name] / total:.1f} % (")
        wrong = {other: pairs[name, other] for other in names if other != name and pairs[name, other]}
        if wrong:
            assert any(rows[name][2].startswith(f"{other} (") for other in wrong if wrong[other] == max(wrong.values()))
        else:
            assert rows[name][2] == "nothing"
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    gone = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "Not counted" in gone
