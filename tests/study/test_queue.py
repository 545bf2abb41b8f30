"""The queue: its order, the rule of seeds, and that stopping or killing it loses no finished trial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from queue_order import ENDLESS, ORDER, TINY

from espalier.study.record import Record, record_run
from espalier.study.records import read_records
from espalier.train import load_run
from experiments.experiment import BATCH, MOST_SEEDS, ROW_SEEDS, Experiment
from experiments.scheduler import missing, parse_duration
from fabricated_runs import fabricate

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the queue's trials end with their parent on POSIX only")


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a queue of its own."""
    paths = [str(ROOT), str(ROOT / "src"), str(Path(__file__).parent)]
    command = [
        sys.executable,
        str(ROOT / "experiments" / "queue.py"),
        "--out",
        str(out),
        "--committed",
        str(out / "no"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "QUEUE_NICE": "0"}
    return subprocess.Popen(
        [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(experiment: Experiment, out: Path, scores: dict[str, list[float]], seeds: range) -> list[Record]:
    """Return records of some seeds of every arm, as if they had run."""
    records = []
    for trial in replace(experiment, seeds=seeds.stop, extend=False).first(out).trials():
        if trial.seed in seeds:
            path = out / "made" / trial.arm / f"{trial.lr:g}-{trial.seed}"
            fabricate(trial.recipe, path, scores[trial.arm][trial.seed])
            records.append(record_run(load_run(path), experiment.name, trial.arm))
    return records


def test_missing_rows_come_before_missing_seeds(tmp_path: Path) -> None:
    order = [
        Experiment("dear", "", TINY, ("default", "covariance"), (1e-2,), seeds=ROW_SEEDS + 2, minutes=9.0),
        Experiment("cheap", "", TINY, ("default",), (1e-2, 1e-3), seeds=ROW_SEEDS, minutes=1.0, extend=False),
    ]
    found = [(experiment.name, trial.seed) for experiment, trial in missing(order, tmp_path, [])]
    rows = [("dear", seed) for seed in range(ROW_SEEDS) for _ in range(2)]
    rows += [("cheap", seed) for seed in range(ROW_SEEDS) for _ in range(2)]
    assert found == rows + [("dear", seed) for seed in (ROW_SEEDS, ROW_SEEDS + 1) for _ in range(2)]
    half = finished(order[0], tmp_path, {"default": [0.1] * 9, "covariance": [0.2] * 9}, range(1))
    assert [(e.name, t.seed) for e, t in missing(order, tmp_path, half)] == found[2:]


def test_only_undecided_pairs_get_seeds_and_the_look_is_taken_once(tmp_path: Path) -> None:
    experiment = Experiment("e", "", TINY, ("default", "covariance", "impulse"), (1e-2,), seeds=3, minutes=1.0)
    base = [0.50, 0.51, 0.52, *[0.0] * 7]
    scores = {"default": base, "covariance": [s + 0.1 for s in base], "impulse": [0.52, 0.50, 0.51, *[1.0] * 7]}
    first = finished(experiment, tmp_path, scores, range(3))

    def asked(records: list[Record]) -> dict[str, int]:
        trials = experiment.study(tmp_path, records).trials()
        return {arm: sum(trial.arm == arm for trial in trials) for arm in experiment.arms}

    assert asked([]) == asked(first[:-1]) == {"default": 3, "covariance": 3, "impulse": 3}
    assert asked(first) == {"default": MOST_SEEDS, "covariance": 3, "impulse": MOST_SEEDS}
    # The later seeds would decide the pair at once; the rule does not look at them.
    later = finished(experiment, tmp_path, scores, range(3, 7))
    assert asked([*first, *later]) == asked(first)
    waiting = [trial.seed for _, trial in missing([experiment], tmp_path, [*first, *later])]
    assert waiting == [7, 7, 8, 8, 9, 9]
    fixed = replace(experiment, extend=False)
    assert not list(missing([fixed], tmp_path, first))


def test_seeds_are_added_a_batch_for_each_in_turn(tmp_path: Path) -> None:
    order = [Experiment(name, "", TINY, ("default", "impulse"), (1e-2,), seeds=3, minutes=1.0) for name in ("a", "b")]
    scores = {"default": [0.50, 0.51, 0.52], "impulse": [0.52, 0.50, 0.51]}
    records = [record for each in order for record in finished(each, tmp_path / each.name, scores, range(3))]
    found = [(experiment.name, trial.seed) for experiment, trial in missing(order, tmp_path, records)]
    assert found[: 4 * BATCH] == [(name, 3 + seed) for name in ("a", "b") for seed in range(BATCH) for _ in range(2)]
    assert len(found) == 2 * 2 * (MOST_SEEDS - 3)


def test_finishes_what_it_can_and_says_what_failed(tmp_path: Path) -> None:
    queue = start(tmp_path, "--order", "queue_order:ORDER", "--deadline", "10m", "--cores", "2")
    text, _ = queue.communicate(timeout=600)
    assert queue.returncode == 0, text
    assert "2 trials finished, 1 failed" in text
    assert "broken: default lr=0.01 seed=0" in text
    assert "Traceback" not in text
    assert {record.arm for record in read_records(tmp_path / "records" / "tiny.jsonl")} == {"default", "covariance"}
    assert not list((tmp_path / "trials" / "tiny").rglob("*.safetensors"))
    again = start(tmp_path, "--order", "queue_order:ORDER", "--deadline", "10m", "--only", "tiny")
    text, _ = again.communicate(timeout=300)
    assert "0 trials finished, 0 failed" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, None])
def test_however_it_stops_no_trial_runs_on_and_it_resumes(number: signal.Signals | None, tmp_path: Path) -> None:
    deadline = "5m" if number else "25s"
    queue = start(tmp_path, "--order", "queue_order:ENDLESS", "--deadline", deadline)
    begun = tmp_path / "trials" / "endless"
    wait_for(lambda: any(begun.rglob("checkpoint")))
    if number:
        os.kill(queue.pid, number)
    text, _ = queue.communicate(timeout=60)
    if number is not signal.SIGKILL:
        assert queue.returncode == 0
        assert "0 trials finished, 0 failed, 1 stopped before their end" in text
    (run,) = begun.rglob("metrics.jsonl")
    wait_for(lambda: not grows(run))
    assert not (tmp_path / "records" / "endless.jsonl").exists()
    rows = run.read_text().count("\n")
    queue = start(tmp_path, "--order", "queue_order:ENDLESS", "--deadline", "5m")
    wait_for(lambda: run.read_text().count("\n") > rows)
    os.kill(queue.pid, signal.SIGTERM)
    queue.communicate(timeout=60)


def wait_for(condition: object, seconds: float = 300.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def grows(path: Path) -> bool:
    """Return whether a file grows within two seconds."""
    before = path.stat().st_size
    time.sleep(2.0)
    return path.stat().st_size != before


def test_two_queues_share_the_trials(tmp_path: Path) -> None:
    queues = [start(tmp_path, "--order", "queue_order:ORDER", "--only", "tiny", "--deadline", "10m") for _ in range(2)]
    texts = [queue.communicate(timeout=280)[0] for queue in queues]
    assert sum(int(text.rpartition("queue: ")[2].split()[0]) for text in texts) in (2, 3)  # 3: met just after its end
    assert len(read_records(tmp_path / "records" / "tiny.jsonl")) == 2


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("150m", 9000), ("2.5h", 9000)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    for wrong in ("150", "m", "-1m", "nanm", "1d", ""):
        with pytest.raises(Exception, match="write a duration"):
            parse_duration(wrong)


def test_names_and_arms_of_the_order_are_sound(tmp_path: Path) -> None:
    from experiments.order import ORDER as real

    names = [experiment.name for experiment in real]
    assert len(set(names)) == len(names)
    for experiment in (*real, *ORDER, *ENDLESS):
        study = experiment.study(tmp_path)
        assert set(study.arms) == set(experiment.arms)
        assert {name for pair in experiment.asked_pairs() for name in pair} <= set(study.arms)


def test_scripts_beside_it_still_get_the_standard_librarys_queue(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1]); import queue; print(queue.Queue(3).maxsize, queue.SimpleQueue)"
    )
    command = [sys.executable, "-S", "-c", probe, str(ROOT / "experiments")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.split() == ["3", "<class", "'_queue.SimpleQueue'>"]
