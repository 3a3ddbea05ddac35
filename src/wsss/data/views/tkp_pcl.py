"""Training views of TKP-PCL and ViT-PCM (methods/tkp_pcl.md section 4), from one uint8 image."""

import albumentations as A
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.data.views.colours import augment

PART_PROBABILITY = 0.3  # that a second view shows a part and not the whole
PART = 3  # a part is a third of the side: 128 of 384 px


class SquareViews:
    """Squashes an image to a square, turns it, jitters its colours; never crops the main view.

    1. bilinear to ``size`` x ``size``, whatever the aspect: a crop could lose an object and so
    falsify the image's labels. 2. flip columns, flip rows, transpose, each with p = 0.5, which is
    uniform over the eight symmetries of a square. 3. contrast 0.5-2, saturation 0.5-1.5, hue 0.1,
    always; grey with p = 0.1. ViT-PCM's brightness jitter has no effect there and is left out.

    Args:
        size: side of the main view in pixels (384 in ViT-PCM).
        view: also make the second view of the equivariance term: half as large, the whole image
            or with p = 0.3 a third of its side, turned and jittered on its own.
        patch_size: side of a patch; a part begins and ends on the patch grid.
    """

    def __init__(self, *, size: int = 384, view: bool = False, patch_size: int = 16) -> None:
        if view and size % (2 * patch_size):
            raise WSSSError(
                f"data.train_transform: size={size} with view=true must be a multiple of twice "
                f"patch_size={patch_size}, since four second views make one image"
            )
        self.size, self.view, self.patch_size = size, view, patch_size
        self.steps = A.Compose(
            [
                A.ColorJitter(
                    brightness=0, contrast=(0.5, 2.0), saturation=(0.5, 1.5), hue=0.1, p=1.0
                ),
                A.ToGray(p=0.1),
            ]
        )

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the views of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, size, size) normalised; ``symmetry``: bool (3,), which of flip
            columns, flip rows, transpose made it. With ``view`` also ``view`` (3, size/2, size/2),
            ``view_symmetry`` (3,) and ``view_box``, int64 (4,): rows r0:r1 and columns c0:c1 of the
            unturned main view that it shows, in pixels, on the patch grid.
        """
        square = Image.fromarray(rgb).resize((self.size, self.size), Image.Resampling.BILINEAR)
        symmetry = rng.random(3) < 0.5
        main = turned(np.asarray(square), symmetry)
        sample = {
            "image": augment(self.steps, main, rng),
            "symmetry": torch.from_numpy(symmetry),
        }
        if self.view:
            sample |= self._second_view(square, rng)
        return sample

    def _second_view(self, square: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        patches = self.size // self.patch_size
        row = column = 0
        part = patches
        if rng.random() < PART_PROBABILITY:
            part = max(1, patches // PART)
            row, column = (int(start) for start in rng.integers(patches - part + 1, size=2))
        box = np.array([row, row + part, column, column + part]) * self.patch_size
        top, bottom, left, right = box.tolist()
        half = (self.size // 2, self.size // 2)
        shown = square.resize(half, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        symmetry = rng.random(3) < 0.5
        return {
            "view": augment(self.steps, turned(np.asarray(shown), symmetry), rng),
            "view_symmetry": torch.from_numpy(symmetry),
            "view_box": torch.from_numpy(box),
        }


def turned(image: NDArray[np.uint8], symmetry: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Flip the columns and the rows of an image (n, n, 3) and transpose it, each if wanted."""
    columns, rows, transpose = symmetry
    if columns:
        image = image[:, ::-1]
    if rows:
        image = image[::-1]
    if transpose:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image)
