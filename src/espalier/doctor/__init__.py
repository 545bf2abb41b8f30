"""Is this model healthy before its first step? Checks of the weights, and a probe with a batch."""

from espalier.doctor import checks  # noqa: F401  (registers the built-in checks)
from espalier.doctor.diagnosis import Diagnosis
from espalier.doctor.examination import diagnose
from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Finding, register_check
from espalier.doctor.stats import TensorStats

__all__ = ["Diagnosis", "Finding", "Patient", "Record", "TensorStats", "diagnose", "register_check"]
