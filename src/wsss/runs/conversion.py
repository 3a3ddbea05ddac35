"""An official checkpoint becomes a checkpoint of ours."""

from pathlib import Path
from typing import Any

from torch import Tensor

import wsss
from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.core.pretraining import UNKNOWN, declared, pretraining_of_tag
from wsss.methods.official import CONVERTERS, load_official
from wsss.models.backbone import WeightsInfo
from wsss.models.weights import read_state_dict, save_atomically, state_sha256
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, build_module


def convert(method: str, official: str, out: str, *, overrides: list[str]) -> None:
    """Write ``out`` from an official checkpoint; nothing is written unless every key fits.

    Args:
        method: one of ``wsss.methods.official.CONVERTERS``.
        official: a ``.pth`` state dict of the method's official code.
        out: the ``.ckpt`` to write, for ``wsss eval run=`` and ``wsss predict run=``.
        overrides: as of ``wsss train``: what the checkpoint was made with.

    Raises:
        WSSSError: unknown method, unreadable file, keys that do not fit, unwritable output.
    """
    if method not in CONVERTERS:
        raise WSSSError(f"no converter for {method!r}; known: {', '.join(sorted(CONVERTERS))}")
    source, target = Path(official), Path(out)
    if target.suffix != ".ckpt":
        raise WSSSError(f"{out}: expected an output that ends in .ckpt")
    state = read_state_dict(source)
    if any(name.startswith("backbone.vit.") for name in state):
        raise WSSSError(f"{source}: is a wsss checkpoint already; pass it to run= as it is")
    arguments = [f"method={method}", *overrides]
    try:
        config = compose_run(arguments)
    except WSSSError as error:
        if not str(error).startswith("data.root is missing"):
            raise
        # no data is read here; evaluation asks for its place
        config = compose_run([*arguments, "data.root=unset"])
    num_classes = build_data(config).num_classes
    module = build_module(config, num_classes, with_weights=False)
    load_official(method, module, state, str(source))
    info = module.backbone.weights_info
    module.backbone.weights_info = WeightsInfo(
        info.name,
        f"converted:{source.name}",
        _pretraining(config["backbone"]),
        file_sha256(source),
        state_sha256(module.backbone.vit.state_dict()),
    )
    checkpoint: dict[str, object] = {
        "state_dict": module.state_dict(),
        "global_step": 0,
        "wsss_version": wsss.__version__,
    }
    module.on_save_checkpoint(checkpoint)
    save_atomically(checkpoint, target)
    count = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    print(f"{target}: {len(state)} entries, {count:,} parameters of {source} under our names")
    dropped = [name for name in state if CONVERTERS[method](name) is None]
    if dropped:
        print(f"dropped, as the method never uses them: {', '.join(dropped)}")


def _pretraining(backbone: dict[str, Any]) -> str:
    """Say what the official encoder started from: the user says it, by naming weights of timm."""
    said = backbone.get("declared_pretraining")
    if said is None and backbone["weights"] == "timm":
        said = pretraining_of_tag(backbone["name"])
    return UNKNOWN if said is None else declared(said)
