"""The sweep's judge: what a model's layers compute after ``structure_``, read out of forward passes alone."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts.made_up import calls
from espalier.init.layouts.scratch import fresh, leaves, untraced

# Notes after which the report's figures are not the forward pass's.
RESCALED = re.compile(r"up to scale|gate|norm|softmax|up to their scale|fixed factors|sink|times the")
PROBES = 32
# Filters so narrow that a few channels tell which tap they are drawn around.
NARROW = espalier.FilterCovariance(sigma0=0.1, v=0.0, a=0.0)


class Watch(TorchDispatchMode):
    """Keeps every softmax's input, who was running then, and how every depthwise convolution met its positions."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack, self.seen = stack, []
        # By where the filters lie in memory: zeros in front, dilation and stride, axis by axis.
        self.convolved: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self._padded: tuple[Tensor, list[int]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default):
            self.seen.append((self.stack[-1] if self.stack else "", args[0].movedim(args[1], -1)))
        out = func(*args, **(kwargs or {}))
        if func == torch.ops.aten.constant_pad_nd.default:
            self._padded = (out, args[1])
        if func == torch.ops.aten.convolution.default and args[8] == args[1].shape[0] > 1:
            x, filters, _, stride, padding, dilation, *_ = args
            front = list(padding)
            if self._padded is not None and self._padded[0].data_ptr() == x.data_ptr():
                # Pairs from the last axis back, zeros in front first.
                outer = self._padded[1][::2][::-1]
                front = [a + b for a, b in zip(front, [0] * (len(front) - len(outer)) + outer, strict=True)]
            self.convolved.setdefault(filters.data_ptr(), (front, list(dilation), list(stride)))
        return out


def judge(model: nn.Module) -> dict[str, Any]:
    """Write structure into a model and return a verdict for every layer."""
    reports, why = [], ""
    model.requires_grad_(True)  # what a library freezes by default is judged, too
    try:
        reports = list(espalier.structure_(model, depthwise=NARROW, generator=torch.Generator().manual_seed(0)).layers)
    except EspalierError as error:
        why = str(error).splitlines()[0]
        try:
            reports = list(espalier.audit(model).layers)
        except EspalierError:
            reports = []
        if any(row.status != "skipped" for row in reports):
            return {"result": "crash", "why": why}
    used, attending, convolved = run_whole(model.double())
    layers = []
    for row in reports:
        verdict, note = ("skipped", row.note) if row.status == "skipped" else judge_row(model, row, used, convolved)
        layers.append({"layer": row.layer, "host": row.host, "kind": row.kind, "verdict": verdict, "note": note})
    covered = [row.layer for row in reports if row.kind in ("attention", "ssm")]
    attending = [name for name in attending if mixes_tokens(model.get_submodule(name))]
    for name in dict.fromkeys([*attending, *named_attention(model)]):
        if not any(name == c or name.startswith(f"{c}.") or c.startswith(f"{name}.") or not c for c in covered):
            host = type(model.get_submodule(name)).__name__
            layers.append({"layer": name, "host": host, "kind": "attention", "verdict": "silent", "note": "no row"})
    return {"result": "judged", "layers": layers}


def mixes_tokens(module: nn.Module) -> bool:
    """Return whether a module that takes a square softmax may be attention: hyper-connections mix their few streams."""
    return "HyperConnection" not in type(module).__name__


def named_attention(model: nn.Module) -> list[str]:
    """Return modules whose class is called attention and that hold two matrices or more of their own."""
    return [
        name
        for name, module in model.named_modules()
        if re.search(r"Attention|Attn", type(module).__name__)
        and sum(p.ndim == 2 for p in module.parameters()) >= 2
        and name
    ]


def run_whole(model: nn.Module) -> tuple[dict[str, tuple[Any, Any]], list[str], dict[int, Any]]:
    """Run a model on whatever inputs it takes.

    Returns:
        Every module's inputs, where tokens met tokens, and ``Watch.convolved``.
    """
    used: dict[str, tuple[Any, Any]] = {}
    stack: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        if stack:
            stack.pop()

    for name, module in model.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            stack.append(name)
            used.setdefault(name, (fresh(args), fresh(kwargs)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    attending: list[str] = []
    convolved: dict[int, Any] = {}
    for inputs in whole_inputs(model):
        inputs = double(inputs)
        stack.clear()
        with untraced(), Watch(stack) as watch:
            try:
                model(*inputs.pop("args", ()), **inputs)
            except Exception:
                continue
            finally:
                attending += [n for n, s in watch.seen if s.ndim >= 3 and s.shape[-1] == s.shape[-2] > 1 and n]
                convolved = {**watch.convolved, **convolved}
        break
    for handle in handles:
        handle.remove()
    return used, attending, convolved


def double(value: Any) -> Any:
    """Return nested inputs with every floating-point tensor in float64."""
    if isinstance(value, dict):
        return {key: double(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def whole_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs that models take: tokens, an image, sound."""
    ids = torch.arange(1, 9)[None]
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None) or getattr(model, "img_size", None)
    size = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, size or 224))[-1]
    size = size if isinstance(size, int) else 224
    bins = getattr(config, "num_mel_bins", 16)
    image = torch.randn(1, getattr(config, "num_channels", 3), size, size)
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids}
    yield {"pixel_values": image}
    yield {"input_ids": ids, "pixel_values": image}
    yield {"input_values": torch.randn(1, 4000)}
    yield {
        "input_features": torch.randn(1, bins, 2 * getattr(config, "max_source_positions", 32)),
        "decoder_input_ids": ids,
    }
    yield {"input_features": torch.randn(1, 64, bins)}
    yield {"inputs_embeds": torch.randn(1, 8, getattr(config, "hidden_size", 32))}
    yield {"args": (torch.randn(1, 3, size, size),)}


def judge_row(
    model: nn.Module, row: Any, used: dict[str, tuple[Any, Any]], convolved: dict[int, Any]
) -> tuple[str, str]:
    """Return the verdict on a written layer, with the note that belongs to it."""
    module = model.get_submodule(row.layer)
    if row.kind == "depthwise":
        return judge_filters(model, row.layer, row.note, convolved)
    if row.kind != "attention":
        return "written", row.note
    inputs = [used[row.layer]] if row.layer in used else []
    made_up = calls(module, width_of(module), heads_of(module))
    inputs += [one_sequence(module, call.args, call.kwargs) for call in made_up]
    why = ""
    # Tables of angles may come with a factor (YaRN), for queries and keys each.
    turned = {f for part in model.modules() if isinstance(f := getattr(part, "attention_scaling", 1.0), float)} - {1.0}
    for args, kwargs in inputs:
        try:
            qk, vo = products(module, args, kwargs, even="terms of queries or keys alone" in row.note)
            qk += [one / factor**2 for one in qk for factor in turned]
        except Exception as error:
            why = why or f"{type(error).__name__}: {error}".splitlines()[0][:80]
            continue
        if not all(map(math.isfinite, (*qk, vo))):
            why = why or "a mask hides every token from itself"
            continue
        asked_qk, asked_vo = row.measured["qk_diagonal"], row.measured["vo_diagonal"]
        right = any(abs(one - asked_qk) <= 0.15 * abs(asked_qk) + 0.03 for one in qk)
        right = right and abs(vo - asked_vo) <= 0.15 * abs(asked_vo) + 0.03
        if right:
            return "proved", row.note
        if RESCALED.search(row.note):
            return "rescaled", row.note
        return "wrong", f"qk {', '.join(f'{one:.2f}' for one in qk)} for {asked_qk:.2f}, vo {vo:.2f} for {asked_vo:.2f}"
    return "not run", f"{row.note}; the judge: {why}".strip("; ")


def judge_filters(model: nn.Module, layer: str, note: str, convolved: dict[int, Any]) -> tuple[str, str]:
    """Return whether the filters' energy lies on the tap that met the output's own position as the model ran.

    With p zeros in front, tap j of an output meets the input j·dilation − p further on: tap p / dilation is the
    present. A strided output covers several inputs, and any of them is its own.
    """
    filters = model.get_parameter(f"{layer}.weight".lstrip(".")).detach()
    if filters.data_ptr() not in convolved:
        # The model was not run as far as here: what calls it alone, on made-up inputs.
        convolved = run_callers(model, layer)
    if filters.data_ptr() not in convolved:
        return "not run", f"{note}; the judge: no input was found that reaches it".strip("; ")
    energy = filters.square().mean((0, 1))
    for axis, (front, dilation, stride) in enumerate(zip(*convolved[filters.data_ptr()], strict=True)):
        along = energy.movedim(axis, 0).flatten(1).sum(1) if energy.ndim > 1 else energy
        first, last, held = front / dilation, (front + stride - 1) / dilation, int(along.argmax())
        if len(along) > 1 and not first <= held <= last:
            return "wrong", f"axis {axis}: energy around tap {held}, its own position is tap {first:g}"
    return "proved", note


def run_callers(model: nn.Module, layer: str) -> dict[int, Any]:
    """Return ``Watch.convolved`` from runs of the modules around a layer on made-up sequences and images."""
    own = model.get_submodule(layer)
    filters = own.get_parameter("weight")
    spatial = [2 * taps + 3 for taps in filters.shape[2:]]
    path = layer.split(".")
    # A plain convolution alone says nothing of what its caller pads.
    nearest = len(path) if type(own) not in (nn.Conv1d, nn.Conv2d) else len(path) - 1
    for depth in range(nearest, max(0, nearest - 3), -1):
        caller = model.get_submodule(".".join(path[:depth]))
        widths = {p.shape[1] for p in caller.parameters() if p.ndim == 2} | {len(filters)}
        for shape in [s for w in sorted(widths) for s in ((1, *spatial, w), (1, w, *spatial))]:
            with untraced(), Watch([]) as watch, contextlib.suppress(Exception):
                caller(torch.randn(shape, dtype=filters.dtype))
            if filters.data_ptr() in watch.convolved:
                return watch.convolved
    return {}


def one_sequence(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return made-up inputs whose keys and values come from the queries' own tokens, as a written layer claims."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    named = bound.arguments
    queries = next((named[k] for k in named if k.split("_")[0] in ("query", "queries", "q", "hidden")), None)
    for name, value in named.items():
        is_key = name.split("_")[0].rstrip("s") in ("key", "value", "k", "v")
        if is_key and queries is not None and isinstance(value, Tensor) and value.is_floating_point():
            named[name] = queries
    return bound.args, bound.kwargs


def products(module: nn.Module, args: Any, kwargs: Any, *, even: bool) -> tuple[list[float], float]:
    """Return the mean diagonals of W_Q W_Kᵀ, under each scale that a layer may use, and of W_V W_out.

    With ``even`` terms of queries or keys alone, which change sign with the tokens, are taken out of the scores.
    """
    keys = [key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    first = args[0] if args else kwargs[keys[0]]
    dim = first.shape[channels(module)]
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(4))[:PROBES].tolist()
    qk, vo, scales = 0.0, 0.0, {1.0}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "sink" in name:
                parameter.fill_(-50.0)  # they take a share of every output
    zero = one_run(module, args, kwargs, keys, torch.zeros(dim, dtype=torch.float64))
    if 0 < heads_of(module, 0) * (first.numel() // dim) < zero[0].numel() // zero[0].shape[-1]:
        raise ValueError("windows are filled up with tokens that are none, which dilute what is seen")
    for index in order:
        unit = torch.zeros(dim, dtype=torch.float64)
        unit[index] = 1.0
        scores, out = one_run(module, args, kwargs, keys, unit)
        if even:
            scores = (scores + one_run(module, args, kwargs, keys, -unit)[0]) / 2
        moved = (scores - zero[0]).diagonal(0, -1, -2)
        qk += float(moved[moved.abs() < 1e6].mean()) / len(order)
        vo += float((out - zero[1])[..., index].mean()) / len(order)
        heads = scores.numel() // scores.shape[-1] ** 2 // max(1, first.numel() // dim // scores.shape[-1])
        scales |= {(dim / heads) ** -0.5, dim**-0.5}
    scales |= {float(s) for n in ("scaling", "scale", "scale_attn") if isinstance(s := getattr(module, n, None), float)}
    scales |= {
        w**-0.5 for n in ("head_dim", "attention_head_size", "d_kv") if isinstance(w := getattr(module, n, None), int)
    }
    return [qk / scale for scale in sorted(scales) if scale], vo


def one_run(module: nn.Module, args: Any, kwargs: Any, keys: list[str], token: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer with every token equal; return its scores and the output of its last linear map."""
    last: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
        for part in module.modules()
        if not list(part.children()) and any(p.ndim >= 2 for p in part.parameters())
    ]
    axis = channels(module)
    args, kwargs = fresh(args), fresh(kwargs)
    same = args[0] if args else kwargs[keys[0]]
    filled = token.to(same.dtype).expand_as(same.movedim(axis, -1)).movedim(-1, axis).clone()

    # Whatever has the same values as the tokens (query, key, value) stays equal to them. Detectors add positions to
    # torch's queries and keys alone: its values are tokens all the same.
    def filled_in(place: int | str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.shape == same.shape):
            return value
        named = isinstance(module, nn.MultiheadAttention) and place in (0, 1, 2, "query", "key", "value")
        return filled if named or torch.equal(value, same) else value

    args = tuple(filled_in(place, value) for place, value in enumerate(args))
    kwargs = {name: filled_in(name, value) for name, value in kwargs.items()}
    kwargs = {k: v for k, v in kwargs.items() if "past" not in k and "cache" not in k}
    try:
        with untraced(), Watch([]) as watch:
            out = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    scores = [s for _, s in watch.seen if s.ndim >= 3 and s.shape[-1] - s.shape[-2] in (0, 1)]
    if scores[0].shape[-1] > scores[0].shape[-2] and not scores[0].amax(-1).any():
        scores[0] = scores[0] - scores[0][..., -1:]  # of whose rows the largest was taken off: a sink's tells it
    mapped = [part for part in last if isinstance(part, Tensor) and part.shape[axis] == len(token)]
    final = mapped[-1] if mapped and not isinstance(module, nn.MultiheadAttention) else next(leaves(out))
    return scores[0][..., : scores[0].shape[-2]], final.movedim(axis, -1)


def width_of(module: nn.Module) -> int:
    """Return the input width of a layer's first matrix, or of its first convolution."""
    return next(p.shape[1] for ndim in (2, 3, 4, 5) for p in module.parameters() if p.ndim == ndim)


def channels(module: nn.Module) -> int:
    """Return the axis of a layer's channels: 1 where its maps are convolutions."""
    convolved = any(isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in module.modules())
    return 1 if convolved and all(p.ndim != 2 for p in module.parameters()) else -1


def heads_of(module: nn.Module, unknown: int = 4) -> int:
    """Return the number of heads that a layer states."""
    names = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
    return next((n for name in names if isinstance(n := getattr(module, name, None), int)), unknown)
