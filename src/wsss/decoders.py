"""Segmentation heads that more than one method uses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LargeFOV(nn.Module):
    """Two dilated 3x3 convolutions and a 1x1 classifier, all bias-free (DeepLab-LargeFOV).

    Source: toco.md section 1, "Decoder". PyTorch's default convolution initialisation is what the
    official codes end up with, their own init routine being never called.

    Args:
        in_channels: width D of the patch tokens.
        num_outputs: K + 1.
        channels: width of the two hidden maps.
        dilation: dilation and padding of the 3x3 convolutions.
    """

    def __init__(
        self, *, in_channels: int, num_outputs: int, channels: int = 512, dilation: int = 5
    ) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(
            in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.conv7 = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.conv8 = nn.Conv2d(channels, num_outputs, kernel_size=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K+1, h, w) from features (B, D, h, w)."""
        return self.conv8(self.relu(self.conv7(self.relu(self.conv6(features)))))


class ASPPSum(nn.Module):
    """DeepLab V2's head: the sum of dilated 3x3 convolutions, weights N(0, 0.01^2), biases 0.

    Source: tkp_pcl.md section 3, "Stage 2".

    Args:
        in_channels: width D of the features.
        num_outputs: K + 1.
        rates: dilation and padding of each convolution, in features.
    """

    def __init__(
        self, *, in_channels: int, num_outputs: int, rates: Sequence[int] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_outputs, 3, padding=rate, dilation=rate) for rate in rates
        )
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K+1, h, w) from features (B, D, h, w)."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)
