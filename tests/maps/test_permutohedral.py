import itertools

import pytest
import torch
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.maps.permutohedral import PermutohedralLattice


def points(count: int, d: int, spread: float, seed: int = 0) -> Tensor:
    return spread * torch.rand(count, d, generator=torch.Generator().manual_seed(seed))


def matrix(features: Tensor) -> Tensor:
    """The whole filter as a matrix."""
    return PermutohedralLattice(features).filter(torch.eye(len(features)))


def by_definition(features: Tensor) -> Tensor:
    """Adams et al. 2010, point by point with a dictionary, in float64 and brute force.

    The simplex of a point is found by trying: among all d + 1 remainder-0 roundings the one with
    non-negative barycentric weights, whose vertices are enumerated from the sorted offsets.
    """
    n, d = features.shape
    size = d + 1
    basis = torch.zeros(d, size, dtype=torch.float64)
    for j in range(1, size):
        basis[j - 1, :j] = 1
        basis[j - 1, j] = -j
        basis[j - 1] /= (j * (j + 1)) ** 0.5
    elevated = features.double() @ basis * (2 / 3) ** 0.5 * size
    cells: dict[tuple[int, ...], Tensor] = {}
    splats = []
    for p in range(n):
        e = elevated[p]
        near = (e / size).round() * size
        excess = int(near.sum().item() / size)
        order = (e - near).argsort(descending=excess < 0)
        for k in order[: abs(excess)].tolist():
            near[k] -= size if excess > 0 else -size
        offset = (e - near) / size
        ranked = offset.argsort(descending=True).tolist()
        weights = [1 - float(offset[ranked[0]] - offset[ranked[-1]])]
        weights += [
            float(offset[ranked[d - r]] - offset[ranked[d - r + 1]]) for r in range(1, size)
        ]
        mine = []
        for r, weight in enumerate(weights):
            vertex = near.clone() + r
            for k in ranked[size - r :]:
                vertex[k] -= size
            key = tuple(int(v) for v in vertex)
            assert sum(key) == 0
            assert weight > -1e-9
            mine.append((key, weight))
            cells.setdefault(key, torch.zeros(n, dtype=torch.float64))[p] += weight
        splats.append(mine)
    for axis in range(size):
        step = [-1] * size
        step[axis] += size
        blurred = {}
        for key, value in cells.items():
            total = value.clone()
            for sign in (1, -1):
                neighbour = tuple(k + sign * s for k, s in zip(key, step, strict=True))
                if neighbour in cells:
                    total += 0.5 * cells[neighbour]
            blurred[key] = total
        cells = blurred
    rows = [sum(w * cells[k] for k, w in mine) for mine in splats]
    return (torch.stack(rows) / (1 + 2.0**-d)).float()


@pytest.mark.parametrize(("d", "spread"), list(itertools.product((1, 2, 5), (0.5, 3.0, 9.0))))
def test_equals_the_definition(d: int, spread: float) -> None:
    features = points(40, d, spread)
    torch.testing.assert_close(matrix(features), by_definition(features), rtol=1e-4, atol=2e-5)


def test_filter_is_about_half_of_the_gaussian() -> None:
    # Dense samples of a plane in five dimensions, as an image is.
    grid = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"), -1)
    features = torch.cat([grid.view(-1, 2) / 5, (grid.view(-1, 2) @ torch.ones(2, 3)) / 20], 1)
    kernel = PermutohedralLattice(features).filter(torch.eye(576)[:, ::7])
    exact = (-0.5 * torch.cdist(features, features[::7]).square()).exp()
    assert 0.4 < kernel.sum() / exact.sum() < 0.65
    assert torch.corrcoef(torch.stack([kernel.flatten(), exact.flatten()]))[0, 1] > 0.95


def test_constant_values_far_apart_give_the_same_everywhere() -> None:
    one = matrix(points(1, 5, 1.0))
    apart = torch.tensor([[0.0] * 5, [0.0] * 5]) + points(1, 5, 1.0)
    apart[1, 0] += 1000
    both = matrix(apart)
    assert both[0, 0] == one[0, 0]
    assert both[0, 1] == both[1, 0] == 0


def test_channels_are_independent_and_linear() -> None:
    features, values = points(200, 5, 4.0), torch.randn(200, 3)
    lattice = PermutohedralLattice(features)
    whole = lattice.filter(values)
    single = torch.cat([lattice.filter(values[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(whole, single)
    torch.testing.assert_close(lattice.filter(2 * values), 2 * whole)


def test_batch_entries_do_not_see_each_other() -> None:
    features = torch.stack([points(100, 5, 3.0, seed) for seed in (1, 2, 1)])
    values = torch.randn(3, 100, 2)
    together = PermutohedralLattice(features).filter(values)
    alone = [PermutohedralLattice(f).filter(v) for f, v in zip(features, values, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_negative_and_shifted_features() -> None:
    features = points(100, 3, 6.0) - 300
    torch.testing.assert_close(
        matrix(features[:40]), by_definition(features[:40]), atol=2e-3, rtol=0
    )


def test_bad_features_are_refused() -> None:
    with pytest.raises(WSSSError, match="finite"):
        PermutohedralLattice(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(WSSSError, match="too many cells"):
        PermutohedralLattice(points(50, 5, 1e6))
