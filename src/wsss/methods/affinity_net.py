"""AffinityNet: it learns which neighbours belong together, for the random walk of other maps.

Idea: where a method's maps are certain, pairs of neighbours are known to show the same or not. A
network that learns their affinities from these pairs knows it elsewhere too, and maps that walk
along the affinities fill objects up to their edges. The network segments nothing by itself: it is
trained below a run (:mod:`wsss.training.random_walk`) and refines that run's maps
(:mod:`wsss.maps.refine.random_walk`).

Paper: Ahn, Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
Supervised Semantic Segmentation" (CVPR 2018). Settings as in mctformer.md section 5, step 2.

Departures:
    * The encoder is the shared ViT or a torchvision ResNet, where the page has a ResNet-38; a
      radius of 5 features is 40 pixels at its stride of 8 and 80 at a ViT's of 16.
    * Label maps are reduced to the grid by counting pixels, where the page averages the posteriors
      behind them; on its golden case both give the same labels.
    * Weight decay is weight decay. The official code gives it as the momentum (section 7).
    * All pairs within a crop count, also at its edge.
    * Layers start as PyTorch starts them, of which the page says nothing.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.maps.pixels import IGNORE_INDEX
from wsss.maps.refine.random_walk import affinity, pad_to_multiple, pairs
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.schedules import poly_warmup
from wsss.methods.settings import BelowOne, NotNegative, Positive, Settings, Some, Width
from wsss.models.backbone import Backbone
from wsss.models.conv_backbone import ConvBackbone

_EPS = 1e-5  # in the logarithms
Radius = Annotated[int, Ge(2), Le(64)]  # within 1 lies no neighbour


@dataclass(frozen=True, kw_only=True)
class AffinityNetSettings(Settings):
    """Settings of the affinity network; the defaults are the page's for VOC."""

    # network
    taps: Some[int] = (-3, -2, -1)  # blocks of a ViT, or parts of a ResNet: its last three stages
    widths: Some[Width] = (64, 128, 256)  # of the taps' convolutions; their sum is the features'
    radius: Radius = 5  # pairs are nearer than that, in features
    freeze_batch_norm: bool = True  # keep them as pretrained; not for a random start

    # optimiser
    optimiser: Literal["sgd", "adamw"] = "sgd"  # transformers want AdamW
    lr: Positive = 0.01  # of the encoder; twice that for its biases
    head_lr_factor: Positive = 10.0  # times lr: new layers' weights; twice that for their biases
    momentum: BelowOne = 0.0  # of SGD
    weight_decay: NotNegative = 5e-4  # on all but biases

    def check(self) -> None:
        """Raise WSSSError unless every tap has its width."""
        if len(self.taps) != len(self.widths):
            raise WSSSError(
                f"method.widths={list(self.widths)}: expected one for each of the "
                f"{len(self.taps)} method.taps"
            )

    def check_crop(self, crop_size: int, patch_size: int) -> None:
        """Raise WSSSError where a crop does not fill a grid, or the grid is below the radius."""
        if crop_size % patch_size:
            raise WSSSError(
                f"budget.crop_size={crop_size}: expected a multiple of {patch_size}, the pixels a "
                "feature of the affinity network"
            )
        if crop_size // patch_size < self.radius:
            raise WSSSError(
                f"method.radius={self.radius}: larger than the grid of a training crop; "
                f"budget.crop_size={crop_size} has {crop_size // patch_size} features of "
                f"{patch_size} px a side"
            )


class AffinityNet(WSSSModule):
    """Features whose distances say which neighbours belong together.

    Example:
        >>> settings = AffinityNetSettings(max_steps=5000)
        >>> backbone = ConvBackbone(name="resnet50")
        >>> AffinityNet(backbone=backbone, num_classes=20, settings=settings).dim
        448

    Args:
        backbone: the encoder.
        num_classes: K, foreground classes of the labels it learns from.
        settings: see :class:`AffinityNetSettings`.

    Raises:
        WSSSError: a tap that the encoder lacks.
    """

    settings: AffinityNetSettings
    takes_convolutions = True

    def __init__(
        self,
        *,
        backbone: Backbone | ConvBackbone,
        num_classes: int,
        settings: AffinityNetSettings,
    ) -> None:
        # the base keeps the encoder and asks nothing of it
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)  # type: ignore[arg-type]
        if settings.freeze_batch_norm:
            self.freeze_batch_norms()
        self.narrow = nn.ModuleList(
            nn.Conv2d(tap, width, 1)
            for tap, width in zip(self._tap_widths(), settings.widths, strict=True)
        )
        self.dim = sum(settings.widths)
        # a bias would be the same at both ends of a pair
        self.joined = nn.Conv2d(self.dim, self.dim, 1, bias=False)

    def _tap_widths(self) -> list[int]:
        """Give the channels of every tap."""
        encoder, taps = self.backbone, self.settings.taps
        depth = len(encoder.body) if isinstance(encoder, ConvBackbone) else encoder.depth
        for tap in taps:
            if not -depth <= tap < depth:
                raise WSSSError(f"method.taps: {tap} is none of the encoder's {depth} parts")
        if not isinstance(encoder, ConvBackbone):
            return [encoder.dim] * len(taps)
        widths = []
        for tap in taps:
            layers = [m for m in encoder.body[tap].modules() if isinstance(m, nn.Conv2d)]
            if not layers:
                raise WSSSError(f"method.taps: part {tap} of the encoder has no convolution")
            widths.append(layers[-1].out_channels)
        return widths

    # ---- what the random walk sees -----------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Compute the features of normalised images (B, 3, H, W).

        Images are padded to a multiple of the stride, at right and bottom, with 0, the mean colour.

        Returns:
            (B, D, ceil(H / stride), ceil(W / stride)) float32.
        """
        taps = self._taps(pad_to_multiple(images, self.backbone.patch_size))
        narrow = [F.elu(layer(tap)) for layer, tap in zip(self.narrow, taps, strict=True)]
        return self.joined(torch.cat(narrow, dim=1)).float()

    def _taps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, D_i, h, w) behind the chosen parts, all at the last one's size."""
        wanted, encoder = self.settings.taps, self.backbone
        if not isinstance(encoder, ConvBackbone):
            found = encoder(images, taps=wanted)
            return [found.as_map(found.intermediates[tap % encoder.depth]) for tap in wanted]
        depth, maps, last = len(encoder.body), {}, images
        for index, part in enumerate(encoder.body):
            last = part(last)
            if index in {tap % depth for tap in wanted}:
                maps[index] = last
        size = last.shape[-2:]
        return [
            tap if tap.shape[-2:] == size else F.interpolate(tap, size, mode="bilinear")
            for tap in (maps[tap % depth] for tap in wanted)
        ]

    def forward(self, images: Tensor) -> Outputs:
        """Raise WSSSError: it has no logits."""
        self._serves_another()

    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Raise WSSSError: it has no maps."""
        self._serves_another()

    def _serves_another(self) -> NoReturn:
        raise WSSSError(
            "an affinity network has no maps of its own and is not evaluated; give the run whose "
            "maps it refines (wsss pseudo run=RUN_DIR refine=random_walk)"
        )

    # ---- training ----------------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Compute the losses of background, of same and of different pairs.

        *Several processes*: each is a mean over the pairs of one forward pass.

        Args:
            batch: ``image`` (B, 3, H, W), ``target`` (B, H, W) class ids and 255.
            step: all steps are alike.

        Returns:
            The losses; the outputs have no class, (B, 0).
        """
        with self.phase("forward"):
            features = self.features(batch["image"])
        target = grid_labels(batch["target"], self.backbone.patch_size)
        losses = pair_losses(features, target, radius=self.settings.radius)
        background, same, different = losses.values()
        total = background / 4 + same / 4 + different / 2
        nothing = Outputs(features.new_zeros(len(features), 0), None)
        return Step(losses, total, nothing, {"target": target})

    def compiled_parts(self) -> list[nn.Module]:
        """Give the transformer's blocks, or the parts of the convolutional encoder."""
        if isinstance(self.backbone, ConvBackbone):
            return list(self.backbone.body)
        return super().compiled_parts()

    def param_groups(self) -> list[dict[str, Any]]:
        """Give weights and biases of encoder and new layers; biases twice as fast, not decayed."""
        s, groups = self.settings, []
        own = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        for part, lr in (("encoder", s.lr), ("head", s.lr * s.head_lr_factor)):
            its = [(n, p) for n, p in own if n.startswith("backbone.") is (part == "encoder")]
            weights = [p for n, p in its if not n.endswith("bias")]
            biases = [p for n, p in its if n.endswith("bias")]
            groups += [
                {"name": part, "params": weights, "lr": lr},
                {"name": f"{part}_biases", "params": biases, "lr": 2 * lr, "weight_decay": 0.0},
            ]
        return groups

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make SGD, or AdamW."""
        s = self.settings
        if s.optimiser == "adamw":
            return torch.optim.AdamW(groups, weight_decay=s.weight_decay)
        return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)

    def lr_multiplier(self, step: int) -> float:
        """Give (1 - step / max)^0.9."""
        return poly_warmup(step, max_steps=self.settings.max_steps, warmup_steps=0)


def grid_labels(target: Tensor, stride: int) -> Tensor:
    """Reduce labels to the grid by counting pixels.

    Args:
        target: (B, H, W) class ids, and 255 where nothing is certain; sides are multiples.
        stride: pixels a position.

    Returns:
        (B, H / stride, W / stride): the class with most pixels where it has more than background
        and 255 together; 0 where the background has at least as many as that class and 255
        together; 255 elsewhere.
    """
    blocks = target.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))  # (B, h, s, w, s)
    blocks = blocks.transpose(2, 3).flatten(3)  # (B, h, w, s * s)
    background, unknown = (blocks == 0).sum(-1), (blocks == IGNORE_INDEX).sum(-1)
    most, label = torch.zeros_like(background), torch.zeros_like(background)
    for class_id in target.unique().tolist():
        if class_id in (0, IGNORE_INDEX):
            continue
        count = (blocks == class_id).sum(-1)
        label = label.masked_fill(count > most, class_id)
        most = torch.maximum(most, count)
    label = label.masked_fill(most <= background + unknown, IGNORE_INDEX)
    return label.masked_fill(background >= most + unknown, 0)


def pair_losses(features: Tensor, labels: Tensor, *, radius: int) -> dict[str, Tensor]:
    """Compute the three losses of pairs, each a mean; 0 where there is no such pair.

    -log a of pairs of background and of pairs of one class, -log(1 - a) of all others, with 1e-5
    added within the logarithms. Pairs with a 255 are left out.

    Args:
        features: (B, D, h, w) float32.
        labels: (B, h, w) class ids, 0 the background, and 255.
        radius: pairs are nearer than that.

    Returns:
        By name: of background pairs, of pairs of one class, of different pairs.
    """
    names = ("background_pairs_loss", "same_pairs_loss", "different_pairs_loss")
    sums, counts = features.new_zeros(3), features.new_zeros(3)
    for here, there in pairs((features.shape[-2], features.shape[-1]), radius):
        a = affinity(features, here, there)
        one, other = labels[(..., *here)], labels[(..., *there)]
        known = (one != IGNORE_INDEX) & (other != IGNORE_INDEX)
        same = known & (one == other)
        alike, unlike = -(a + _EPS).log(), -(1 + _EPS - a).log()
        kinds = [(same & (one == 0), alike), (same & (one > 0), alike), (known & ~same, unlike)]
        sums = sums + torch.stack([(loss * chosen).sum() for chosen, loss in kinds])
        counts = counts + torch.stack([chosen.sum() for chosen, _ in kinds])
    return dict(zip(names, (sums / counts.clamp_min(1)).unbind(), strict=True))
