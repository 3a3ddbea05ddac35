import torch

from wsss.methods.losses import pair_masks


def test_pairs_of_a_small_map() -> None:
    label = torch.tensor([[[0, 3], [3, 255]]])
    same, different = pair_masks(label)
    expected_same = torch.zeros(4, 4, dtype=torch.bool)
    expected_same[1, 2] = expected_same[2, 1] = True
    expected_different = torch.zeros(4, 4, dtype=torch.bool)
    expected_different[0, 1:3] = expected_different[1:3, 0] = True
    assert torch.equal(same[0], expected_same)
    assert torch.equal(different[0], expected_different)


def test_masks_are_symmetric_disjoint_and_without_diagonal() -> None:
    label = torch.randint(0, 4, (3, 5, 7), generator=torch.Generator().manual_seed(0))
    label[0, :2] = 255
    same, different = pair_masks(label.to(torch.uint8))
    assert same.shape == (3, 35, 35)
    assert torch.equal(same, same.transpose(1, 2))
    assert torch.equal(different, different.transpose(1, 2))
    assert not (same & different).any()
    assert not same.diagonal(dim1=1, dim2=2).any()
    valid = (label.flatten(1) != 255).sum(1)
    assert torch.equal((same | different).sum((1, 2)), valid * (valid - 1))


def test_ignored_maps_and_images_do_not_mix() -> None:
    same, different = pair_masks(torch.full((1, 3, 3), 255))
    assert not same.any()
    assert not different.any()
    same, _ = pair_masks(torch.full((1, 2, 2), 9), ignore_index=9)
    assert not same.any()
