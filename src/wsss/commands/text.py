"""``wsss text``: text features of a data set's classes, made once with a CLIP's text tower."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from wsss.core.arguments import parse_arguments
from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.core.places import choices, config_root
from wsss.core.ranges import Some
from wsss.core.schema import check_fields, check_node, nearest, parameters_of, plain
from wsss.models.text import check_ending, write_text_features
from wsss.runs.line import compose_line, take_folders, with_folders


@dataclass
class TextArguments:
    """Arguments of ``wsss text``; null: as the wording says.

    Attributes:
        out: the file to write, ``.npz`` or ``.safetensors``.
        text: wording: one of ``conf/text``, or a custom YAML file; null: that of the data
            set's name, or else the class names alone.
        background: texts of what surrounds the classes.
        templates: in which ``{}`` stands for a class or a background.
        model: open_clip's name of the CLIP whose image tower the run has.
        pretrained: its tag in open_clip, or a file of the whole CLIP.
    """

    out: str = MISSING
    text: str | None = None
    background: list[str] | None = None
    templates: list[str] | None = None
    model: str | None = None
    pretrained: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What is said of classes and background, and to which CLIP.

    Attributes:
        background: texts of what surrounds the classes.
        words: class name -> what the templates say instead of it.
        templates: in which ``{}`` stands for a class or a background.
        model: open_clip's name of a CLIP.
        pretrained: its tag in open_clip, or a file.
    """

    background: Some[str] = ()
    words: dict[str, str] = field(default_factory=dict)
    templates: Some[str] = ("a clean origami {}.",)
    model: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"


def main(arguments: list[str]) -> int:
    """Run the verb."""
    arguments, folders = take_folders(arguments)
    chosen, overrides = parse_arguments(TextArguments, arguments, passed_on=("data", "hydra"))
    overrides = with_folders(overrides, folders)
    out = Path(chosen.out).expanduser()
    check_ending(out)
    name, class_names = _classes(overrides)
    wording = _wording(chosen, name, class_names)
    from wsss.models.text_encoder import load_clip, make_text_features

    network, tokenizer = load_clip(wording.model, wording.pretrained)
    features = make_text_features(
        network,
        tokenizer,
        class_names=class_names,
        words=wording.words,
        background=wording.background,
        templates=wording.templates,
        model=f"{wording.model} {Path(wording.pretrained).name}",
    )
    write_text_features(features, out)
    for kind, prompts in (
        ("class", features.foreground_prompts),
        ("background", features.background_prompts),
    ):
        for prompt in prompts:
            print(f"{kind}: {prompt}")
    print(f"{out}: {len(features.foreground)} classes and {len(features.background)} backgrounds")
    return 0


def _classes(overrides: list[str]) -> tuple[str, tuple[str, ...]]:
    """Give the name of a data set, and its classes; images are read only where they name them."""
    try:
        config = compose_line(overrides)
    except WSSSError as error:
        if not str(error).startswith("data.root is missing"):
            raise
        config = compose_line([*overrides, "data.root=unset"])
        if config.data.class_names is None:
            raise
    from wsss.runs.config import check_config
    from wsss.runs.folder import build_data

    check_config(config)
    return config.data.name, tuple(build_data(plain(config)).class_names)


def _wording(chosen: TextArguments, name: str, class_names: tuple[str, ...]) -> Wording:
    """Read the wording that was chosen; what the command line says takes the place of its keys.

    Raises:
        WSSSError: no such wording, a bad key or value, or nothing said of the background.
    """
    text = chosen.text or (name if name in choices("text") else None)
    wording = Wording() if text is None else read_wording(text)
    keys = ("background", "templates", "model", "pretrained")
    given = {key: getattr(chosen, key) for key in keys}
    wording = replace(wording, **{key: value for key, value in given.items() if value is not None})
    if not wording.background:
        raise WSSSError(
            f"background is missing: say what surrounds {', '.join(class_names[:3])}, ..., such as "
            "background=[ground,wall,sky], or give text=voc"
        )
    check_fields(wording, "text")
    for template in wording.templates:
        if "{}" not in template:
            raise WSSSError(f"templates: {template!r} has no {{}}, where a class is to stand")
    unknown = sorted(wording.words.keys() - set(class_names))
    if chosen.text and text not in choices("text") and unknown:
        raise WSSSError(
            f"{text}: words.{unknown[0]}: no such class{nearest(unknown[0], class_names)}"
        )
    return wording


def read_wording(text: str) -> Wording:
    """Read a wording of ``conf/text`` by its name, or a YAML file.

    Raises:
        WSSSError: there is none, or it holds another key or type.
    """
    path = Path(text).expanduser()
    if text in choices("text"):
        path = config_root() / "conf" / "text" / f"{text}.yaml"
    elif not path.is_file():
        known = choices("text")
        raise WSSSError(
            f"text={text}: no such file, and none of {', '.join(known)}{nearest(text, known)}"
        )
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML, text and OmegaConf errors share no base class
        raise WSSSError(f"{path}: cannot be read ({first_line(error)})") from error
    check_node(content, parameters_of(Wording), str(path), set())
    return Wording(**content)
