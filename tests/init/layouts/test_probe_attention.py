"""The probe: what is written into a class that nobody registered is right by its own forward pass, or is left alone."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import AttentionWeights, Skipped, find_layers
from reference.random_attention import ANGLES, DIM, KEYS, STORAGE, Form, RandomAttention, true_diagonals

SPEC = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def found_in(model: nn.Module) -> dict[str, AttentionWeights | Skipped]:
    return {name: found for name, _, found in find_layers(model)}  # type: ignore[misc]


forms = st.builds(
    Form,
    storage=st.sampled_from(STORAGE),
    heads=st.sampled_from([1, 2, 4, 6]),
    groups=st.sampled_from([0, 1, 2]),
    keys=st.sampled_from(("self",) * 4 + KEYS),
    causal=st.booleans(),
    norm=st.sampled_from(["", "", "layer", "rms"]),
    rotary=st.booleans(),
    gate=st.booleans(),
    order=st.integers(0, 2),
    tiled=st.booleans(),
    swapped_heads=st.booleans(),
    bias=st.booleans(),
    fused=st.booleans(),
    angles=st.sampled_from(ANGLES),
)


def repaired(form: Form) -> Form:
    groups = form.groups or form.heads
    heads = form.heads if form.heads % groups == 0 else groups
    groups = heads if "head" in form.storage else groups
    return Form(**{**vars(form), "heads": heads, "groups": groups})


def is_plain(form: Form) -> bool:
    """Return whether the rows are where a reading of the names puts them, and attention is of the usual kind."""
    order = form.order == 0 or not form.storage.startswith("shuffled")
    one_each = form.groups in (1, form.heads)
    return (
        form.keys == "self" and order and form.storage not in ("rolled", "kv_by_head")
        and not form.swapped_heads and (one_each or not form.tiled)
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(form=forms)
@example(form=Form(storage="by_head", heads=2, groups=2, causal=True, gate=True))  # looks at its own token alone
@example(form=Form(fused=True))
@example(form=Form(angles="function"))
@example(form=Form(angles="logarithm"))
def test_whatever_is_written_is_right_by_a_forward_pass(form: Form) -> None:
    form = repaired(form)
    torch.random.default_generator.manual_seed(0)
    module = RandomAttention(form).double()
    before = copy.deepcopy(module.state_dict())
    try:
        [row] = espalier.structure_(module, attention=SPEC, generator=seeded()).layers
    except EspalierError:
        assert not is_plain(form), form
        assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
        return
    assert row.status == "written"
    assert form.keys in ("self", "context")
    still = RandomAttention(Form(**{**vars(form), "norm": "", "gate": False})).double()
    still.load_state_dict(module.state_dict(), strict=False)
    qk, vo = true_diagonals(still)
    assert qk == pytest.approx(row.measured["qk_diagonal"], abs=1e-6)
    assert vo == pytest.approx(row.measured["vo_diagonal"], abs=1e-6)
    assert qk > 0.05
    assert vo < -0.05


def test_notes_say_what_stands_between_product_and_score() -> None:
    for form, words in (
        (Form(rotary=True), "distance zero"),
        (Form(norm="rms"), "up to scale"),
        (Form(norm="layer"), "up to scale"),
        (Form(gate=True), "before the gate"),
    ):
        [row] = espalier.structure_(RandomAttention(form), generator=seeded()).layers
        assert words in row.note
        assert "proven by a run" in row.note


class Caller(nn.Module):
    """A module that hands an attention layer its keys: its own tokens, or others."""

    def __init__(self, attention: nn.Module, keys: str, name: str = "attn") -> None:
        super().__init__()
        self.add_module(name, attention)
        self.name, self.keys = name, keys
        self.latents = nn.Parameter(torch.randn(1, 3, DIM))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.get_submodule(self.name)
        x = self.norm(x)
        other = {"self": x, "half": x[:, ::2], "latents": self.latents.expand(len(x), -1, -1), "flip": x.flip(1)}[
            self.keys
        ]
        if isinstance(attention, nn.MultiheadAttention):
            return attention(x, other, other)[0]
        return attention(x, other)


@pytest.mark.parametrize(
    "make", [lambda: nn.MultiheadAttention(DIM, 4, batch_first=True), lambda: RandomAttention(Form())]
)
def test_keys_are_those_that_the_owner_hands_over(make: object) -> None:
    for keys in ("self", "half", "latents", "flip"):
        model = nn.ModuleList([Caller(make(), keys)])  # type: ignore[operator]
        [found] = [found for name, found in found_in(model).items() if name.endswith("attn")]
        assert isinstance(found, AttentionWeights) == (keys == "self"), (keys, found)
        if keys != "self":
            assert isinstance(found, Skipped)
            assert "cross-attention" in found.reason or "shorter" in found.reason


@pytest.mark.parametrize(
    "name",
    ["src_attn", "xattn", "cross", "decoder_cross_attn", "cross_attn.mha", "encoder_attn", "cross.0", "attn_pool"],
)
def test_names_that_read_as_cross_attention_are_skipped(name: str) -> None:
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(DIM, 4)})
    path, holder = name.split("."), model
    for part in path[:-1]:
        holder.add_module(part, nn.ModuleDict())
        holder = holder.get_submodule(part)  # type: ignore[assignment]
    holder.add_module(path[-1], nn.MultiheadAttention(DIM, 4))
    rows = {row.layer: row for row in espalier.structure_(model).layers}
    assert rows["self_attn"].status == "written"
    assert rows[name].status == "skipped"
    assert "cross-attention" in rows[name].note


class SaysByClass(nn.MultiheadAttention):
    """Cross-attention by an attribute of its class."""

    is_cross_attention = True


class SaysByKind(nn.MultiheadAttention):
    """Cross-attention by a value."""

    kind = "cross_attn"


class SaysByProperty(nn.MultiheadAttention):
    """Cross-attention by a property of its class."""

    @property
    def is_cross(self) -> bool:
        """Say so."""
        return True


class Permissive(nn.MultiheadAttention):
    """Self-attention that could be given other keys, and says so; its other words are not about itself."""

    supports_cross_attention = True
    no_cross = True
    loss = "cross_entropy"


def test_a_module_s_own_word_counts() -> None:
    guessed, registered = RandomAttention(Form()), nn.MultiheadAttention(DIM, 4)
    guessed.is_cross_attention = True
    registered.encoder_decoder_attention = True
    for module in (guessed, registered, SaysByClass(DIM, 4), SaysByKind(DIM, 4), SaysByProperty(DIM, 4)):
        [found] = found_in(nn.ModuleDict({"layer": module})).values()
        assert isinstance(found, Skipped), type(module)
        assert "cross-attention" in found.reason
    assert isinstance(found_in(nn.ModuleDict({"layer": Permissive(DIM, 4)}))["layer"], AttentionWeights)
    model = nn.ModuleDict({"cross_encoder": nn.ModuleDict({"self_attn": RandomAttention(Form())})})
    assert isinstance(found_in(model)["cross_encoder.self_attn"], AttentionWeights)


class Doubled(nn.Module):
    """A block that cannot be run on anything made up, around attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.mha(batch["a"], batch["b"], batch["b"])[0]


def test_what_cannot_be_run_is_skipped_with_the_reason() -> None:
    [found] = found_in(nn.ModuleList([Doubled()])).values()
    assert isinstance(found, Skipped)
    assert "cannot be proven" in found.reason
    assert "Doubled" in found.reason


def reset_by_hook(module: nn.Linear) -> None:
    module.register_parameter("weight_source", nn.Parameter(module.weight.detach().clone()))
    module.register_forward_pre_hook(lambda m, _: m.weight.data.copy_(m.weight_source))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("parent", ["registered", "guessed", "torch", "depthwise"])
def test_weights_that_a_hook_computes_are_skipped(parent: str) -> None:
    for hook in (
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        lambda layer: prune.identity(layer, "bias"),
        reset_by_hook,
    ):
        model: nn.Module = {
            "registered": lambda: espalier.models.VisionTransformer(8, 2, 1, embed_dim=DIM, depth=1, num_heads=2),
            "guessed": lambda: RandomAttention(Form(bias=True)),
            "torch": lambda: nn.MultiheadAttention(DIM, 4),
            "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8)),
        }[parent]()
        target = {"registered": "blocks.0.attn.proj", "guessed": "proj", "torch": "out_proj", "depthwise": "0"}[parent]
        hook(model.get_submodule(target))
        found = list(found_in(model).values())
        assert found
        assert all(isinstance(part, Skipped) for part in found), hook
        assert "hook" in found[0].reason


class Overridden(nn.MultiheadAttention):
    """A subclass of a registered class that does something else with its rows."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        v, k, q = nn.functional.linear(x, self.in_proj_weight).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Renamed(nn.MultiheadAttention):
    """A subclass that changes nothing."""


def test_subclasses_with_code_of_their_own_are_proven_or_skipped() -> None:
    [found] = found_in(Overridden(DIM, 4)).values()
    assert isinstance(found, Skipped)
    [found] = found_in(Renamed(DIM, 4)).values()
    assert isinstance(found, AttentionWeights)


class Latent(nn.Module):
    """Attention in a form that no layout knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_a_proj, self.kv_b_proj = nn.Linear(DIM, 4), nn.Linear(4, 2 * DIM)
        self.q_b_proj, self.o_proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)


class ClassAttn(nn.Module):
    """The same, known by its class's name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)


def test_no_attention_is_silent() -> None:
    model = nn.ModuleDict({"known": RandomAttention(Form()), "latent": Latent(), "cls": nn.Sequential(ClassAttn())})
    rows = {row.layer: (row.status, row.note) for row in espalier.structure_(model).layers}
    assert rows["known"][0] == "written"
    assert rows["latent"][0] == rows["cls.0"][0] == "skipped"
    assert "latent" in rows["latent"][1]
    assert "looks like attention" in rows["cls.0"][1]
    assert len(rows) == 3


def test_the_probe_leaves_no_trace() -> None:
    calls: list[int] = []
    module = RandomAttention(Form(norm="rms")).train()
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    module.qkv.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (value, value.clone(), value._version) for name, value in module.state_dict(keep_vars=True).items()}
    attributes = dict(vars(module))
    state = torch.random.get_rng_state()
    flags = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled())
    list(find_layers(module))
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled())
    assert not calls
    assert module.training
    assert vars(module) == attributes
    for name, value in module.state_dict(keep_vars=True).items():
        old, copied, version = before[name]
        assert value is old
        assert value._version == version
        assert torch.equal(value, copied)


def test_the_probe_runs_once_for_layers_alike_and_less_for_those_with_another_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from espalier.init.layouts import prove, trial, verdicts

    proofs, runs, run, alone = [], [], trial.run, prove._prove_alone
    monkeypatch.setattr(prove, "_prove_alone", lambda *a: proofs.append(len(runs)) or alone(*a))
    monkeypatch.setattr(trial, "run", lambda *a: runs.append(1) or run(*a))
    verdicts.KNOWN.clear()
    model = nn.ModuleList([RandomAttention(Form(heads=3, groups=3)) for _ in range(6)])
    for index, module in enumerate(model):
        module.layer_idx = index // 2
    espalier.structure_(model, generator=seeded())
    assert len(proofs) == 3
    costs = [after - before for before, after in itertools.pairwise([*proofs, len(runs)])]
    assert max(costs[1:]) <= costs[0] / 4


@pytest.mark.parametrize("error", [ValueError, None])
def test_a_refused_module_is_not_kept_alive(error: type[Exception] | None) -> None:
    class Refused(RandomAttention):
        def forward(self, x: Tensor) -> Tensor:
            if error is not None:
                raise error("it does not run")
            return x * self.qkv.weight.sum() * self.proj.weight.sum()

    module = Refused(Form())
    [found] = found_in(nn.Sequential(module)).values()
    assert isinstance(found, Skipped)
    kept = weakref.ref(module)
    del module, found
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("kind", ["mamba", "encoder", "vit"])
def test_layers_whose_weights_are_elsewhere_get_a_row(kind: str) -> None:
    from espalier.nn.ssm.mamba import Mamba1

    model: nn.Module = {
        "mamba": lambda: Mamba1(16),
        "encoder": lambda: nn.TransformerEncoderLayer(DIM, 2),
        "vit": lambda: espalier.models.VisionTransformer(8, 2, 1, embed_dim=DIM, depth=1, num_heads=2),
    }[kind]()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    [found] = [found for _, _, found in find_layers(model)]
    assert isinstance(found, Skipped)
    rows = espalier.structure_(nn.ModuleList([model, RandomAttention(Form())])).layers
    assert [row.status for row in rows] == ["skipped", "written"]


def test_an_adapter_on_a_state_space_layer_gets_a_row() -> None:
    from espalier.nn.ssm.mamba import Mamba1

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.lora_A = base, nn.Linear(16, 2)

    mixer = Mamba1(16)
    mixer.x_proj = Adapted(mixer.x_proj)
    [found] = [found for _, _, found in find_layers(mixer)]
    assert isinstance(found, Skipped)
    assert "LoRA" in found.reason


def test_a_class_whose_mode_switch_returns_nothing_is_probed_all_the_same() -> None:
    class Careless(RandomAttention):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    plain, careless = (cls(Form()) for cls in (RandomAttention, Careless))
    assert type(found_in(nn.Sequential(careless))["0"]) is type(found_in(nn.Sequential(plain))["0"])
