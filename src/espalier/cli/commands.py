"""The commands: one typed function each, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.cli.completion import Shell, completion_script
from espalier.cli.finished import attack, certify, export, predict
from espalier.cli.listing import arms, datasets, inits, models, recipes
from espalier.cli.messages import say
from espalier.errors import EspalierError, told

if TYPE_CHECKING:
    from torch import nn

    from espalier.init import StructureFit
    from espalier.init.families import Specs
    from espalier.recipes import Recipe
    from espalier.study.record import Record

# Rooms and libraries are imported inside the commands that need them: `espalier --help` must answer at once.


def demo(out: Path = Path("runs/demo"), workers: int = 2, smallest: bool = False) -> None:
    """Show the whole idea in minutes: structure, training with and without it, a fair comparison, a page.

    Args:
        out: folder of the runs and the page.
        workers: processes that train side by side.
        smallest: one seed, one learning rate, one epoch: a smoke test; its numbers mean nothing.
    """
    from espalier.report import write_report
    from espalier.study import compare as compare_arms
    from espalier.study import text_table
    from espalier.study.demo import demo_plans
    from espalier.train.certify_runs import demo_certificate

    folders = []
    for plan in demo_plans(smallest=smallest):
        folders.append(out / plan.name)
        summary = compare_arms(
            plan.recipe, arms=plan.arms, out=folders[-1], lrs=plan.lrs, seeds=plan.seeds, workers=workers
        )
        print(f"\n{plan.title}\n{text_table(summary)}", flush=True)
    run, table = demo_certificate(out, smallest=smallest)
    folders.append(run)
    print(f"\nA net of orthogonal layers on digits: what is proved about it\n{table}", flush=True)
    print(f"\nreport: {write_report(folders, out / 'report.html')}")


def train(
    recipe: Recipe,
    out: Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    quiet: bool = False,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    checkpoint_every_minutes: float | None = None,
) -> None:
    """Train one recipe into a run folder; run the same command again to resume.

    Status 1 if the loss stops being finite, 75 if SIGTERM or SIGUSR1 stopped the run after a checkpoint.

    Args:
        recipe: the recipe, with any field changed.
        out: the run folder; runs/RECIPE by default.
        resume: resume from the folder's checkpoint, or refuse a folder that has one.
        quiet: print no progress.
        strategy: under torchrun or srun: a whole model in every process, or shards of it.
        checkpoint_every_minutes: write a checkpoint when this long has passed since the last, too.
    """
    from espalier.recipes.validation import resolve_recipe
    from espalier.train import train as run_training
    from espalier.train.checkpoint import has_checkpoint
    from espalier.train.image_input import IMAGES
    from espalier.train.parallel import launched
    from espalier.train.run import check_folder

    out = out or Path("runs") / recipe.name
    first = launched().rank == 0  # one of several processes speaks
    found = check_folder(out, resolve_recipe(recipe), resume)
    if found != "new" and first and not quiet:
        state = "unfinished, resumed" if found == "unfinished" else "already finished, nothing trained"
        say(f"run: {out} ({state})")
    run = run_training(
        recipe, out, resume=resume, progress=False if quiet else None, strategy=strategy,
        checkpoint_every_minutes=checkpoint_every_minutes,
    )  # fmt: skip
    result = run.result or {}
    if first:
        print(json.dumps(result, indent=2))
    if result.get("diverged"):
        where = f"diverged in epoch {result['epochs']}, at {result.get('diverged_at', 'an unknown step')}"
        kept = "; its last checkpoint is kept" if has_checkpoint(out) else ""
        if first:
            say(f"espalier: {out} {where}: choose another folder and a smaller --lr{kept}")
        raise SystemExit(1)
    if first and not quiet:
        say(f"run: {out}")
        images = [f"predict {out} IMAGES…", f"export {out} --to onnx"] if (out / IMAGES).exists() else []
        for step in (f"report {out}", f"audit {out}", *images):
            say(f"next: espalier {step}")


def compare(
    recipe: Recipe,
    arms: Sequence[str] = ("default", "structured"),
    out: Path | None = None,
    lrs: Sequence[str] = ("auto",),
    seeds: int = 3,
    workers: int = 2,
    cluster: Literal["local", "slurm"] = "local",
    partition: str | None = None,
    time: str | None = None,
    gpus: int | None = None,
    account: str | None = None,
) -> None:
    """Train every arm at every learning rate and seed, print the table and write the page.

    Status 1 if a trial failed, or if every one diverged.

    Args:
        recipe: the recipe that all arms share.
        arms: the arms, or "all" that apply to the model; the first is the baseline. An initialisation of your own is
            one, too: FILE.py:NAME.
        out: folder of the study; runs/compare-RECIPE by default.
        lrs: learning rates, or "auto" for five around the recipe's own.
        seeds: how many paired seeds.
        workers: processes (or Slurm jobs) that share the trials.
        cluster: where the workers run.
        partition: of a Slurm job.
        time: limit of a Slurm job, as sbatch takes it: minutes, or days-hours:minutes:seconds. A job that meets it
            writes a checkpoint and goes back into the queue.
        gpus: of a Slurm job.
        account: that a Slurm job is charged to.
    """
    from espalier.report import write_report
    from espalier.study import applicable_arms, text_table
    from espalier.study import compare as compare_arms

    out = out or Path("runs") / f"compare-{recipe.name}"
    named = applicable_arms(recipe) if list(arms) == ["all"] else list(arms)
    options = {"partition": partition, "time": time, "gpus": gpus, "account": account}
    summary = compare_arms(
        recipe, arms=named, out=out, lrs=_rates(lrs), seeds=seeds, workers=workers, cluster=cluster,
        parameters={name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    print(text_table(summary))
    print(f"report: {write_report([out], out / 'report.html')}")
    scored = any(point.scores for arm in summary.arms for point in arm.rates)
    if not scored and not summary.failures:
        say(f"espalier: {out}: every trial diverged: choose smaller --lrs")
    if not scored or summary.failures:
        raise SystemExit(1)


def audit(model: str, picture: Path | None = None, heads: int | None = None) -> None:
    """Say how much structure a model's weights carry now, layer by layer.

    Args:
        model: a run folder, a checkpoint (.safetensors, a sharded index, a folder of either, or weights that torch
            saved), a folder with config.json, or a model as `espalier structure` takes it.
        picture: write heat maps of the weights to this HTML file.
        heads: query heads of a checkpoint's attention layers, where no config.json beside it says so.
    """
    from espalier.init import audit as audit_model

    net = _open_model(model, heads)
    print(audit_model(net))
    if picture is not None:
        from espalier.report import write_weight_pictures

        print(f"pictures: {write_weight_pictures(net, picture)}")


def doctor(
    model: str,
    json: bool = False,
    strict: bool = False,
    probe: bool = False,
    against: Path | None = None,
    heads: int | None = None,
) -> None:
    """Say what is wrong with a model's weights before the first step; status 1 if there is an error.

    Args:
        model: a checkpoint (.safetensors, a sharded index, a folder of either, or weights that torch saved; read tensor
            by tensor), a run folder, or a model as `espalier structure` takes it.
        json: print the findings as JSON.
        strict: status 1 on warnings too.
        probe: also run a made-up batch through the model, forward and backward.
        against: a checkpoint that the model should hold: weights that differ are errors.
        heads: query heads of a checkpoint's attention layers, where no config.json beside it says so.
    """
    from espalier.doctor import diagnose

    subject = Path(model) if _holds_weights(Path(model)) and not probe else _open_model(model, heads)
    diagnosis = diagnose(subject, "synthetic" if probe else None, against=against, heads=heads)
    print(diagnosis.to_json() if json else diagnosis)
    if status := diagnosis.exit_status(strict):
        raise SystemExit(status)


def fit(model: str, out: Path | None = None, heads: int | None = None) -> None:
    """Read a trained model's strengths off its weights: what to ask for, to start another model like it.

    Args:
        model: as `espalier audit` takes it.
        out: write the fit to this JSON file; `espalier structure MODEL --like FILE` starts a model from it.
        heads: query heads of a checkpoint's attention layers, where no config.json beside it says so.
    """
    from espalier.files import write_json
    from espalier.init import fit as fit_model

    found = fit_model(_open_model(model, heads))
    print(found)
    if out is not None:
        write_json(out, found.to_dict())
        print(f"fit: {out}")


def structure(model: str, out: Path = Path("init.safetensors"), seed: int = 0, like: Path | None = None) -> None:
    """Build a model, write structure into it, verify it, and save the weights as safetensors.

    Args:
        model: `espalier:NAME`, `timm:NAME` or `transformers:FOLDER` (a folder that holds config.json).
        out: the file to write.
        seed: seed of the weights and of the structure.
        like: a file that `espalier fit` wrote: every family that it has gets its strengths, others are left alone.
    """
    from espalier.files import write_tensors
    from espalier.init import structure_
    from espalier.randomness import derive_generator

    net = _open_model(model, seed=seed)
    specs: Specs = {} if like is None else _read_fit(like).specs()
    print(structure_(net, **specs, generator=derive_generator(seed, "structure")))
    print(f"weights: {write_tensors(out, net.state_dict())}")


def report(folders: Sequence[Path], out: Path = Path("report.html")) -> None:
    """Write one page over run folders and studies.

    Args:
        folders: run folders and study folders.
        out: the HTML file.
    """
    from espalier.report import write_report

    print(f"report: {write_report(list(folders), out)}")


def records(action: Literal["export", "merge"], paths: Sequence[Path], to: Path = Path("records.jsonl")) -> None:
    """Write what finished trials left behind as one line each, or merge such files; what TO holds already stays.

    Trials that a study folder's records.jsonl names count as finished there: merge into it to go on elsewhere.

    Args:
        action: export reads study folders, merge reads files of records.
        paths: study folders, or files of records.
        to: the file of records; it is replaced as a whole, and not at all if records contradict each other.
    """
    from espalier.study.records import add_records, read_records
    from espalier.study.trial import load_study

    found: list[Record] = []
    for path in paths:
        found += load_study(path).outcomes().values() if action == "export" else read_records(path)
    print(f"records: {to}: {len(add_records(found, to))} trials")


def convert(checkpoint: Path, to: Literal["timm", "original", "espalier"] = "timm", out: Path | None = None) -> None:
    """Rename the weights of a ConvMixer checkpoint for timm, for the paper's nn.Sequential or for this library.

    Args:
        checkpoint: safetensors or torch file in any of the three layouts; no code in it is run.
        to: the layout to write.
        out: safetensors file to write; by default beside the checkpoint, with the layout in its name.
    """
    from espalier.checkpoints.convmixer import convert_state, load_checkpoint_file
    from espalier.files import write_tensors

    state = convert_state(load_checkpoint_file(checkpoint), to)
    name = checkpoint.name.removesuffix(".safetensors").removesuffix(".tar").removesuffix(".pth")
    print(f"weights: {write_tensors(out or checkpoint.with_name(f'{name}.{to}.safetensors'), state)}")


def statistics(models: Sequence[str], out: Path = Path("statistics.safetensors")) -> None:
    """Measure the covariance of a trained network's depthwise filters, layer by layer, for `--init transferred`.

    Args:
        models: run folders of one shape (other seeds, other widths), pooled; or models as `espalier structure` takes
            them.
        out: the file to write.
    """
    from espalier.init import FilterStatistics

    measured = FilterStatistics.from_model([_open_model(model) for model in models])
    for layer in measured.layers:
        print(f"{layer.name}: kernel {'×'.join(map(str, layer.kernel_size))}, {layer.filters} filters")
    print(f"statistics: {measured.save(out)}")


def completion(shell: Shell) -> None:
    """Print a script that completes commands, options and choices in a shell.

    Bash: `eval "$(espalier completion bash)"` in .bashrc; zsh: write it to a file `_espalier` on $fpath; fish:
    `espalier completion fish > ~/.config/fish/completions/espalier.fish`.

    Args:
        shell: the shell.
    """
    print(completion_script(COMMANDS, shell))


def _open_model(spec: str, heads: int | None = None, seed: int = 0) -> nn.Module:
    """Open a run folder's final weights, a checkpoint, a folder with config.json, or a model by host and name.

    What has no weights yet draws them from ``seed``.
    """
    from espalier.checkpoints.loading import open_checkpoint, open_host_model
    from espalier.randomness import derive_generator
    from espalier.train import load_run

    path = Path(spec)
    bare = _holds_weights(path) and not (path / "config.json").is_file()
    if heads is not None and (heads < 1 or not bare):
        raise EspalierError(f"heads {heads}: give a number from 1, and only with a file of weights")
    if bare:
        return open_checkpoint(path, heads)
    if path.is_dir() and not (path / "config.json").is_file():
        return load_run(path).model()
    return open_host_model(f"transformers:{spec}" if path.is_dir() else spec, derive_generator(seed, "weights"))


def _holds_weights(path: Path) -> bool:
    """Return whether a path is a file, or a folder with weights that is no run."""
    from espalier.doctor.sources import weight_files

    return path.is_file() or (path.is_dir() and not (path / "recipe.json").exists() and bool(weight_files(path)))


def _read_fit(path: Path) -> StructureFit:
    from espalier.files import read_object
    from espalier.init import StructureFit

    try:
        return StructureFit.from_dict(read_object(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EspalierError(f"like {path}: is not a fit ({told(error)}): name a file that espalier fit wrote") from None


def _rates(texts: Sequence[str]) -> list[float] | Literal["auto"]:
    if list(texts) == ["auto"]:
        return "auto"
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise EspalierError(f"lrs {' '.join(texts)!r}: write numbers such as 1e-3 3e-3, or auto") from None


_COMMANDS: tuple[Callable[..., None], ...] = (
    demo, train, compare, audit, doctor, fit, structure, convert, statistics, predict, export, certify, attack,
    report, records, recipes, models, datasets, arms, inits, completion,
)  # fmt: skip
COMMANDS = {command.__name__: command for command in _COMMANDS}
