"""CLIP-CAM: WeCLIP's maps without training, Grad-CAM and attention of a frozen CLIP.

Idea: what WeCLIP (method.py) learns from in its first phase is a map of each class already. Nothing
is trained: a run only evaluates, and its checkpoint holds the encoder and the texts. Like CLIP-ES,
from which WeCLIP has this part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.methods.base import Batch, Outputs, Step, WSSSModule
from wsss.methods.settings import Count, Fraction, Settings
from wsss.methods.weclip import maps, tower
from wsss.methods.weclip.gradcam import class_slots, unit_range
from wsss.methods.weclip.texts import STORED, ClassTexts
from wsss.methods.weclip.tower import Encoded, Normalisation
from wsss.models.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class CLIPCAMSettings(Settings):
    """Settings of CLIP-CAM; ``max_steps`` is not used."""

    text: str  # file of text features
    normalisation: Normalisation = "imagenet"  # of the images: as WeCLIP, or CLIP's own
    box_threshold: Fraction = 0.4  # of CAM scores inside a box; COCO 0.7
    static_layers: Count = 8  # last blocks whose attention refines


class CLIPCAM(WSSSModule):
    """A frozen CLIP as a source of class maps.

    The map of a class depends on which others are asked for: they compete in one softmax.

    Args:
        backbone: an image tower of CLIP.
        num_classes: K, foreground classes.
        settings: see :class:`CLIPCAMSettings`.

    Raises:
        WSSSError: the backbone is no tower of CLIP or too shallow, or the text features do not
            fit it.
    """

    settings: CLIPCAMSettings
    classes_compete = True
    takes_frozen = True
    held_by_checkpoint: Mapping[str, Any] = MappingProxyType({"text": STORED})
    trains = False

    def __init__(self, *, backbone: Backbone, num_classes: int, settings: CLIPCAMSettings) -> None:
        super().__init__(backbone=backbone, num_classes=num_classes, settings=settings)
        tower.freeze(backbone, settings.text, "clip_cam")
        tower.check_layers(backbone, static_layers=settings.static_layers)
        self.texts = ClassTexts(settings.text, num_classes, backbone)
        self.files_sha256 = self.texts.files_sha256

    @property
    def title(self) -> str:
        """Its name in tables."""
        return "CLIP-CAM"

    def forward(self, images: Tensor) -> Outputs:
        """Give zero-shot class logits (B, K): a class's log-odds against all backgrounds."""
        encoded = self.encode(images)
        assert encoded.last is not None
        texts, unit = self.texts(), F.normalize(encoded.last.embedding, dim=1)
        own, rest = (texts.scale * unit @ rows.T for rows in (texts.foreground, texts.background))
        return Outputs(own - rest.logsumexp(1, keepdim=True), None)

    @torch.no_grad()
    def cams(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give refined maps, stretched to [0, 1], (B, K, H, W); others zero."""
        s, slots, encoded = self.settings, class_slots(labels), self.encode(images)
        refined = maps.refined_maps(
            encoded, self.texts(), slots, box_threshold=s.box_threshold, layers=s.static_layers
        )
        every = maps.by_class(unit_range(refined), slots, self.num_classes)
        return tower.at_pixels(every, images.shape[-2:], self.backbone.patch_size)

    def encode(self, images: Tensor) -> Encoded:
        """Run the tower on images (B, 3, H, W); see :func:`tower.encode`."""
        images = tower.whole_patches(images, self.backbone.patch_size)
        images = tower.renormalised(images, self.settings.normalisation)
        return tower.encode(self.backbone, images, layers=self.settings.static_layers)

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raise WSSSError where the text features are of other classes than the data."""
        self.texts.check(tuple(class_names), self.backbone)

    def fit_to(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's number of background texts."""
        self.texts.fit_to(state, "texts.")

    # ---- nothing is trained ------------------------------------------------------------------

    def losses(self, batch: Batch, step: int) -> Step:
        """Refuse: there are none."""
        self._refuse()

    def param_groups(self) -> list[dict[str, Any]]:
        """Give no group."""
        return []

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Refuse: nothing is optimised."""
        self._refuse()

    def lr_multiplier(self, step: int) -> float:
        """Refuse: nothing is optimised."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise WSSSError("method=clip_cam learns nothing: evaluate it")
