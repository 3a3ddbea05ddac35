"""The wheel carries configurations, data and weights: an installed wsss works from anywhere."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
def test_installed_wheel_composes_from_the_root_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(PROJECT)], check=True)
    (wheel,) = tmp_path.glob("wsss-*.whl")
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True)
    # Dependencies are borrowed from here: a path file adds their folder but does not run the
    # path files inside it, so this checkout's editable install stays invisible.
    purelib = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    borrowed = purelib / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")

    def wsss(*arguments: str) -> str:
        return subprocess.run(
            [str(environment / "bin" / "wsss"), *arguments],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    job = wsss("train", "+experiments=toco/minivoc", "--cfg", "job")
    assert "_target_: wsss.methods.toco.ToCo" in job
    assert "study: toco-minivoc" in job
    code = (
        "import wsss, pathlib; from wsss.data.builtin import minivoc_root;"
        "from wsss.core.places import PACKAGE; from wsss.comparison.render import TEMPLATES;"
        "from wsss.cli import VERBS, help_of; assert all(map(help_of, VERBS));"
        "assert (TEMPLATES / 'page.css').is_file(); assert wsss.ToCo.__name__ == 'ToCo';"
        "assert (PACKAGE / 'weights' / 'vit_pico.safetensors').is_file();"
        "assert (minivoc_root() / 'VOC2012').is_dir(); print(wsss.__file__)"
    )
    where = subprocess.run(
        [str(python), "-c", code], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert str(environment) in where
