"""A language model over any mixture of Mamba-1, Mamba-2 and causal attention, with generation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import EspalierError, unknown_name
from espalier.models.contract import TimmContract, check_divisor, check_ratio, draw_uniform
from espalier.models.hub import HubModel
from espalier.nn import Mamba1, Mamba2, MambaState
from espalier.sizes import whole_number, whole_numbers

BLOCKS = ("attention", "mamba1", "mamba2")
_PART = re.compile(r"([A-Za-z]\w*)(?:\*([1-9]\d*))?")


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """Return the blocks that ``pattern`` names, in order: ``"mamba2*2 attention"`` has three.

    Raises:
        EspalierError: an empty pattern, a part that is not ``BLOCK`` or ``BLOCK*COUNT``, or an unknown block.
    """
    blocks: list[str] = []
    for part in pattern.split():
        match = _PART.fullmatch(part)
        if match is None:
            raise EspalierError(f"pattern {pattern!r}: {part!r} does not parse: write parts such as mamba2 or mamba2*3")
        if match[1] not in BLOCKS:
            raise EspalierError(f"pattern {pattern!r}: {unknown_name('block', match[1], BLOCKS)}")
        blocks += [match[1]] * int(match[2] or 1)
    if not blocks:
        raise EspalierError(f"pattern {pattern!r} names no block: write one such as 'mamba2*3 attention mamba2*4'")
    return tuple(blocks)


def rotate(x_BHLK: Tensor, first: int, base: float = 10000.0) -> Tensor:
    """Return rotary positions applied to queries or keys: pairs (i, i + K/2) turn by ``position · base^(−2i/K)``.

    Args:
        x_BHLK: queries or keys, K even.
        first: position of the first token.
        base: longest wavelength over 2π.

    Source: RoFormer (arXiv 2104.09864), section 3.2, in the half-split order that most libraries store.
    """
    half = x_BHLK.shape[-1] // 2
    dtype = torch.promote_types(x_BHLK.dtype, torch.float32)
    steps_I = torch.arange(half, device=x_BHLK.device, dtype=dtype)
    places_L = torch.arange(first, first + x_BHLK.shape[-2], device=x_BHLK.device, dtype=dtype)
    angles_LI = places_L[:, None] * base ** (-steps_I / half)
    cos_LI, sin_LI = angles_LI.cos().to(x_BHLK.dtype), angles_LI.sin().to(x_BHLK.dtype)
    one, two = x_BHLK[..., :half], x_BHLK[..., half:]
    return torch.cat([one * cos_LI - two * sin_LI, one * sin_LI + two * cos_LI], dim=-1)


class KeyValues(NamedTuple):
    """What attention remembers between calls: every key (rotated) and value so far, (B, H_kv, L, K)."""

    k_BGLK: Tensor
    v_BGLK: Tensor


State = MambaState | KeyValues


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention ``softmax(Q Kᵀ / √K + mask) V``, with rotary positions or none.

    ``qkv`` holds the rows of H·K queries, then H_kv·K keys and values.

    Args:
        dim: width D of the input and output.
        num_heads: H, a divisor of D.
        num_kv_heads: H_kv, a divisor of H; H if none is given.
        rope: rotate queries and keys by their positions.

    Raises:
        EspalierError: sizes that are not whole numbers from 1 or do not divide, or rotary positions on an odd head
            width.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int | None = None, rope: bool = True) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        dim, num_heads, groups = whole_numbers(dim=dim, num_heads=num_heads, num_kv_heads=groups)
        check_divisor("num_heads", num_heads, "dim", dim)
        check_divisor("num_kv_heads", groups, "num_heads", num_heads)
        width = dim // num_heads
        if rope and width % 2:
            raise EspalierError(f"heads of width {width} cannot be rotated in pairs: change num_heads or set rope off")
        self.num_heads, self.num_kv_heads, self.head_dim, self.rope = num_heads, groups, width, rope
        self.qkv = nn.Linear(dim, (num_heads + 2 * groups) * width, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw ``qkv`` and ``proj`` uniform on ±1/√fan-in (torch's default)."""
        for layer in (self.qkv, self.proj):
            draw_uniform(layer.weight, generator=generator)

    def forward(
        self, x_BLD: Tensor, *, state: KeyValues | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, KeyValues]:
        """Mix a sequence that follows what ``state`` has seen; with ``return_state`` also return the state after it."""
        if x_BLD.ndim != 3:
            raise EspalierError(
                f"the input is {tuple(x_BLD.shape)}: give (batch, length, {self.num_heads * self.head_dim})"
            )
        shares = [count * self.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        parts = self.qkv(x_BLD).split(shares, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        past = 0 if state is None else state.k_BGLK.shape[2]
        if self.rope:
            q, k = rotate(q, past), rotate(k, past)
        if state is not None:
            k, v = torch.cat([state.k_BGLK.to(k.dtype), k], dim=2), torch.cat([state.v_BGLK.to(v.dtype), v], dim=2)
        repeats = self.num_heads // self.num_kv_heads
        keys, values = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
        length = x_BLD.shape[1]
        seen = x_BLD.new_ones(length, past + length, dtype=torch.bool).tril_(past) if past else None
        mixed_BHLK = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, is_causal=seen is None)
        out_BLD = self.proj(mixed_BHLK.transpose(1, 2).flatten(2))
        return (out_BLD, KeyValues(k, v)) if return_state else out_BLD

    def step(self, x_BD: Tensor, state: KeyValues) -> tuple[Tensor, KeyValues]:
        """Mix one token and return (output, the state after it)."""
        out_BLD, state = self(x_BD[:, None], state=state, return_state=True)
        return out_BLD[:, 0], state

    def empty_state(self, batch: int) -> KeyValues:
        """Return the state before the first token."""
        nothing = self.qkv.weight.new_empty(batch, self.num_kv_heads, 0, self.head_dim)
        return KeyValues(nothing, nothing)


class Layer(nn.Module):
    """One pre-norm block ``x + mixer(RMSNorm(x))``, and after attention, if wanted, ``x + MLP(RMSNorm(x))``."""

    def __init__(self, dim: int, mixer: Mamba1 | Mamba2 | CausalSelfAttention, hidden: int = 0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.norm2 = nn.RMSNorm(dim, eps=1e-5) if hidden else None
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) if hidden else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transform a whole sequence."""
        return self._after(x_BLD + self.mixer(self.norm(x_BLD)))

    def forward_with_state(self, x_BLD: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Transform a sequence that follows what ``state`` has seen, and return the state after it."""
        mixed_BLD, after = self.mixer(self.norm(x_BLD), state=state, return_state=True)
        return self._after(x_BLD + mixed_BLD), after

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Transform one token and return the state after it."""
        mixed_BD, after = self.mixer.step(self.norm(x_BD), state)  # type: ignore[arg-type]
        return self._after(x_BD + mixed_BD), after

    def output_weights(self) -> list[Tensor]:
        """Return the weights that write into the residual stream."""
        last = self.mixer.proj if isinstance(self.mixer, CausalSelfAttention) else self.mixer.out_proj
        return [last.weight] if self.mlp is None else [last.weight, self.mlp[2].weight]  # type: ignore[list-item]

    def _after(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


class SequenceModel(TimmContract, HubModel):
    """Tokens to next-token logits: embedding, pre-norm residual blocks of any mixture, RMSNorm, head.

    Mamba blocks bear the names and shapes of mamba_ssm's and transformers' language models (``layers.{i}.norm``,
    ``layers.{i}.mixer``, ``norm_f``, ``lm_head``).

    Args:
        vocab_size: number of tokens V.
        dim: width D of the residual stream.
        pattern: the blocks in order, e.g. ``"mamba2*3 attention mamba2*4"``; known are ``mamba1``, ``mamba2``,
            ``attention``.
        state_size: numbers kept per channel in Mamba blocks; each mixer's own default if none is given.
        head_dim: channels of a Mamba-2 head.
        expand: inner width of Mamba blocks over D.
        conv_size: taps of their causal convolution.
        num_heads: attention heads.
        num_kv_heads: attention heads of keys and values; ``num_heads`` if none is given.
        rope: rotary positions in attention; without them only the causal mask tells positions apart.
        mlp_ratio: hidden width over D of an MLP after every attention block; 0 adds none.
        tie_head: the head shares the embedding's weight. ``init_weights`` ties them again; so do loading weights and
            moving the model, if they were tied before.

    Raises:
        EspalierError: a pattern that does not parse, or sizes that are not whole numbers from 1 or do not fit together.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        pattern: str = "mamba2*2",
        *,
        state_size: int | None = None,
        head_dim: int = 64,
        expand: int = 2,
        conv_size: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rope: bool = True,
        mlp_ratio: float = 0.0,
        tie_head: bool = True,
    ) -> None:
        super().__init__()
        vocab_size, dim, num_heads = whole_numbers(vocab_size=vocab_size, dim=dim, num_heads=num_heads)
        if num_kv_heads is not None:
            num_kv_heads = whole_number("num_kv_heads", num_kv_heads)
        whole_numbers(head_dim=head_dim, expand=expand, conv_size=conv_size)  # also where no block has them
        check_ratio("mlp_ratio", mlp_ratio)
        sizes: dict[str, Any] = {"expand": expand, "conv_size": conv_size}
        if state_size is not None:
            sizes["state_size"] = state_size
        layers = []
        for block in parse_pattern(pattern):
            if block == "attention":
                attention = CausalSelfAttention(dim, num_heads, num_kv_heads, rope)
                layers.append(Layer(dim, attention, int(dim * mlp_ratio)))
            elif block == "mamba1":
                layers.append(Layer(dim, Mamba1(dim, **sizes)))
            else:
                layers.append(Layer(dim, Mamba2(dim, head_dim=head_dim, **sizes)))
        self.vocab_size, self.num_features, self.tie_head = vocab_size, dim, tie_head
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(layers)
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.register_load_state_dict_post_hook(_after_loading)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter as the reference language models do; callable again, also after ``to_empty()``.

        | parameter | distribution |
        |---|---|
        | embedding (and tied head) | normal, deviation 0.02 |
        | free head | uniform on ±1/√D |
        | Mamba mixers | their own (see ``Mamba1.init_weights``, ``Mamba2.init_weights``) |
        | attention, MLP | uniform on ±1/√fan-in, biases 0 |
        | ``out_proj``, ``proj``, last map of an MLP | the same, over √(number of residual branches) |
        | norms | 1 |
        """
        nn.init.normal_(self.embedding.weight, std=0.02, generator=generator)
        if self.tie_head:  # ``to_empty`` may have given each a weight of its own
            self.lm_head.weight = self.embedding.weight
        else:
            draw_uniform(self.lm_head.weight, generator=generator)
        outputs = []
        for layer in self._layers():
            layer.mixer.init_weights(generator)
            for linear in (module for module in layer.mlp or () if isinstance(module, nn.Linear)):
                draw_uniform(linear.weight, generator=generator)
                nn.init.zeros_(linear.bias)
            outputs += layer.output_weights()
        for weight in outputs:
            weight /= len(outputs) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def _is_tied(self) -> bool:
        # The head may be anything by now: quantised, wrapped by an adapter.
        return isinstance(self.lm_head, nn.Linear) and self.lm_head.weight is self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceModel:
        tied = self._is_tied()
        super()._apply(fn, recurse)
        if tied:  # a parameter that cannot stay itself, as on leaving the meta device, is made once for each module
            self.lm_head.weight = self.embedding.weight
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.__dict__["_tied_before"] = self._is_tied()  # torch calls this before it loads the modules inside
        super()._load_from_state_dict(*arguments)

    def forward_features(self, tokens_BL: Tensor) -> Tensor:
        """Return the normalised features (B, L, D) of tokens (B, L)."""
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = self.run_block(layer, x_BLD)
        return self.norm_f(x_BLD)

    def forward_head(self, x_BLD: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, L, V) of features, or with ``pre_logits`` the features themselves."""
        return x_BLD if pre_logits else self.lm_head(x_BLD)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return logits (B, L, V): those at place t are for the token after t."""
        return self.forward_head(self.forward_features(tokens_BL))

    def prefill(self, tokens_BL: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Read a sequence in parallel and return (its logits (B, L, V), the state of every layer after it)."""
        self._check_states(states)
        x_BLD, after = self.embedding(tokens_BL), []
        for index, layer in enumerate(self._layers()):
            x_BLD, state = layer.forward_with_state(x_BLD, None if states is None else states[index])
            after.append(state)
        return self.lm_head(self.norm_f(x_BLD)), after

    def step(self, tokens_B: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Read one token per sequence and return (logits (B, V), the states after it)."""
        self._check_states(states)
        x_BD, after = self.embedding(tokens_B), []
        for layer, before in zip(self._layers(), states, strict=True):
            x_BD, state = layer.step(x_BD, before)
            after.append(state)
        return self.lm_head(self.norm_f(x_BD)), after

    def empty_states(self, batch: int) -> list[State]:
        """Return the states before the first token."""
        return [layer.mixer.empty_state(batch) for layer in self._layers()]

    @torch.no_grad()
    def generate(
        self, tokens_BL: Tensor, steps: int, temperature: float = 0.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue every sequence by ``steps`` tokens, one step a token from the recurrent state.

        Args:
            tokens_BL: what comes before, at least one token.
            steps: how many tokens to add.
            temperature: divides the logits before sampling; 0 takes the likeliest token.
            generator: source of the samples.

        Returns:
            Tokens (B, L + steps), the given ones first.

        Raises:
            EspalierError: no token to begin with, a negative number of steps, or a negative temperature.
        """
        if tokens_BL.dim() != 2 or not tokens_BL.shape[1]:
            raise EspalierError(f"tokens are {tuple(tokens_BL.shape)}: give (B, L) with at least one token")
        if steps < 0 or not temperature >= 0:
            raise EspalierError(f"steps {steps}, temperature {temperature}: give numbers that are not negative")
        if not steps:
            return tokens_BL.clone()
        logits_BLV, states = self.prefill(tokens_BL)
        logits_BV, found = logits_BLV[:, -1], [tokens_BL]
        for index in range(steps):
            if temperature:
                shares_BV = (logits_BV.float() / temperature).softmax(-1)
                next_B = torch.multinomial(shares_BV, 1, generator=generator)[:, 0]
            else:
                next_B = logits_BV.argmax(-1)
            found.append(next_B[:, None])
            if index < steps - 1:
                logits_BV, states = self.step(next_B, states)
        return torch.cat(found, dim=1)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by layer."""
        return {"stem": r"^embedding", "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the reference exempts from weight decay: ``A_log``, ``D`` and ``dt_bias``."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("A_log", "D", "dt_bias")}

    def _check_states(self, states: list[State] | None) -> None:
        if states is not None and len(states) != len(self.layers):
            raise EspalierError(f"there are {len(states)} states: give one for each of the {len(self.layers)} layers")

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]


def _after_loading(net: nn.Module, _: Any) -> None:
    """Tie what was tied: ``load_state_dict(assign=True)`` gives every module the parameter of its own key."""
    assert isinstance(net, SequenceModel)
    if net.__dict__.pop("_tied_before", False):
        net.lm_head.weight = net.embedding.weight
