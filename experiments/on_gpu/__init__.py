"""The parts of ``experiments/gpu.py``: where results go, how things are timed, and what is timed and trained."""
