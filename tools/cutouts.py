"""Cut-outs and backgrounds for the MiniVOC composite and for the ViT-Pico pretraining.

The media come from two Debian packages: ``scratch`` (photographic people, cars and
backgrounds, CC-BY-SA-3.0) and ``sweethome3d-furniture`` (128x128 renders, CC-BY-3.0 or CC0).
Which file shows which class was decided by looking at contact sheets; the tables below record
those decisions, so nothing here guesses a class from a file name.

Both tools that import this module share one composition function, :func:`composite`, so that the
pretraining images and the shipped data set are pasted in the same way.
"""

from __future__ import annotations

import io
import re
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASSES = (
    "bottle",
    "car",
    "chair",
    "diningtable",
    "person",
    "pottedplant",
    "sofa",
    "tvmonitor",
)
PACKAGES = ("scratch", "sweethome3d-furniture")
MEDIA_ROOT = Path("usr/share/scratch/Media")
FURNITURE_ROOT = Path("usr/share/sweethome3d/furniture")
IGNORE = 255
SOLID_ALPHA = 128  # from here on a pixel counts as the object
EDGE_ALPHA = 24  # from here to SOLID_ALPHA a pixel is neither object nor background

# One letter per furniture library keeps the keys short: "S:tv" is tv.png of Scopia.
LIBRARIES = {
    "0": ("BlendSwap-CC-0", "CC0-1.0"),
    "B": ("BlendSwap-CC-BY", "CC-BY-3.0"),
    "K": ("KatorLegaz", "CC-BY-3.0-US"),
    "R": ("Reallusion", "CC-BY-3.0-US"),
    "S": ("Scopia", "CC-BY-3.0"),
}
SCRATCH_LICENCE = "CC-BY-SA-3.0"

# Class members by key. "P:" is scratch Costumes/People, "T:" is Costumes/Transportation.
# Left out on purpose: drawn people and cars, stools, benches, loungers, desks, coffee tables,
# laptops, cut flowers in a vase and trees without a pot (VOC's guidelines exclude most of them).
MEMBERS = {
    "bottle": """0:mamadeira 0:yogurtBottle 0:flacon B:beer_bottle K:red-wine-bottle-01
        K:oil-servers K:spray-bottle S:wine_bottle S:com_bath S:com_bath2_jabon_pijo
        S:medicoscopia_bottle S:medicoscopia_bottle2""",
    "car": """T:car-blue T:car-bug T:car-cow T:convertible1 T:convertible2 B:fordFocus
        K:concept-sedan-01v1 K:concept-sedan-01v2 K:concept-sedan-02 K:concept-sedan-02-sport
        K:VW-new-beetle S:peugeot-308 S:renault-scenic S:suv S:chevrolet S:van S:smart-car
        S:seat_leon""",
    "chair": """0:armchair 0:oakChair 0:plasticChair 0:sillaBlanca 0:designChair 0:armchair2
        0:chair 0:modernArmchair 0:antiqueChair 0:chairWithCushion 0:chair2 0:osakaChair
        0:winchesterArmchair 0:thonet 0:deckChair B:cafe_set_mota_chair B:cafe_set_tonon_chair
        B:chairWithCushion B:childChair B:ella_chair_f B:leaf_chair B:armchair1 B:fotel
        B:classSeat B:foldingChair B:plaidChair B:armChair2 B:kitchenChair B:chair3 B:chair4
        K:cafe-chair K:mid-century-chair K:chair-ottoman K:dining-chair K:office-chair
        S:silla_teca S:armchair3 S:armchair S:armchair1 S:chair3 S:chair4 S:chair S:office_chair
        S:tubular_chair S:armchair2 S:kids_desk_chair S:modern_armchair S:plastic_chair
        S:white_kitchen_chair S:children_chair S:rattanArmchair S:ryokanChair""",
    "diningtable": """0:oakTable 0:tableWithTablecloth 0:technicalTable1 0:table
        B:cafe_set_mota_table B:cafe_set_tonon_table B:table K:cafe-table K:folding-table
        K:glass-dining-table S:black_table S:table3 S:table4 S:wooden_table_office
        S:metal_glass_table S:glass_table_office S:desk_table S:bar_table
        S:wooden_office_alder_table S:wooden_office_pear_table S:wooden_office_pear_table_rect
        S:wooden_office_teak_table S:white_kitchen_table S:table-on-trestles
        S:table-with-leaning-feet S:round-table S:children_table""",
    "person": """P:amon1 P:anjuli-1 P:anjuli-2 P:anjuli-3 P:anjuli-4 P:anjuli-5 P:anna-1 P:anna-2
        P:anna-3 P:breakdancer1 P:breakdancer2 P:breakdancer3 P:calvrett-jumping
        P:calvrett-thinking P:calvrett P:cassy-chillin P:cassy-dancing-1 P:cassy-dancing-2
        P:cassy-dancing-3 P:cassy-dancing-4 P:cassy-jumping-1 P:cassy-jumping-2 P:cassy-phone-1
        P:cassy-sitting-1 P:cassy-standing-1 P:chamak1 P:chamak2 P:dan1 P:dan2 P:dan3 P:dan4
        P:dan5 P:dan6 P:ed P:football-run P:football-stand P:jay P:jodi1 P:jodi2 P:lee-fan
        P:mako-laughing P:mako-screaming P:mako-stop P:marissa-crouching P:marissa-sitting
        P:marissa P:nathan P:nina1 P:paul1 P:referee1 P:referee2 P:ribbon-dancer P:sam
        P:thai-dancer P:thai-dancer2 K:female-01-casual-clothing K:male-01-suit R:female01
        R:female02 R:female03 R:male01 R:male02 R:male03 R:holdingMale01 R:holdingFemale01
        R:holdingFemale02 R:holdingFemale03 R:sitMale01 R:sitMale02 R:sitMale03 R:sitFemale01
        R:sitFemale02 R:sitFemale03 R:lyingDownFemale01 R:lyingDownMale01 R:lyingDownMale02
        R:boyLying R:boySitting R:boyStanding R:girlSittingGround R:girlStanding
        R:girlSittingTable S:mannequinMale S:mannequinBrunette""",
    "pottedplant": """0:flowerBox 0:littlePlant 0:cactus 0:decorativePlant 0:orchids 0:plant
        0:plantie B:luckyBamboo B:mediumIndoorPlant B:spatifilum B:yuccaPlant B:decorativePlant
        B:succulentPlant S:maceta S:ficus S:bonsai-tree""",
    "sofa": """0:L_shaped_sofa 0:sofa 0:couch 0:couch2 0:sofa2 0:winchesterSofa B:cornerSofa
        B:sofa2 B:sofa3 B:couch3 K:futon-couch K:mid-century-bench-sofa K:mid-century-sofa
        S:clear_sofa S:simple_sofa S:beige_sofa_2seats S:beige_sofa S:burlap_sofa S:leather_sofa
        S:sofa_white_beige S:convertible-sofa-BZ-closed S:rattanSofa""",
    "tvmonitor": "0:led_tv K:apple-imac-1998 S:tv S:apple_pc S:wall-flat-tv",
}

# Cut-outs that are one identity (a person in several poses, a model in variations, or a set in
# one design). A key that no pattern matches is a family of its own.
FAMILIES = (
    (r"P:([a-z]+?)[-\d].*|P:(marissa|calvrett)$", "person-{}"),
    (r"R:(?:holding|sit|lyingDown)?(Male|Female|male|female)(\d+)$", "reallusion-{}{}"),
    (r"R:(boy|girl).*", "reallusion-{}"),
    (r"T:(convertible)\d", "car-{}"),
    (r"T:car-bug|K:VW-new-beetle", "car-beetle"),
    (r"K:(concept-sedan-\d\d).*", "car-{}"),
    (r"0:(winchester).*", "set-{}"),
    (r"0:sillaBlanca|0:designChair", "chair-tulip"),
    (r"B:(cafe_set_mota|cafe_set_tonon).*", "set-{}"),
    (r"K:(mid-century).*", "set-{}"),
    (r"S:(rattan).*", "set-{}"),
    (r"S:(beige_sofa).*", "sofa-{}"),
    (r"S:(wooden_office).*", "table-{}"),
    (r"S:(medicoscopia_bottle).*", "bottle-{}"),
    (r"S:(white_kitchen).*", "set-{}"),
    (r"S:chair4|S:chair", "chair-scopia"),
    (r"S:armchair3?", "chair-scopia-wing"),
)

# Families that only val_unseen may use; the pretraining never sees them.
_UNSEEN_FAMILIES = """
    S:wine_bottle 0:yogurtBottle S:com_bath
    car-beetle S:seat_leon S:suv
    set-winchester set-rattan set-cafe_set_tonon S:office_chair 0:oakChair B:armchair1
    B:foldingChair K:cafe-chair S:plastic_chair B:kitchenChair S:tubular_chair
    0:oakTable K:glass-dining-table S:round-table S:table4 S:table-on-trestles
    person-anna person-dan person-mako person-football person-nina reallusion-male03
    reallusion-girl person-chamak
    0:littlePlant B:decorativePlant B:luckyBamboo 0:decorativePlant
    S:simple_sofa B:sofa3 S:clear_sofa 0:couch
    S:wall-flat-tv
"""
UNSEEN_FAMILIES = frozenset(_UNSEEN_FAMILIES.split())

# Neither a class nor a usable negative: too close to one of the eight classes to be a distractor.
_AMBIGUOUS = """
    0:silla2 0:stool 0:stool2 0:bench 0:foldingChair 0:pianoBench 0:relaxChair B:chair_deck
    B:green_stool B:poolLounge B:wheelchair B:abdominalBench B:workbench K:concrete-bench
    K:painted-bench K:bar-stool K:bench S:ext_chair S:littlebank S:wood_bank S:bar_chair
    S:kitchen_stool S:beach_chair S:baby_high_chair S:puff S:convertible-sofa-BZ-opened S:futon
    S:day_bed_frame 0:technicalTable2 0:desk 0:islandExtension 0:lbDesk B:biurko3 B:coffeeTable
    B:simpleDesk B:officeTable K:custom-desk S:ext_table S:saloon_table S:coffee_table
    S:kids_desk_table S:kids_wooden_desk S:living_room_table S:table_wood_and_iron
    S:coffee-table2 S:dressing-table S:rattanTable 0:augalas B:spider_plant B:tulip B:white_lily
    B:tulips S:calla_lily_with_roses B:arbolito S:christmas_tree B:laptop K:apple-ibook-2001
    S:tablet S:intercom_with_screen S:doll S:doll-house B:suit B:carrito-de-madera S:vase3
    0:whiteBoard B:tvStand S:japanese_style_screen
"""
AMBIGUOUS = frozenset(_AMBIGUOUS.split())

# Photographic backgrounds; drawn ones and those that show one of the classes (or painted people,
# parked cars, spectators, garden furniture, shelves with bottles) were dropped after a look.
# Near-duplicates share a split.
BACKGROUNDS = {
    "train": """beach-malibu canyon flowers garden-rock gravel-desert hill moon pathway tree
        water-and-rocks boardwalk brick-wall-and-stairs brick-wall1 brick-wall2 building-fireproof
        city-with-water city-with-water2 graffiti hall houses mansion train-tracks1 train-tracks2
        wooden-house""",
    "val": """clothing-store flower-bed lake bench-with-view building-at-mit hay_field
        playing-field wave silos""",
    "val_unseen": """forest grand-canyon driveway hallway_outdoors parking-ramp village
        basketball-court1-a basketball-court1-b tennis-backboard""",
}
# Training backgrounds that the pretraining keeps for its own evaluation.
HOLDOUT_BACKGROUNDS = frozenset(("pathway", "mansion", "gravel-desert", "hall"))

# Extra identities, without a class, for the pretraining only (humanoid drawings left out).
EXTRA_FOLDERS = {"A": "Costumes/Animals", "H": "Costumes/Things", "T": "Costumes/Transportation"}
_EXTRA_DROPPED = """
    H:laptop H:flower-vase T:car1 T:car2 T:convertible3 A:cat5 H:button H:buttonPressed
    H:sunglassF1 H:sunglassF2 H:sunglassF3 H:sunglassF4 H:key1
"""
EXTRA_DROPPED = frozenset(_EXTRA_DROPPED.split())


@dataclass(frozen=True)
class CutOut:
    """One object with an alpha channel.

    Attributes:
        key: short unique name, library letter and file stem.
        rgba: uint8 array ``(h, w, 4)``, colours *not* premultiplied, cropped to the object.
        label: 1..8 for the classes, 0 for an extra identity without a class.
        family: identity group that never straddles a split.
        source: Debian package (and library) the file came from.
        creator: author as the source names it.
        licence: SPDX-like licence identifier.
    """

    key: str
    rgba: np.ndarray
    label: int
    family: str
    source: str
    creator: str
    licence: str

    @property
    def unseen(self) -> bool:
        """Whether only ``val_unseen`` may use this cut-out."""
        return self.family in UNSEEN_FAMILIES


@dataclass(frozen=True)
class Media:
    """Everything read from the packages.

    Attributes:
        cutouts: cut-outs of the eight classes, by key.
        extras: cut-outs without a class, by key.
        backgrounds: uint8 RGB photographs ``(h, w, 3)`` by name.
        versions: Debian package versions by package name.
    """

    cutouts: dict[str, CutOut]
    extras: dict[str, CutOut]
    backgrounds: dict[str, np.ndarray]
    versions: dict[str, str]

    def pool(self, unseen: bool) -> list[CutOut]:
        """Give the class cut-outs of the seen or of the unseen families, sorted by key."""
        return [c for _, c in sorted(self.cutouts.items()) if c.unseen == unseen]

    def photos(self, split: str) -> dict[str, np.ndarray]:
        """Give the backgrounds of one split, by name."""
        return {name: self.backgrounds[name] for name in BACKGROUNDS[split].split()}


@dataclass(frozen=True)
class Placement:
    """Where and how one cut-out is pasted.

    Attributes:
        cutout: the object.
        centre: x, y in canvas pixels.
        scale: canvas pixels per cut-out pixel.
        angle: degrees, counter-clockwise.
        flip: mirror left to right.
        gain: colour factors ``(3,)``.
        offset: brightness added after the factors, in 0..255.
    """

    cutout: CutOut
    centre: tuple[float, float]
    scale: float
    angle: float = 0.0
    flip: bool = False
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: float = 0.0


# --------------------------------------------------------------------------------- extraction


def fetch_debs(folder: Path) -> None:
    """Download the two packages with ``apt-get download`` unless ``folder`` has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)


def unpack_debs(folder: Path) -> tuple[Path, dict[str, str]]:
    """Unpack the packages in ``folder`` beside themselves, once.

    Returns:
        The folder that holds ``usr/`` and the package versions by name.
    """
    target = folder / "unpacked"
    versions = {}
    for package in PACKAGES:
        deb = sorted(folder.glob(f"{package}_*.deb"))[-1]
        # apt writes the epoch colon and other specials percent-encoded into the file name.
        versions[package] = deb.name.split("_")[1]
        marker = target / f".{deb.name}"
        if not marker.exists():
            target.mkdir(exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True)
            marker.touch()
    return target, versions


def _crop(image: Image.Image) -> np.ndarray:
    """Give the RGBA array of an image, cropped to what is visible."""
    rgba = np.array(image.convert("RGBA"))
    ys, xs = np.nonzero(rgba[..., 3] >= EDGE_ALPHA)
    if len(ys) == 0:
        return rgba[:0, :0]
    return np.ascontiguousarray(rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def _family(key: str) -> str:
    """Give the identity group of a cut-out key."""
    for pattern, name in FAMILIES:
        match = re.fullmatch(pattern, key)
        if match:
            return name.format(*(g.lower() for g in match.groups() if g))
    return key


def _furniture(root: Path) -> dict[str, tuple[np.ndarray, str, str]]:
    """Read every transparent icon of the furniture libraries: key -> (rgba, creator, category).

    Only files that a catalogue lists as an icon count; textures in the same archives do not.
    """
    found = {}
    for letter, (library, _) in LIBRARIES.items():
        with zipfile.ZipFile(root / FURNITURE_ROOT / f"{library}.sh3f") as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin1")
            props = dict(re.findall(r"^(\w+#\d+)\s*=\s*(.*?)\s*$", text, re.M))
            for name, path in props.items():
                if not name.startswith("icon#"):
                    continue
                number = name[5:]
                with Image.open(io.BytesIO(archive.read(path.lstrip("/")))) as image:
                    opaque = image.mode == "RGB"
                    rgba = _crop(image)
                if opaque or min(rgba.shape[:2]) < 12:
                    continue
                creator = props.get(f"creator#{number}", library)
                key = f"{letter}:{Path(path).stem}"
                found[key] = (rgba, creator, props[f"category#{number}"])
    return found


def _costumes(root: Path, letter: str, folder: str) -> dict[str, np.ndarray]:
    """Read one folder of scratch costumes: key -> rgba."""
    found = {}
    for path in sorted((root / MEDIA_ROOT / folder).iterdir()):
        if path.suffix in (".gif", ".png"):
            with Image.open(path) as image:
                rgba = _crop(image)
            if rgba.size and min(rgba.shape[:2]) >= 12:
                found[f"{letter}:{path.stem}"] = rgba
    return found


def _backgrounds(root: Path) -> dict[str, np.ndarray]:
    """Read the photographs named in :data:`BACKGROUNDS`."""
    wanted = {name for names in BACKGROUNDS.values() for name in names.split()}
    found = {}
    for path in sorted((root / MEDIA_ROOT / "Backgrounds").rglob("*")):
        if path.suffix in (".gif", ".jpg", ".png") and path.stem in wanted:
            with Image.open(path) as image:
                found[path.stem] = np.array(image.convert("RGB"))
    missing = wanted - found.keys()
    if missing:
        raise FileNotFoundError(f"backgrounds not in the package: {sorted(missing)}")
    return found


def load_media(debs: Path) -> Media:
    """Read all cut-outs and backgrounds.

    Args:
        debs: folder with the two packages, filled by ``apt-get download`` when they are missing.

    Returns:
        The media, the same for the same packages.

    Raises:
        FileNotFoundError: a listed cut-out or background is not in the packages.
    """
    fetch_debs(debs)
    root, versions = unpack_debs(debs)
    raw: dict[str, tuple[np.ndarray, str, str, str]] = {}
    plain = set()
    for key, (rgba, creator, category) in _furniture(root).items():
        library, licence = LIBRARIES[key[0]]
        raw[key] = (rgba, f"sweethome3d-furniture/{library}", creator, licence)
        # Doors, windows and wall plugs are near-duplicates of each other: useless identities.
        if category != "Doors and windows" and "plug" not in key and "-whites" not in key:
            plain.add(key)
    for letter, folder in {**EXTRA_FOLDERS, "P": "Costumes/People"}.items():
        for key, rgba in _costumes(root, letter, folder).items():
            raw[key] = (rgba, "scratch", "MIT Scratch team", SCRATCH_LICENCE)
            if letter != "P":
                plain.add(key)
    members = {key: i for i, name in enumerate(CLASSES, 1) for key in MEMBERS[name].split()}
    missing = members.keys() - raw.keys()
    if missing:
        raise FileNotFoundError(f"cut-outs not in the packages: {sorted(missing)}")
    extras = sorted(plain - members.keys() - AMBIGUOUS - EXTRA_DROPPED)

    def build(key: str, label: int) -> CutOut:
        rgba, source, creator, licence = raw[key]
        return CutOut(key, rgba, label, _family(key), source, creator, licence)

    return Media(
        cutouts={key: build(key, label) for key, label in sorted(members.items())},
        extras={key: build(key, 0) for key in extras},
        backgrounds=_backgrounds(root),
        versions=versions,
    )


# -------------------------------------------------------------------------------- composition


def premultiplied(cutout: CutOut) -> np.ndarray:
    """Give float32 ``(h, w, 4)`` with colours times alpha, so that resizing leaves no halo."""
    rgba = cutout.rgba.astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255.0
    return rgba


def warp(placement: Placement, size: int, source: np.ndarray | None = None) -> np.ndarray:
    """Draw one placed cut-out on an empty canvas.

    Args:
        placement: what goes where.
        size: side of the square canvas.
        source: ``premultiplied(placement.cutout)`` where a caller keeps it in memory.

    Returns:
        float32 ``(size, size, 4)``, premultiplied, 0..255.
    """
    rgba = premultiplied(placement.cutout) if source is None else source
    scale = placement.scale
    # warpAffine samples bilinearly and would alias below half size.
    if scale < 0.75:
        height, width = rgba.shape[:2]
        shape = (max(2, round(width * scale)), max(2, round(height * scale)))
        rgba = cv2.resize(rgba, shape, interpolation=cv2.INTER_AREA)
        scale = 1.0
    height, width = rgba.shape[:2]
    matrix = cv2.getRotationMatrix2D((0.0, 0.0), placement.angle, scale)
    if placement.flip:
        matrix[:, 0] *= -1
    matrix[:, 2] = np.array(placement.centre) - matrix[:, :2] @ ((width - 1) / 2, (height - 1) / 2)
    layer = cv2.warpAffine(rgba, matrix, (size, size), flags=cv2.INTER_LINEAR)
    alpha = layer[..., 3:] / 255.0
    gain = np.asarray(placement.gain, np.float32)
    layer[..., :3] = np.clip(layer[..., :3] * gain + placement.offset * alpha, 0, 255 * alpha)
    return layer


def composite(
    background: np.ndarray, layers: Sequence[np.ndarray], labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Paste layers, first at the bottom, and draw the class mask.

    Args:
        background: uint8 ``(s, s, 3)``.
        layers: premultiplied float32 ``(s, s, 4)`` each.
        labels: class of each layer.

    Returns:
        The image uint8 ``(s, s, 3)``; the mask uint8 ``(s, s)`` with 255 on soft edges; and for
        each layer the number of pixels that carry its label and that no later layer covers.
    """
    image = background.astype(np.float32)
    mask = np.zeros(background.shape[:2], np.uint8)
    owner = np.full(mask.shape, -1, np.int16)
    for i, (layer, label) in enumerate(zip(layers, labels, strict=True)):
        alpha = layer[..., 3]
        image *= 1.0 - alpha[..., None] / 255.0
        image += layer[..., :3]
        edge = (alpha >= EDGE_ALPHA) & (alpha < SOLID_ALPHA)
        solid = alpha >= SOLID_ALPHA
        mask[edge], owner[edge] = IGNORE, -1
        mask[solid], owner[solid] = label, i
    visible = [int((owner == i).sum()) for i in range(len(layers))]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), mask, visible


def solid_area(cutout: CutOut) -> int:
    """Count the solid pixels of a cut-out at its own size."""
    return int((cutout.rgba[..., 3] >= SOLID_ALPHA).sum())
