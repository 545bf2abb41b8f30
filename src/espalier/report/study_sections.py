"""What a page says of a study."""

from __future__ import annotations

from collections.abc import Callable

from espalier.recipes import Recipe
from espalier.report.curves import learning_curves, score_over_rate
from espalier.report.pictures import picture_sections
from espalier.report.section import Context, Markup, Section, bullets, counted, folded, paragraph, table
from espalier.study import Trial
from espalier.study.summary import ArmSummary, Summary
from espalier.study.table import assumptions, cells, failure_lines, header, number, sentences
from espalier.train import Run

StudySection = Callable[[Summary, Context], Section | None]


def headline(summary: Summary, context: Context) -> Section:
    """Say what was found: one sentence an arm, the table, what it rests on, and what failed."""
    recipe, study = summary.study.recipe, summary.study
    what = f"Training function {recipe.name}"
    if isinstance(recipe, Recipe):
        what = (
            f"Recipe {recipe.name}: model {recipe.model} on {recipe.dataset}, {counted(recipe.epochs, 'epoch')} of "
            f"batches of {recipe.batch_size}"
        )
    setting = (
        f"{what}; {counted(len(study.arms), 'arm')} × "
        f"{counted(len(study.lrs), 'learning rate')} × {counted(len(study.seeds), 'seed')}, "
        f"{len(summary.records)} of {len(study.trials())} runs finished."
    )
    changes = [[arm, ", ".join(f"{key} = {value!r}" for key, value in made.items()) or "nothing"]
               for arm, made in study.arms.items()]  # fmt: skip
    found = sentences(summary)
    verdicts = [bullets(found, "verdicts")] if found else []
    parts = [paragraph(setting), *verdicts, table(header(summary), cells(summary), "numbers")]
    if summary.failures:
        parts.append(bullets(failure_lines(summary), "failures"))
    parts.append(folded("What the numbers rest on", bullets(assumptions(summary))))
    if isinstance(recipe, Recipe):
        parts.append(folded("What each arm changes in the recipe", table(("arm", "changes"), changes)))
    return Section("What was found", tuple(parts))


def pictures(summary: Summary, context: Context) -> list[Section]:
    """Draw the first run of every arm at its best rate, at the start and at the end."""
    return picture_sections({arm.arm: run for arm in summary.arms if (run := first_run(arm, summary)) is not None})


def first_run(arm: ArmSummary, summary: Summary) -> Run | None:
    """Return the finished run of an arm at its best rate with the smallest seed, None where there is none."""
    if arm.best_lr is None:
        return None
    runs = (summary.run(arm.arm, arm.best_lr, seed) for seed in summary.study.seeds)
    return next((run for run in runs if run is not None), None)


def trials(summary: Summary, context: Context) -> Section:
    """List every trial with its score, what became of it, and a link to its folder."""
    rows = [_trial_row(trial, summary, context) for trial in summary.study.trials()]
    header = ("arm", "lr", "seed", "score", "state", "ms per step", "folder")
    return Section(
        "All runs",
        (folded(f"{counted(len(rows), 'run')}, with links to their folders", table(header, rows, "numbers")),),
    )


def _trial_row(trial: Trial, summary: Summary, context: Context) -> list[str | Markup]:
    record = summary.records.get(trial.path)
    score, step = (None, None) if record is None else (record.score, record.step_seconds)
    state = "finished" if record is not None else "unfinished"
    if record is not None and record.diverged:
        state = "diverged"
    elif trial.failure is not None:
        state = "failed: " + trial.failure.partition("\n")[0]
    name = str(trial.path.relative_to(summary.study.path))
    link: str | Markup = Markup(context.link(trial.path, name))
    if trial.record is not None and not trial.path.exists():
        link = "a record"
    return [
        trial.arm,
        f"{trial.lr:g}",
        str(trial.seed),
        "–" if score is None else number(score, summary.is_share),
        state,
        "–" if step is None else f"{1e3 * step:.3g}",
        link,
    ]


STUDY_SECTIONS: tuple[StudySection, ...] = (headline, learning_curves, score_over_rate)
"""In the order of the page; the pictures and the list of all runs follow."""
