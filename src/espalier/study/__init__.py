"""Studies: arms × learning rates × seeds as trials, launched together, summarised with their uncertainty."""

from espalier.study.comparison import applicable_arms, compare
from espalier.study.launcher import launch
from espalier.study.record import Record, record_run
from espalier.study.records import add_records, read_records
from espalier.study.summary import Summary, summarise
from espalier.study.table import markdown_table, text_table
from espalier.study.trial import Study, Trial, load_study, plan_study

__all__ = [
    "Record",
    "Study",
    "Summary",
    "Trial",
    "add_records",
    "applicable_arms",
    "compare",
    "launch",
    "load_study",
    "markdown_table",
    "plan_study",
    "read_records",
    "record_run",
    "summarise",
    "text_table",
]
