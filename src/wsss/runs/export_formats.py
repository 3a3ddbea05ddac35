"""The formats of ``wsss export``: each is written from one graph and read back by its reader."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wsss.core.errors import WSSSError

Outputs = tuple[Tensor, ...]
#: runs what a file holds
Loaded = Callable[[Outputs], Outputs]
METADATA = "wsss.json"  # file inside TorchScript and PT2; in ONNX the metadata property ``wsss``


class Graph(NamedTuple):
    """What is written.

    Attributes:
        program: the traced network.
        outputs: names of what it gives.
        example: inputs that it takes.
        metadata: what a reader needs to use it, as JSON.
    """

    program: torch.export.ExportedProgram
    outputs: Sequence[str]
    example: Outputs
    metadata: str


def write_onnx(graph: Graph, path: Path) -> Loaded:
    """Write ONNX, weights inside; ONNX Runtime reads it."""
    import onnxruntime

    names, outputs = list(graph.program.graph_signature.user_inputs), list(graph.outputs)
    written = torch.onnx.export(
        graph.program, dynamo=True, input_names=names, output_names=outputs, verbose=False
    )
    assert written is not None
    written.model.metadata_props["wsss"] = graph.metadata
    written.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Outputs) -> Outputs:
        arrays = dict(zip(names, (each.numpy() for each in inputs), strict=True))
        return tuple(map(torch.from_numpy, session.run(outputs, arrays)))

    return run


def write_torchscript(graph: Graph, path: Path) -> Loaded:
    """Write TorchScript, traced at one size."""
    traced = torch.jit.trace(graph.program.module(), graph.example, check_trace=False)
    torch.jit.save(traced, path, _extra_files={METADATA: graph.metadata})
    loaded = torch.jit.load(path)
    return lambda inputs: tuple(loaded(*inputs))


def write_pt2(graph: Graph, path: Path) -> Loaded:
    """Write the archive of ``torch.export.save``."""
    content = io.BytesIO()
    torch.export.save(graph.program, content, extra_files={METADATA: graph.metadata})
    path.write_bytes(content.getvalue())
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda inputs: tuple(module(*inputs))


WRITERS = {"onnx": write_onnx, "torchscript": write_torchscript, "pt2": write_pt2}


def import_onnx() -> None:
    """Raise WSSSError unless what writes and reads ONNX is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise WSSSError(
            f"format=onnx needs the package {error.name} (pip install 'wsss[export]'); or give "
            "format=torchscript"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print and log, graphs of thousands of lines among it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
