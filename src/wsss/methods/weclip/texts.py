"""Text features as part of a method: read once from a file, then stored in its checkpoints."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.methods.weclip.gradcam import Texts
from wsss.models.backbone import Backbone
from wsss.models.text import TextFeatures, read_text_features

RANDOM = "random"  # instead of a file: for smoke tests, no number of which means anything
STORED = "stored"  # a checkpoint follows that holds the features
RANDOM_BACKGROUNDS, RANDOM_SCALE = 25, 100.0


class ClassTexts(nn.Module):
    """Unit text features of the classes and of backgrounds, as buffers.

    Args:
        text: file of :mod:`wsss.models.text`, ``random``, or ``stored``.
        num_classes: K.
        backbone: the tower that they are compared with.

    Raises:
        WSSSError: a missing or damaged file, or one of other classes or another width.

    Attributes:
        features: what the file holds, or None.
        sha256: hash of the file, or None.
    """

    foreground: Tensor
    background: Tensor
    scale: Tensor

    def __init__(self, text: str, num_classes: int, backbone: Backbone) -> None:
        super().__init__()
        self.text = text
        self.features: TextFeatures | None = None
        self.sha256: str | None = None
        width = backbone.dim
        if backbone.projection is not None:
            width = int(backbone.projection.shape[1])
        if text in (RANDOM, STORED):
            draws = torch.Generator().manual_seed(0)
            rows = torch.randn(num_classes + RANDOM_BACKGROUNDS, width, generator=draws)
            foreground, background = F.normalize(rows, dim=1).tensor_split([num_classes])
            scale = RANDOM_SCALE
        else:
            path = Path(text).expanduser()
            if not path.is_file():
                raise WSSSError(
                    f"method.text={text}: no such file; `wsss text data=... out={text}` makes it"
                )
            features = read_text_features(path)
            if len(features.foreground) != num_classes:
                raise WSSSError(
                    f"method.text={text}: has texts of {len(features.foreground)} classes, and "
                    f"the data {num_classes}; make it anew with `wsss text`"
                )
            if features.width != width:
                raise WSSSError(
                    f"method.text={text}: its features are {features.width} wide, and "
                    f"backbone.projection {width}; make it anew from the CLIP of the backbone"
                )
            self.features, self.sha256 = features, file_sha256(path)
            foreground = torch.tensor(features.foreground)
            background = torch.tensor(features.background)
            scale = features.logit_scale
        self.register_buffer("foreground", foreground)
        self.register_buffer("background", background)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self) -> Texts:
        """Give them to the CAM."""
        return Texts(self.foreground, self.background, self.scale)

    @property
    def files_sha256(self) -> dict[str, str]:
        """Hash of the file, by the name under which results have it."""
        return {} if self.sha256 is None else {"text": self.sha256}

    def check(self, class_names: tuple[str, ...], backbone: Backbone) -> None:
        """Raise WSSSError where the file's classes are not the data's; warn of other weights."""
        if self.text == STORED:
            raise WSSSError(f"method.text={STORED}: expected a file that `wsss text` made")
        if self.features is not None:
            self.features.check_classes(class_names, f"method.text={self.text}")
            digest = backbone.weights_info.state_sha256
            self.features.check_tower(self.features.width, digest, f"method.text={self.text}")

    def fit_to(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Take a checkpoint's number of background texts, before it is loaded strictly."""
        stored = state.get(f"{prefix}background")
        if stored is not None and stored.shape[1:] == self.background.shape[1:]:
            self.background = torch.empty_like(stored, device=self.background.device)
