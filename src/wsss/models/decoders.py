"""Segmentation heads that more than one method uses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.models.backbone import Backbone, Features, token_map


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
        """Compute logits (B, K+1, h, w) from features (B, D, h, w)."""
        return self.conv8(self.relu(self.conv7(self.relu(self.conv6(features)))))


class Reassemble(nn.Module):
    """Tokens of one block as a feature map at another stride (DPT).

    Each patch token is joined with the class token and projected ("readout"), the tokens become a
    map, a 1x1 convolution sets the width and another layer the size. Source: getam.md section 1,
    "Taps".

    Args:
        dim: width D of the tokens.
        channels: width of the map.
        factor: size of the map relative to the token grid: 4, 2, 1 or 0.5.
    """

    def __init__(self, *, dim: int, channels: int, factor: float) -> None:
        super().__init__()
        self.readout = nn.Linear(2 * dim, dim)
        self.narrow = nn.Conv2d(dim, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            side = int(factor)
            self.resize = nn.ConvTranspose2d(channels, channels, side, stride=side)
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=round(1 / factor), padding=1)

    def read(self, patches: Tensor, cls_token: Tensor) -> Tensor:
        """Let patch tokens (B, N, D) see the class token (B, D): (B, N, D)."""
        joined = torch.cat([patches, cls_token[:, None].expand_as(patches)], dim=2)
        return F.gelu(self.readout(joined))

    def forward(self, patches: Tensor, cls_token: Tensor, grid: tuple[int, int]) -> Tensor:
        """Make a map (B, channels, h * factor, w * factor) of patch tokens on a grid of (h, w)."""
        tokens = token_map(self.read(patches, cls_token), grid)
        return self.resize(self.narrow(tokens))


class ResidualUnit(nn.Module):
    """x + BN(conv(ReLU(BN(conv(ReLU x))))) with bias-free 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to one of the same shape."""
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class Fusion(nn.Module):
    """Joins a coarse path with the map of the next finer level, then enlarges it.

    Args:
        channels: width C.
        with_skip: False for the coarsest level, which has nothing to join.
    """

    def __init__(self, channels: int, *, with_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualUnit(channels) if with_skip else None
        self.unit = ResidualUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, path: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """Fuse the path (B, C, h, w) and the skip of its size into (B, C, *size)."""
        if self.skip_unit is not None:
            path = path + self.skip_unit(skip)
        path = F.interpolate(self.unit(path), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out_conv(path)


class SqueezeBlock(nn.Module):
    """Two 3x3 convolutions whose output channels are weighed by their means, added to the input."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to one of the same shape."""
        body = self.body(x)
        return x + body * self.gate(body.mean((2, 3)))[..., None, None]


class DPTDecoder(nn.Module):
    """Fuses four maps from coarse to fine and classifies every pixel (DPT, as GETAM uses it).

    Source: getam.md section 1, "Decoder". Level sizes follow the maps, so that any image size
    works; where each is twice the next coarser one, as for multiples of two patches, this is the
    method's fixed factor of two. All layers keep PyTorch's default initialisation.

    Args:
        in_channels: widths of the four maps, finest first.
        num_outputs: K + 1.
        channels: width of the decoder.
        dropout: share of single entries dropped before the last convolution.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        num_outputs: int,
        channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(
            nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in in_channels
        )
        coarsest = len(in_channels) - 1
        self.fusions = nn.ModuleList(
            Fusion(channels, with_skip=level < coarsest) for level in range(len(in_channels))
        )
        self.squeeze = SqueezeBlock(channels)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(channels, num_outputs, 1),
        )

    def paths(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Fuse the maps, coarsest level first, each of the next finer level's size.

        Args:
            maps: finest first, (B, C_i, h_i, w_i).
        """
        skips = [narrow(one) for narrow, one in zip(self.narrow, maps, strict=True)]
        path, found = skips[-1], []
        for level in range(len(skips) - 1, -1, -1):
            height, width = skips[0].shape[-2:]
            size = skips[level - 1].shape[-2:] if level else (2 * height, 2 * width)
            path = self.fusions[level](path, skips[level], size)
            found.append(path)
        return found

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Compute logits (B, K+1, *size) from four maps, finest first."""
        logits = self.head(self.squeeze(self.paths(maps)[-1]))
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


DPT = "a DPT decoder (method=getam, method.head=dpt)"


class Levels(NamedTuple):
    """What the four levels of a DPT read, finest first.

    Attributes:
        taps: level, 1 (finest) to 4 -> the block that it reads; a hybrid's first two read the stem.
        widths: of the four maps.
    """

    taps: dict[int, int]
    widths: list[int]


def dpt_levels(backbone: Backbone, widths: Sequence[int] | None = None) -> Levels:
    """Say what the levels read: the block after each quarter of the depth.

    Args:
        backbone: plain or hybrid.
        widths: of the four maps, finest first; None: D/8, D/4, D/2 (a hybrid's: D), D. Those of a
            hybrid's first two maps are the stem's.

    Raises:
        WSSSError: the backbone has no class token, or fewer than four blocks.
    """
    depth, dim = backbone.depth, backbone.dim
    if backbone.num_prefix_tokens == 0:
        raise WSSSError(f"{DPT} reads the class token, and this backbone has none")
    if depth < 4:
        raise WSSSError(f"{DPT} taps four blocks, and this backbone has {depth}")
    stem = list(backbone.stem_channels[:2])
    own = widths or (dim // 8, dim // 4, dim if stem else dim // 2, dim)
    taps = {level: depth * level // 4 - 1 for level in range(len(stem) + 1, 5)}
    return Levels(taps, [*stem, *own[len(stem) :]])


def reassembly(dim: int, levels: Levels) -> nn.ModuleDict:
    """Make what turns tokens into the map of each level that reads a block."""
    return nn.ModuleDict(
        {
            str(level): Reassemble(
                dim=dim, channels=levels.widths[level - 1], factor=2.0 ** (3 - level)
            )
            for level in levels.taps
        }
    )


def level_map(
    features: Features, level: int, taps: dict[int, int], reassemble: nn.ModuleDict
) -> Tensor:
    """Give the map of a level, 1 (finest) to 4: (B, C, h * f, w * f) with f = 4, 2, 1, 1/2."""
    if level not in taps:
        return features.stem_maps[level - 1]
    block = taps[level]
    patches, cls_token = features.intermediates[block], features.prefixes[block][:, 0]
    made: Tensor = reassemble[str(level)](patches, cls_token, features.grid)
    return made


class DPTHead(nn.Module):
    """Taps of a ViT, their maps and a :class:`DPTDecoder`, in one.

    Args:
        backbone: whose blocks are read; it is not kept.
        num_outputs: K + 1.
        channels: width of the decoder.

    Raises:
        WSSSError: the backbone has no class token, or fewer than four blocks.
    """

    def __init__(self, *, backbone: Backbone, num_outputs: int, channels: int = 256) -> None:
        super().__init__()
        levels = dpt_levels(backbone)
        self.taps, self.patch_size = levels.taps, backbone.patch_size
        self.reassemble = reassembly(backbone.dim, levels)
        self.decoder = DPTDecoder(
            in_channels=levels.widths, num_outputs=num_outputs, channels=channels
        )

    def forward(self, features: Features) -> Tensor:
        """Compute logits (B, K+1, h * patch, w * patch) from features with these taps."""
        maps = [level_map(features, level, self.taps, self.reassemble) for level in range(1, 5)]
        return self.decoder(maps, [side * self.patch_size for side in features.grid])


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
        """Compute logits (B, K+1, h, w) from features (B, D, h, w)."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)
