"""Where configurations lie: this project's, and those of packages that declare methods.

Nothing heavy is imported, so that ``--help`` can list choices.
"""

import importlib.util
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from wsss.core.errors import WSSSError

PACKAGE = Path(__file__).parents[1]
#: an installed package declares its methods and its training views here, as
#: ``name = "package.module:Class"``
ENTRY_POINTS = ("wsss.methods", "wsss.views")


def config_root() -> Path:
    """Find the folder that holds ``conf/`` and ``experiments/``.

    Inside an installed wheel that is the package itself; in a checkout the project's root.

    Raises:
        WSSSError: neither is there, so the installation is broken.
    """
    for root in (PACKAGE, PACKAGE.parents[1]):
        if (root / "conf" / "train.yaml").is_file():
            return root
    raise WSSSError(f"no conf/train.yaml beside {PACKAGE}: the installation is incomplete")


def declared_classes() -> list[EntryPoint]:
    """Give the classes that installed packages declare; none of them is imported."""
    return [point for group in ENTRY_POINTS for point in entry_points(group=group)]


def declared_folders() -> list[Path]:
    """Find the ``conf`` folders of the packages that declare classes."""
    folders: dict[Path, None] = {}
    for package in sorted({point.module.split(".")[0] for point in declared_classes()}):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if (folder := Path(place) / "conf").is_dir():
                folders[folder] = None
    return list(folders)


def choices(group: str, *further: Path | str) -> list[str]:
    """Give the names of the files of a group of ``conf/``, such as ``method``.

    Args:
        group: the folder's name.
        further: folders of the user's that have groups too.
    """
    folders = (config_root() / "conf", *declared_folders(), *map(Path, further))
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
