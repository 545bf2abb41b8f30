"""A finished run on the Hugging Face Hub: its model, with a card that says its recipe, numbers and certificate."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

from espalier.certify.certificate import EPSILONS
from espalier.errors import EspalierError, require
from espalier.models.hub import HubModel
from espalier.recipes import Recipe
from espalier.study.record import record_run
from espalier.train import Run, load_run
from espalier.train.certify_runs import certificate_path, kept_certificate
from espalier.train.run import RECIPE, read_structure

_CERTIFICATE, _RECORD = "certificate.json", "\n## Record\n"


def model_card(run: Run | str | Path) -> str:
    """Return the text of a model card: recipe, numbers, structure, record, and the certificate if there is one.

    Args:
        run: a finished run, or its folder.

    Raises:
        EspalierError: it is no run folder, the run is not finished, or the certificate beside it is of other weights.
    """
    run = run if isinstance(run, Run) else load_run(run)
    record = record_run(run, study=run.recipe.name, arm=run.recipe.init)
    score = "diverged" if record.score is None else f"{record.score:.4g}"
    defaults = Recipe("")
    fields = dataclasses.asdict(run.recipe)
    changed = {k: v for k, v in fields.items() if v != getattr(defaults, k) and k != "data_path"}
    numbers = {record.metric: score, **{name: f"{value:.4g}" for name, value in record.extra.items()}}
    parts = [
        f"# {run.recipe.name}",
        f"Trained with [Espalier](https://github.com/espalier/espalier): {record.epochs} epochs, {record.steps} steps, "
        f"seed {record.seed}, start `{run.recipe.init}`. Inputs are normalised as the recipe says "
        f"(`{run.recipe.normalize}`, with the statistics of the training set).",
        "## Numbers\n\n| metric | value |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in numbers.items()),
        "One run; how scores scatter from seed to seed is not shown by it.",
        f"## Recipe\n\n```json\n{json.dumps(changed, indent=2)}\n```",
    ]
    if (report := read_structure(run.path)) is not None:
        parts.append(f"## Structure at the start\n\n```text\n{report}\n```")
    if (proof := kept_certificate(run)) is not None:
        parts.append(f"## Certificate\n\n```text\n{proof.table(EPSILONS)}\n```")
    parts.append(f"## Record\n\n```json\n{record.line().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def save_run(run: Run | str | Path, folder: str | Path) -> Path:
    """Write a finished run's model for sharing: weights, configuration, card, recipe, and certificate.

    ``espalier.models.CLASS.from_pretrained(folder)`` reads it back.

    Args:
        run: a finished run of one of our models, or its folder.
        folder: it is made if need be. A README.md that it holds stays, unless it is another run's card.

    Raises:
        EspalierError: the run is not finished or has no weights, its model is not one of ours, the certificate beside
            it is of other weights, or ``folder`` is the run's own, no folder, or holds the card or certificate of
            other weights.
    """
    run = run if isinstance(run, Run) else load_run(run)
    model, folder = run.model(), Path(folder)
    if not isinstance(model, HubModel):
        raise EspalierError(f"run {run.path}: {type(model).__name__} is no model of ours: save it by its own means")
    card, proof = model_card(run), certificate_path(run.path)
    _refuse_others(run, folder, card, proof)
    try:
        model.save_pretrained(folder, card=card)
        shutil.copyfile(run.path / RECIPE, folder / RECIPE)
        if proof.exists():
            shutil.copyfile(proof, folder / _CERTIFICATE)
    except OSError as error:
        raise EspalierError(f"cannot write {folder} ({error.strerror}): name a folder with room") from error
    return folder


def _refuse_others(run: Run, folder: Path, card: str, proof: Path) -> None:
    """Refuse a folder where what is said of other weights would stand beside these."""
    if folder.exists() and not folder.is_dir():
        raise EspalierError(f"{folder} is no folder: name another one")
    if folder.resolve() == run.path.resolve():
        raise EspalierError(f"{folder} is the run's own folder, which is never written again: name another one")
    readme, kept = folder / "README.md", folder / _CERTIFICATE
    # The card may have been edited since; its measured parts are what must be this run's.
    if readme.is_file() and _RECORD in (text := readme.read_text(errors="replace")):
        measured = [part for part in card.split("\n## ") if part.startswith(("Certificate\n", "Record\n"))]
        if not all(part.strip() in text for part in measured):
            raise EspalierError(
                f"{readme} is a card of other weights or another certificate: remove it or name another folder"
            )
    if kept.is_file() and not (proof.exists() and kept.read_bytes() == proof.read_bytes()):
        raise EspalierError(f"{kept} is not this run's certificate: remove it or name another folder")


def push_run(run: Run | str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload what ``save_run`` writes to ``ORG/NAME`` and return the address of the commit.

    Args:
        run: a finished run of one of our models, or its folder.
        repo_id: the repository, made if need be.
        private: whether a new repository is private; by default as its organisation has it.
        token: by default the one of ``hf auth login``.

    Raises:
        EspalierError: see ``save_run``.
        MissingExtraError: huggingface_hub is not installed.
    """
    api = require("huggingface_hub", "hub").HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_run(run, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a run of espalier"))
