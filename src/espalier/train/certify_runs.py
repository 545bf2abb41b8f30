"""Certificates and attacks of trained runs: the files lie beside the run folder, which is never written again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from espalier.certify.attack_report import AttackReport, challenge
from espalier.certify.certificate import EPSILONS, Certificate
from espalier.certify.radius import certify
from espalier.data import ImageSource, StreamSource
from espalier.errors import EspalierError
from espalier.randomness import derive_generator
from espalier.recipes import get_recipe
from espalier.train import Run, train
from espalier.train.manifest import file_digest
from espalier.train.run import FINAL

Kept = TypeVar("Kept", Certificate, AttackReport)


def certificate_path(run: Path | str) -> Path:
    """Return where the certificate of a run lies: ``RUN-certificate.json``, beside the folder."""
    return _beside(run, "certificate")


def attack_path(run: Path | str) -> Path:
    """Return where the attack report of a run lies: ``RUN-attack.json``, beside the folder."""
    return _beside(run, "attack")


def certify_run(run: Run, limit: int | None = None, arithmetic: str = "float64") -> Certificate:
    """Certify the final network of a run on its test images.

    Args:
        run: a finished run on images.
        limit: how many of the test images, in their stored order; None: all.
        arithmetic: ``"float64"`` or ``"float32"``; see ``certify``.

    Raises:
        EspalierError: an unfinished or diverged run, or one whose data are no images.
        UncertifiableError: a module without a known Lipschitz constant.
    """
    return replace(certify(*pixel_net(run, limit), arithmetic=arithmetic), weights=_weights_of(run))


def attack_run(
    run: Run,
    limit: int | None = None,
    *,
    steps: int = 40,
    restarts: int = 1,
    autoattack: bool = False,
    queries: int = 5000,
    eps: tuple[float, ...] = EPSILONS,
) -> AttackReport:
    """Certify the final network of a run on its test images and attack it; see ``challenge``.

    The starts of PGD come from the stream (seed of the run, "attack"), so the report can be made again.

    Args:
        run: a finished run on images.
        limit: how many of the test images; None: all.
        steps: gradient steps of PGD.
        restarts: random starts of PGD.
        autoattack: also try AutoAttack.
        queries: of AutoAttack's Square; 5,000 is the standard.
        eps: radii at which the accuracy under attack is wanted.

    Raises:
        EspalierError: as ``certify_run``.
    """
    tested = pixel_net(run, limit)
    report = challenge(
        *tested, certify(*tested), eps, steps=steps, restarts=restarts, autoattack=autoattack, queries=queries,
        generator=derive_generator(run.recipe.seed, "attack"),
    )  # fmt: skip
    return replace(report, weights=_weights_of(run))


def kept_certificate(run: Run) -> Certificate | None:
    """Return the certificate that lies beside a finished run, None where there is none.

    Raises:
        EspalierError: it is damaged, or of other weights: of an earlier run in a folder of this name.
    """
    path = certificate_path(run.path)
    return _of_these_weights(Certificate.load(path), path, run, "certify") if path.exists() else None


def kept_attack(run: Run) -> AttackReport | None:
    """Return the attack report that lies beside a finished run, None where there is none.

    Raises:
        EspalierError: as for ``kept_certificate``.
    """
    path = attack_path(run.path)
    return _of_these_weights(AttackReport.load(path), path, run, "attack") if path.exists() else None


def pixel_net(run: Run, limit: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a run's final network as a function of pixels in [0, 1], in evaluation mode, and its test images.

    Raises:
        EspalierError: an unfinished or diverged run, or one whose data are no images.
    """
    source = run.source()
    if not isinstance(source, ImageSource | StreamSource):
        raise EspalierError(f"run {run.path} was trained on {run.recipe.dataset!r}: only runs on images are certified")
    images, labels = source.images("test", limit)
    return nn.Sequential(source.normalizer, run.model()).eval(), images, labels


def parse_eps(texts: tuple[str, ...]) -> tuple[float, ...]:
    """Return radii given as ``36/255`` or ``0.1``.

    Raises:
        EspalierError: text that is no number from 0.
    """
    try:
        values = tuple(map(_ratio, texts))
    except (ValueError, ZeroDivisionError, OverflowError):
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise EspalierError(f"eps {' '.join(texts)!r}: write radii such as 36/255 or 0.1")
    if min(values, default=0.0) < 0:
        raise EspalierError(f"eps {' '.join(texts)!r}: a radius cannot be negative")
    return values


def _ratio(text: str) -> float:
    # Fraction would write 1e999999999 out, digit by digit.
    above, slash, below = text.partition("/")
    return int(above) / int(below) if slash else float(text)


def demo_certificate(out: Path, *, smallest: bool = False) -> tuple[Path, str]:
    """Train a small Cayley net on digits into ``out/digits_robust``, certify it, attack it; return the run folder and
    both tables.

    Args:
        out: folder of the run; the certificate and the attack report lie there too.
        smallest: one epoch and few images: everything runs, nothing is shown.

    Raises:
        CertificateBrokenError: a certified point fell.
    """
    recipe = get_recipe("digits_robust")
    recipe = replace(recipe, epochs=1) if smallest else recipe
    run = train(recipe, out / recipe.name, progress=False)
    certificate = certify_run(run)
    certificate.save(certificate_path(run.path))
    report = attack_run(run, 20 if smallest else 120, steps=20)
    report.save(attack_path(run.path))
    report.check()
    return run.path, f"{certificate}\n\n{report}"


def _weights_of(run: Run) -> str:
    return file_digest(run.path / FINAL) if (run.path / FINAL).exists() else ""  # of a diverged run there are none


def _of_these_weights(found: Kept, path: Path, run: Run, command: str) -> Kept:
    if found.weights and found.weights != _weights_of(run):  # the oldest files do not say of which they are
        raise EspalierError(
            f"{path} is of other weights than those of run {run.path}: espalier {command} {run.path} writes it anew"
        )
    return found


def _beside(run: Path | str, what: str) -> Path:
    folder = Path(run).resolve()
    return folder.with_name(f"{folder.name}-{what}.json")
