"""Sheets to look at: image, CAM, pseudo label, prediction and truth, drawn with PIL.

Every panel is computed by the functions that the evaluator scores with
(`wsss.evaluation.inference`), so a sheet shows exactly what the numbers are about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from wsss.core.files import make_writable, whole_file
from wsss.core.modes import evaluating
from wsss.data.images import voc_palette
from wsss.evaluation.inference import localise, predict, pseudo_label, refinement, resized
from wsss.evaluation.protocol import Protocol
from wsss.maps.pixels import IGNORE_INDEX
from wsss.maps.pseudo_labels import cam_to_label
from wsss.maps.refine.pamr import PAMR
from wsss.maps.refine.par import PAR

PANEL = 224  # longest side of a panel in pixels
GAP = 8
CAPTION = 20
HEADING = 24
LEGEND_LINE = 24
LEGEND_ENTRY = 140
MARGIN = 16
ROWS_PER_SHEET = 8
GREY = 32  # a colour whose channels lie closer together is a grey
INK, FAINT, PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """One picture of a row.

    Attributes:
        heading: title of its column.
        pixels: (H, W, 3) uint8, enlarged to panel size when drawn.
        caption: line below it.
        mask: the (H, W) class ids behind it, where it shows a label map of the image's size.
    """

    heading: str
    pixels: Pixels
    caption: str
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Gallery:
    """What was drawn.

    Attributes:
        sheets: the files.
        rows: (image name, panels) of every image, without the method's further maps.
        class_names: the K foreground classes.
    """

    sheets: list[Path]
    rows: list[tuple[str, list[Panel]]]
    class_names: list[str]


def overlay(
    rgb: Pixels, mask: NDArray[Any], palette: Sequence[int] | None = None, alpha: float = 0.7
) -> Pixels:
    """Colour a label map over its faded image.

    Args:
        rgb: (H, W, 3) uint8.
        mask: (H, W) class ids, 255 where undecided.
        palette: 3 values a class in one list, as PIL takes it; VOC's colours by default.
        alpha: opacity of the classes.

    Returns:
        (H, W, 3) uint8.
    """
    return _laid_over(faded(rgb), painted(mask, palette, alpha))


def faded(rgb: Pixels) -> Pixels:
    """Make an image (H, W, 3) pale and half grey, so that the class colours alone are strong."""
    colour = rgb.astype(np.float32)
    pale = 0.3 * colour + 0.35 * colour.mean(axis=2, keepdims=True) + 0.35 * 230
    return pale.clip(0, 255).astype(np.uint8)


def painted(mask: NDArray[Any], palette: Sequence[int] | None = None, alpha: float = 0.7) -> Pixels:
    """Paint a label map: regions are outlined, grey classes are lined, 255 is hatched.

    Args:
        mask: (H, W) class ids, 255 where undecided.
        palette: 3 values a class in one list, as PIL takes it; VOC's colours by default.
        alpha: opacity of the classes; background has none.

    Returns:
        (H, W, 4) uint8, to lay over an image.
    """
    flat = voc_palette() if palette is None else palette
    colours = np.array(flat, dtype=np.uint8).reshape(-1, 3)
    ids = mask.astype(np.int64)
    ignored = ids == IGNORE_INDEX
    shown = np.where(ignored, 0, ids)
    layer = np.zeros((*ids.shape, 4), np.uint8)
    layer[..., :3] = colours[shown]
    layer[shown > 0, 3] = round(255 * alpha)
    rows, columns = np.indices(ids.shape)
    # a grey class would vanish in a grey image
    is_grey = np.ptp(colours.astype(np.int64), axis=1) < GREY
    layer[is_grey[shown] & (shown > 0) & (rows % 6 < 2)] = 255
    stripe = (rows + columns) % 8 < 4
    layer[ignored & stripe] = 255
    layer[ignored & ~stripe] = (150, 150, 150, 255)
    # some VOC colours are near-blacks: a white outline shows them on any image
    layer[_outline(ids)] = 255
    return layer


def _laid_over(under: Pixels, layer: Pixels) -> Pixels:
    """Lay (H, W, 4) pixels over an image (H, W, 3)."""
    weight = layer[..., 3:].astype(np.float32) / 255
    return (under * (1 - weight) + layer[..., :3] * weight).clip(0, 255).astype(np.uint8)


def _outline(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the class pixels (H, W) that touch another label on a side."""
    edge = np.zeros(ids.shape, dtype=bool)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (ids > 0) & (ids != IGNORE_INDEX)


def heat(rgb: Pixels, values: NDArray[np.float32]) -> Pixels:
    """Lay a jet-like heat map over an image.

    Args:
        rgb: (H, W, 3) uint8.
        values: (H, W) in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    return _laid_over(rgb, heated(values))


def heated(values: NDArray[np.float32]) -> Pixels:
    """Give the jet-like colours (H, W, 4) of a heat map (H, W) in [0, 1], to lay over an image."""
    v = values.clip(0, 1)[..., None]
    # three tents centred on 1, 0.5 and 0: the usual jet without its dark ends
    jet = 255 * np.clip(1.5 - np.abs(4 * v - np.array([3.0, 2.0, 1.0])), 0, 1)
    weight = 255 * (0.25 + 0.4 * v)
    return np.concatenate([jet, weight], axis=2).astype(np.uint8)


def choose_images(labels: NDArray[np.float32], n: int) -> list[int]:
    """Choose images to show, by index: evenly spaced, then swapped in until all classes show.

    Args:
        labels: (M, K) image-level labels.
        n: how many.

    Returns:
        At most ``n`` ascending indices; the same for the same labels.
    """
    total = len(labels)
    chosen = sorted(set(np.linspace(0, total - 1, min(n, total)).round().astype(int).tolist()))
    for k in np.flatnonzero(labels.any(axis=0)):
        shown = labels[chosen].sum(axis=0)
        if shown[k] > 0:
            continue
        # an image may go if each of its classes is shown by another one too
        spare = [i for i in chosen if (shown[labels[i] > 0] > 1).all()]
        if spare:
            new = int(np.flatnonzero(labels[:, k])[0])
            chosen = sorted({*chosen, new} - {spare[-1]})
    return chosen


def write_gallery(
    module: nn.Module,
    dataset: Dataset[Mapping[str, Any]],
    out_dir: Path,
    class_names: Sequence[str],
    *,
    n: int = 16,
    protocol: Protocol,
) -> Gallery:
    """Draw sheets of what a module sees.

    Args:
        module: a method (``forward`` and ``cams``), used where its parameters are.
        dataset: an evaluation split with ``labels`` (M, K), as `VOCDataset` has.
        out_dir: folder of ``sheet_00.png``, ``sheet_01.png``, ..., and of ``sheet_00_maps.png``,
            ... with the method's further maps where it has any; older sheets there go.
        class_names: the K foreground classes.
        n: how many images.
        protocol: scales and thresholds; CRF is left out.

    Returns:
        The sheets and what is on them.

    Raises:
        WSSSError: a sheet cannot be written.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    labels: NDArray[np.float32] = dataset.labels  # type: ignore[attr-defined]
    refine = refinement(protocol)
    if refine is not None:
        refine = refine.to(device)
    rows: list[tuple[str, list[Panel]]] = []
    further: list[tuple[str, list[Panel]]] = []
    with evaluating(module):
        for index in choose_images(labels, n):
            batch = default_collate([dataset[index]])
            name = batch["name"][0]
            rows.append((name, _panels(module, batch, class_names, protocol, refine)))
            further.append((name, _further_panels(module, batch, class_names)))
    make_writable(out_dir)
    for old in out_dir.glob("sheet_*.png"):
        old.unlink()
    sheets = []
    # a method without further maps leaves only the image in their rows
    kinds = {"": rows} if len(further[0][1]) == 1 else {"": rows, "_maps": further}
    for number, start in enumerate(range(0, len(rows), ROWS_PER_SHEET)):
        for suffix, content in kinds.items():
            path = out_dir / f"sheet_{number:02d}{suffix}.png"
            with whole_file(path) as temporary:
                sheet = draw_sheet(content[start : start + ROWS_PER_SHEET], class_names)
                sheet.save(temporary, format="PNG")
            sheets.append(path)
    return Gallery(sheets, rows, list(class_names))


def _panels(
    module: nn.Module,
    batch: Mapping[str, Any],
    class_names: Sequence[str],
    protocol: Protocol,
    refine: PAR | PAMR | None,
) -> list[Panel]:
    """Make the row of one image: image, CAM, pseudo label, prediction (if any), truth."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    images, labels = batch["image"].to(device), batch["labels"].to(device)
    rgb = batch["rgb"][0].numpy()
    size = rgb.shape[:2]
    prediction = predict(module, images, size, protocol)  # type: ignore[arg-type]
    cams = localise(module, images, labels, size, protocol)  # type: ignore[arg-type]
    present = labels[0] > 0
    main = int(prediction.class_logits[0].masked_fill(~present, -torch.inf).argmax())
    if protocol.cam_high is None:
        seed = cam_to_label(cams, labels, bg_threshold=protocol.cam_threshold)
    else:
        seed = pseudo_label(refine, batch["rgb"], cams, labels, protocol)
    panels = [
        Panel("image", rgb, _names(np.flatnonzero(labels[0].cpu().numpy()) + 1, class_names)),
        Panel("CAM", heat(rgb, cams[0, main].cpu().numpy()), class_names[main]),
        _mask_panel("CAM seed" if protocol.cam_high is None else "pseudo label", rgb, seed[0]),
    ]
    logits = prediction.single if prediction.merged is None else prediction.merged
    if logits is not None:
        panels.append(_mask_panel("prediction", rgb, logits[0].argmax(0)))
    panels.append(_mask_panel("truth", rgb, batch["mask"][0]))
    return panels


def _further_panels(
    module: nn.Module, batch: Mapping[str, Any], class_names: Sequence[str]
) -> list[Panel]:
    """Show the image, and over it every further map that the method offers."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    rgb, labels = batch["rgb"][0].numpy(), batch["labels"]
    maps = module.gallery_maps(batch["image"].to(device), labels.to(device))  # type: ignore[operator]
    names = _names(np.flatnonzero(labels[0].numpy()) + 1, class_names)
    return [Panel("image", rgb, names)] + [
        Panel(name, heat(rgb, resized(values[:, None], rgb.shape[:2])[0, 0].cpu().numpy()), "")
        for name, values in maps.items()
    ]


def _names(ids: NDArray[Any], class_names: Sequence[str]) -> str:
    return ", ".join(class_names[i - 1] for i in ids)


def _mask_panel(heading: str, rgb: Pixels, mask: Tensor) -> Panel:
    """Paint a label map over its image, enlarged first so that edges stay crisp."""
    ids = mask.cpu().numpy().astype(np.uint8)
    size = _panel_size(*ids.shape)
    large = np.asarray(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    return Panel(heading, overlay(_enlarged(rgb), large), "", ids)


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Give (width, height) of a panel: the longest side is ``PANEL``."""
    scale = PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _enlarged(rgb: Pixels) -> Pixels:
    size = _panel_size(*rgb.shape[:2])
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Panel]]], class_names: Sequence[str]
) -> Image.Image:
    """Put rows of panels on one sheet with column headings and a legend of the classes.

    Args:
        rows: (image name, panels) of each row, all with the same columns.
        class_names: the K foreground classes, for the legend.

    Returns:
        An RGB image, ``sheet_size`` large.
    """
    columns = len(rows[0][1])
    legend = _legend_rows(class_names, columns)
    width, height = sheet_size(len(rows), columns, len(legend))
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_legend(sheet, legend)
    top = MARGIN + LEGEND_LINE * len(legend) + GAP
    for column, panel in enumerate(rows[0][1]):
        left = MARGIN + column * (PANEL + GAP)
        draw.text((left, top), panel.heading, fill=INK, font=_font(16))
    top += HEADING
    for row, (name, panels) in enumerate(rows):
        y = top + row * (PANEL + CAPTION + GAP)
        for column, panel in enumerate(panels):
            x = MARGIN + column * (PANEL + GAP)
            picture = Image.fromarray(_enlarged(panel.pixels))
            # centred, so that portrait and landscape images line up
            sheet.paste(picture, (x + (PANEL - picture.width) // 2, y + PANEL - picture.height))
            caption = panel.caption if column else f"{name}: {panel.caption}"
            text = _shortened(draw, caption, PANEL)
            draw.text((x, y + PANEL + 3), text, fill=FAINT, font=_font(12))
    return sheet


def sheet_size(rows: int, columns: int, legend_lines: int) -> tuple[int, int]:
    """Give (width, height) of a sheet in pixels."""
    width = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    height = 2 * MARGIN + legend_lines * LEGEND_LINE + GAP + HEADING
    return width, height + rows * (PANEL + CAPTION + GAP) - GAP


def _legend_rows(class_names: Sequence[str], columns: int) -> list[list[tuple[int, str]]]:
    """Give (class id, name) of the legend in lines; 255 is undecided or unlabelled."""
    entries = [*enumerate(class_names, start=1), (IGNORE_INDEX, "undecided / void")]
    per_line = max(1, (columns * (PANEL + GAP)) // LEGEND_ENTRY)
    return [entries[i : i + per_line] for i in range(0, len(entries), per_line)]


def _draw_legend(sheet: Image.Image, lines: Sequence[Sequence[tuple[int, str]]]) -> None:
    """Draw the legend with each class as it looks over a mid-grey image."""
    draw = ImageDraw.Draw(sheet)
    side = 16
    grey = np.full((side, side, 3), 128, np.uint8)
    for line, entries in enumerate(lines):
        for column, (class_id, name) in enumerate(entries):
            x, y = MARGIN + column * LEGEND_ENTRY, MARGIN + line * LEGEND_LINE
            swatch = overlay(grey, np.full((side, side), class_id))
            sheet.paste(Image.fromarray(swatch), (x, y))
            text = _shortened(draw, name, LEGEND_ENTRY - side - 14, 13)
            draw.text((x + side + 6, y + 1), text, fill=INK, font=_font(13))


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int, size: int = 12) -> str:
    """Cut the text with an ellipsis where it is wider than ``width`` pixels."""
    font = _font(size)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text}…"


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
