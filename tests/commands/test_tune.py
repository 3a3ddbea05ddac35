"""What ``wsss tune`` knows of its searches only once they are planned."""

import pytest

from wsss.cli import main

pytest.importorskip("optuna")


def test_searches_judged_by_other_numbers_are_apart(capsys: pytest.CaptureFixture[str]) -> None:
    experiments = "+experiments=few_shot/minivoc,toco/minivoc"
    assert main(["tune", experiments, "objective=seg_miou", "budget.max_steps=10"]) == 2
    said = (
        "the number of masks that judge is not the same for all (4 of segmenter_vit on minivoc "
        "train:holdout:3:holdout:1, 12 of toco on minivoc train:holdout:3); search apart"
    )
    assert said in capsys.readouterr().err
