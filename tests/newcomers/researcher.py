"""A researcher with a Trainer, Lightning and timm: structure in each (extras: trainer, lightning, timm)."""

import lightning
import timm
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

import espalier
from espalier.integrations.lightning import StructureCallback as LightningCallback
from espalier.integrations.transformers import StructureCallback as TrainerCallback


class Noise(Dataset):
    """Sixteen images of noise with labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 4}


config = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
    num_labels=4,
)  # fmt: skip
arguments = transformers.TrainingArguments(
    "out", num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
)
model = transformers.ViTForImageClassification(config)
trainer = transformers.Trainer(
    model=model, args=arguments, train_dataset=Noise(), callbacks=[TrainerCallback(structure=True)]
)
trainer.train()


class Classifier(lightning.LightningModule):
    """A ViT of timm's under Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=4
        )

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[LightningCallback(structure=True)],
).fit(Classifier(), DataLoader(Noise(), batch_size=4))  # fmt: skip

fresh = timm.create_model("convnext_atto", num_classes=4)
assert any(row.status == "written" for row in espalier.structure_(fresh).layers)
