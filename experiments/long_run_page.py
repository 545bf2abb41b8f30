"""The page of the long run's sessions (docs/results/long-run.md)."""

from __future__ import annotations

import json

from espalier.study.table import markdown_rows
from experiments.scheduler import COMMITTED

SESSIONS = COMMITTED.parent / "long-run.jsonl"
PLANNED_HOURS = 12.0
_COLUMNS = ("date", "processor", "hours", "stops", "restarts", "trials", "repeated", "lost", "other complaints",
            "longest process, minutes", "most MB more", "handles", "threads")  # fmt: skip


def long_run_page() -> str:
    """Return the page: what was lost in all sessions together, then one row a session."""
    sessions = [json.loads(line) for line in SESSIONS.read_text(encoding="utf-8").splitlines()]
    hours, trials, stops, lost = (
        sum(values) for values in zip(*(
            (s["hours"], s["trials"], sum(s["stops"].values()), s["lost"] + s["repeated"]) for s in sessions
        ), strict=True)
    )  # fmt: skip
    rows = [_COLUMNS]
    for s in sessions:
        stopped = ", ".join(f"{count} {kind}" for kind, count in sorted(s["stops"].items()))
        grown = (s["longest_minutes"], s["most_more_megabytes"], s["most_more_handles"], s["most_more_threads"])
        counts = (s["restarts"], s["trials"], s["repeated"], s["lost"], len(s["complaints"]))
        rows.append((s["date"], s["processor"], f"{s['hours']:g}", stopped, *map(str, counts),
                     *(f"{number:g}" for number in grown)))  # fmt: skip
    said = [line for s in sessions for line in s["complaints"]]
    return "\n".join([
        "<!-- Made from docs/results/long-run.jsonl by `make results`: do not edit. -->",
        "",
        "# The long run",
        "",
        f"**Finding: {trials} trials in {hours:.1f} hours of the queue ({PLANNED_HOURS:g} are planned) with {stops} "
        f"random stops: {lost or 'none'} lost or repeated.**",
        "",
        "`experiments/long_run.py` runs the queue of recall and image training, ends it or its trial at random moments "
        "with SIGTERM or SIGKILL, starts it again, and notes every twenty seconds what each process holds. What a "
        "process held at its end over what it held once warm is in the last three columns, of the process that gained "
        "most. Sessions with the same date may have run side by side, each with its own queue on its own core.",
        "",
        *markdown_rows(rows),
        *(["", "Complaints:", "", *(f"- {line}" for line in said)] if said else []),
        "",
    ])  # fmt: skip
