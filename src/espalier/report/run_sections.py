"""What a page says of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from espalier.doctor import diagnose
from espalier.init.report import describe_measured
from espalier.recipes import Recipe, get_recipe, recipe_functions
from espalier.report.confusion import confusion
from espalier.report.curves import run_curves
from espalier.report.robustness import robustness
from espalier.report.section import Context, Markup, Section, counted, folded, paragraph, table
from espalier.train import Run
from espalier.train.run import ENVIRONMENT, START, read_part, read_structure

RunSection = Callable[[Run, Context], Section | None]


def outcome(run: Run, context: Context) -> Section:
    """Say how the run ended and where its folder is."""
    recipe, result = run.recipe, run.result
    if result is None:
        text = f"Unfinished after {max((row['epoch'] for row in run.rows), default=0)} of {recipe.epochs} epochs."
    elif result.get("diverged"):
        reached = counted(result["epochs"], "epoch")
        text = f"Diverged: its loss or its weights stopped being finite; no score. It went through {reached}."
    else:
        text = (
            f"{result['metric']} {result['score']:.4g} after {counted(result['epochs'], 'epoch')} and "
            f"{counted(result['steps'], 'step')}, {result['seconds']:.3g} s of training."
        )
    setting = f"Recipe {recipe.name}: model {recipe.model} on {recipe.dataset}, init {recipe.init}, seed {recipe.seed}."
    link = Markup(f"<p>Folder: {context.link(run.path)}</p>")
    return Section("What was found", (paragraph(text), paragraph(setting), link))


def structure(run: Run, context: Context) -> Section | None:
    """List what was written into the network before training and what was measured of it there."""
    report = read_structure(run.path)
    if report is None:
        return None
    rows = []
    for row in report.layers:
        measured = {name: value for name, value in row.measured.items() if value == value}  # no NaN
        words = describe_measured(replace(row, measured=measured))
        rows.append((row.layer or "(model)", row.kind, row.host, row.status, row.asked, words))
    header = ("layer", "kind", "host", "status", "asked", "measured at the start")
    return Section("Structure written", (table(header, rows),))


def health(run: Run, context: Context) -> Section | None:
    """List what the doctor finds wrong with the weights that the run started from, the worst first."""
    if not (run.path / START).exists():
        return None
    diagnosis = diagnose(run.model("start"))
    rows = [(f.severity, f.layer or "(model)", f.check, f.measured, f.usual, f.remedy) for f in diagnosis.findings]
    if not rows:
        return Section("Health at the start", (paragraph(str(diagnosis)),))
    listed = table(("severity", "layer", "check", "measured", "usual", "remedy"), rows)
    if not (diagnosis.errors or diagnosis.warnings):
        listed = folded("Notes", listed)
    return Section("Health at the start", (paragraph(str(diagnosis).splitlines()[0]), listed))


def recipe(run: Run, context: Context) -> Section:
    """List the fields that differ from the recipe of this name, and fold the whole recipe away."""
    name, known = run.recipe.name, run.recipe.name in recipe_functions()
    base = get_recipe(name) if known else Recipe(name=name)
    values = {field.name: (getattr(run.recipe, field.name), getattr(base, field.name)) for field in fields(Recipe)}
    changed = [(key, repr(mine), repr(theirs)) for key, (mine, theirs) in values.items() if mine != theirs]
    there = f"in recipe {name}" if known else "by default"
    everything = folded("The whole recipe", table(("field", "value"), [(k, repr(v)) for k, (v, _) in values.items()]))
    first = table(("field", "here", there), changed) if changed else paragraph(f"As {there}, unchanged.")
    return Section("Recipe", (first, everything))


def environment(run: Run, context: Context) -> Section | None:
    """List what the run ran on."""
    if not (run.path / ENVIRONMENT).exists():
        return None
    rows = [(key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
            for key, value in read_part(run.path, ENVIRONMENT).items()]  # fmt: skip
    return Section("Environment", (folded("Versions and machine", table((), rows)),))


RUN_SECTIONS: tuple[RunSection, ...] = (
    outcome,
    run_curves,
    confusion,
    robustness,
    structure,
    health,
    recipe,
    environment,
)
"""In the order of the page; the pictures follow the curves' end. A room that measures runs adds its own."""
