"""What the trials of a search are judged on: a declared holdout of the training data, never more.

Trials are runs whose ``data.val_split`` is the holdout as a list (`wsss.data.lists`) and that have
no test list, so nothing of them opens another mask. Images that the data set declares as reported
never judge, whatever a line makes of its lists. Where training sees the ground truth, or masks of
which nothing says what made them, the images it is judged on are left out of the training list; a
few-shot run, which has no further masks, is judged on ``N // 3`` images a class, at least one, of
its ``train:holdout:N``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wsss.core.errors import WSSSError
from wsss.core.supervision import PIXEL_MASKS
from wsss.data.datamodule import ImageDataModule
from wsss.data.lists import cut_of, is_few_shot
from wsss.data.train_masks import UNSTATED, supervision_of
from wsss.runs.folder import build_data


@dataclass(frozen=True)
class Judging:
    """The lists of a search's trials.

    Attributes:
        split: of the images whose masks judge.
        train_split: what trials train on.
        masks: number of images that judge.
        list_sha256: of their names.
        trained_on: number of masks that training sees, where it sees any.
    """

    split: str
    train_split: str
    masks: int
    list_sha256: str
    trained_on: int | None


def judging_of(config: Mapping[str, Any], declared: Iterable[str] = ()) -> Judging:
    """Say what a search of a configuration's settings is judged on.

    Args:
        config: of the search.
        declared: lists whose scores are reported by the declaration of the data set, beside the
            configuration's own.

    Raises:
        WSSSError: no holdout is declared, or images of it, or of the training list, are in a list
            whose scores are reported.
    """
    data = config["data"]
    train, per_class = data["train_split"], config["eval"]["holdout_per_class"]
    key, source = "data.train_split", train
    # masks that nobody has said what made them may be the ground truth
    truth = supervision_of(data.get("train_masks")) in (PIXEL_MASKS, UNSTATED)
    if truth and is_few_shot(train):
        cut = cut_of(train)
        assert cut is not None
        per_class = max(cut.per_class // 3, 1)
    elif per_class < 1:
        raise WSSSError(
            "eval.holdout_per_class=0 declares no holdout, and a search chooses on nothing else; "
            "give eval.holdout_per_class=3"
        )
    elif not truth and config["eval"].get("holdout_split"):
        key, source = "eval.holdout_split", config["eval"]["holdout_split"]
    split = f"{source}:holdout:{per_class}"
    trained = f"{train}:without:{per_class}" if truth else train
    module = build_data(config, for_training=False)
    own = [data["val_split"], *(data.get("test_splits") or ())]
    for name, known in _reported(module, own, declared):
        for setting, listed in ((key, split), ("data.train_split", trained)):
            if shared := [s.name for s in module.samples(listed) if s.name in known]:
                raise WSSSError(
                    f"{setting}={source if setting == key else train}: {len(shared)} of its images "
                    f"are in {name!r} ({shared[0]!r}), whose scores are reported; a search reads "
                    "the training data alone"
                )
    return Judging(
        split,
        trained,
        len(module.samples(split)),
        module.list_hash(split),
        len(module.samples(trained)) if truth else None,
    )


def _reported(
    module: ImageDataModule, own: Sequence[str], declared: Iterable[str]
) -> Iterator[tuple[str, set[str]]]:
    """Give each list whose scores are reported with the names of its images."""
    for name in dict.fromkeys([*own, *declared]):
        try:
            samples = module.samples(name)
        except WSSSError:
            if name in own:
                raise
            continue  # the data set lies elsewhere, without this list of the declaration
        yield name, {sample.name for sample in samples}
