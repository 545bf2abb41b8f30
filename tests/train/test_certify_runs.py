"""Certificates of run folders, and the two commands: files beside the run, status 1 for a broken certificate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.certify import Certificate
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.train import certify_runs as runs
from espalier.train import load_run, train
from espalier.train.certify_runs import attack_path, certificate_path, demo_certificate, parse_eps
from photos import write_photos


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small Cayley net, trained on some of the digits."""
    recipe = replace(
        get_recipe("digits_robust"), model_args={"width": 4, "hidden": 16}, epochs=3, threads=1,
        data_args={"train_limit": 500, "test_limit": 40},
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "net"
    train(recipe, out, progress=False)
    return out


def test_certify_and_attack_write_beside_the_run_and_leave_it_alone(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    assert main(["certify", str(run_folder), "--eps", "36/255", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "36/255" in said
    assert "\n0.1 " in said
    certificate = Certificate.load(certificate_path(run_folder))
    assert certificate_path(run_folder).parent == run_folder.parent
    assert len(certificate) == 40
    # Certified in float64, scored in float32: an image on the border between two classes may fall to the other side.
    assert certificate.clean_accuracy == pytest.approx(load_run(run_folder).result["score"], abs=1.5 / 40)
    assert 0 < certificate.certified_accuracy(36 / 255) < certificate.clean_accuracy
    assert main(["attack", str(run_folder), "--limit", "20", "--steps", "5"]) == 0
    assert "none fell" in capsys.readouterr().out
    report = json.loads(attack_path(run_folder).read_text())
    assert report["broken"] == []
    assert len(report["distances"]) == 20
    assert all(d is None or d >= r for d, r in zip(report["distances"], certificate.radii, strict=False))
    assert {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()} == before


def test_a_broken_certificate_ends_the_command_with_status_1(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = runs.certify

    def boastful(*arguments: object) -> Certificate:
        found = honest(*arguments)  # type: ignore[arg-type]
        return replace(found, radii=tuple(4 * radius for radius in found.radii))

    monkeypatch.setattr(runs, "certify", boastful)
    out = tmp_path / "attack.json"
    with pytest.raises(SystemExit) as stop:
        main(["attack", str(run_folder), "--limit", "20", "--steps", "5", "--out", str(out)])
    assert stop.value.code == 1
    assert "fell within their radius" in capsys.readouterr().err
    assert json.loads(out.read_text())["broken"]


def test_what_cannot_be_certified_ends_with_status_2(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(get_recipe("digits_vit"), epochs=1, threads=1, data_args={"train_limit": 64, "test_limit": 10})
    train(recipe, tmp_path / "vit", progress=False)
    assert main(["certify", str(tmp_path / "vit")]) == 2
    assert "no Lipschitz constant for 1" in capsys.readouterr().err
    assert main(["certify", str(run_folder), "--eps", "wide"]) == 2
    assert main(["certify", str(tmp_path)]) == 2


def test_radii_are_read_as_fractions_or_decimals() -> None:
    assert parse_eps(("36/255", "0.1", "1")) == (36 / 255, 0.1, 1.0)
    # As a fraction the last one has a thousand million digits.
    for text in ("-1", "1/0", "nan", "", "inf", "1/-3", "0.5/2", "1e999999999"):
        with pytest.raises(EspalierError, match="eps"):
            parse_eps((text,))


def test_the_demo_s_arm_runs_at_its_smallest(tmp_path: Path) -> None:
    run, text = demo_certificate(tmp_path, smallest=True)
    assert load_run(run).result is not None
    assert "certified accuracy" in text
    assert "under attack" in text
    assert (tmp_path / "digits_robust-certificate.json").exists()


def test_data_that_moved_are_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 4)
    write_photos(tmp_path / "others", 5)
    words = ["--dataset", "folder", "--data", "photos", "--data-args.size", "16", "--width", "4", "--hidden", "16"]
    words += ["--epochs", "1", "--batch-size", "4", "--threads", "1", "--quiet", "--out", "run"]
    assert main(["train", "digits_robust", *words]) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    for command in (["certify", "run"], ["attack", "run", "--steps", "1"]):
        assert main(command) == 2
        assert "photos: give its place with --data, or put it back" in capsys.readouterr().err
        assert main([*command, "--data", "others"]) == 2
        assert "the data of run have changed" in capsys.readouterr().err
        assert main([*command, "--data", "moved"]) == 0


def test_an_unknown_option_is_named_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "espalier:vit", "--data", "x"]) == 2
    error = capsys.readouterr().err
    assert error == "espalier: unknown option of audit '--data': choose one of --heads, --help, --picture\n"
    assert main(["recipes", "--all"]) == 2
    assert capsys.readouterr().err == "espalier: unknown option of recipes '--all': did you mean '--help'?\n"


def test_a_streamed_run_is_certified_as_one_in_memory(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 5)
    certificates = []
    for storage in ("memory", "stream"):
        recipe = replace(
            get_recipe("digits_robust"), dataset="folder", data_path=str(tmp_path / "photos"), epochs=1, threads=1,
            batch_size=4, data_args={"size": 16, "storage": storage}, model_args={"width": 4, "hidden": 16},
        )  # fmt: skip
        train(recipe, tmp_path / storage, progress=False)
        certificates.append(runs.certify_run(load_run(tmp_path / storage)))
    held, streamed = certificates
    assert held.radii == pytest.approx(streamed.radii, rel=1e-4)
    assert held.labels == streamed.labels
