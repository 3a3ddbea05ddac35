"""Training views the plain way: Pillow and torchvision, one step after another.

These are what a first implementation from a method's page looks like (methods/*.md, section 4), for
`wsss benchmark part=data` to stand beside. They draw from the global generators and are not used
for training.
"""

import random
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as T

from wsss.data.views.imagenet import rand_augment
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD

PlainViews = Callable[[Image.Image], dict[str, Tensor]]


def _normalised(*steps: Callable[..., object]) -> T.Compose:
    return T.Compose([*steps, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def _transposed(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.TRANSPOSE)


def _rescaled(picture: Image.Image) -> Image.Image:
    """Scale by U(0.5, 2), then mirror with p = 0.5."""
    scale = random.uniform(0.5, 2.0)
    size = (int(scale * picture.width), int(scale * picture.height))
    scaled = picture.resize(size, Image.Resampling.BILINEAR)
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else scaled


def _padded_crop(picture: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Pad with zeros at a random offset, then crop at random."""
    width, height = max(picture.width, size), max(picture.height, size)
    left = random.randint(0, width - picture.width)
    top = random.randint(0, height - picture.height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture, (left, top))
    x, y = random.randint(0, width - size), random.randint(0, height - size)
    rows = (max(top - y, 0), min(top + picture.height - y, size))
    columns = (max(left - x, 0), min(left + picture.width - x, size))
    return canvas.crop((x, y, x + size, y + size)), (*rows, *columns)


class PlainToCoViews:
    """ToCo's three views (methods/toco.md section 4)."""

    def __init__(self, size: int) -> None:
        self.size = size
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        colours = (T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2))
        self.input = _normalised(*colours, _blur)
        self.local = _normalised(*colours, T.RandomApply([_blur], p=0.5))
        self.view2 = _normalised(
            T.RandomResizedCrop(size, (0.4, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            *colours,
            T.RandomApply([_blur], p=0.1),
            T.RandomSolarize(128, p=0.2),
        )

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the views of one decoded picture."""
        crop, box = _padded_crop(_rescaled(picture), self.size)
        return {
            "image": self.input(crop),
            "local_view": self.local(crop),
            "view2": self.view2(picture),
            "box": torch.tensor(box),
        }


class PlainImageNetViews:
    """ClusterCAM's and MCTformer+'s view (section 4 of both), with timm's RandAugment on Pillow."""

    def __init__(self, size: int) -> None:
        crop = T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
        self.view = _normalised(crop, T.RandomHorizontalFlip(), rand_augment())
        self.erase = T.RandomErasing(p=0.25, value="random")

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the view of one decoded picture."""
        return {"image": self.erase(self.view(picture))}


class PlainTKPPCLView:
    """TKP-PCL's square view (methods/tkp_pcl.md section 4), without a second one."""

    def __init__(self, size: int) -> None:
        self.view = _normalised(
            T.Resize((size, size)),
            T.RandomHorizontalFlip(),
            T.RandomVerticalFlip(),
            T.RandomApply([_transposed], p=0.5),
            T.ColorJitter(contrast=(0.5, 2.0), saturation=(0.5, 1.5), hue=0.1),
            T.RandomGrayscale(0.1),
        )

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the view of one decoded picture."""
        return {"image": self.view(picture)}


class PlainGETAMViews:
    """GETAM's view (methods/getam.md section 4) without saliency; padded with the mean colour."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.long_side = (int(0.9 * size), int(8 / 7 * size))
        self.normalise = _normalised()

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the view of one decoded picture."""
        long_side = random.randint(*self.long_side)
        factor = long_side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        scaled = T.RandomHorizontalFlip()(picture.resize(size, Image.Resampling.BILINEAR))
        crop, box = _padded_crop(scaled, self.size)
        image = self.normalise(crop)
        inside = torch.zeros(self.size, self.size)
        inside[box[0] : box[1], box[2] : box[3]] = 1
        return {"image": image * inside, "box": torch.tensor(box)}


class PlainMoReViews:
    """MoRe's view on VOC (methods/more.md section 4), without the one that is never used."""

    def __init__(self, size: int) -> None:
        self.box = torch.tensor([0, size, 0, size])
        self.view = _normalised(
            T.RandomResizedCrop(size, (0.32, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.5),
        )

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the view of one decoded picture."""
        return {"image": self.view(picture), "box": self.box}


class PlainWeCLIPViews:
    """WeCLIP's view (methods/weclip.md section 8)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.normalise = _normalised()

    def __call__(self, picture: Image.Image) -> dict[str, Tensor]:
        """Make the view of one decoded picture."""
        crop, box = _padded_crop(_rescaled(picture), self.size)
        return {"image": self.normalise(crop), "box": torch.tensor(box)}


#: method of ``conf/method`` -> its views the plain way
PLAIN: dict[str, Callable[[int], PlainViews]] = {
    "toco": PlainToCoViews,
    "clustercam": PlainImageNetViews,
    "getam": PlainGETAMViews,
    "tkp_pcl": PlainTKPPCLView,
    "mctformer": PlainImageNetViews,
    "more": PlainMoReViews,
    "weclip": PlainWeCLIPViews,
}
