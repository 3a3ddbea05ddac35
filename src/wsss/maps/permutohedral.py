"""High-dimensional Gaussian filtering on the permutohedral lattice, in plain PyTorch.

The scheme is that of Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the
Permutohedral Lattice" (2010): splat every point onto the vertices of its enclosing simplex, blur
along the d + 1 lattice axes, slice back with the same weights. Everything is a sort, a search in
sorted keys or a gather, so it runs on any device, and no loop runs over points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.core.errors import WSSSError

_KEY_LIMIT = 2**62  # packed int64 keys stay below it


def _elevate(features: Tensor) -> Tensor:
    """Embed (P, d) features in the hyperplane of R^(d+1) whose coordinates sum to zero.

    The factor sqrt(2/3) * (d + 1) makes the whole filter's standard deviation 1 in feature units.
    The order of the operations is that of the C++ filters, so that float32 rounds alike.
    """
    d = features.shape[1]
    spread = torch.tensor(math.sqrt(2.0 / 3.0) * (d + 1)).item()  # rounded to float32
    tail = torch.zeros_like(features[:, 0])
    columns = []
    for axis in range(d, 0, -1):
        scaled = features[:, axis - 1] * (spread / math.sqrt(axis * (axis + 1)))
        columns.append(tail - axis * scaled)
        tail = tail + scaled
    return torch.stack([tail, *reversed(columns)], dim=1)


def _enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest remainder-0 vertex, each offset's rank, and barycentric weights.

    Args:
        elevated: (P, d + 1) coordinates that sum to zero.

    Returns:
        (P, d + 1) int64 vertex, (P, d + 1) int64 ranks, (P, d + 1) weights of the vertices with
        remainder 0 .. d, which sum to 1.
    """
    size = elevated.shape[1]
    inverse = 1 / size  # multiplied by, as in the C++ filters
    up = torch.ceil(elevated * inverse) * size
    down = torch.floor(elevated * inverse) * size
    nearest = torch.where(up - elevated < elevated - down, up, down)
    excess = (nearest.sum(1) / size).round().long()

    offset = elevated - nearest
    # Rank = number of larger offsets, an equal one counting if it comes earlier.
    rank = torch.zeros_like(nearest, dtype=torch.long)
    for i in range(size):
        for j in range(i + 1, size):
            smaller = (offset[:, i] < offset[:, j]).long()
            rank[:, i] += smaller
            rank[:, j] += 1 - smaller
    # Rounding may leave the hyperplane; step back along the coordinates that moved the most.
    rank += excess[:, None]
    shift = (rank < 0).long() - (rank > size - 1).long()
    rank += shift * size
    nearest = nearest + shift * size

    delta = (elevated - nearest) * inverse
    weights = torch.zeros(len(elevated), size + 1, dtype=elevated.dtype, device=elevated.device)
    weights.scatter_add_(1, size - 1 - rank, delta)
    weights.scatter_add_(1, size - rank, -delta)
    weights[:, 0] += 1 + weights[:, size]
    return nearest.long(), rank, weights[:, :size]


class PermutohedralLattice:
    """A lattice over fixed features that filters any number of value channels.

    The filter is sum_j k(f_i, f_j) v_j with a kernel close to 0.5 * exp(-|f_i - f_j|^2 / 2) for
    d = 5, the point itself included, not normalised: blur taps (0.5, 1, 0.5) along every axis and
    a final factor 1 / (1 + 2^-d), as in the C++ filter behind ToCo's regulariser.
    """

    def __init__(self, features: Tensor) -> None:
        """Build the lattice.

        Args:
            features: (N, d) or (B, N, d) points, already divided by the kernel's standard
                deviations. Batch entries do not see each other.

        Raises:
            WSSSError: features are not finite or spread over too many lattice cells for 64-bit
                keys.
        """
        self._batched = features.ndim == 3
        batch = features.shape[0] if self._batched else 1
        points = features.detach().float().reshape(-1, features.shape[-1])
        finite = torch.isfinite(points).all()
        # Else the cells' numbers would lead outside of the tables before anybody has looked.
        points = torch.where(finite, points, 0)
        d = points.shape[1]
        self._normaliser = 1 / (1 + 2.0**-d)
        vertex, rank, self._weights = _enclosing_simplex(_elevate(points))

        keys, strides = self._packed_keys(vertex, rank, batch, finite)
        # Stable, so that each vertex sums its points in their own order: the same bits every time.
        order = keys.flatten().argsort(stable=True)
        unique, vertex_of, counts = torch.unique_consecutive(
            keys.flatten()[order], return_inverse=True, return_counts=True
        )
        self._vertices = torch.empty_like(order)
        self._vertices[order] = vertex_of
        self._vertices = self._vertices.view(-1, d + 1)
        # The points of each vertex, one bag a vertex.
        self._members = order.div(d + 1, rounding_mode="floor")
        self._member_weights = self._weights.flatten()[order]
        self._bag_starts = counts.cumsum(0) - counts
        self._neighbours = [self._neighbours_along(unique, strides, axis) for axis in range(d + 1)]

    @staticmethod
    def _packed_keys(
        vertex: Tensor, rank: Tensor, batch: int, finite: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Pack each vertex (its first d coordinates and the image) into one integer.

        The host waits once, for the extents and for whether all is finite.

        Returns:
            (P, d + 1) int64 keys of the vertices with remainder 0 .. d, and the place value of each
            of the d coordinates.
        """
        size = vertex.shape[1]
        d = size - 1
        remainder = torch.arange(size, device=vertex.device)
        # Vertex r of the simplex lies at +r, or at r - (d + 1) where the rank is among the last r.
        step = remainder[None, :, None] - size * (rank[:, None, :d] > d - remainder[None, :, None])
        coordinates = vertex[:, None, :d] + step
        low, high = coordinates.amin((0, 1)), coordinates.amax((0, 1))
        # A blur neighbour is up to d away: with that margin it cannot alias another key.
        known = torch.cat([high - low + 1 + 2 * size, finite[None].long()])
        *extents, all_finite = known.tolist()
        if not all_finite:
            raise WSSSError("permutohedral lattice: features must be finite")
        strides, place = [], 1
        for extent in extents:
            strides.append(place)
            place *= extent
        if place * batch >= _KEY_LIMIT:
            raise WSSSError(
                "permutohedral lattice: the features span too many cells for 64-bit keys; use "
                "larger kernel widths"
            )
        stride = torch.tensor(strides).to(vertex.device, non_blocking=True)
        keys = ((coordinates - low + size) * stride).sum(-1)
        image = torch.arange(batch, device=keys.device).repeat_interleave(len(vertex) // batch)
        return keys + image[:, None] * place, strides

    @staticmethod
    def _neighbours_along(unique: Tensor, strides: list[int], axis: int) -> Tensor:
        """Find the rows of every vertex's two blur neighbours, (2, M); M stands for "not there"."""
        d = len(strides)
        step = -sum(strides) + ((d + 1) * strides[axis] if axis < d else 0)
        wanted = torch.stack([unique + step, unique - step])
        row = torch.searchsorted(unique, wanted).clamp_max_(len(unique) - 1)
        return torch.where(unique[row] == wanted, row, len(unique))

    def filter(self, values: Tensor) -> Tensor:
        """Filter values that sit at the lattice's points.

        Args:
            values: (N, C), or (B, N, C) for a lattice of B images.

        Returns:
            Filtered values of the same shape, float32.
        """
        flat = values.float().reshape(-1, values.shape[-1])
        cells = F.embedding_bag(
            self._members,
            flat,
            self._bag_starts,
            mode="sum",
            per_sample_weights=self._member_weights,
        )
        cells = F.pad(cells, (0, 0, 0, 1))  # the last row is the empty neighbour
        for first, second in self._neighbours:
            around = cells[first] + cells[second]
            cells[:-1] += around.mul_(0.5)
        sliced = F.embedding_bag(
            self._vertices, cells, mode="sum", per_sample_weights=self._weights
        )
        return (sliced * self._normaliser).view(values.shape)
