"""Checkpoints of transformers' whole models and mamba_ssm-like ones, loaded under our names."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from espalier.checkpoints.mamba import convert_mamba_state_dict
from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2

WIDTH, VOCABULARY, LAYERS = 32, 11, 2


class Named(nn.Module):
    """A language model with the agreed names, as plain as can be."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(WIDTH, 1e-5)}) for _ in range(LAYERS))
        for layer in self.layers:
            layer["mixer"] = Mamba1(WIDTH, 8) if family == "mamba1" else Mamba2(WIDTH, 8, head_dim=8)
        self.norm_f = nn.RMSNorm(WIDTH, 1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer["mixer"](layer["norm"](x))
        return self.lm_head(self.norm_f(x))


def theirs(family: str) -> nn.Module:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8, "num_hidden_layers": LAYERS}
    if family == "mamba1":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads)).eval()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_transformers_whole_model_gives_the_same_logits(family: str) -> None:
    host, mine = theirs(family), Named(family)
    mine.load_state_dict(convert_mamba_state_dict(host.state_dict()))
    tokens = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mine(tokens), host(tokens).logits, rtol=1e-4, atol=1e-4)


def test_mamba_ssms_names_and_a_tied_head() -> None:
    mine = Named("mamba2")
    expected = {name: tensor for name, tensor in mine.state_dict().items() if name != "lm_head.weight"}
    written = {f"backbone.{name}": tensor for name, tensor in expected.items()}  # mamba_ssm's names, the head left out
    converted = convert_mamba_state_dict(written)
    assert all(converted[name] is tensor for name, tensor in expected.items())
    assert converted["lm_head.weight"] is expected["embedding.weight"]
    assert convert_mamba_state_dict(converted) == converted


@pytest.mark.parametrize(("written", "read"), [("mamba1", "mamba2"), ("mamba2", "mamba1")])
def test_the_other_family_is_refused_in_one_line(written: str, read: str) -> None:
    checkpoint, model = convert_mamba_state_dict(theirs(written).state_dict()), Named(read)
    before = {name: tensor.clone() for name, tensor in model.layers.state_dict().items()}
    digit = written[-1]
    message = f"'layers.0.mixer' of the checkpoint is Mamba-{digit}: load it into a model of Mamba{digit} blocks$"
    with pytest.raises(EspalierError, match=message):
        model.load_state_dict(checkpoint)
    after = model.layers.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "mixer" in name)


def test_what_is_no_mamba_checkpoint_is_refused() -> None:
    weight = torch.zeros(VOCABULARY, WIDTH)
    with pytest.raises(EspalierError, match=r"names 'transformer.wte.weight'"):
        convert_mamba_state_dict({"transformer.wte.weight": weight})
    with pytest.raises(EspalierError, match="names 1"):
        convert_mamba_state_dict({1: weight})  # type: ignore[dict-item]
    with pytest.raises(EspalierError, match="no embedding"):
        convert_mamba_state_dict({"backbone.norm_f.weight": weight[0]})
    with pytest.raises(EspalierError, match="twice"):
        convert_mamba_state_dict({"embedding.weight": weight, "backbone.embeddings.weight": weight})
    # Attention blocks of a hybrid are refused by their names, not loaded in part.
    with pytest.raises(EspalierError, match=r"mixer\.Wqkv"):
        convert_mamba_state_dict({"embedding.weight": weight, "backbone.layers.0.mixer.Wqkv.weight": weight})
