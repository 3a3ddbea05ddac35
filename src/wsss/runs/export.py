"""``wsss export``: a run's network as a file that runs without this package, checked on images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.files import first_line, whole_file
from wsss.core.modes import evaluating
from wsss.data.image_files import find_images
from wsss.data.images import read_rgb, voc_palette
from wsss.evaluation.card import package_versions
from wsss.evaluation.inference import predicted_labels, resized
from wsss.maps.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from wsss.methods.base import WSSSModule
from wsss.runs.export_formats import WRITERS, Graph, Outputs, import_onnx, quiet
from wsss.runs.folder import Run
from wsss.runs.output_forms import SIZE, check_format, format_of

IMAGES = 4  # on which outputs are compared, where none are named
#: a second size on which a file of dynamic size is compared, over the first one
OTHER_SIZE = 1.25


class Segmentation(nn.Module):
    """Give probabilities (1, K+1, H, W) of a normalised image, and of its classes (1, K)."""

    names = ("probabilities", "class_probabilities")
    inputs = ("image",)

    def __init__(self, module: WSSSModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Outputs:
        """Run a single-scale forward pass, resized to the image."""
        outputs = self.module(image)
        assert outputs.seg_logits is not None
        return _to_size(outputs.seg_logits, image).softmax(1), outputs.class_logits.sigmoid()


class Localisation(nn.Module):
    """Give localisation maps (1, K, H, W) of a normalised image and its labels (1, K)."""

    names = ("cams",)
    inputs = ("image", "labels")

    def __init__(self, module: WSSSModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor, labels: Tensor) -> Outputs:
        """Compute the maps of the labelled classes, resized to the image."""
        return (_to_size(self.module.cams(image, labels), image) * labels[..., None, None],)


Network = Segmentation | Localisation
#: what ``source`` chooses
NETWORKS: dict[str, type[Segmentation] | type[Localisation]] = {
    "seg": Segmentation,
    "cam": Localisation,
}


def _to_size(maps: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(maps.float(), image.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Size:
    """Of the input of an exported network.

    Attributes:
        height: in pixels; of the example where the size is dynamic.
        width: in pixels.
        dynamic: any other size is taken too.
    """

    height: int
    width: int
    dynamic: bool = False

    def checked(self) -> list[tuple[int, int]]:
        """List the sizes at which outputs are compared."""
        first = (self.height, self.width)
        other = (int(self.height * OTHER_SIZE), int(self.width / OTHER_SIZE))
        return [first, other] if self.dynamic else [first]


def export(
    run: Run,
    out: Path,
    *,
    kind: str | None = None,
    source: str | None = None,
    size: str | None = None,
    images: str | None = None,
    tolerance: float = 1e-4,
) -> float:
    """Write a run's network into one file, once its outputs there equal the module's.

    Args:
        run: a trained run; its module is moved to the CPU.
        out: the file.
        kind: ``onnx``, ``torchscript`` (traced) or ``pt2``, torch's own archive; None: by
            the ending of ``out``.
        source: ``seg``, the segmentation head, or ``cam``, the localisation maps; None: the former,
            or the latter where a method has no such head.
        size: of the input: ``SIDE``, ``HEIGHTxWIDTH`` or ``dynamic``; None: the square that the
            run's protocol or else its training crops have.
        images: folder, pattern or file of images to compare on; None: of the validation split.
        tolerance: largest difference of any probability or map that counts as equal.

    Returns:
        The largest difference found.

    Raises:
        WSSSError: an unknown format, source or size, no images, a network that no graph can hold,
            outputs that differ; no file is left behind then.
    """
    kind = format_of(out, kind)
    check_format(kind, size)
    if kind == "onnx":
        import_onnx()
    shape = read_size(size, run)
    pictures = _pictures(run, images)
    run.to("cpu")
    with evaluating(run.module):
        network = _network(run, source, pictures[0], shape)
        given = [_inputs(run, network, one, at) for at in shape.checked() for one in pictures]
        expected = [network(*each) for each in given]
        program = _traced(run, network, given[0], shape)
        with whole_file(out) as temporary:
            with quiet():
                metadata = _metadata(run, network, shape)
                graph = Graph(program, network.names, given[0], metadata)
                loaded = WRITERS[kind](graph, temporary)
            found = [loaded(each) for each in given]
            difference = largest_difference(expected, found)
            if not difference <= tolerance:  # NaN too
                raise WSSSError(
                    f"{out}: not written: on real images its outputs differ from the module's by "
                    f"up to {difference:.2g}, more than tolerance={tolerance:g}; give another "
                    "format, or a tolerance that you accept"
                )
    print(
        f"{out}: {source_of(network)} as {kind}; on {len(pictures)} images its outputs differ from "
        f"the module's by at most {difference:.1e}"
    )
    return difference


def largest_difference(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """Give the largest absolute difference of two lists of outputs; NaN where there is one."""
    pairs = zip(expected, found, strict=True)
    return float(
        torch.stack(
            [
                (one - other).abs().max()
                for wanted, own in pairs
                for one, other in zip(wanted, own, strict=True)
            ]
        ).max()
    )


def read_size(text: str | None, run: Run) -> Size:
    """Read ``SIDE``, ``HEIGHTxWIDTH`` or ``dynamic``.

    Raises:
        WSSSError: it is none of them.
    """
    protocol = run.protocol
    side = protocol.single_resize or protocol.resize_long or run.config["budget"]["crop_size"]
    if text in (None, "dynamic"):
        return Size(side, side, dynamic=text is not None)
    match = SIZE.fullmatch(str(text))
    patch = run.module.backbone.patch_size
    sides = [int(each) for each in (match[1], match[2] or match[1])] if match else [0]
    if min(sides) < patch:
        raise WSSSError(
            f"size={text}: expected SIDE, HEIGHTxWIDTH (at least a patch of {patch} px) or dynamic"
        )
    return Size(sides[0], sides[1])


def _pictures(run: Run, images: str | None) -> list[NDArray[np.uint8]]:
    """Read the images to compare on."""
    if images is not None:
        return [read_rgb(path) for path in list(find_images(images).values())[:IMAGES]]
    try:
        dataset = run.data.unmasked_dataset(run.data.val_split)
    except WSSSError as error:
        raise WSSSError(
            f"outputs are compared on real images, and the run's are not there ({error}); give "
            "images=FOLDER"
        ) from error
    return [dataset[index]["rgb"] for index in range(min(IMAGES, len(dataset)))]


def _network(run: Run, source: str | None, rgb: NDArray[np.uint8], shape: Size) -> Network:
    """Choose what is exported."""
    module = run.module
    has_head = module(_image(rgb, (shape.height, shape.width))).seg_logits is not None
    chosen = source or ("seg" if has_head else "cam")
    if chosen not in NETWORKS:
        raise WSSSError(f"source={chosen}: expected {' or '.join(NETWORKS)}")
    if chosen == "seg" and not has_head:
        raise WSSSError(f"source=seg: {module.title} has no segmentation head; give source=cam")
    return NETWORKS[chosen](module)


def _image(rgb: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Make the input (1, 3, H, W) of a picture, squashed to a size."""
    return resized(normalise(rgb)[None], size)


def _inputs(
    run: Run, network: Network, rgb: NDArray[np.uint8], size: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Make all inputs of a picture; labels are those that the method predicts."""
    image = _image(rgb, size)
    if len(network.inputs) == 1:
        return (image,)
    return image, predicted_labels(run.module(image).class_logits)


def _traced(
    run: Run, network: Network, given: tuple[Tensor, ...], shape: Size
) -> torch.export.ExportedProgram:
    """Trace the graph that every format is written from.

    Raises:
        WSSSError: what happens depends on values in Python, which no graph holds.
    """
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if shape.dynamic else {}
    shapes = tuple(free if each.ndim == 4 else {} for each in given)
    try:
        with quiet():
            program = torch.export.export(network, given, dynamic_shapes=shapes if free else None)
    except Exception as error:  # torch has dozens of kinds
        name = source_of(network)
        mend = "a size" if shape.dynamic else "source=seg"
        if name == "cam" and not shape.dynamic:
            mend = "source=seg where there is a head, or export a second stage (wsss pseudo)"
        raise WSSSError(
            f"source={name}: {run.module.title}'s forward pass decides by values in Python, which "
            f"no graph holds ({first_line(error)}); give {mend}"
        ) from error
    _drop_unused(program)
    return program


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Empty the parameters that a graph does not read: heads and teachers of training."""
    names = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        if node.name in names and not node.users:
            empty = nn.Parameter(torch.empty(0), requires_grad=False)
            program.state_dict[names[node.name]] = empty


def source_of(network: Network) -> str:
    """Give the word that chooses a network."""
    return next(name for name, kind in NETWORKS.items() if isinstance(network, kind))


def _metadata(run: Run, network: Network, shape: Size) -> str:
    """Write as JSON what a reader needs to use the file: sizes, normalisation, classes, colours."""
    first = 0 if source_of(network) == "seg" else 1  # maps have no background
    names = ["background", *run.data.class_names][first:]
    colours = np.array(voc_palette()).reshape(-1, 3)[first : first + len(names)]
    return json.dumps(
        {
            "program": f"wsss {package_versions()['wsss']}",
            "method": run.module.title,
            "run": run.home.name,
            "step": run.step,
            "inputs": list(network.inputs),
            "outputs": list(network.names),
            "image": "float32 (1, 3, height, width), RGB, (value / 255 - mean) / std",
            "size": "dynamic" if shape.dynamic else [shape.height, shape.width],
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "class_names": names,
            "palette": colours.tolist(),
        }
    )
