"""Sheets that show what ClusterCAM's class tokens attend to, and its clusters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps.cams import normalise_cam
from wsss.methods.clustercam.network import BlockOutput, Encoded
from wsss.models.class_tokens import sum_of_last


def sheets(
    encoded: Encoded,
    blocks: Sequence[BlockOutput],
    labels: Tensor,
    size: torch.Size,
    layers: int,
) -> dict[str, Tensor]:
    """Draw maps of the strongest labelled class, and the clusters, each (B, H, W) in [0, 1].

    ``class attention`` is R and ``cluster attention`` G of the CAM's blocks, ``mixed`` what the
    network makes of them; each map is stretched to [0, 1]. ``clusters`` shows the strongest cluster
    of each patch in the last block, numbered row by row as they began.

    Args:
        encoded: of B images.
        blocks: what each block gave.
        labels: (B, K) in {0, 1}.
        size: H, W of the images.
        layers: last blocks whose maps make the CAM.
    """
    grid = encoded.activation.shape[-2:]
    main = encoded.class_logits.masked_fill(labels <= 0, -torch.inf).argmax(dim=1)
    maps = {
        "class attention": [block.class_rows for block in blocks],
        "cluster attention": [block.clustered.class_map for block in blocks],
        "mixed": encoded.class_maps,
    }
    batch = torch.arange(len(labels), device=labels.device)
    drawn = {}
    for name, values in maps.items():
        own = sum_of_last(values, layers)[batch, main].unflatten(1, grid)[:, None]
        full = F.interpolate(own, size, mode="bilinear", align_corners=False)
        drawn[name] = normalise_cam(full)[:, 0]
    assignment = blocks[-1].clustered.assignment
    number = assignment.argmax(dim=-1) / max(1, assignment.shape[-1] - 1)
    drawn["clusters"] = F.interpolate(number.unflatten(1, grid)[:, None], size)[:, 0]
    return drawn
