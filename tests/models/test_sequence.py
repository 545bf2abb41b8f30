"""The sequence model: against transformers with the same weights, and recurrent against parallel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.init import Mimetic, structure_
from espalier.models import SequenceModel, build_model
from espalier.models.sequence import CausalSelfAttention, parse_pattern, rotate

HYBRID = {
    "vocab_size": 11,
    "dim": 16,
    "pattern": "mamba1 attention mamba2",
    "state_size": 4,
    "head_dim": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_ratio": 2.0,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hybrid(**changes: object) -> SequenceModel:
    net = SequenceModel(**{**HYBRID, **changes})  # type: ignore[arg-type]
    net.init_weights(seeded())
    with torch.no_grad():
        for parameter in net.parameters():  # away from zeros, ones and equal rows
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return net.double()


def tokens(batch: int = 3, length: int = 13, vocab: int = 11) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=seeded(1))


@pytest.mark.parametrize("pattern", ["mamba1*2", "mamba2*2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(pattern: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {
        "vocab_size": 19,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "expand": 2,
        "tie_word_embeddings": tied,
        "use_cache": False,
    }
    if pattern == "mamba1*2":
        peer = transformers.MambaForCausalLM(transformers.MambaConfig(**shared, time_step_rank=2))
    else:
        config = transformers.Mamba2Config(**shared, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)
        peer = transformers.Mamba2ForCausalLM(config)
    net = SequenceModel(19, 32, pattern, state_size=8, head_dim=16, tie_head=tied)
    net.init_weights(seeded(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    theirs = {"backbone." + name.replace("embedding.", "embeddings."): w for name, w in net.state_dict().items()}
    theirs["lm_head.weight"] = theirs.pop("backbone.lm_head.weight")
    peer.load_state_dict(theirs)
    text = tokens(2, 37, 19)
    torch.testing.assert_close(net(text), peer.eval()(text).logits, atol=1e-4, rtol=1e-4)


def test_attention_equals_a_plain_loop_with_complex_rotations() -> None:
    layer = CausalSelfAttention(24, num_heads=4, num_kv_heads=2).double()
    x = torch.randn(2, 7, 24, generator=seeded(3), dtype=torch.float64)
    q, k, v = layer.qkv.weight.detach().split([24, 12, 12])
    expected = torch.zeros_like(x)
    for b in range(2):
        for head in range(4):
            group = head // 2
            queries, keys, values = (x[b] @ w[6 * i : 6 * i + 6].T for w, i in ((q, head), (k, group), (v, group)))
            turn = torch.tensor([[p * 10000 ** (-i / 3) for i in range(3)] for p in range(7)], dtype=torch.float64)
            turned = [
                torch.complex(t[:, :3], t[:, 3:]) * torch.polar(torch.ones_like(turn), turn) for t in (queries, keys)
            ]
            for place in range(7):
                scores = (turned[0][place] @ turned[1][: place + 1].conj().T).real / math.sqrt(6)
                mixed = scores.softmax(-1) @ values[: place + 1]
                expected[b, place] += layer.proj.weight.detach()[:, 6 * head : 6 * head + 6] @ mixed
    # Angles are float32, so that the positions of a bf16 model are not rounded to bf16.
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(first=st.integers(0, 500), shift=st.integers(0, 500))
def test_rotated_products_depend_on_distance_alone(first: int, shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 5, 8, generator=seeded(4), dtype=torch.float64)
    here = rotate(q, first) @ rotate(k, first).mT
    there = rotate(q, first + shift) @ rotate(k, first + shift).mT
    torch.testing.assert_close(here, there, atol=2e-3, rtol=1e-3)


def test_rotations_keep_the_digits_of_their_input() -> None:
    found = rotate(torch.ones(1, 1, 1, 8, dtype=torch.float64), 100_003)
    angles = [100_003 * 10_000.0 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) - math.sin(a) for a in angles] + [math.sin(a) + math.cos(a) for a in angles]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=12)
@given(cut=st.integers(1, 12), rope=st.booleans(), pattern=st.sampled_from(["mamba1 attention mamba2", "attention*2"]))
def test_recurrent_equals_parallel(cut: int, rope: bool, pattern: str) -> None:
    net, text = hybrid(rope=rope, pattern=pattern), tokens()
    whole = net(text)
    states = net.empty_states(3)
    for place in range(text.shape[1]):
        logits, states = net.step(text[:, place], states)
        torch.testing.assert_close(logits, whole[:, place], atol=1e-5, rtol=1e-5)
    first, states = net.prefill(text[:, :cut])
    second, _ = net.prefill(text[:, cut:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)


def test_greedy_generation_equals_reading_everything_again() -> None:
    net, text = hybrid(), tokens(length=5)
    made = net.generate(text, 9)
    assert made.shape == (3, 14)
    assert torch.equal(made[:, :5], text)
    for place in range(5, 14):
        # Step by step rounds otherwise than reading again: of two logits that are equal up to that, either may win.
        logits = net(made[:, :place])[:, -1]
        chosen = logits.gather(1, made[:, place : place + 1])[:, 0]
        assert (logits.amax(1) - chosen).max() < 1e-10
    assert torch.equal(net.generate(text, 0), text)


def test_sampling_follows_the_softmax_and_the_generator() -> None:
    net = hybrid()
    start = torch.full((4000, 1), 3)
    drawn = net.generate(start, 1, temperature=0.5, generator=seeded(5))[:, 1]
    assert torch.equal(drawn, net.generate(start, 1, temperature=0.5, generator=seeded(5))[:, 1])
    expected = (net(start[:1])[0, -1] / 0.5).softmax(-1)
    shares = drawn.bincount(minlength=11) / 4000
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((shares - expected).abs() < 5 * deviation + 1e-3).all())


def test_outputs_do_not_depend_on_later_tokens() -> None:
    net, text = hybrid(), tokens()
    changed = text.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    one, two = net(text), net(changed)
    torch.testing.assert_close(one[:, :7], two[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, 7:], two[:, 7:])


def test_names_and_tied_head() -> None:
    net = SequenceModel(**HYBRID)  # type: ignore[arg-type]
    names = set(dict(net.named_parameters()))
    assert {"embedding.weight", "norm_f.weight", "layers.0.norm.weight", "layers.0.mixer.A_log"} <= names
    assert "lm_head.weight" not in names
    assert net.lm_head.weight is net.embedding.weight
    assert "lm_head.weight" in dict(SequenceModel(**HYBRID, tie_head=False).named_parameters())  # type: ignore[arg-type]
    exempt = net.no_weight_decay()
    assert exempt == {n for n in names if n.endswith((".A_log", ".D", "dt_bias"))}
    assert len(exempt) == 5


def test_initial_weights_follow_the_table_and_the_generator() -> None:
    net = SequenceModel(500, 64, "mamba1 attention mamba2*2", mlp_ratio=4, tie_head=False)
    net.init_weights(seeded(6))
    first = [parameter.clone() for parameter in net.parameters()]
    state = torch.random.get_rng_state()
    net.init_weights(seeded(6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))
    assert float(net.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    branches = 5  # four mixers and one MLP
    for weight, fan_in in [
        (net.lm_head.weight, 64),
        (net.layers[1].mixer.qkv.weight, 64),
        (net.layers[1].mixer.proj.weight, 64 * branches),
        (net.layers[1].mlp[2].weight, 256 * branches),
        (net.layers[0].mixer.out_proj.weight, 128 * branches),
        (net.layers[3].mixer.out_proj.weight, 128 * branches),
    ]:
        bound = fan_in**-0.5
        assert bound * 0.97 < float(weight.detach().abs().max()) <= bound * 1.0001
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_checkpointing_gives_equal_gradients() -> None:
    net, text = hybrid(), tokens()
    grads = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        net(text).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_mimetic_attention_reaches_its_attention_blocks() -> None:
    net = SequenceModel(11, 32, "mamba2 attention*2", head_dim=16)
    report = structure_(net, attention=Mimetic(), ssm=None, depthwise=None, generator=seeded())
    written = [row.layer for row in report.layers if row.status == "written"]
    assert written == ["layers.1.mixer", "layers.2.mixer"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["mamba1", "mamba2", "attention"]), st.integers(1, 9)), min_size=1))
def test_patterns_parse_as_written(parts: list[tuple[str, int]]) -> None:
    text = "  ".join(f"{name}*{count}" if count > 1 else name for name, count in parts)
    assert list(parse_pattern(text)) == [name for name, count in parts for _ in range(count)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "names no block"),
        ("mamba2*", "'mamba2*' does not parse"),
        ("mamba2*0", "'mamba2*0' does not parse"),
        ("mamba2 * 3", "'*' does not parse"),
        ("mamba2,attention", "'mamba2,attention' does not parse"),
        ("mamba3*2", "unknown block 'mamba3': did you mean"),
    ],
)
def test_patterns_that_do_not_parse(pattern: str, words: str) -> None:
    with pytest.raises(EspalierError) as caught:
        parse_pattern(pattern)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, "dim 16 is not divisible by num_heads 3"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"num_heads": 16, "num_kv_heads": None}, "heads of width 1 cannot be rotated"),
        ({"head_dim": 5}, "head_dim 5 does not divide"),
        ({"state_size": 0}, "state_size is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0"),
        ({"pattern": "mamba4"}, "unknown block"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        build_model("sequence", **{**HYBRID, **changes})


@pytest.mark.parametrize("pattern", ["attention", "mamba1", "mamba2"])
def test_tokens_without_a_batch_are_refused_in_one_line(pattern: str) -> None:
    net = SequenceModel(7, 8, pattern, num_heads=1, head_dim=8)
    for read in (net, net.prefill):
        with pytest.raises(EspalierError, match=r"the input is \(5, 8\): give \(batch, length, 8\)"):
            read(torch.arange(5))


@pytest.mark.parametrize("count", [1, 3])
def test_states_of_another_model_are_refused_in_one_line(count: int) -> None:
    net = SequenceModel(7, 8, "mamba1*2")
    states = SequenceModel(7, 8, f"mamba1*{count}").empty_states(2)
    with pytest.raises(EspalierError, match=f"there are {count} states: give one for each of the 2 layers"):
        net.prefill(torch.zeros(2, 3, dtype=torch.long), states)
    with pytest.raises(EspalierError, match=f"there are {count} states: give one for each of the 2 layers"):
        net.step(torch.zeros(2, dtype=torch.long), states)


def test_bad_generation_arguments() -> None:
    net = hybrid()
    with pytest.raises(EspalierError, match="at least one token"):
        net.generate(tokens(length=1)[:, :0], 3)
    with pytest.raises(EspalierError, match="steps -1"):
        net.generate(tokens(), -1)
    with pytest.raises(EspalierError, match="temperature -1"):
        net.generate(tokens(), 1, temperature=-1)
    with pytest.raises(EspalierError, match="temperature nan"):
        net.generate(tokens(), 1, temperature=float("nan"))
