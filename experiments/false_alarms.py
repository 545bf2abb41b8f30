"""How often does the doctor complain about untouched models? Builds hundreds of them and writes a table.

    python experiments/false_alarms.py transformers espalier --out alarms.jsonl          (the project's environment)
    PYTHONPATH=src:tests python experiments/false_alarms.py timm torchvision fla         (the interop environment; there
        --only NAME of transformers, too, for models whose backbone is timm's)
    python experiments/false_alarms.py --table alarms.jsonl > docs/results/false-alarms.md

Every model is built with the library's own start, from a small configuration, in a process of its own that is stopped
after ten minutes; the static checks run on all, the probe where a batch can be made. An hour or two of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier
from espalier.errors import EspalierError

LIMIT = 1_000_000_000  # parameters; larger models are left out
PROBED = 3_000_000  # parameters; larger models are not run
SECONDS = 600
MEMORY = 8 << 30  # bytes that a child may hold

# Small values for fields that most configurations of transformers and fla share.
SMALL = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "embed_dim": 64, "dim": 64, "encoder_dim": 64, "hidden_dim": 64,
    "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4, "n_layer": 4,
    "n_layers": 4, "num_layers": 4, "encoder_layers": 3, "decoder_layers": 3, "num_decoder_layers": 3,
    "num_encoder_layers": 3, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "head_dim": 16, "d_kv": 16,
    "vocab_size": 512, "max_position_embeddings": 128, "n_positions": 128, "image_size": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "state_size": 16, "embedding_size": 64,
    "projection_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# For configurations that a small width does not fit: their own width, and fewer layers.
FEWER = {name: value for name, value in SMALL.items() if "layer" in name or name == "vocab_size"}


def shrink(config: Any, fields: dict[str, int] = SMALL) -> Any:
    """Set the size fields that a configuration has, its inner configurations' too, as far as it lets us."""
    for name, value in fields.items():
        if isinstance(getattr(config, name, None), int) and not isinstance(getattr(config, name), bool):
            try:
                setattr(config, name, value)
            except Exception:  # a read-only or validated field
                continue
    for inner in list(vars(config).values()):
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            shrink(inner, fields)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        with contextlib.suppress(AttributeError):  # a property that follows the number of layers by itself
            config.layer_types = (kinds * 4)[: getattr(config, "num_hidden_layers", len(kinds))]
    return config


def small(config: Callable[[], Any], build: Callable[[Any], nn.Module]) -> nn.Module:
    """Build a model from its configuration, smaller in every size, or in its layers alone where that does not build."""
    try:
        return build(shrink(config()))
    except Exception:
        return build(shrink(config(), FEWER))


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every model type that ``AutoModel`` knows, and every one with a language head."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    for head, table in (
        ("AutoModel", MODEL_MAPPING_NAMES),
        ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        for kind in table:
            build = partial(small, CONFIG_MAPPING[kind], getattr(transformers, head).from_config)
            yield f"{kind} ({head[4:]})", build


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every architecture of timm."""
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name, pretrained=False, num_classes=100)


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield torchvision's classifiers."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield name, lambda name=name: torchvision.models.get_model(name, weights=None)


def fla_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the language models of flash-linear-attention."""
    import fla.models as models

    for name in sorted(n for n in dir(models) if n.endswith("Config")):
        head = getattr(models, name.replace("Config", "ForCausalLM"), None)
        if head is not None:
            yield name.removesuffix("Config"), partial(small, getattr(models, name), head)


def espalier_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield our own models, untouched and structured."""
    from espalier.models import MODELS, build_model

    def structured(name: str) -> nn.Module:
        model = build_model(name)
        espalier.structure_(model)
        return model

    for name in MODELS:
        yield name, lambda name=name: build_model(name)
    for name in ("vit", "convmixer", "sequence"):
        yield f"{name}, structured", lambda name=name: structured(name)


LIBRARIES = {
    "transformers": transformers_models,
    "timm": timm_models,
    "torchvision": torchvision_models,
    "fla": fla_models,
    "espalier": espalier_models,
}


# What was found on looking at every model with a warning: the reason in the library's own code.
_TINY = "the library: `initializer_range` of the vision configuration is 1e-10, for every weight of the encoder"
_GAINS = "the library: `_init_weights` draws the gains of batch norm from noise, like the weights of a convolution"
_FACTOR = "the library: `initializer_factor` or `init_std` of 1.0 is taken for the deviation of a linear layer"
LOOKED_AT = {
    **dict.fromkeys(
        ["blip", "blip-2", "instructblip", "instructblipvideo", "got_ocr2", "unlimited_ocr", "deepseek_vl_hybrid"],
        _TINY,
    ),
    **dict.fromkeys(["sam", "sam_hq", "sam_hq_vision_model", "sam_vision_model"], _TINY),
    **dict.fromkeys(["mobilevit", "mobilevitv2", "rt_detr", "rt_detr_v2", "efficientloftr", "efficientnet"], _GAINS),
    **dict.fromkeys(["pp_doclayout_v3", "pp_doclayout_v4"], _GAINS),
    **dict.fromkeys(["aimv2", "xclip", "udop", "cpmant"], _FACTOR),
    "phi4_multimodal": "the library: `normal_` without a deviation for every weight of the vision encoder",
    "muse_glimmer": "the library: its base class sets every RMSNorm to one, and this one multiplies by 1 + w",
    "muse_glimmer_text": "the library: its base class sets every RMSNorm to one, and this one multiplies by 1 + w",
    **dict.fromkeys(
        ["granitemoehybrid", "bamba", "falcon_h1"],
        "the library: `dt_bias` is one, a step of 1.31, where Mamba-2 draws steps from 1e-3 to 0.1",
    ),
    "jamba": "the library: `_init_weights` sets the bias of `dt_proj` to zero like any other: every step is 0.69",
    "bigbird_pegasus": "the library: the decoder's class lists no tied weights, its configuration says tied",
    **dict.fromkeys(
        ["mobilenetv4_conv_small", "mobilenetv4_conv_small_035", "mobilenetv4_conv_small_050"],
        "the library: the head is drawn by its fan-out, so 100 classes get three times the weights of 1,000",
    ),
}


INTRODUCTION = """# False alarms of the doctor

Written by `experiments/false_alarms.py`: untouched models as their libraries build them, from small configurations
(transformers, fla) or by name (timm, torchvision, ours), with torch 2.13, transformers 5.23, timm 1.0.31, torchvision
0.28 and flash-linear-attention 0.6. Models of up to 3 million parameters also ran a made-up batch, where one could be
made; larger than a billion, or not done within ten minutes and 8 GiB, they are left out.

Every error and warning was looked at in the library's own code. Where that code starts a model other than its layers
are meant to start, the warning is right; the column *not the library's fault* counts models where the check is wrong.
"""


def examine(build: Callable[[], nn.Module], pipe: Any) -> None:
    """Build one model and send what the doctor says of it; runs in a child process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        try:
            with torch.device("meta"):
                numbers = sum(parameter.numel() for parameter in build().parameters())
        except Exception:
            numbers = 0  # some constructors look at values: build those for real
        if numbers > LIMIT:
            pipe.send({"left_out": f"{numbers:,} parameters"})
            return
        model = build()
        numbers = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        pipe.send({"left_out": f"does not build: {type(error).__name__}: {str(error)[:100]}"})
        return
    diagnosis = espalier.diagnose(model)
    pipe.send({"parameters": numbers, "probed": False, "findings": [vars(finding) for finding in diagnosis.findings]})
    if numbers <= PROBED:
        try:
            diagnosis = espalier.diagnose(model, example="synthetic")
        except EspalierError:
            return
        except Exception as error:
            pipe.send({"broken_probe": f"{type(error).__name__}: {str(error)[:200]}"})
            return
        pipe.send({"probed": True, "findings": [vars(finding) for finding in diagnosis.findings]})


def sweep(
    library: str, examine: Callable[[Callable[[], nn.Module], Any], None], out: Path, only: str = "", share: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Examine every ``share``-th model of a library in a child process; append a line of JSON and yield it."""
    done = set()
    if out.exists():
        done = {(r["library"], r["model"]) for r in map(json.loads, out.read_text().splitlines())}
    if importlib.util.find_spec("torchvision") is not None:
        # The interop environment's torchvision does not import without these operators declared first.
        importlib.import_module("reference.torchvision_operators")
    context = multiprocessing.get_context("fork")
    # Shuffled by name, so that a sweep that is stopped has seen some of everything.
    models = sorted(LIBRARIES[library](), key=lambda pair: hashlib.md5(pair[0].encode()).hexdigest())
    for name, build in models[::share]:
        if (library, name) in done or only not in name:
            continue
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=examine, args=(build, there))
        child.start()
        there.close()
        result: dict[str, Any] = {}
        try:
            while here.poll(SECONDS):
                result |= here.recv()
        except EOFError:
            pass
        if not result:
            result = {"left_out": f"more than {SECONDS} s, or out of memory"}
        child.kill()
        child.join()
        with out.open("a") as file:
            file.write(json.dumps({"library": library, "model": name, **result}) + "\n")
        yield name, result


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: counts by library, then every model with an error or a warning."""
    examined = list({(r["library"], r["model"]): r for r in records if "findings" in r}.values())

    def count(rows: list[dict[str, Any]], severity: str) -> int:
        return sum(any(f["severity"] == severity for f in r["findings"]) for r in rows)

    def verdict(row: dict[str, Any]) -> str:
        return LOOKED_AT.get(row["model"].partition(" ")[0], "not looked at yet")

    def wrongly(rows: list[dict[str, Any]]) -> int:
        loud = [r for r in rows if any(f["severity"] != "note" for f in r["findings"])]
        return sum(not verdict(r).startswith("the library") for r in loud)

    head = "| library | models | run with a batch, too | with an error | with a warning | not the library's fault |"
    lines = [f"{head} with a note |", "|---|---|---|---|---|---|---|"]
    for library in [*sorted({r["library"] for r in examined}), "all"]:
        rows = [r for r in examined if library in (r["library"], "all")]
        counts = [count(rows, "error"), count(rows, "warning"), wrongly(rows), count(rows, "note")]
        cells = [len(rows), sum(r["probed"] for r in rows), *counts]
        lines.append(f"| {library} | {' | '.join(map(str, cells))} |")
    lines += ["", "## Every error and warning, looked at", ""]
    lines += [
        "| model | severity | check | how often | first layer | measured | whose fault |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in sorted(examined, key=lambda r: (r["library"], r["model"])):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for f in record["findings"]:
            if f["severity"] != "note":
                groups.setdefault((f["severity"], f["check"]), []).append(f)
        for (severity, check), found in groups.items():
            cells = (f"{record['library']} {record['model']}", severity, check, f"{len(found)}",
                     f"`{found[0]['layer'] or '(model)'}`", found[0]["measured"], verdict(record))  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Every model", ""]
    for library in sorted({r["library"] for r in examined}):
        names = sorted(r["model"] for r in examined if r["library"] == library)
        lines += [f"**{library}**: {', '.join(names)}.", ""]
    return "\n".join([INTRODUCTION, *lines[:-1]])


def main() -> None:
    """Run the sweeps that the command line names, or print the table of their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", choices=[*LIBRARIES, []])
    parser.add_argument("--out", type=Path, default=Path("alarms.jsonl"))
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--table", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for path in arguments.table for line in path.read_text().splitlines()]))
        return
    for library in arguments.libraries:
        for name, result in sweep(library, examine, arguments.out, arguments.only):
            loud = [f for f in result.get("findings", []) if f["severity"] != "note"]
            state = result.get("left_out") or result.get("broken_probe") or f"{len(loud)} errors and warnings"
            lines = [f"\n    {f['severity']} {f['layer']} {f['check']}: {f['measured']}" for f in loud[:4]]
            print(f"{library} {name}: {state}", *lines, flush=True)


if __name__ == "__main__":
    sys.exit(main())
