"""Commands on finished runs: what they say of images, files for other programs, certificates and attacks."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.cli.messages import say
from espalier.errors import shown

if TYPE_CHECKING:
    from espalier.train import Run


def predict(run: Path, images: Sequence[Path], top: int = 1, json: bool = False) -> None:
    """Say which class a run's network sees in each image; its training data are not needed.

    Args:
        run: a finished run on images.
        images: image files, or folders of them.
        top: how many classes, with their probabilities.
        json: print one object by file instead of a table.
    """
    from espalier.train import load_run
    from espalier.train.predict import predict as predict_images

    found = predict_images(load_run(run), list(images), top)
    if json:
        print(json_format.dumps({str(file): dict(classes) for file, classes in found.items()}, indent=2))
        return
    width = max(len(shown(file)) for file in found)
    for file, classes in found.items():
        print(f"{shown(file):<{width}}  {', '.join(f'{shown(name)} {share:.3f}' for name, share in classes)}")


def export(run: Path, to: Literal["onnx", "torch-export", "safetensors"] = "onnx", out: Path | None = None) -> None:
    """Write a run's network to one file, its normalisation inside: pixels in [0, 1] to logits, for any batch.

    Args:
        run: a finished run on images.
        to: the format; onnx and torch-export are tried here on batches of three sizes.
        out: the file; RUN.onnx, RUN.pt2 or RUN.safetensors beside the run folder by default.
    """
    from espalier.train import load_run
    from espalier.train.export import export_run

    print(f"network: {export_run(load_run(run), to, out)}")


def certify(
    run: Path,
    eps: tuple[str, ...] = ("36/255", "72/255", "108/255"),
    limit: int | None = None,
    arithmetic: Literal["float64", "float32"] = "float64",
    slack: bool = False,
    data: Path | None = None,
    out: Path | None = None,
) -> None:
    """Prove how far every test image of a run can move before its class can change, and print certified accuracies.

    Args:
        run: a finished run on images.
        eps: l2 radii in [0, 1] pixel units, such as 36/255 or 0.1.
        limit: how many test images; all by default.
        arithmetic: what the certificate is about: the net as evaluated in float64, or in float32 with a larger charge.
        slack: print the constant and the rounding of every module.
        data: where the run's data lie now, if they were moved.
        out: the file of the certificate; RUN-certificate.json beside the run folder by default.
    """
    from espalier.train.certify_runs import certificate_path, certify_run, parse_eps

    radii = parse_eps(eps)
    certificate = certify_run(_with_data(run, data), limit, arithmetic)
    print(certificate.table(radii))
    if slack:
        print(f"\n{certificate.slack_table()}")
    print(f"certificate: {certificate.save(out or certificate_path(run))}")


def attack(
    run: Path,
    eps: tuple[str, ...] = ("36/255", "72/255", "108/255"),
    limit: int | None = None,
    steps: int = 40,
    restarts: int = 1,
    autoattack: bool = False,
    queries: int = 5000,
    data: Path | None = None,
    out: Path | None = None,
) -> None:
    """Attack a run's test images, certified ones at their own radius; status 1 if a certified one falls.

    Args:
        run: a finished run on images.
        eps: l2 radii in [0, 1] pixel units, such as 36/255 or 0.1.
        limit: how many test images; all by default.
        steps: gradient steps of PGD.
        restarts: random starts of PGD.
        autoattack: also try AutoAttack on what PGD leaves.
        queries: of AutoAttack's Square, most of the time; 5,000 is the standard.
        data: where the run's data lie now, if they were moved.
        out: the file of the report; RUN-attack.json beside the run folder by default.
    """
    from espalier.certify import CertificateBrokenError
    from espalier.train.certify_runs import attack_path, attack_run, parse_eps

    report = attack_run(
        _with_data(run, data), limit, steps=steps, restarts=restarts, autoattack=autoattack, queries=queries,
        eps=parse_eps(eps),
    )  # fmt: skip
    print(report)
    print(f"report: {report.save(out or attack_path(run))}")
    try:
        report.check()
    except CertificateBrokenError as error:
        say(f"espalier: {error}")
        raise SystemExit(1) from None


def _with_data(path: Path, data: Path | None) -> Run:
    """Return a run with its data at another place; whether they are the same is looked at when they are read."""
    from espalier.train import load_run

    run = load_run(path)
    return run if data is None else replace(run, recipe=replace(run.recipe, data_path=str(data)))
