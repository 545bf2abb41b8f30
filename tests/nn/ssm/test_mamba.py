"""The mixers against transformers' with the same weights, and their step mode against their parallel one."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2, MambaState, backend, use_backend
from needs import IMPLEMENTATIONS

FAMILIES = ["mamba1", "mamba2", "mamba2-groups"]


def ours(family: str, seed: int = 0) -> Mamba1 | Mamba2:
    g = torch.Generator().manual_seed(seed)
    if family == "mamba1":
        return Mamba1(32, 8, generator=g)
    return Mamba2(32, 8, head_dim=8, groups=2 if family.endswith("groups") else 1, generator=g)


def theirs(family: str) -> nn.Module:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if family == "mamba1":
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1), 0)
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    groups = 2 if family.endswith("groups") else 1
    sizes = {"hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": groups, "chunk_size": 16}
    return Mamba2Mixer(Mamba2Config(num_hidden_layers=1, **sizes), 0)


def tokens(length: int = 45) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_transformers_with_the_same_weights(family: str, implementation: str) -> None:
    mixer, host = ours(family), theirs(family)
    host.load_state_dict(mixer.state_dict())  # the names and shapes are the same, in both directions
    mixer.load_state_dict(host.state_dict())
    x = tokens().requires_grad_()
    with use_backend(implementation):
        mine = mixer(x)
    other = host(x)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    weight = torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    mine_grads = torch.autograd.grad(mine, (x, *parameters), weight)
    other_grads = torch.autograd.grad(other, (x, *(host.get_parameter(name) for name in names)), weight)
    for name, one, two in zip(("x", *names), mine_grads, other_grads, strict=True):
        assert (one - two).abs().max() <= 1e-4 * max(1.0, two.abs().max().item()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_equals_transformers(family: str) -> None:
    mixer, host = ours(family), theirs(family)
    host.load_state_dict(mixer.state_dict())
    mask = torch.arange(45).expand(2, -1) >= torch.tensor([[0], [15]])
    mine, other = mixer(tokens(), mask=mask), host(tokens(), attention_mask=mask.long())
    torch.testing.assert_close(mine[mask], other[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    mixer, x = ours(family), tokens()
    alone, alone_state = mixer(x[1:, :30], return_state=True)
    rest = torch.zeros(2, 15, 32)
    padded = torch.cat([rest, x[:, :30]] if side == "left" else [x[:, :30], rest], dim=1)
    mask = torch.cat([rest[..., 0], torch.ones(2, 30)] if side == "left" else [torch.ones(2, 30), rest[..., 0]], 1) > 0
    out, state = mixer(padded, mask=mask, return_state=True)
    torch.testing.assert_close(out[1, mask[1]], alone[0], rtol=1e-5, atol=1e-6)
    assert out[~mask].abs().max() == 0
    for one, two in zip(state, alone_state, strict=True):
        torch.testing.assert_close(one[1:], two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_real_tokens_do_not_see_what_stands_in_the_padding(family: str, implementation: str, value: float) -> None:
    mixer, x, mask = ours(family), tokens(), torch.ones(2, 45)
    mask[0, 30:], mask[1, :5] = 0, 0
    with use_backend(implementation):
        expected, state = mixer(x, mask=mask, return_state=True)
        padded = x.masked_fill(mask[..., None] == 0, value).requires_grad_()
        out, found = mixer(padded, mask=mask, return_state=True)
        wanted = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
        of_padded, *gradients = torch.autograd.grad(out.square().sum(), [padded, *mixer.parameters()])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, state)
    torch.testing.assert_close(gradients, list(wanted))
    assert not of_padded[mask == 0].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_step_mode_equals_the_parallel_one(family: str, implementation: str) -> None:
    mixer, x = ours(family), tokens(20)
    with use_backend(implementation):
        whole, last = mixer(x, return_state=True)
    state = mixer.empty_state(2)
    for t in range(20):
        out, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(out, whole[:, t], rtol=1e-5, atol=1e-6)
    for one, two in zip(state, last, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_may_be_cut_anywhere(family: str) -> None:
    mixer, x = ours(family), tokens()
    whole = mixer(x)
    for cut in (1, 2, 30):
        first, state = mixer(x[:, :cut], return_state=True)
        assert isinstance(state, MambaState)
        second = mixer(x[:, cut:], state=state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_state_stays_float32(family: str) -> None:
    mixer = ours(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = mixer(tokens(), return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.scan.dtype == torch.float32
    assert mixer.bfloat16().empty_state(2).scan.dtype == torch.float32
    mixer = ours(family)
    assert (out.float() - mixer(tokens())).abs().max() < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_come_from_the_generator_alone(family: str) -> None:
    torch.manual_seed(1)
    one = ours(family, seed=3)
    torch.manual_seed(2)
    two = ours(family, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    bias = one.dt_proj.bias if family == "mamba1" else one.dt_bias
    steps = nn.functional.softplus(bias)
    assert 1e-3 * 0.99 < steps.min() <= steps.max() < 1e-1 * 1.01
    rates = one.A_log.exp()
    assert 0.99 < rates.min() <= rates.max() < 16.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_every_gradient_in_float64_equals_finite_differences(family: str, implementation: str) -> None:
    mixer = Mamba1(4, 2) if family == "mamba1" else Mamba2(4, 2, head_dim=4, groups=2, chunk_size=3)
    mixer = mixer.double()
    mixer.init_weights(torch.Generator().manual_seed(0))
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    g = torch.Generator().manual_seed(1)
    empty = mixer.empty_state(2)
    inputs = [torch.randn(t.shape, dtype=torch.float64, generator=g) for t in (torch.empty(2, 4, 4), *empty)]

    def run(x: Tensor, conv: Tensor, scan: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        options = {"state": MambaState(conv, scan), "return_state": True}
        out, state = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,), options)
        return out, *state

    with use_backend(implementation):
        arguments = [t.requires_grad_() for t in inputs] + [p.detach().clone().requires_grad_() for p in parameters]
        assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_used_twice_in_part_strided_and_copied(family: str, implementation: str) -> None:
    mixer, x = ours(family), tokens(9)
    with use_backend(implementation):
        y = mixer(x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(copy.deepcopy(mixer)))(x), y, rtol=1e-5, atol=1e-6)
        strided = torch.randn(32, 9, 2).permute(2, 1, 0).copy_(x)
        torch.testing.assert_close(mixer(strided), y, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert not mixer(x).requires_grad
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        once = torch.autograd.grad(y, parameters, weight)
        twice = torch.autograd.grad(mixer(x) + mixer(x), parameters, weight)
        for name, parameter, one, two in zip(names, parameters, once, twice, strict=True):
            torch.testing.assert_close(two, 2 * one, rtol=1e-4, atol=1e-5)
            # Alone: all other weights frozen, and no gradient asked of the input.
            mixer.requires_grad_(False)
            parameter.requires_grad_(True)
            (alone,) = torch.autograd.grad(mixer(x), parameter, weight)
            torch.testing.assert_close(alone, one, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_inputs_are_refused_in_one_line(family: str) -> None:
    mixer, x = ours(family), tokens(5)
    for wrong in (x[:0], x[:, :0], x[..., :3], x[0]):
        with pytest.raises(EspalierError, match=r"the input is .* give \(batch, length, 32\)"):
            mixer(wrong)
    with pytest.raises(EspalierError, match=r"mask is \(2, 4\)"):
        mixer(x, mask=torch.ones(2, 4))
    with pytest.raises(EspalierError, match="mask is a list: give a tensor of the shape"):
        mixer(x, mask=[[1] * 5] * 2)
    for wrong in (x, x[:, 0, :3], x[0, 0]):
        with pytest.raises(EspalierError, match=r"the input is .* give \(batch, 32\)"):
            mixer.step(wrong, mixer.empty_state(2))
    for batch in (-1, 2.0, True):
        with pytest.raises(EspalierError, match=f"batch is {batch}: give a whole number from 0"):
            mixer.empty_state(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_that_does_not_fit_is_refused_by_sequences_and_steps_alike(family: str) -> None:
    mixer, x = ours(family), tokens(1)
    window, scan = mixer.empty_state(2)
    cases: list[tuple[Any, str]] = [
        (mixer.empty_state(3), "the state is for 3 sequences: give 2"),
        (mixer.empty_state(1), "the state is for 1 sequences: give 2"),
        (MambaState(window[:, 1:], scan), r"the state's window is .* give it the shape \(2, 3, "),
        (MambaState(window[..., 1:], scan), r"the state's window is .* give it the shape \(2, 3, "),
        (MambaState(window[0, 0, 0], scan), r"the state's window is \(\): give it the shape \(2, 3, "),
        (MambaState(window, scan[:1]), r"the state's recurrent part is \(1, .* give it the shape \(2, "),
        (MambaState(window, scan[:, :1]), r"the state's recurrent part is \(2, 1, .* give it the shape \(2, "),
        (MambaState(window, scan[..., :1]), r"the state's recurrent part is .*, 1\): give it the shape \(2, "),
        (MambaState(window, scan.to("meta")), "another device"),
        (MambaState(None, scan), r"state is NoneType, Tensor: give a MambaState, such as empty_state\(2\)"),
        ((window, scan), r"state is tuple: give a MambaState, such as empty_state\(2\)"),
    ]
    for state, words in cases:
        for call in (lambda state=state: mixer(x, state=state), lambda state=state: mixer.step(x[:, 0], state)):
            with pytest.raises(EspalierError, match=words):
                call()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compile_traces_through_the_mixers() -> None:
    for family in ("mamba1", "mamba2"):
        mixer = ours(family)
        # In plain torch the backward passes written by hand stay outside the graph.
        compiled = torch.compile(mixer, backend="aot_eager", fullgraph=backend().name == "compiled")
        x = tokens(10).requires_grad_()
        out = compiled(x)
        torch.testing.assert_close(out, mixer(x), rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        (expected,) = torch.autograd.grad(mixer(x).square().sum(), x)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_divide_are_refused_in_one_line() -> None:
    with pytest.raises(EspalierError, match="head_dim 24 does not divide expand·dim = 64"):
        Mamba2(32, 8, head_dim=24)
    with pytest.raises(EspalierError, match="groups 3 does not divide the 8 heads"):
        Mamba2(32, 8, head_dim=8, groups=3)
    with pytest.raises(EspalierError, match="state_size is 0"):
        Mamba1(32, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("family", FAMILIES)
def test_compilers_leave_the_backward_passes_by_hand_alone(family: str) -> None:
    # Traced, their in-place updates gave gradients of zero with torch 2.11: graphs hold plain operations only.
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    mixer, x = ours(family), tokens().requires_grad_()
    torch.compiler.reset()
    with use_backend("torch"):
        compiled = torch.compile(mixer, backend=collect)
        wanted = [x, *mixer.parameters()]
        found, plain = (torch.autograd.grad(m(x).square().sum(), wanted) for m in (compiled, mixer))
    # Sums of thousands of float32 products, in another order: to each gradient's size and the largest one's.
    largest = max(grad.norm() for grad in plain)
    for mine, other in zip(found, plain, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-5 * largest
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("linear" in target for target in targets)
    assert not [target for target in targets if "autograd" in target]
