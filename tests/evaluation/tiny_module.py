"""A small real module with the interface of a method, and images to run it on."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wsss.methods.base import Outputs

CLASS_NAMES = ("cat", "dog", "car")


class TinyModule(LightningModule):
    """One convolution, output stride 4: logits, CAMs and, if wanted, segmentation."""

    def __init__(self, *, segments: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.segments = segments
        self.forwards = 0

    def forward(self, images: Tensor) -> Outputs:
        self.forwards += 1
        logits = self.dropout(self.conv(images))
        return Outputs(logits[:, 1:].mean((2, 3)), logits if self.segments else None)

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = F.interpolate(self.conv(images)[:, 1:].sigmoid(), size=images.shape[-2:])
        return maps * labels[:, :, None, None]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            self(batch["image"]).class_logits, batch["labels"]
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Scenes(Dataset[dict[str, Any]]):
    """Coloured rectangles on noise, of different sizes, with a void border."""

    COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220))

    def __init__(self, count: int) -> None:
        self.items = [self._scene(index) for index in range(count)]
        self.labels = torch.stack([item["labels"] for item in self.items]).numpy()

    def _scene(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        height, width = 24 + 4 * (index % 3), 32 - 4 * (index % 2)
        rgb = torch.randint(60, 120, (height, width, 3), generator=generator).byte()
        mask = torch.zeros(height, width, dtype=torch.int64)
        labels = torch.zeros(3)
        for k in {index % 3, index % 2}:
            top, left = torch.randint(0, 12, (2,), generator=generator).tolist()
            rgb[top : top + 10, left : left + 12] = torch.tensor(self.COLOURS[k]).byte()
            mask[top : top + 10, left : left + 12] = k + 1
            labels[k] = 1
        mask[0] = 255
        image = rgb.permute(2, 0, 1).float() / 127.5 - 1
        name = f"scene_{index}"
        return dict(image=image, rgb=rgb, mask=mask, labels=labels, name=name, index=index)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def batches(scenes: Scenes, indices: range) -> Iterator[dict[str, Any]]:
    yield from DataLoader(torch.utils.data.Subset(scenes, indices), batch_size=1)
