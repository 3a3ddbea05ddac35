"""Official checkpoints made ours, for the methods that have official code."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.methods.clustercam import official as clustercam
from wsss.methods.getam import official as getam
from wsss.methods.mctformer import official as mctformer
from wsss.methods.more import official as more
from wsss.methods.toco import official as toco
from wsss.methods.weclip import official as weclip
from wsss.models.weights import fit_positions, load_state_dict_strictly

#: method -> our name of an official parameter; None where the method never uses it
CONVERTERS: dict[str, Callable[[str], str | None]] = {
    "toco": toco.our_name,
    "clustercam": clustercam.our_name,
    "getam": getam.our_name,
    "mctformer": mctformer.our_name,
    "more": more.our_name,
    "weclip": weclip.our_name,
}
#: method -> the official name of a parameter of ours
OFFICIAL_NAMES: dict[str, Callable[[str], str]] = {
    "toco": toco.official_name,
    "clustercam": clustercam.official_name,
    "getam": getam.official_name,
    "mctformer": mctformer.official_name,
    "more": more.official_name,
    "weclip": weclip.official_name,
}
#: method -> the official state dict with one entry a parameter of ours, shaped as ours is
JOINED: dict[str, Callable[[Mapping[str, Tensor], str], dict[str, Tensor]]] = {
    "mctformer": mctformer.joined,
    "weclip": weclip.reshaped,
}
#: method -> what our module holds and no official checkpoint does; it stays as it is
OURS_ALONE: dict[str, tuple[str, ...]] = {"weclip": weclip.OURS_ALONE}


def convert_official(
    method: str, state: Mapping[str, Tensor], origin: str = "the official checkpoint"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give an official state dict under our names, and a map from our names back to theirs.

    Args:
        method: name of the method.
        state: parameters under official names.
        origin: what to call the source in an error.

    Raises:
        WSSSError: no converter is known for the method, or the file is of another method.
    """
    if method not in CONVERTERS:
        raise WSSSError(
            f"no converter for method {method!r}; known: {', '.join(sorted(CONVERTERS))}"
        )
    if method in JOINED:
        state = JOINED[method](state, origin)
    ours = {name: CONVERTERS[method](name) for name in state}
    converted = {our: state[official] for official, our in ours.items() if our is not None}
    return converted, {our: official for official, our in ours.items() if our is not None}


def load_official(method: str, module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load an official checkpoint's parameters into our module.

    The position grid follows the file, since positions are resized at every call.

    Raises:
        WSSSError: missing, extra or misshapen keys, under their official names.
    """
    converted, back = convert_official(method, state, origin)
    fit_positions(module.get_submodule("backbone.vit"), converted.get("backbone.vit.pos_embed"))
    own = OURS_ALONE.get(method, ())
    converted |= {name: value for name, value in module.state_dict().items() if name in own}
    # names of ours that the file lacks have no way back through the file
    named = {name: OFFICIAL_NAMES[method](name) for name in module.state_dict()}
    load_state_dict_strictly(module, converted, origin, rename={**named, **back})
