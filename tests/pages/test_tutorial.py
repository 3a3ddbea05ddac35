"""docs/own_data.md does what it says: its blocks are run in order."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.cli import main
from wsss.results.store import read_results

PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a shell block; Python and wsss in this process, which has imported everything."""
    words = shlex.split(os.path.expandvars(command), comments=True)
    if words[0] == "wsss":
        try:
            status = main(words[1:])
        except SystemExit as leave:  # Hydra's main ends the process itself
            status = int(leave.code or 0)
        assert status == 0, command
    elif words[0] == "python":
        exec(compile(Path(words[1]).read_text(), words[1], "exec"), {})
    elif assigned := re.fullmatch(r"(\w+)=\$\((.*)\)", command):
        found = subprocess.run(assigned[2], shell=True, check=True, capture_output=True, text=True)
        monkeypatch.setenv(assigned[1], found.stdout.strip())
    else:
        subprocess.run(command, shell=True, check=True)


@pytest.mark.slow
def test_the_tutorial_leads_from_pictures_to_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verbs = []
    for language, title, text in BLOCK.findall(PAGE.read_text()):
        if title:
            Path(title).write_text(text)
        elif language == "bash":
            for command in text.replace("\\\n", " ").splitlines():
                run(command, monkeypatch)
                verbs += re.findall(r"^wsss (\w+)", command)
    assert verbs == ["data", "train", "eval", "predict", "pseudo"]

    (folder,) = Path("runs/mine").iterdir()
    trained = read_results(folder / "results.json")["splits"]["val"]
    evaluated = read_results(Path("evaluated/results.json"))["splits"]["val"]
    assert 0 <= trained["seg_miou"] <= 1
    assert trained["seg_miou"] == evaluated["seg_miou"]
    assert evaluated["protocol"]["cam_threshold"] == 0.4
    pictures = sorted(Path("mine/photos").iterdir())
    assert len(pictures) == 12
    for picture in pictures:
        with Image.open(picture) as photo, Image.open(f"predicted/{picture.stem}.png") as mask:
            assert mask.size == photo.size
            assert np.asarray(mask).max() <= 8
    assert len(list(Path("labels").rglob("*.png"))) == 8
    assert trained["num_images"] == 4

    (advice,) = re.findall(r"^train on them: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert f"`{advice.partition(' budget.')[0]} " in " ".join(PAGE.read_text().split())
    run(f"{advice} study=second", monkeypatch)
    (second,) = Path("runs/second").glob("segmenter-*/results.json")
    assert read_results(second)["splits"]["val"]["protocol"]["train_masks"]["iterations"] == 4
