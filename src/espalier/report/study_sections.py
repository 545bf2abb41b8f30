"""What a page says of a study."""

from __future__ import annotations

from collections.abc import Callable

from espalier.recipes import Recipe
from espalier.report.curves import learning_curves, score_over_rate
from espalier.report.section import Context, Markup, Section, bullets, counted, folded, paragraph, table
from espalier.study import Trial
from espalier.study.summary import Summary
from espalier.study.table import assumptions, cells, failure_lines, header, number, sentences
from espalier.train import Run

StudySection = Callable[[Summary, Context], Section | None]


def headline(summary: Summary, context: Context) -> Section:
    """Say what was found: one sentence an arm, the table, what it rests on, and what failed."""
    recipe, study = summary.study.recipe, summary.study
    what = f"Training function {recipe.name}"
    if isinstance(recipe, Recipe):
        what = f"Recipe {recipe.name}: model {recipe.model} on {recipe.dataset}, {counted(recipe.epochs, 'epoch')} of "
        what += f"batches of {recipe.batch_size}"
    setting = (
        f"{what}; {counted(len(study.arms), 'arm')} × {counted(len(study.lrs), 'learning rate')} × "
        f"{counted(len(study.seeds), 'seed')}, {len(summary.records)} of {len(study.trials())} runs finished."
    )
    parts = [paragraph(setting)]
    if found := sentences(summary):
        parts.append(bullets(found, "verdicts"))
    parts.append(table(header(summary), cells(summary), "numbers"))
    if summary.failures:
        parts.append(bullets(failure_lines(summary), "failures"))
    parts.append(folded("What the numbers rest on", bullets(assumptions(summary))))
    if isinstance(recipe, Recipe):
        changes = [[arm, ", ".join(f"{key} = {value!r}" for key, value in made.items()) or "nothing"]
                   for arm, made in study.arms.items()]  # fmt: skip
        parts.append(folded("What each arm changes in the recipe", table(("arm", "changes"), changes)))
    return Section("What was found", tuple(parts))


def first_runs(summary: Summary) -> dict[str, Run]:
    """Return the finished run of every arm at its best rate with the smallest seed, where there is one."""
    runs: dict[str, Run] = {}
    for arm in summary.arms:
        for seed in summary.study.seeds:
            if arm.arm not in runs and arm.best_lr is not None and (run := summary.run(arm.arm, arm.best_lr, seed)):
                runs[arm.arm] = run
    return runs


def trials(summary: Summary, context: Context) -> Section:
    """List every trial with its score, what became of it, and a link to its folder."""
    rows = [_trial_row(trial, summary, context) for trial in summary.study.trials()]
    header = ("arm", "lr", "seed", "score", "state", "ms per step", "folder")
    listed = folded(f"{counted(len(rows), 'run')}, with links to their folders", table(header, rows, "numbers"))
    return Section("All runs", (listed,))


def _trial_row(trial: Trial, summary: Summary, context: Context) -> list[str | Markup]:
    record = summary.records.get(trial.path)
    score = step = "–"
    if record is None:
        state = "unfinished" if trial.failure is None else "failed: " + trial.failure.partition("\n")[0]
    else:
        state = "diverged" if record.diverged else "finished"
        score = score if record.score is None else number(record.score, summary.is_share)
        step = step if record.step_seconds is None else f"{1e3 * record.step_seconds:.3g}"
    link: str | Markup = Markup(context.link(trial.path, str(trial.path.relative_to(summary.study.path))))
    if trial.record is not None and not trial.path.exists():
        link = "a record"
    return [trial.arm, f"{trial.lr:g}", str(trial.seed), score, state, step, link]


STUDY_SECTIONS: tuple[StudySection, ...] = (headline, learning_curves, score_over_rate)
"""In the order of the page; the pictures and the list of all runs follow."""
