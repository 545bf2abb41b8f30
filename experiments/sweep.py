"""Every architecture that builds: write structure into it, then judge each layer by the model's own forward pass.

    python experiments/sweep.py --out docs/guides            # all of transformers, timm, torchvision and fla
    python experiments/sweep.py --short --out runs/sweep     # thirty types of transformers, about two minutes
    python experiments/sweep.py --library vit_pytorch,esm    # other installed packages: their classes, by signature

Each model is built in a process of its own with a time limit. What is written is read out from outside, never through
our views: every token is the i-th unit vector, so a score at distance zero is (W_Q W_Kᵀ)ᵢᵢ times the layer's scale and
the output's i-th entry is (W_V W_out)ᵢᵢ. A layer is *proved* if both means are within 15 % of what the report says;
*rescaled* if a norm or a gate that the report notes stands between; *not run* if no input could be made for it.
Depthwise filters are drawn narrow, and proved if their energy lies on the tap that met the output's own position as the
model ran; state-space layers are only *written* here, and proved by forward pass in tests/init/test_ssm_layouts.py. A
failure is a wrong write, an attention layer without a row, or a crash; with one the command exits with 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import pkgutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.init.layouts.arguments import VARIADIC
from sweep_judge import judge

LIMIT_S = 60.0
LARGEST = 40_000_000
SHORT = """
    vit bert llama gpt2 gpt_neox bloom t5 bart gpt_bigcode lfm2 siglip_vision_model deepseek_v3 deberta xlnet mamba
    mamba2 falcon gemma3_text qwen3 whisper clip_vision_model swin beit mpt wav2vec2-conformer opt codegen olmo2
    gpt_oss convnext
""".split()  # noqa: SIM905


# Sizes of a small model, by how libraries call them.
SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim hidden_dim encoder_hidden_size decoder_hidden_size embedding_size "
    "word_embed_proj_dim projection_dim conv_dim attention_dim out_hidden_size feature_size",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers "
    "num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_key_value_heads num_kv_heads "
    "window_size num_local_experts num_experts n_routed_experts num_experts_per_tok moe_num_experts",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner moe_intermediate_size d_inner "
    "shared_expert_intermediate_size mlp_dim ffn_hidden_size",
    64: "vocab_size max_position_embeddings n_positions max_source_positions max_target_positions vocab_size_or_config",
    8: "head_dim d_kv attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "patch_size qk_head_dim global_head_dim mamba_d_head",
    16: "image_size num_mel_bins state_size ssm_state_size",
}  # fmt: skip
# And of what has one size a stage.
LISTS = {"num_heads": 2, "num_attention_heads": 2, "depths": 1}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# What classes of other packages ask for besides.
ASKED = SMALL | {
    **dict.fromkeys(("channels", "in_channels", "in_chans", "input_channels"), 3),
    **dict.fromkeys(("heads", "nhead", "num_classes", "out_channels"), 4),
    **dict.fromkeys(("dim_head", "seq_len", "max_seq_len", "n_ctx"), 16),
    **dict.fromkeys(("in_features", "embedding_dim", "input_dim", "latent_dim", "n_feat"), 32),
    **dict.fromkeys(("num_tokens", "dim_feedforward"), 64),
}


def main() -> int:
    """Sweep, write the record and the table, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--short", action="store_true", help="thirty model types, for continuous integration")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument(
        "--library", default="transformers,timm,torchvision,fla", help="of these, or any installed package"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
        # Before torchvision, which does not import beside a CPU build of torch without it.
        importlib.import_module("reference.torchvision_operators")
    libraries = ["transformers"] if options.short else options.library.split(",")
    modules = {"transformers": "transformers.modeling_utils", "fla": "fla.layers"}
    for library in libraries:
        # Imported once, before the forks: it takes longer than most models.
        importlib.import_module(modules.get(library, library))
    builders = [(library, BUILDERS.get(library, partial(package_models, library))) for library in libraries]
    builds = [(library, *found) for library, models in builders for found in models()]
    wanted = SHORT if options.short else options.only.split(",") if options.only else None
    builds = [build for build in builds if wanted is None or build[1] in wanted]
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    record = options.out / "supported-models.jsonl"
    # Threads only wait here: each model is forked off into a process of its own.
    with record.open("w") as lines, ThreadPoolExecutor(options.jobs) as pool:
        for (library, name, _), outcome in zip(builds, pool.map(in_a_process, [b[2] for b in builds]), strict=True):
            records.append({"library": library, "model": name, **outcome})
            lines.write(json.dumps(records[-1]) + "\n")
            lines.flush()
            print(one_line(records[-1]), flush=True)
    (options.out / "supported-models.md").write_text(table(records))
    failures = [one for one in records if one["result"] == "crash" or bad_layers(one)]
    print(
        f"{len(records)} models tried, {len(failures)} with a failure; the table is {options.out}/supported-models.md"
    )
    return bool(failures)


def in_a_process(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return what came of one model: "judged" with its layers, "not built" or "crash" with the reason."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(build, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(LIMIT_S) else {"result": "not built", "why": f"takes over {LIMIT_S:.0f} s"}
    except EOFError:
        outcome = {"result": "crash", "why": "the process died"}
    process.kill()
    process.join()
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def child(build: Callable[[], nn.Module], pipe: Any) -> None:
    """Build, write, judge, and send the outcome."""
    warnings.simplefilter("ignore")
    torch.default_generator.manual_seed(0)
    try:
        model = build()
    except Exception as error:
        pipe.send({"result": "not built", "why": f"{type(error).__name__}: {error}".splitlines()[0][:150]})
        return
    try:
        pipe.send(judge(model.eval()))
    except Exception as error:
        pipe.send({"result": "crash", "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every model type of transformers and how to build a tiny one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for kind in CONFIG_MAPPING_NAMES:
        yield kind, lambda kind=kind: tiny_transformer(kind)


def tiny_transformer(kind: str) -> nn.Module:
    """Build a model type with small sizes; where it refuses them all, with those that it takes."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    cls, why = CONFIG_MAPPING[kind], None
    for wanted in (SMALL, {k: v for k, v in SMALL.items() if "head_dim" not in k and "lora" not in k}, {}):
        try:
            config = small_config(cls, wanted)
            config._attn_implementation = "eager"
            with torch.device("meta"):
                model = model_of(config)
            if sum(p.numel() for p in model.parameters()) > LARGEST:
                raise ValueError("its smallest configuration here is too large")
            return model_of(config)
        except Exception as error:
            why = why or error
    assert why is not None
    raise why


def small_config(cls: Any, wanted: dict[str, int]) -> Any:
    """Return a configuration with the wanted sizes, its parts too."""
    plain = cls()
    changes: dict[str, Any] = {}
    for name, value in vars(plain).items():
        if isinstance(value, bool) or name.startswith("_"):
            continue
        if isinstance(value, list | tuple) and name in LISTS and wanted:
            changes[name] = [LISTS[name]] * len(value)
        elif isinstance(value, int) and name in wanted:
            changes[name] = min(value, wanted[name]) if value > 0 else value
        elif hasattr(value, "to_diff_dict"):
            changes[name] = small_config(type(value), wanted).to_dict()
    changes.update({name: 0 for name in ("pad_token_id",) if isinstance(getattr(plain, name, None), int)})
    return cls(**changes)


def model_of(config: Any) -> nn.Module:
    """Return the model of a configuration, through the automatic class or the class that names it as its own."""
    import transformers

    try:
        return transformers.AutoModel.from_config(config)
    except ValueError:
        pass
    module = __import__(type(config).__module__.replace("configuration", "modeling"), fromlist=["*"])
    owners = [
        c for c in vars(module).values() if isinstance(c, type) and getattr(c, "config_class", None) is type(config)
    ]
    owners = [c for c in owners if issubclass(c, nn.Module) and not c.__name__.endswith("PreTrainedModel")]
    if not owners:
        raise ValueError("no model class takes this configuration alone")
    return min(owners, key=lambda c: len(c.__name__))(config)


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield one small architecture of every file of timm's models."""
    import timm

    for file in timm.list_modules():
        names = timm.list_models(module=file)
        if names:
            yield file, lambda names=names: smallest_timm(names)


def smallest_timm(names: list[str]) -> nn.Module:
    """Build the smallest of the first names of a file."""
    import timm

    sizes = {}
    for name in names[:: max(1, len(names) // 8)]:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(sizes, key=lambda one: sizes[one])
    if sizes[name] > LARGEST:
        raise ValueError("its smallest architecture is too large")
    return timm.create_model(name)


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield torchvision's classification models, the smaller ones."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield name, lambda name=name: checked_size(torchvision.models.get_model_builder(name))


def checked_size(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model that is not too large."""
    with torch.device("meta"):
        if sum(p.numel() for p in build().parameters()) > LARGEST:
            raise ValueError("too large")
    return build()


def fla_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every layer class of flash-linear-attention."""
    import fla.layers

    for name in fla.layers.__all__:
        yield name, lambda name=name: getattr(fla.layers, name)(hidden_size=64, num_heads=4)


def package_models(package: str) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every module class of a package that needs no more than sizes, as small as those make it."""
    root = importlib.import_module(package)
    places = [package]
    if hasattr(root, "__path__"):
        places += [found.name for found in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None)]
    for place in places:
        try:
            classes = list(vars(importlib.import_module(place)).items())
        except (Exception, SystemExit):
            continue  # it needs what is not installed, or is a command
        for name, cls in classes:
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == place:
                asked = [p for p in inspect.signature(cls).parameters.values() if p.kind not in VARIADIC]
                if all(p.name in ASKED or p.default is not p.empty for p in asked):
                    sizes = {p.name: ASKED[p.name] for p in asked if p.name in ASKED and type(p.default) in (int, type)}
                    yield f"{place}.{name}", partial(checked_size, partial(cls, **sizes))


BUILDERS: dict[str, Callable[[], Iterator[tuple[str, Callable[[], nn.Module]]]]] = {
    "transformers": transformers_models,
    "timm": timm_models,
    "torchvision": torchvision_models,
    "fla": fla_models,
}


def bad_layers(record: dict[str, Any]) -> list[str]:
    """Return the layers of a model that were written wrongly or have no row."""
    return [row["layer"] for row in record.get("layers", ()) if row["verdict"] in ("wrong", "silent")]


def one_line(record: dict[str, Any]) -> str:
    """Return a model's outcome for the terminal."""
    counts = Counter(row["verdict"] for row in record.get("layers", ()))
    words = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or record.get("why", "no layer of these kinds")
    bad = bad_layers(record)
    return f"{record['library']} {record['model']}: {record['result']}: {words}" + (
        f"  FAILED {bad[:3]}" if bad else ""
    )


def table(records: list[dict[str, Any]]) -> str:
    """Return the page of the documentation."""
    versions = []
    for name in ("torch", "transformers", "timm", "torchvision", "flash-linear-attention"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    built = [one for one in records if one["result"] != "not built"]
    counts = Counter(row["verdict"] for one in built for row in one.get("layers", ()))
    crashes = sum(one["result"] == "crash" for one in built)
    lines = [
        "# Supported models",
        "",
        "Generated by `make sweep`: every model type that builds small on one CPU core within a minute, written by",
        f"`structure_` and judged by its own forward pass (see `experiments/sweep.py`). {', '.join(versions)}.",
        "",
        f"**{len(built)} of {len(records)} models built; {sum(counts.values())} layers: "
        + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v] or v in ("wrong", "silent"))
        + f"; {crashes} crashes.**",
        "",
        "| library | model | layer class | layers | result | note |",
        "|---|---|---|---|---|---|",
    ]
    for one in built:
        if one["result"] == "crash":
            lines.append(f"| {one['library']} | {one['model']} | | | crash | {one['why']} |")
        groups = Counter((r["host"], r["verdict"], r["note"]) for r in one.get("layers", ()))
        for (host, verdict, note), count in groups.items():
            note = note.replace("|", "/").replace("\n", " ")
            lines.append(f"| {one['library']} | `{one['model']}` | `{host}` | {count} | {verdict} | {note} |")
    return "\n".join(lines) + "\n"


VERDICTS = ("proved", "rescaled", "not run", "written", "skipped", "wrong", "silent")

if __name__ == "__main__":
    sys.exit(main())
