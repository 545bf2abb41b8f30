"""A vision transformer, small and readable, with timm's model contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.models.contract import TimmContract, check_divisor, check_ratio, draw_uniform, new_head
from espalier.models.hub import HubModel
from espalier.sizes import whole_numbers


def sincos_positions(
    height: int, width: int, dim: int, temperature: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding of a grid of patches.

    With ω_i = temperature^(−i/(dim/4)), patch (y, x) gets ``[sin(x ω), cos(x ω), sin(y ω), cos(y ω)]``, unscaled.

    Args:
        height: rows of patches.
        width: columns of patches.
        dim: width of the embedding, a multiple of 4.
        temperature: longest wavelength over 2π.
        device: of the result, which is computed on the CPU to be the same everywhere; the default device if None.

    Returns:
        Shape (height · width, dim), rows first.

    Raises:
        EspalierError: a width that is no multiple of 4.

    Source: the "simple ViT" baseline (arXiv 2205.01580), section 2, as mimetic initialisation uses it.
    """
    if dim % 4:
        raise EspalierError(f"embed_dim {dim} is no multiple of 4: sine-cosine positions need four equal parts")
    host = torch.device("cpu")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64, device=host) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(height, device=host), torch.arange(width, device=host), indexing="ij")
    angles_y, angles_x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    positions = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1).float()
    return positions.to(torch.get_default_device() if device is None else device)


class Attention(nn.Module):
    """Multi-head self-attention: ``softmax(Q Kᵀ / √k) V`` per head, then the output projection.

    ``qkv`` holds the rows of queries, keys and values in this order.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_divisor("num_heads", num_heads, "embed_dim", dim)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, H, L, k)."""
        b, length, _ = x_BLD.shape
        # Every size is named: an empty batch leaves nothing to infer one from.
        width = self.proj.in_features // self.num_heads
        q, k, v = self.qkv(x_BLD).reshape(b, length, 3, self.num_heads, width).permute(2, 0, 3, 1, 4)
        return q, k, v

    def maps(self, x_BLD: Tensor) -> Tensor:
        """Return the attention maps (B, H, L, L); each row sums to one."""
        q, k, _ = self.split_heads(x_BLD)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix the tokens: (B, L, D) to (B, L, D)."""
        mixed_BHLK = F.scaled_dot_product_attention(*self.split_heads(x_BLD))
        return self.proj(mixed_BHLK.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm transformer block: ``x + Attention(LN(x))``, then ``x + MLP(LN(x))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Transform the tokens: (B, L, D) to (B, L, D)."""
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))


class VisionTransformer(TimmContract, HubModel):
    """A vision transformer with fixed sine-cosine positions and average pooling, as mimetic initialisation expects.

    Fixed positions follow from the sizes and are in no checkpoint: loading weights, and leaving the meta device, set
    them anew.

    Args:
        img_size: side of the square images, in pixels.
        patch_size: side of a patch; divides ``img_size``.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out.
        embed_dim: width of the tokens, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden width of the MLP over ``embed_dim``.
        positions: ``"sincos"`` fixed, or ``"learned"`` starting from the same values.
        pool: ``"avg"`` over the patches, or ``"cls"``, a class token.
        qkv_bias: whether queries, keys and values have biases.

    Raises:
        EspalierError: sizes that are not whole numbers, are too small or do not divide, or unknown options.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "learned"] = "sincos",
        pool: Literal["avg", "cls"] = "avg",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        img_size, patch_size, in_chans, embed_dim, num_heads = whole_numbers(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads
        )
        num_classes, depth = whole_numbers(0, num_classes=num_classes, depth=depth)
        check_ratio("mlp_ratio", mlp_ratio)
        check_divisor("patch_size", patch_size, "img_size", img_size)
        for name, value, known in (("positions", positions, ("sincos", "learned")), ("pool", pool, ("avg", "cls"))):
            if value not in known:
                raise EspalierError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}")
        self.num_classes, self.embed_dim, self.num_features = num_classes, embed_dim, embed_dim
        self.grid, self.pool = img_size // patch_size, pool
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "cls" else None
        values = sincos_positions(self.grid, self.grid, embed_dim)[None].to(torch.get_default_dtype())
        if positions == "learned":
            self.pos_embed: Tensor = nn.Parameter(values)
        else:
            self.register_buffer("pos_embed", values, persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter and restore every buffer; callable again, also after ``to_empty()``.

        | parameter | distribution |
        |---|---|
        | weights of linear layers | normal, deviation 0.02, cut at ±2 (timm's default) |
        | biases of linear layers | 0 |
        | weights and biases of the patch embedding | uniform on ±1/√fan_in (torch's default, which timm keeps) |
        | norms | 1 and 0 |
        | class token | normal, deviation 1e-6 |
        | position embedding | the sine-cosine values |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                draw_uniform(module.weight, module.bias, generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self._set_positions()
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6, generator=generator)

    @torch.no_grad()
    def _set_positions(self) -> None:
        values = sincos_positions(self.grid, self.grid, self.embed_dim, device=self.pos_embed.device)[None]
        if values.shape == self.pos_embed.shape:  # someone may have put positions of another grid
            self.pos_embed.copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionTransformer:
        before = self.pos_embed
        super()._apply(fn, recurse)
        # ``to_empty`` leaves whatever was in memory, and what half precision rounded stays rounded in float32.
        changed = before.is_meta or self.pos_embed.dtype != before.dtype
        if changed and not self.pos_embed.is_meta and "pos_embed" in self._buffers:
            self._set_positions()
        return self

    def _tokens(self, x_BCHW: Tensor) -> Tensor:
        x_BLD = self.patch_embed(x_BCHW).flatten(2).transpose(1, 2)
        # torch.fx traces with what is no tensor, and has no branches.
        if isinstance(x_BLD, Tensor) and x_BLD.shape[1] != self.pos_embed.shape[1]:
            size = self.grid * self.patch_embed.stride[0]
            raise EspalierError(f"images of {tuple(x_BCHW.shape[-2:])} pixels: this model takes {size} × {size}")
        x_BLD = x_BLD + self.pos_embed
        if self.cls_token is not None:
            x_BLD = torch.cat([self.cls_token.expand(x_BLD.shape[0], -1, -1), x_BLD], dim=1)
        return x_BLD

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised tokens (B, L, D); with a class token it comes first."""
        x_BLD = self._tokens(x_BCHW)
        for block in self.blocks:
            x_BLD = self.run_block(block, x_BLD)
        return self.norm(x_BLD)

    def forward_head(self, x_BLD: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens and classify: (B, L, D) to (B, classes), or (B, D) with ``pre_logits``."""
        pooled = x_BLD.mean(1) if self.pool == "avg" else x_BLD[:, 0]
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images: (B, C, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x_BCHW))

    @torch.no_grad()
    def attention_maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return the attention maps of every block, each (B, H, L, L)."""
        x_BLD, maps = self._tokens(x_BCHW), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.maps(block.norm1(x_BLD)))
            x_BLD = block(x_BLD)
        return maps

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes; 0 removes it."""
        self.head = new_head(self, nn.Linear, self.embed_dim, num_classes)
        self.num_classes = num_classes
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by layer."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimiser factory exempts from weight decay."""
        return {"pos_embed", "cls_token"}


def _after_loading(net: nn.Module, _: Any) -> None:
    """Give fixed positions their values, and the device and dtype of weights that were assigned."""
    assert isinstance(net, VisionTransformer)
    if "pos_embed" not in net._buffers:
        return
    like = net.patch_embed.weight
    assert isinstance(like, Tensor)
    if not like.is_meta and (net.pos_embed.device, net.pos_embed.dtype) != (like.device, like.dtype):
        net.pos_embed = torch.empty_like(net.pos_embed, device=like.device, dtype=like.dtype)
    net._set_positions()
