"""``--arms all``: every arm that the model has a place for, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from espalier.cli.commands import compare
from espalier.recipes import ARMS, get_recipe
from espalier.study import applicable_arms


def test_attention_models_get_the_attention_arms_and_convolutions_theirs() -> None:
    attention = applicable_arms(get_recipe("digits_vit"))
    assert attention[0] == "default"
    assert {"mimetic", "truncated-normal", "uniform-values", "zero-output", "identity-vo", "semi-orthogonal", "impulse",
            "mlp-mean-shift"} <= set(attention)  # fmt: skip
    # structured writes what mimetic writes on a model without another family, and nothing depthwise applies.
    assert not {"structured", "covariance", "covariance-frozen", "default-frozen"} & set(attention)
    convolution = applicable_arms(get_recipe("digits_convmixer"))
    assert convolution == ["default", "default-frozen", "covariance", "covariance-frozen"]
    assert set(attention) | set(convolution) <= set(ARMS)


def test_compare_expands_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned = []

    class Stop(Exception):
        pass

    def stop(recipe: object, *, arms: list[str], **rest: object) -> None:
        planned.extend(arms)
        raise Stop

    monkeypatch.setattr("espalier.report.write_report", None, raising=False)
    monkeypatch.setattr("espalier.study.compare", stop)
    recipe = get_recipe("digits_convmixer")
    with pytest.raises(Stop):
        compare(recipe, ["all"], tmp_path)
    assert planned == applicable_arms(recipe)
