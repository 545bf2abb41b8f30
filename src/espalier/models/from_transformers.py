"""Classes of transformers as models of a recipe: built from a config, with the library's own initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, require
from espalier.models.contract import check_divisor
from espalier.models.hub import HubModel
from espalier.models.vit import sincos_positions
from espalier.sizes import whole_numbers


class TransformersViT(HubModel):
    """transformers' ``ViTModel`` from scratch, with sine-cosine positions to start from and average pooling.

    Every weight is the library's own draw, but for the learned position embedding, which starts at the 2-D sine-cosine
    values (the class token's at zero): mimetic initialisation counts on them, and a fair baseline gets them too.

    Args:
        img_size: side of the square images, in pixels.
        patch_size: side of a patch; divides ``img_size``.
        in_chans: channels of the images.
        num_classes: classes.
        embed_dim: width of the tokens, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: heads of every block.

    Raises:
        EspalierError: sizes below 1 or that do not divide.
        MissingExtraError: transformers is not installed.
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
    ) -> None:
        super().__init__()
        whole_numbers(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        whole_numbers(num_heads=num_heads, depth=depth, num_classes=num_classes)
        check_divisor("patch_size", patch_size, "img_size", img_size)
        check_divisor("num_heads", num_heads, "embed_dim", embed_dim)
        grid = img_size // patch_size
        positions_LD = sincos_positions(grid, grid, embed_dim)
        transformers = require("transformers", "transformers")
        config = transformers.ViTConfig(
            hidden_size=embed_dim,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=4 * embed_dim,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            image_size=img_size,
            patch_size=patch_size,
            num_channels=in_chans,
        )
        self.backbone = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(embed_dim, num_classes)
        with torch.no_grad():
            self.backbone.embeddings.position_embeddings[0, 0] = 0
            self.backbone.embeddings.position_embeddings[0, 1:] = positions_LD
            nn.init.trunc_normal_(self.head.weight, std=config.initializer_range)
            nn.init.zeros_(self.head.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images: (B, C, H, W) to (B, classes), from the mean over the patches."""
        tokens_BLD = self.backbone(x_BCHW).last_hidden_state
        return self.head(tokens_BLD[:, 1:].mean(1))


class TransformersConvNext(HubModel):
    """transformers' ``ConvNextModel`` from scratch, at any depth and width, with a linear head.

    Args:
        in_chans: channels of the images.
        num_classes: classes.
        patch_size: stride of the stem; small images want a small one.
        depths: blocks of every stage.
        dims: channels of every stage.
        layer_scale: initial scale of every residual branch; the class's own of 1e-6 needs long training.

    Raises:
        EspalierError: not as many depths as widths, or sizes below 1.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        patch_size: int = 4,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise EspalierError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in number: give one a stage")
        whole_numbers(in_chans=in_chans, num_classes=num_classes, patch_size=patch_size, stages=len(dims))
        for name, sizes in (("depths", depths), ("dims", dims)):
            whole_numbers(**{f"{name}[{index}]": size for index, size in enumerate(sizes)})
        transformers = require("transformers", "transformers")
        config = transformers.ConvNextConfig(
            num_channels=in_chans,
            patch_size=patch_size,
            num_stages=len(dims),
            hidden_sizes=list(dims),
            depths=list(depths),
            layer_scale_init_value=layer_scale,
        )
        self.backbone = transformers.ConvNextModel(config)
        self.head = nn.Linear(dims[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=config.initializer_range)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images: (B, C, H, W) to (B, classes)."""
        return self.head(self.backbone(x_BCHW).pooler_output)
