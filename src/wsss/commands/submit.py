"""``wsss submit``: masks of VOC's test images in the archive that its evaluation server takes."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from omegaconf import MISSING

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.files import make_writable
from wsss.data.dataset import check_files
from wsss.data.voc import VOC_CLASSES, find_voc_root, list_path, voc_samples
from wsss.runs.folder import LAST_CHECKPOINT, load_run
from wsss.runs.submission import _predict_all, _settle_origin, validate_archive, write_archive


@dataclass
class SubmitArguments:
    """Arguments of ``wsss submit``.

    Attributes:
        run: run folder or ``.ckpt`` file, of VOC's 20 classes.
        split: list of the images.
        competition: ``comp6`` (trained on more than VOC's own images, as with SBD or ImageNet) or
            ``comp5``.
        out: folder; null: ``submission`` in the run folder.
        device: ``auto``, ``cpu``, ``cuda``, ...
    """

    run: str = MISSING
    split: str = "test"
    competition: str = "comp6"
    out: str | None = None
    device: str = "auto"


def main(arguments: list[str]) -> int:
    """The verb."""
    chosen, overrides = parse_arguments(SubmitArguments, arguments, passed_on=("eval", "data"))
    if chosen.competition not in ("comp5", "comp6"):
        raise WSSSError(f"competition={chosen.competition}: expected comp5 or comp6")
    path = Path(chosen.run)
    run = load_run(path, overrides)
    if run.data.class_names != VOC_CLASSES:
        raise WSSSError(
            f"{path}: its classes are not VOC's 20 in their order; the server scores only those"
        )
    root = find_voc_root(run.data.root)
    samples = voc_samples(root, chosen.split, "")[: run.data.limit]
    check_files("image", [sample.image for sample in samples], list_path(root, chosen.split))
    out = Path(chosen.out) if chosen.out else run.folder / "submission"
    make_writable(out)
    inner = PurePosixPath("results/VOC2012/Segmentation") / f"{chosen.competition}_test_cls"
    _settle_origin(out, path / LAST_CHECKPOINT if path.is_dir() else path, run)
    _predict_all(run, samples, out / inner, chosen.device)
    archive = out / f"{chosen.competition}_test_cls.tar.gz"
    write_archive(archive, out, [inner / f"{sample.name}.png" for sample in samples])
    validate_archive(archive, inner, samples)
    print(f"{archive}: {len(samples)} masks, valid")
    return 0
