"""The loop's tests run on stand-ins: what is tested is the loop, not the data or the models."""

from __future__ import annotations

import pytest
import standins

from espalier import data, models
from espalier.data.source import Source
from espalier.recipes.base import Recipe


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the builders of data and models; recipe.data_args reach the stand-in source."""

    def build_source(recipe: Recipe) -> Source:
        return standins.build_source(recipe)

    monkeypatch.setattr(data, "build_source", build_source, raising=False)
    monkeypatch.setattr(models, "build_model", standins.build_model, raising=False)
