"""Text features made with the text tower of a CLIP; needs ``open_clip_torch`` (``wsss[clip]``)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.core.files import first_line
from wsss.models.clip import image_tower
from wsss.models.text import TextFeatures
from wsss.models.weights import state_sha256

JOINED = " | "  # between the prompts of several templates


def load_clip(model: str, pretrained: str) -> tuple[Any, Any]:
    """Load a whole CLIP and its tokenizer.

    Args:
        model: open_clip's name.
        pretrained: a tag of open_clip's (downloads once), or a file.

    Raises:
        WSSSError: open_clip is not installed, does not know the names, or cannot load the weights;
            it builds another GELU than they were trained with.
    """
    try:
        import open_clip
    except ImportError as error:
        raise WSSSError(
            "wsss text needs the package open_clip_torch (pip install 'wsss[clip]')"
        ) from error
    known = open_clip.list_models()
    if model not in known:
        raise WSSSError(f"model={model}: open_clip knows none; such as ViT-B-16-quickgelu")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    quick = bool(open_clip.get_model_config(model).get("quick_gelu"))
    if tag and bool(tag.get("quick_gelu")) != quick:
        better = model.removesuffix("-quickgelu") if quick else f"{model}-quickgelu"
        raise WSSSError(
            f"model={model}: builds another GELU than pretrained={pretrained} was trained with; "
            f"give model={better}"
        )
    try:
        with _silent():
            network = open_clip.create_model(model, pretrained, require_pretrained=True)
            return network.eval(), open_clip.get_tokenizer(model)
    except Exception as error:  # network, file and shape errors share no base class
        raise WSSSError(
            f"model={model} pretrained={pretrained}: cannot be loaded ({first_line(error)}); give "
            "a tag of open_clip's where there is internet, or a file of the whole CLIP"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep libraries from logging what the error says in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def encode_texts(
    network: Any, tokenizer: Any, words: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Encode words in templates: unit features, their mean over templates, made unit again.

    Args:
        network: a CLIP of open_clip.
        tokenizer: its own.
        words: N texts.
        templates: in which ``{}`` stands for the text.

    Returns:
        (N, E) float32.
    """
    prompts = [template.replace("{}", word) for word in words for template in templates]
    with torch.no_grad():
        features = F.normalize(network.encode_text(tokenizer(prompts)).float(), dim=1)
    return F.normalize(features.unflatten(0, (len(words), len(templates))).mean(1), dim=1)


def make_text_features(
    network: Any,
    tokenizer: Any,
    *,
    class_names: Sequence[str],
    words: Mapping[str, str],
    background: Sequence[str],
    templates: Sequence[str],
    model: str,
) -> TextFeatures:
    """Encode the texts of a data set's classes and of the background.

    Args:
        network: a CLIP of open_clip.
        tokenizer: its own.
        class_names: the data set's, in its order.
        words: class name -> what the templates say instead of it.
        background: what surrounds the classes.
        templates: as of :func:`encode_texts`.
        model: what to call the CLIP in the file.
    """
    said = [words.get(name, name) for name in class_names]
    tower = image_tower({f"visual.{k}": v for k, v in network.visual.state_dict().items()})
    return TextFeatures(
        foreground=encode_texts(network, tokenizer, said, templates).numpy(),
        background=encode_texts(network, tokenizer, background, templates).numpy(),
        foreground_names=tuple(class_names),
        foreground_prompts=tuple(whole_prompt(word, templates) for word in said),
        background_prompts=tuple(whole_prompt(word, templates) for word in background),
        logit_scale=float(network.logit_scale.detach().exp()),
        model=model,
        # without the projection, as a backbone's own hash is
        weights_sha256=state_sha256({k: v for k, v in tower.items() if not k.startswith("head")}),
    )


def whole_prompt(word: str, templates: Sequence[str]) -> str:
    """Give all that is said of a word."""
    return JOINED.join(template.replace("{}", word) for template in templates)
