"""The pages of docs/results that are made from records: their words, and the experiments that each of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from espalier.study.table import NOTES, assumptions, markdown_findings, markdown_rows
from experiments import attention, convmixer, filters, recall, robustness
from experiments.claims import CLAIMS
from experiments.evidence import NOT_RUN, Results
from experiments.experiment import MOST_SEEDS, Experiment
from experiments.measured import MADE
from experiments.pictures import score_over_rate


@dataclass(frozen=True)
class Page:
    """One page of results."""

    file: str
    title: str
    intro: str
    experiments: Sequence[Experiment]
    archive: str = ""
    """The page of version 0.1.0 whose runs are lost."""


PAGES: Sequence[Page] = (
    Page(
        "recall.md",
        "Recall: the mimetic start of state-space models",
        "Copying: strings of up to 12 symbols from 9, 600 steps of 32. Multi-query recall: 4 pairs within 64 tokens of "
        "a vocabulary of 8,192, 2,000 steps of 64. The score is the share of tokens that are right at the training "
        "length; a run solves the task from 90 %.",
        (
            *recall.MQAR.values(),
            recall.CONTROL,
            recall.LONGER,
            recall.WINDOW,
            recall.LAYERS,
            recall.TEXT,
            *recall.ACROSS,
            recall.PARTS,
            *recall.CAPACITY,
        ),
        "archive/recall.md",
    ),
    Page(
        "attention.md",
        "Attention: mimetic initialisation of vision transformers",
        "transformers' ViT on a part of CIFAR-10, and ours on all of it. The score is the accuracy on test images.",
        (attention.CIFAR10, attention.SMALL),
        "archive/attention.md",
    ),
    Page(
        "filters.md",
        "Filters: what the closed form of their covariance is worth",
        "Small nets with depthwise convolutions see 2,000 CIFAR-10 images for 8 epochs; the score is the accuracy on "
        "2,000 test images. Frozen filters stay as they were drawn.",
        (*filters.WORTH, filters.CONVNEXT, *filters.TRANSFER, *filters.SWITCHED),
        "archive/filters.md",
    ),
    Page(
        "convmixer.md",
        "ConvMixer: against other nets of its size, and what patches do",
        "Small nets on a part of CIFAR-10, the same recipe for all and the best of several rates for each. The score "
        "is the accuracy on test images.",
        (convmixer.EQUAL_PARAMETERS, *convmixer.PATCHES.values()),
    ),
    Page(
        "robustness.md",
        "Robustness: certified accuracy of orthogonal layers",
        "Nets of orthogonal convolutions of several kinds, on all of Fashion-MNIST or CIFAR-10. The score is the share "
        "of test images that are classified right and certified at an ℓ2 radius of 36/255.",
        (
            robustness.EQUAL_EPOCHS,
            robustness.EQUAL_TIME,
            robustness.LAYERS_CIFAR10,
            *robustness.MINUTES.values(),
            *robustness.HOURS.values(),
            robustness.SCALE,
        ),
        "archive/robustness.md",
    ),
)


def page_text(page: Page, results: Results) -> tuple[str, dict[str, str]]:
    """Return a page as Markdown, and its pictures by file name."""
    run = [each for each in page.experiments if results.summary(each).records]
    waiting = [each for each in page.experiments if each not in run]
    lines = [MADE, "", f"# {page.title}", "", _finding(page, results), "", page.intro, "", _seeds_rule(), ""]
    pictures: dict[str, str] = {}
    for experiment in run:
        lines += _section(experiment, results, pictures)
    if waiting:
        lines += ["## Not run yet", "", *(f"- {each.title} (`{each.name}`)" for each in waiting), ""]
    if run:
        summary = results.summary(run[0])
        lines += ["## What the numbers rest on", "", *(f"- {text}" for text in (*assumptions(summary), *NOTES)), ""]
    if page.archive:
        lines += [
            "## Version 0.1.0",
            "",
            f"The tables of version 0.1.0 were typed by hand and their runs are lost: [they are kept]({page.archive}) "
            "until records replace them.",
            "",
        ]
    return "\n".join(lines), pictures


def index_text(results: Results) -> str:
    """Return the table of claims as Markdown."""
    found = {claim.key: claim.judge(results) for claim in CLAIMS}
    counts = {}
    for evidence in found.values():
        counts[evidence.verdict] = counts.get(evidence.verdict, 0) + 1
    said = ", ".join(f"{count} *{verdict}*" for verdict, count in sorted(counts.items()))
    header = ("", "paper", "claim", "verdict", "n", "result, 95 % interval", "setting, and how far from theirs", "more")
    rows = [header]
    for claim in CLAIMS:
        evidence = found[claim.key]
        link = f"[page]({claim.page}); {claim.command}" if claim.page else claim.command
        row = (claim.key, claim.paper, claim.says, f"*{evidence.verdict}*", str(evidence.n), evidence.text)
        rows.append((*row, claim.setting, link))
    records = len(results.records)
    lines = [
        MADE,
        "",
        "# Which of the papers' claims hold here?",
        "",
        f"**Of {len(CLAIMS)} claims: {said}** ({records} trials on record).",
        "",
        "A claim is *shown* where the 95 % interval of its figure lies above zero, *contradicted* where it lies "
        "below, *not shown* where it holds zero, and *not run at this scale* with fewer than three paired seeds. Where "
        "a claim needs several comparisons, the weakest verdict stands. n counts paired seeds (S1.3: settings). "
        "Differences are in points of accuracy, each arm at its own best rate.",
        "",
        *markdown_rows(rows),
        "",
        _seeds_rule(),
        "",
        "`make results` writes this page and the others from the [records](records/README.md).",
        "",
    ]
    return "\n".join(lines)


def _finding(page: Page, results: Results) -> str:
    mine = [claim for claim in CLAIMS if claim.page == page.file]
    found = [(claim, claim.judge(results)) for claim in mine]
    parts = [
        f"{claim.key} {evidence.verdict}" + (f" ({evidence.text})" if evidence.verdict != NOT_RUN else "")
        for claim, evidence in found
    ]
    return f"**Finding:** {'; '.join(parts)}. [The claims](index.md)."


def _seeds_rule() -> str:
    return (
        f"Seeds: every experiment plans its number beforehand; a pair whose interval then holds zero gets seeds up to "
        f"{MOST_SEEDS}, at every rate, without another look in between, unless its section says that their number is "
        "fixed."
    )


def _section(experiment: Experiment, results: Results, pictures: dict[str, str]) -> list[str]:
    summary = results.summary(experiment)
    records = list(summary.records.values())
    processors = sorted({record.processor for record in records if record.processor})
    commits = sorted({record.commit[:7] for record in records if record.commit})
    days = sorted({record.date for record in records if record.date})
    lines = [f"## {experiment.title}", "", "```", f"python experiments/queue.py --only {experiment.name}", "```", ""]
    said = f"{len(records)} of {len(summary.study.trials())} trials"
    if days:
        said += f", {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    said += f", on {', '.join(processors) or 'an unnamed processor'}, at commit {', '.join(commits) or 'unknown'}."
    if not experiment.extend:
        said += f" Their number of seeds is fixed: {experiment.seeds}."
    lines += [f"{said} Machines were shared: times per step mean little.", ""]
    if len(summary.study.lrs) > 1 and any(point.scores for arm in summary.arms for point in arm.rates):
        name = f"{experiment.name}.svg"
        pictures[name] = score_over_rate(summary, experiment.title)
        lines += [f"![Score over learning rate](pictures/{name})", ""]
    return [*lines, *markdown_findings(summary), ""]
