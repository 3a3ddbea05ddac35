"""Training views of every method, from one decoded uint8 image.

ToCo (toco.md section 4): the photometric part runs in albumentations, whose ColorJitter, ToGray and
Solarize agree with the official torchvision and Pillow ones within the rounding that
tests/data/test_transforms.py states. Two operations are not the same there and follow Pillow here:
resampling (OpenCV's does not filter when it shrinks) and the Gaussian blur (`PillowBlur`).

ClusterCAM (clustercam.md section 4) prescribes timm's ImageNet recipe, whose RandAugment is timm's
own table of Pillow operations; albumentations has other ones under the same names, so timm's are
used, fed from the sample's generator.

GETAM (getam.md section 4): OpenCV's bilinear resize of floats, as officially.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

# albumentations asks the network for a newer version of itself when imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize, rand_augment_transform
from torch import Tensor

from wsss.data.images import IMAGENET_MEAN, IMAGENET_STD, normalise
from wsss.errors import WSSSError

# Workers are processes already: OpenCV's own threads would only fight over the cores, and a
# thread pool that exists before the fork can hang the child.
cv2.setNumThreads(0)

GLOBAL2_AREA = (0.4, 1.0)
LOG_RATIO = (np.log(3 / 4), np.log(4 / 3))  # of random resized crops
IMAGENET_AREA = (0.08, 1.0)
ERASED_AREA = (0.02, 1 / 3)
ERASED_LOG_RATIO = (np.log(0.3), np.log(1 / 0.3))


def pillow_blur_kernel(radius: float) -> NDArray[np.float64]:
    """Returns the 1-D kernel (taps,) of Pillow's Gaussian blur: three equal box filters.

    A box of half-width l + a (its two outer taps weigh less) has a third of the variance
    radius^2. A sampled Gaussian hardly blurs below radius 0.5, a fifth of ToCo's draws, where this
    kernel still has the variance asked for.
    """
    variance = radius**2 / 3
    inner = int((np.sqrt(12 * variance + 1) - 1) / 2)
    outer = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    outer /= 6 * (variance - (inner + 1) ** 2)
    box = np.r_[outer, np.ones(2 * inner + 1), outer] / (2 * (inner + outer) + 1)
    return np.convolve(np.convolve(box, box), box)


class PillowBlur(A.ImageOnlyTransform):
    """Blurs like ``ImageFilter.GaussianBlur`` with a random radius, but some ten times as fast.

    Args:
        radius: bounds of the uniform draw, in pixels.
        p: probability.
    """

    def __init__(self, radius: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.radius = radius

    def get_params(self) -> dict[str, float]:
        """Draws the radius from the generator that albumentations shares."""
        return {"radius": self.py_random.uniform(*self.radius)}

    def apply(self, img: NDArray[np.uint8], radius: float, **_: Any) -> NDArray[np.uint8]:
        """Filters rows and columns of a uint8 image (H, W, 3), repeating its border."""
        kernel = pillow_blur_kernel(radius)
        return cv2.sepFilter2D(img, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def _photometric(*, blur: float, radius: tuple[float, float], solarise: float = 0.0) -> A.Compose:
    """J without its flip, then blur and solarisation with the given probabilities."""
    return A.Compose(
        [
            A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
            A.ToGray(p=0.2),
            PillowBlur(radius=radius, p=blur),
            A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarise),
        ]
    )


def _apply(steps: A.Compose, view: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    # Not set_random_seed: it gives every step the same seed, hence the same first draw, so that
    # for example only jittered views would ever be greyed. Sharing the generators keeps the
    # steps independent.
    steps.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return normalise(steps(image=view)["image"])


def _mirror(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(view[:, ::-1])


class ToCoViews:
    """Makes the three views of one ToCo training sample.

    1. scale u ~ U(scale_range), bilinear; 2. flip with p = 0.5; 3. pad with zeros (raw pixel
    value) to the crop size at a random offset and crop at random; ``box`` is where real pixels
    are. 4. from that crop ``image`` (the network's input and global view 1; always blurred) and
    ``local_view`` (blurred with p = 0.5); 5. from the original image ``view2`` (global view 2):
    RandomResizedCrop of 0.4-1 of the area, bicubic, blur p = 0.1, solarise p = 0.2. Every view
    has its own colour jitter and greying, and J's second flip.

    Args:
        crop_size: side of all three views in pixels (448 in the paper).
        official_compat: True flips ``image`` and ``local_view`` independently and leaves the box
            where it was before that (toco.md Q2, Q3). False, the default, draws one flip for the
            two and moves the box with it. All other draws are the same.
        scale_range: bounds of u.
        blur_radius: bounds of the blur's radius in pixels, meant for crops of 448.
    """

    def __init__(
        self,
        *,
        crop_size: int = 448,
        official_compat: bool = False,
        scale_range: tuple[float, float] = (0.5, 2.0),
        blur_radius: tuple[float, float] = (0.1, 2.0),
    ) -> None:
        self.crop_size = crop_size
        self.official_compat = official_compat
        self.scale_range = (scale_range[0], scale_range[1])
        radius = (blur_radius[0], blur_radius[1])
        self.input_steps = _photometric(blur=1.0, radius=radius)
        self.local_steps = _photometric(blur=0.5, radius=radius)
        self.view2_steps = _photometric(blur=0.1, radius=radius, solarise=0.2)

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draws the views of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``, ``view2``, ``local_view``: float32 (3, C, C) normalised; ``box``: int64
            (4,), rows r0:r1 and columns c0:c1 (ends excluded) of real pixels in ``image``.
        """
        picture = Image.fromarray(rgb)
        crop, (r0, r1, c0, c1) = self._scaled_crop(picture, rng)
        flip_image, flip_local = rng.random(2) < 0.5
        if not self.official_compat:
            flip_local = flip_image
            if flip_image:
                c0, c1 = self.crop_size - c1, self.crop_size - c0
        mirrored = _mirror(crop)
        view2 = _random_resized_crop(picture, self.crop_size, GLOBAL2_AREA, rng)
        return {
            "image": _apply(self.input_steps, mirrored if flip_image else crop, rng),
            "local_view": _apply(self.local_steps, mirrored if flip_local else crop, rng),
            "view2": _apply(self.view2_steps, view2, rng),
            "box": torch.tensor([r0, r1, c0, c1]),
        }

    def _scaled_crop(
        self, picture: Image.Image, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
        """Steps 1-3: scale, flip, pad, crop.

        Only the part that the crop shows is resampled: Pillow's ``box`` takes the support of the
        filter from the whole picture, so the pixels are those of resizing all of it (but for
        rounding).
        """
        size, scale = self.crop_size, rng.uniform(*self.scale_range)
        width, height = (max(1, int(scale * side)) for side in picture.size)
        r0, r1, y0 = _place(height, size, rng)
        c0, c1, x0 = _place(width, size, rng)
        flip = rng.random() < 0.5
        if flip:  # the same columns, counted from the right edge of the unflipped picture
            x0 = width - x0 - (c1 - c0)
        to_x, to_y = picture.width / width, picture.height / height
        source = (
            x0 * to_x,
            y0 * to_y,
            min((x0 + c1 - c0) * to_x, picture.width),  # rounding may pass the edge, Pillow objects
            min((y0 + r1 - r0) * to_y, picture.height),
        )
        part = np.asarray(picture.resize((c1 - c0, r1 - r0), Image.Resampling.BILINEAR, box=source))
        crop = np.zeros((size, size, 3), np.uint8)
        crop[r0:r1, c0:c1] = part[:, ::-1] if flip else part
        return crop, (r0, r1, c0, c1)


def _place(scaled: int, size: int, rng: "Draws") -> tuple[int, int, int]:
    """Pads or crops along one axis of the scaled picture.

    Returns:
        Start and end of the real pixels in the crop, and the scaled picture's first shown pixel.
    """
    if scaled < size:
        start = int(rng.integers(0, size - scaled + 1))
        return start, start + scaled, 0
    return 0, size, int(rng.integers(0, scaled - size + 1))


def _random_resized_crop(
    picture: Image.Image, size: int, area: tuple[float, float], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A part of the picture as a square (size, size, 3), bicubic, mirrored with p = 0.5."""
    left, top, width, height = _draw_area(picture.width, picture.height, area, rng)
    part = picture.crop((left, top, left + width, top + height))
    view = np.array(part.resize((size, size), Image.Resampling.BICUBIC))
    return _mirror(view) if rng.random() < 0.5 else view


def _draw_area(
    width: int, height: int, share: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws (left, top, width, height) as torchvision's RandomResizedCrop does.

    Args:
        width: of the picture.
        height: of the picture.
        share: bounds of the part's area over the picture's.
        rng: source of the draws.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*share)
        ratio = np.exp(rng.uniform(*LOG_RATIO))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * 4 / 3)))  # too long a picture: the largest central part
    h = min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


class ClusterCAMView:
    """Makes the one view of a ClusterCAM training sample (clustercam.md section 4).

    Random resized crop (area 0.08-1 unless told otherwise, ratio 3/4-4/3, bicubic), flip with
    p = 0.5, RandAugment ``rand-m9-mstd0.5-inc1`` (two of timm's operations, each with p = 0.5),
    normalisation, random erasing with p = 0.25 (one box of 2-33 % filled with N(0, 1) values).

    Args:
        crop_size: side of the view in pixels (448 in the paper).
        area: bounds of the crop's share of the image; small shares lose labelled objects.

    Raises:
        WSSSError: bounds that are no shares.
    """

    def __init__(self, *, crop_size: int = 448, area: tuple[float, float] = IMAGENET_AREA) -> None:
        self.crop_size = crop_size
        if not 0 < area[0] <= area[1] <= 1:
            raise WSSSError(
                f"data.train_transform.area={list(area)}: expected two rising shares in (0, 1]"
            )
        self.area = (area[0], area[1])
        self.rand_augment = increasing_rand_augment()

    def __call__(self, rgb: NDArray[np.uint8], rng: np.random.Generator) -> dict[str, Tensor]:
        """Draws the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.

        Returns:
            ``image``: float32 (3, C, C), normalised.
        """
        picture = Image.fromarray(rgb)
        view = _random_resized_crop(picture, self.crop_size, self.area, rng)
        augmented = Image.fromarray(view)
        operations = self.rand_augment.ops
        with _own_random(rng):
            for index in rng.integers(len(operations), size=self.rand_augment.num_layers):
                augmented = operations[index](augmented)
        return {"image": erase_box(normalise(np.array(augmented)), rng)}


def increasing_rand_augment() -> RandAugment:
    """Timm's ``rand-m9-mstd0.5-inc1`` on Pillow images, filling with ImageNet's mean colour."""
    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    augment = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    )
    for operation in augment.ops:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As timm does; its strongest level keeps no bit, black until Pillow 13 refused it."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


def erase_box(image: Tensor, rng: np.random.Generator, probability: float = 0.25) -> Tensor:
    """Fills a random box of a normalised image (3, H, W) with N(0, 1) values, in place.

    Source: timm's RandomErasing in ``pixel`` mode with one box.
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = np.exp(rng.uniform(*ERASED_LOG_RATIO))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((3, h, w), dtype=np.float32)
            image[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            break
    return image


@contextmanager
def _own_random(rng: np.random.Generator) -> Iterator[None]:
    """Lets code that draws from Python's global generator draw from ours instead."""
    before = random.getstate()
    random.seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(before)


class Draws(Protocol):
    """Where random decisions come from; numpy's Generator is one."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def integers(self, low: int, high: int) -> Any:
        """Uniform integer in [low, high)."""


class Placement(NamedTuple):
    """How one picture is scaled, mirrored and placed; all that is random about a GETAM view.

    Attributes:
        height: of the scaled picture.
        width: of the scaled picture.
        flip: mirror it.
        rows: (start, end, first shown row) as `_place` gives them.
        columns: the same along the other axis.
    """

    height: int
    width: int
    flip: bool
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]


class GETAMViews:
    """Makes the training sample of GETAM, with the picture's saliency map where there is one.

    1. flip with p = 0.5; 2. long side to a random length, OpenCV's bilinear on floats (saliency
    nearest); 3. crop at random, or place at random on zeros (of the normalised image, so padding
    has the mean colour). No colour jitter.

    Args:
        crop_size: side of the crop in pixels (256 in the paper).
        long_side: bounds of the long side's length over the crop's, both included.
    """

    def __init__(
        self, *, crop_size: int = 256, long_side: tuple[float, float] = (0.9, 8 / 7)
    ) -> None:
        self.crop_size = crop_size
        low, high = long_side
        # a little more, since 8/7 of 56 is 64 and not 63.999
        self.long_side = (int(low * crop_size + 1e-6), int(high * crop_size + 1e-6))
        if not 0 < self.long_side[0] <= self.long_side[1]:
            raise WSSSError(
                f"data.train_transform.long_side=[{low}, {high}]: expected 0 < low <= high"
            )

    def __call__(
        self, rgb: NDArray[np.uint8], rng: Draws, saliency: NDArray[np.uint8] | None = None
    ) -> dict[str, Tensor]:
        """Draws the view of one image.

        Args:
            rgb: uint8 (H, W, 3) of any size.
            rng: source of every random decision.
            saliency: uint8 (H, W), or None.

        Returns:
            ``image``: float32 (3, C, C) normalised; ``box``: int64 (4,), rows r0:r1 and columns
            c0:c1 (ends excluded) of real pixels; with a saliency map ``saliency``: uint8 (C, C),
            0 in the padding.
        """
        place = self.place(rgb.shape[:2], rng)
        sample = {
            "image": self.render(rgb, place),
            "box": torch.tensor([*place.rows[:2], *place.columns[:2]]),
        }
        if saliency is not None:
            size = (place.width, place.height)
            scaled = cv2.resize(saliency, size, interpolation=cv2.INTER_NEAREST)
            sample["saliency"] = torch.from_numpy(self._placed(scaled, place))
        return sample

    def place(self, size: Sequence[int], rng: Draws) -> Placement:
        """Draws flip, long side, column and row, in this order, for a picture of (H, W)."""
        flip = rng.random() > 0.5
        long_side = int(rng.integers(self.long_side[0], self.long_side[1] + 1))
        height, width = (max(1, round(side * long_side / max(size))) for side in size)
        columns = _place(width, self.crop_size, rng)
        return Placement(height, width, flip, _place(height, self.crop_size, rng), columns)

    def render(self, rgb: NDArray[np.uint8], place: Placement) -> Tensor:
        """The normalised crop (3, C, C) of a placed picture."""
        size = (place.width, place.height)
        # double precision in the official order: PAMR's guide is cut to integers afterwards
        normal = cv2.resize(rgb.astype(np.float64), size, interpolation=cv2.INTER_LINEAR)
        normal /= 255
        normal -= np.array(IMAGENET_MEAN)
        normal /= np.array(IMAGENET_STD)
        crop = self._placed(normal.astype(np.float32), place)
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))

    def _placed(self, scaled: NDArray[Any], place: Placement) -> NDArray[Any]:
        """A scaled picture (H, W, ...) mirrored if asked, cropped or on zeros: (C, C, ...)."""
        (r0, r1, row), (c0, c1, column) = place.rows, place.columns
        scaled = scaled[:, ::-1] if place.flip else scaled
        crop = np.zeros((self.crop_size, self.crop_size, *scaled.shape[2:]), scaled.dtype)
        crop[r0:r1, c0:c1] = scaled[row : row + r1 - r0, column : column + c1 - c0]
        return crop
