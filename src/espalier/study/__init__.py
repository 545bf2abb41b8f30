"""Studies: arms × learning rates × seeds as trials, launched together, summarised with their uncertainty."""

from espalier.study.applicable import applicable_arms
from espalier.study.launcher import launch
from espalier.study.summary import Summary, summarise
from espalier.study.table import markdown_table, text_table
from espalier.study.trial import Study, Trial, load_study, plan_study

__all__ = [
    "Study",
    "Summary",
    "Trial",
    "applicable_arms",
    "launch",
    "load_study",
    "markdown_table",
    "plan_study",
    "summarise",
    "text_table",
]
