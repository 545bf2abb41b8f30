"""``diagnose`` on healthy and broken models and checkpoints of every kind; what it leaves behind; how it prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import espalier
from doctor.corpus.case import garbage
from doctor.corpus.training import LanguageModel
from espalier.checkpoints import skeleton
from espalier.doctor import Finding, Patient, Record, register_check
from espalier.doctor.registry import CHECKS
from espalier.doctor.stats import measure
from espalier.errors import EspalierError

INITIALISERS: dict[str, Callable[[torch.Tensor], object]] = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "kaiming": lambda w: nn.init.kaiming_normal_(w),
    "uniform": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "orthogonal": lambda w: nn.init.orthogonal_(w),
}
NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "rms": nn.RMSNorm, "none": lambda width: nn.Identity()}
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU]


def build(width: int, depth: int, initialiser: str, norm: str, activation: int, seed: int) -> nn.Sequential:
    """Return a stack of layers with a head of ten classes, started in one of the usual ways."""
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(nn.Linear(width, width), NORMS[norm](width), ACTIVATIONS[activation]()) for _ in range(depth)
    ]
    model = nn.Sequential(*blocks, nn.Linear(width, 10))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            INITIALISERS[initialiser](parameter)
    return model


models = st.builds(
    build,
    st.sampled_from([16, 24, 48]),
    st.integers(2, 6),
    st.sampled_from(list(INITIALISERS)),
    st.sampled_from(list(NORMS)),
    st.integers(0, 3),
    st.integers(0, 2**16),
)


def loud(diagnosis: espalier.Diagnosis) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.severity != "note"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_usual_starts_are_healthy(model: nn.Sequential, dtype: torch.dtype) -> None:
    assert not loud(espalier.diagnose(model.to(dtype)))


FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "not-finite": lambda w: w.view(-1)[w.numel() // 2].fill_(torch.nan),
    "uninitialised": lambda w: w.copy_(garbage(*w.shape)),
    "constant": lambda w: w.fill_(0.05),
    "equal-units": lambda w: w.copy_(w[:1].clone().expand_as(w)),
    "off-centre": lambda w: w.add_(2 * w.std()),
    "scale": lambda w: w.normal_(std=30.0),
    "pinned": lambda w: w.view(-1)[:: max(1, w.numel() // 8)].fill_(-2000 * float(w.abs().max())),
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models, st.sampled_from(list(FAULTS)), st.integers(0, 5))
def test_one_broken_layer_is_named(model: nn.Sequential, fault: str, index: int) -> None:
    weights = [(name, p) for name, p in model.named_parameters() if p.ndim == 2][:-1]
    name, weight = weights[index % len(weights)]
    with torch.no_grad():
        FAULTS[fault](weight)
    assert fault in {finding.check for finding in loud(espalier.diagnose(model)) if finding.layer == name}


EXTREME = [0.0, 1e-320, 1e-44, 1e-30, 1.0, -1.0, 3e22, 1e38, -1e300, float("inf"), float("nan")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(EXTREME), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 2**16),
)
def test_no_numbers_break_a_check(scales: list[float], rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows), nn.LayerNorm(rows), nn.Embedding(rows, columns)).double()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        factors = torch.tensor(scales, dtype=torch.float64)
        parameter.data = noise * factors[torch.randint(len(scales), parameter.shape, generator=draw)]
    named = {finding.layer for finding in espalier.diagnose(model.to(dtype)).errors if finding.check == "not-finite"}
    assert named == {name for name, values in model.named_parameters() if not torch.isfinite(values).all()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-38, float("nan"), float("inf")]), min_size=1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_one_pass_gives_the_plain_numbers(numbers: list[float], dtype: torch.dtype) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    plain = [float(v) for v in values if torch.isfinite(v)]
    stats = measure(values)
    assert stats.nonfinite == len(numbers) - len(plain)
    assert stats.zeros == sum(v == 0 for v in plain)
    assert stats.tiny == sum(0 < abs(v) < 1e-30 for v in plain)
    if plain:
        scale = max(map(abs, plain))
        assert stats.minimum == min(plain)
        assert stats.maximum == max(plain)
        assert stats.mean == pytest.approx(sum(plain) / len(plain), abs=1e-5 * scale + 1e-30)
        assert stats.rms == pytest.approx((sum(v * v for v in plain) / len(plain)) ** 0.5, rel=1e-4, abs=1e-20)


def test_large_tensors_are_read_in_pieces() -> None:
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    stats = measure(values)
    assert stats.rms == pytest.approx(float(values.double().square().mean().sqrt()), rel=1e-6)
    assert stats.noise
    assert measure(values.reshape(1, -1)).rms == stats.rms
    assert measure(values + 0.0).fingerprint == stats.fingerprint
    values[-1] += 1e-3
    assert measure(values).fingerprint != stats.fingerprint


def state_of(model: nn.Module) -> Iterator[object]:
    yield from (module.training for module in model.modules())
    yield from (tensor.clone() for tensor in model.state_dict().values())
    yield from (None if p.grad is None else p.grad.clone() for p in model.parameters())
    yield torch.random.get_rng_state()


@pytest.mark.parametrize("training", [True, False])
def test_probe_leaves_everything_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train(training)
    model[2].train(not training)
    model[0].weight.grad = torch.ones(8, 8)
    held, before = model[0].weight.grad, list(state_of(model))
    espalier.diagnose(model, (torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(32).long()))
    for was, now in zip(before, state_of(model), strict=True):
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was is now
    assert model[0].weight.grad is held
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Twice(nn.Module):
    """Attends twice, once to one key and once to all."""

    def __init__(self, flat_first: bool) -> None:
        super().__init__()
        self.linear, self.flat_first = nn.Linear(16, 16), flat_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, 16, 16)."""
        sharp = 100 * torch.eye(16).expand(len(x), 1, 16, 16).contiguous()
        for q in (x * 0, sharp) if self.flat_first else (sharp, x * 0):
            x = nn.functional.scaled_dot_product_attention(q, sharp, self.linear(x))
        return x


@pytest.mark.parametrize("flat_first", [True, False])
def test_the_worst_of_several_calls_counts(flat_first: bool) -> None:
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = espalier.diagnose(Twice(flat_first), x)
    assert [(f.check, f.layer) for f in loud(found)] == [("attention-entropy", "")]


def test_probe_that_fails_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    before = list(state_of(model))
    with pytest.raises(RuntimeError):
        espalier.diagnose(model, torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    for was, now in zip(before, state_of(model), strict=True):
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was is now


@pytest.mark.parametrize("layout", ["file", "index", "folder", "torch"])
def test_checkpoints_are_read_in_every_layout(tmp_path: Path, layout: str) -> None:
    state = {name: tensor.detach().clone() for name, tensor in build(24, 3, "normal", "layer", 0, 0).named_parameters()}
    state["1.0.weight"][3, 4] = torch.nan
    names = list(state)
    path = tmp_path / "model.safetensors"
    if layout in ("file", "folder"):
        save_file(state, path)
    elif layout == "torch":
        path = tmp_path / "model.pt"
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, part in shards.items():
            save_file({name: state[name] for name in part}, tmp_path / file)
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    diagnosis = espalier.diagnose(tmp_path if layout in ("folder", "index") else path)
    assert [(f.check, f.layer) for f in diagnosis.errors] == [("not-finite", "1.0.weight")]
    assert diagnosis.tensors == len(state)
    assert diagnosis.parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("fault", ["two of one name", "two by an index", "lost", "two indexes"])
def test_files_that_do_not_make_one_checkpoint_are_refused(tmp_path: Path, fault: str) -> None:
    """Whichever file is read last would hide what the others hold, and what no file holds would be no finding."""
    states = [{"a.weight": torch.full((8, 8), torch.nan), "b.weight": torch.randn(8, 8)}, {"a.weight": torch.eye(8)}]
    if fault in ("lost", "two indexes"):
        del states[0]["a.weight"]
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
    shards = {"a.weight": "1.safetensors", "b.weight": "0.safetensors"}
    if fault == "lost":
        shards["c"] = "1.safetensors"
    for number in range({"two of one name": 0, "two indexes": 2}.get(fault, 1)):
        index = tmp_path / f"m{number}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": shards}))
    said = {"lost": "holds c", "two indexes": "2 indexes"}.get(fault, "1.safetensors both hold a.weight")
    with pytest.raises(EspalierError, match=said):
        espalier.diagnose(tmp_path)
    with pytest.raises(EspalierError, match=said):
        espalier.diagnose(nn.Linear(8, 8), against=tmp_path)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_trained_weights_are_not_held_against_a_fresh_start(tmp_path: Path, norm: str) -> None:
    model = build(48, 6, "kaiming", norm, 1, 0)
    assert not espalier.diagnose(model).trained
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        x = torch.randn(64, 48, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model[3][0].weight[:4] *= 1e-35  # dead units, decayed
    diagnosis = espalier.diagnose(model)
    assert diagnosis.trained
    assert not loud(diagnosis)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert not loud(espalier.diagnose(tmp_path / "model.safetensors", against=model.state_dict()))


def test_head_on_disk_against_the_configuration(tmp_path: Path) -> None:
    model = LanguageModel()
    config = {"architectures": ["TinyForCausalLM"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}  # the head is tied: not in it
    save_file(state, tmp_path / "model.safetensors")
    assert [(f.check, f.layer) for f in espalier.diagnose(tmp_path).errors] == [("tied", "lm_head.weight")]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert espalier.diagnose(tmp_path).ok
    save_file(state | {"lm_head.weight": torch.randn(256, 64) * 0.02}, tmp_path / "model.safetensors")
    assert [(f.check, f.layer) for f in espalier.diagnose(tmp_path).errors] == [("tied", "lm_head.weight")]


def test_wrappers_leave_no_trace_in_names() -> None:
    model = build(16, 2, "normal", "layer", 0, 0)
    model[0][0].weight.data[0, 0] = torch.nan
    for wrapped in (torch.compile(model), nn.ModuleDict({"module": model}), model):
        found = espalier.diagnose(wrapped, example=None)
        assert [f.layer for f in found.errors] == ["0.0.weight"]
    # A module of the user's own with a wrapper's name hides no tensor.
    outer = nn.Linear(16, 16)
    outer.module = nn.Linear(16, 16)
    nn.init.constant_(outer.module.weight, torch.nan)
    assert [f.layer for f in espalier.diagnose(outer).errors] == ["module.weight"]
    assert espalier.diagnose(outer).tensors == 4


def test_tensors_of_other_kinds_are_passed_over() -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("codes", torch.randint(-128, 127, (8, 8), dtype=torch.int8))
    model.register_buffer("waves", torch.zeros(8, dtype=torch.complex64))
    model.register_buffer("links", torch.eye(8).to_sparse())
    model.register_buffer("small", torch.randn(64, 64).to(torch.float8_e4m3fn))
    model.register_buffer("scalar", torch.tensor(3.0))
    assert not loud(espalier.diagnose(model))


def test_users_add_checks_of_their_own() -> None:
    @register_check("no-sevens", scope="tensor")
    def no_sevens(record: Record, patient: Patient) -> Iterator[Finding]:
        if record.values is not None and bool((record.values == 7).any()):
            yield Finding("warning", record.name, "no-sevens", "a seven", "none", "take it out", "our-rules.md")

    try:
        with pytest.raises(EspalierError, match="check 'no-sevens' exists: choose another name"):
            register_check("no-sevens")
        with pytest.raises(EspalierError, match="scope 'layer' of check 'other': choose 'tensor' or 'model'"):
            register_check("other", scope="layer")  # type: ignore[arg-type]
        model = nn.Linear(8, 8)
        model.bias.data[2] = 7.0
        diagnosis = espalier.diagnose(model)
        assert [(f.check, f.layer, f.page) for f in diagnosis.findings] == [("no-sevens", "bias", "our-rules.md")]
        assert (diagnosis.exit_status(), diagnosis.exit_status(strict=True)) == (0, 1)
    finally:
        del CHECKS["no-sevens"]


def test_a_check_of_single_tensors_that_asks_for_the_whole_changes_no_answer() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    for norm in model[1::2]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.1, 0.1)
    assert espalier.diagnose(model).trained

    @register_check("asks", scope="tensor")
    def asks(record: Record, patient: Patient) -> Iterator[Finding]:
        if patient.trained or patient.kin:  # nothing was read yet when it asks first
            yield Finding("note", record.name, "asks", "", "", "")

    try:
        assert espalier.diagnose(model).trained
    finally:
        del CHECKS["asks"]


def test_prints_one_line_when_healthy_and_the_worst_first_when_not() -> None:
    model = build(24, 4, "normal", "layer", 0, 0)
    assert "\n" not in str(espalier.diagnose(model))
    nn.init.zeros_(model[-1].weight)
    model[1][0].weight.data[0, 0] = torch.inf
    diagnosis = espalier.diagnose(model)
    assert [f.severity for f in diagnosis.findings] == ["error", "note"]
    lines = str(diagnosis).splitlines()
    assert lines[0].startswith("1 error, 1 note")
    assert lines[3].split()[:2] == ["error", "1.0.weight"]
    assert "→" in lines[4]
    assert "before-you-train.md#not-finite" in lines[4]
    assert json.loads(diagnosis.to_json())["findings"][0]["layer"] == "1.0.weight"


def test_every_check_has_its_heading_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "before-you-train.md").read_text()
    probed = {"activations", "dead-units", "saturated", "attention-entropy", "loss", "gradients", "no-gradient"}
    for name in {*CHECKS, *probed, "bfloat16"}:
        assert f"### {name}\n" in guide, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/nowhere.safetensors"}, "is neither a module nor a path"),
        ({"model": nn.Linear(2, 2), "example": "some"}, "example 'some': pass a batch, or 'synthetic'"),
        ({"model": nn.Linear(2, 2), "example": 3}, "example int: pass a tensor"),
        (
            {"model": nn.ParameterList([nn.Parameter(torch.randn(3))]), "example": "synthetic"},
            "does not say what it takes: pass a batch",
        ),
        ({"model": nn.Linear(2, 2), "example": torch.ones(0, 2)}, "pass a batch that is not empty"),
        ({"model": skeleton({"a.weight": torch.ones(2, 2)}), "example": "synthetic"}, "a bare checkpoint has no code"),
        ({"model": nn.Linear(2, 2), "against": 3}, "against int: pass a StructureReport"),
        ({"model": nn.Linear(2, 2), "against": {"model": nn.Linear(2, 2).state_dict()}}, "holds no tensors by name"),
        ({"model": nn.Linear(2, 2), "optimizer": "adam"}, "optimizer str: pass the optimiser"),
        ({"model": nn.Linear(2, 2), "heads": "4"}, "heads 4: give a whole number from 1"),
    ],
)
def test_bad_input_is_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(EspalierError, match=message) as error:
        espalier.diagnose(**arguments)
    assert "\n" not in str(error.value)


def test_a_branch_that_starts_at_fixed_offsets_is_not_closed() -> None:
    branch = nn.ModuleDict({"offsets": nn.Linear(16, 8), "weights": nn.Linear(16, 4)})
    model = nn.Sequential(nn.Linear(16, 16), nn.ModuleDict({"attention": branch}))
    for layer in branch.values():
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert any(f.check == "closed-twice" for f in espalier.diagnose(model).findings)
    branch["offsets"].bias.data += torch.linspace(-1, 1, 8)
    assert not any(f.check == "closed-twice" for f in espalier.diagnose(model).findings)


@pytest.mark.parametrize(("shape", "severity"), [((0,), "error"), ((1, 0, 64), "note"), ((0, 64), "note")])
def test_none_of_a_kind_is_no_lost_weight(shape: tuple[int, ...], severity: str) -> None:
    model = nn.Linear(16, 16)
    model.register_parameter("registers", nn.Parameter(torch.empty(shape)))
    assert [f.severity for f in espalier.diagnose(model).findings if f.check == "empty"] == [severity]
