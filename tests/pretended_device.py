"""A device that only says it is one: what a GPU would refuse, launch and wait for, seen on a CPU.

A tensor of the pretended device reports ``meta``, as ``torch.device`` has no name to spare, and
keeps real numbers on the CPU. Inside :class:`PretendedDevice` every operation

* is refused where its tensors lie on two devices, as CUDA refuses it: a CPU tensor without
  dimensions may only meet others element by element;
* is counted as a launch, unless it is a view or only reserves memory. That counts torch's
  operations, of which some launch several kernels; an LSTM counts step by step, where cuDNN has one
  call; attention without weights counts as one fused kernel;
* is counted as a wait where the host reads what the device computes (``item``, ``nonzero``, a
  boolean index, a copy to the host) or copies to it without ``non_blocking``. A wait is known by
  its kind and by the function of the package that it happens in.

``torch.autocast("meta")`` follows the lists of CUDA's autocast, one cast a weight.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Self
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wsss

DEVICE = torch.device("meta")
PACKAGE = Path(wsss.__file__).parent
aten = torch.ops.aten

# no kernel runs for these, views aside
RESERVING = (
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "_unsafe_view",
)  # fmt: skip
# a value without dimensions may lie on the CPU, though these do not go element by element
TAKES_SCALARS = (
    "fill_",
    "masked_fill",
    "masked_fill_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
)
# CUDA's autocast, by the names of torch's functions
HALF = {
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "gru", "linear", "lstm",
    "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "prelu", "scaled_dot_product_attention",
}  # fmt: skip
FULL = {
    "__pow__", "__rpow__", "binary_cross_entropy_with_logits", "cdist", "cosine_similarity",
    "cross_entropy_loss", "cumprod", "cumsum", "dist", "exp", "expm1", "group_norm",
    "huber_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax",
    "logsumexp", "mse_loss", "nll_loss", "nll_loss2d", "nll_loss_nd", "norm", "pow", "prod",
    "reciprocal", "rsqrt", "smooth_l1_loss", "soft_margin_loss", "softmax", "softplus", "sum",
    "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d",
}  # fmt: skip
WIDEST = {
    "addcdiv", "addcdiv_", "addcmul", "addcmul_", "bilinear", "cross", "dot", "grid_sampler",
    "index_put", "scatter_add", "tensordot",
}  # fmt: skip


class DeviceMismatchError(RuntimeError):
    """An operation got tensors of two devices."""


class PretendedTensor(Tensor):
    """A tensor that says it is on :data:`DEVICE`.

    Attributes:
        numbers: on the CPU.
    """

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor) -> "PretendedTensor":
        """Wrap numbers that are on the CPU; views of them stay views."""
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.numbers = real
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Say that this wraps, so that ``Module.to`` swaps parameters in place."""
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], _: None, *__: Any) -> "PretendedTensor":
        """Wrap again."""
        return PretendedTensor(parts["numbers"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what happens outside of the context, where nothing would be counted."""
        raise RuntimeError(f"{func}: outside of PretendedDevice")


class Autocast:
    """``torch.autocast`` that knows the pretended device too, as context and as decorator."""

    dtype: torch.dtype | None = None  # of the innermost context
    cache: ClassVar[dict[int, tuple[Tensor, Tensor]]] = {}

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self.wanted = (dtype or torch.float16) if enabled else None
        self.real = None
        if device_type != DEVICE.type:
            self.real = _AUTOCAST(device_type, dtype, enabled, cache_enabled)
        self.before: list[torch.dtype | None] = []

    def __enter__(self) -> Self:
        """Begin."""
        if self.real is not None:
            self.real.__enter__()
            return self
        self.before.append(Autocast.dtype)
        Autocast.dtype = self.wanted
        return self

    def __exit__(self, *error: Any) -> None:
        """Go back to what was before; the outermost forgets the weights that were cast."""
        if self.real is not None:
            self.real.__exit__(*error)
            return
        Autocast.dtype = self.before.pop()
        if Autocast.dtype is None and self.wanted is not None:
            Autocast.cache.clear()

    @classmethod
    def narrowed(cls, tensor: Tensor) -> Tensor:
        """Cast to the half type, a weight once."""
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(cls.dtype)
        if id(tensor) not in cls.cache:
            with torch.enable_grad():  # as torch does, whoever asks first
                cls.cache[id(tensor)] = tensor, tensor.to(cls.dtype)
        return cls.cache[id(tensor)][1]

    @classmethod
    def cast(cls, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cast the arguments of a function as CUDA's autocast would."""
        if cls.dtype is None:
            return args, kwargs

        def narrow(value: Any) -> Any:
            return cls.narrowed(value) if _floats(value) and value.dtype == torch.float32 else value

        def widen(value: Any) -> Any:
            return value.float() if _floats(value) and value.dtype == cls.dtype else value

        if name not in HALF | FULL | WIDEST:
            return args, kwargs
        if name in HALF:
            return tree_map(narrow, args), tree_map(narrow, kwargs)
        if name in FULL and kwargs.get("dtype") is None:
            return tree_map(widen, args), tree_map(widen, kwargs)
        given = [value for value in tensors_in((args, kwargs)) if _floats(value)]
        if name in WIDEST and any(value.dtype == torch.float32 for value in given):
            return tree_map(widen, args), tree_map(widen, kwargs)
        return args, kwargs


_AUTOCAST = torch.autocast


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function inside tuples, lists and dictionaries; torch's own takes thrice as long."""
    if isinstance(value, dict):
        return {name: tree_map(function, part) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tree_map(function, part) for part in value))
    if isinstance(value, (tuple, list)):
        parts = [tree_map(function, part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return function(value)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors inside tuples, lists and dictionaries."""
    found: list[Tensor] = []
    tree_map(lambda part: found.append(part) if isinstance(part, Tensor) else None, value)
    return found


def _floats(value: Any) -> bool:
    return isinstance(value, PretendedTensor) and value.is_floating_point()


class _Functions(TorchFunctionMode):
    """What the dispatcher does not see: tensors of numbers, autocast, fused attention."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], PretendedTensor):
            kwargs.setdefault("dtype", args[0].dtype)
            kwargs.setdefault("device", DEVICE)
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _pretended(kwargs):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], PretendedTensor):
            return args[0].cpu().tolist()
        name = getattr(func, "__name__", "")
        args, kwargs = Autocast.cast(name, args, kwargs)
        if name == "scaled_dot_product_attention" and _floats(args[0]):
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _pretended(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == DEVICE.type


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class PretendedDevice(TorchDispatchMode):
    """A context in which tensors can be on :data:`DEVICE`, and what happens there is counted.

    Attributes:
        launched: operation -> how often it was launched.
        waits: "kind: function of the package" -> how often the host waited.

    Raises:
        DeviceMismatchError: an operation gets tensors of two devices.
    """

    #: the one that is open
    current: "PretendedDevice | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin."""
        self._stack.enter_context(patch.object(torch, "autocast", Autocast))
        # functions written in Python would otherwise hide the ones that they call
        for module in (F, torch.functional, torch._tensor):
            for check in (
                "has_torch_function",
                "has_torch_function_unary",
                "has_torch_function_variadic",
            ):
                if hasattr(module, check):
                    self._stack.enter_context(patch.object(module, check, _never))
        self._stack.enter_context(_Functions())
        PretendedDevice.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End; what is still on the device can be read by :func:`real`."""
        super().__exit__(*error)
        PretendedDevice.current = None
        self._stack.close()

    def forget(self) -> None:
        """Count anew."""
        self.launched.clear()
        self.waits.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check, count and compute one operation."""
        kwargs = dict(kwargs or {})
        given = tensors_in((args, kwargs))
        there = [x for x in given if isinstance(x, PretendedTensor)]
        result_there = bool(there)
        if kwargs.get("device") is not None:
            result_there = _pretended(kwargs)
            kwargs["device"] = torch.device("cpu") if result_there else kwargs["device"]
        if not there and not result_there:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self._check(func, name, args, given)
        kind = _wait(func, name, args, kwargs, bool(there), result_there)
        if kind:
            self.waits[f"{kind}: {_place()}"] += 1
        if not (name in RESERVING or _is_view(func)):
            self.launched[name] += 1
        out = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ] + [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        by_real = {id(_real(value)): value for value in tensors_in(written)}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return by_real.get(id(value)) if id(value) in by_real else PretendedTensor(value)

        return tree_map(wrapped, out) if result_there else out

    @staticmethod
    def _check(func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        """Refuse tensors of two devices."""
        here = [x for x in given if not isinstance(x, PretendedTensor)]
        if not here or len(here) == len(given) or name in ("copy_", "_to_copy"):
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            # indices may lie on the CPU; they are copied
            indices = tensors_in(args[1])
            here = [x for x in here if not any(x is index for index in indices)]
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
        if all(x.dim() == 0 for x in here) and (scalars or not here):
            return
        shapes = ", ".join(f"{x.device.type} {tuple(x.shape)}" for x in given)
        raise DeviceMismatchError(f"{func}: tensors of two devices ({shapes}) in {_place()}")


def _wait(func: Any, name: str, args: Any, kwargs: Any, there: bool, result_there: bool) -> str:
    """Name what makes the host wait, or give an empty string."""
    if name in ("copy_", "_to_copy"):
        if name == "copy_":
            to, of = (isinstance(x, PretendedTensor) for x in args[:2])
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            to, of = result_there, there
            blocking = not kwargs.get("non_blocking", False)
        if to == of or (to and not blocking):
            return ""
        return "copy to the device" if to else "copy to the host"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        indices = tensors_in(args[1])
        if not all(isinstance(x, PretendedTensor) for x in indices):
            return "copy to the device"
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        filled = "put" in name and args[2].numel() == 1  # a masked fill
        return "boolean index" if masks and not filled else ""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name if tags & set(func.tags) else ""


def _is_view(func: Any) -> bool:
    """Tell whether an operation only gives another look at its argument."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _place() -> str:
    """Name the innermost function of the package that is running, as module.function."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            inside = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            return f"{inside}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


def _never(*_: Any) -> bool:
    return False


def _real(value: Any) -> Any:
    return value.numbers if isinstance(value, PretendedTensor) else value


def real(value: Any) -> Any:
    """Give the numbers behind tensors anywhere in a structure, detached."""
    return tree_map(lambda x: _real(x).detach() if isinstance(x, Tensor) else x, value)
