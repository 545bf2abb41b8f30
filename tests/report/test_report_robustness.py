"""The page's section on certificates: there when a certificate is, with the numbers of its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from espalier.recipes import get_recipe
from espalier.report.robustness import _survival, robustness
from espalier.report.section import Context, Plot
from espalier.train import load_run, train
from espalier.train.certify_runs import attack_path, attack_run, certificate_path, certify_run


def test_a_run_without_a_certificate_has_no_section_and_one_with_it_shows_its_numbers(tmp_path: Path) -> None:
    recipe = replace(
        get_recipe("digits_robust"), model_args={"width": 4, "hidden": 16}, epochs=2, threads=1,
        data_args={"train_limit": 300, "test_limit": 30},
    )  # fmt: skip
    train(recipe, tmp_path / "net", progress=False)
    run, context = load_run(tmp_path / "net"), Context(tmp_path, {})
    assert robustness(run, context) is None
    certificate = certify_run(run)
    certificate.save(certificate_path(run.path))
    section = robustness(run, context)
    plot = section.parts[0]
    assert isinstance(plot, Plot)
    assert [trace.name for trace in plot.figure.data] == ["certified"]
    attack_run(run, 10, steps=3).save(attack_path(run.path))
    section = robustness(run, context)
    attacked, certified = section.parts[0].figure.data
    assert (attacked.name, certified.name) == ("under attack", "certified")
    # A step curve that starts with what is right and certified at radius 0.
    assert certified.y[sum(radius == 0 for radius in certificate.radii) - 1] == pytest.approx(
        100 * certificate.certified_accuracy(0.0)
    )
    words = "".join(getattr(part, "html", "") for part in section.parts)
    for path, constant, _ in certificate.slack:
        assert f"<td>{path}</td><td>{constant:.9g}</td>" in words
    assert words.count("data:image/png") >= 3
    assert f"certified radius {max(certificate.radii):.3f}" in words


def test_what_was_proved_of_an_earlier_run_of_the_name_is_not_shown_of_this_one(tmp_path: Path) -> None:
    recipe = replace(
        get_recipe("digits_robust"), model_args={"width": 4, "hidden": 16}, epochs=1, threads=1,
        data_args={"train_limit": 200, "test_limit": 30},
    )  # fmt: skip
    run, context = train(recipe, tmp_path / "net", progress=False), Context(tmp_path, {})
    certificate = certify_run(run)
    certificate.save(certificate_path(run.path))
    attack_run(run, 5, steps=1).save(attack_path(run.path))
    assert len(robustness(run, context).parts) > 3
    run.path.rename(tmp_path / "old")
    train(replace(recipe, seed=1, data_args={"train_limit": 200, "test_limit": 20}), tmp_path / "net", progress=False)
    again = load_run(tmp_path / "net")
    words = "".join(part.html for part in robustness(again, context).parts)
    assert "is of other weights" in words
    assert "data:image" not in words
    replace(certificate, weights="").save(certificate_path(run.path))  # as the first version wrote them
    attack_path(run.path).unlink()
    assert "is of other images" in "".join(part.html for part in robustness(again, context).parts)
    certify_run(again).save(certificate_path(run.path))
    assert len(robustness(again, context).parts) > 3


def test_a_survival_curve_counts_what_is_strictly_above() -> None:
    height = dict(_survival([0.0, 0.2, 0.2, 0.5, float("inf")], 1.0))
    assert height[0.0] == 80
    assert height[0.2] == 40
    assert height[1.0] == 20
