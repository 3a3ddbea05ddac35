import pytest
import torch
from torch import nn

from wsss.models.decoders import ASPPSum, DPTDecoder, Fusion, Reassemble, ResidualUnit, SqueezeBlock


def test_reassembled_sizes() -> None:
    patches, cls_token = torch.randn(2, 12, 8), torch.randn(2, 8)
    for factor, size in ((4, (12, 16)), (2, (6, 8)), (1, (3, 4)), (0.5, (2, 2))):
        level = Reassemble(dim=8, channels=5, factor=factor)
        assert level(patches, cls_token, (3, 4)).shape == (2, 5, *size)


def test_readout_joins_every_patch_with_the_class_token() -> None:
    level = Reassemble(dim=4, channels=3, factor=1)
    patches, cls_token = torch.randn(1, 6, 4), torch.randn(1, 4)
    joined = torch.cat([patches[0, 2], cls_token[0]])
    torch.testing.assert_close(
        level.read(patches, cls_token)[0, 2], nn.functional.gelu(level.readout(joined))
    )


def test_residual_unit_keeps_its_input_and_uses_no_bias() -> None:
    unit = ResidualUnit(6).eval()
    assert unit.conv1.bias is None
    x = torch.randn(1, 6, 5, 5)
    nn.init.zeros_(unit.bn2.weight)
    torch.testing.assert_close(unit(x), x)


def test_coarsest_fusion_has_no_unit_for_a_skip() -> None:
    path = torch.randn(1, 4, 3, 3)
    coarsest = Fusion(4, with_skip=False)
    assert coarsest.skip_unit is None
    assert coarsest(path, None, (6, 6)).shape == (1, 4, 6, 6)
    finer = Fusion(4, with_skip=True).eval()
    skip = torch.randn(1, 4, 3, 3)
    assert not torch.equal(finer(path, skip, (6, 6)), finer(path, 2 * skip, (6, 6)))


def test_squeeze_block_weighs_channels() -> None:
    block = SqueezeBlock(32)
    assert block.gate[0].weight.shape == (2, 32)
    x = torch.randn(2, 32, 4, 4)
    body = block.body(x)
    weight = block.gate(body.mean((2, 3)))
    torch.testing.assert_close(block(x), x + body * weight[..., None, None])


def test_every_size_is_twice_the_coarser_one_and_odd_ones_fit() -> None:
    decoder = DPTDecoder(in_channels=(3, 4, 5, 6), num_outputs=7, channels=8)
    maps = [torch.randn(2, c, s, s) for c, s in ((3, 16), (4, 8), (5, 4), (6, 2))]
    assert [path.shape[-1] for path in decoder.paths(maps)] == [4, 8, 16, 32]
    assert decoder(maps, (64, 64)).shape == (2, 7, 64, 64)
    odd = [torch.randn(2, c, h, w) for c, h, w in ((3, 12, 20), (4, 6, 10), (5, 3, 5), (6, 2, 3))]
    assert decoder(odd, (48, 80)).shape == (2, 7, 48, 80)


def test_dropout_is_of_single_entries_and_off_in_evaluation() -> None:
    decoder = DPTDecoder(in_channels=(3,), num_outputs=2, channels=16)
    assert any(type(layer) is nn.Dropout and layer.p == 0.1 for layer in decoder.head)
    maps = [torch.randn(1, 3, 4, 4)]
    decoder.eval()
    assert torch.equal(decoder(maps, (8, 8)), decoder(maps, (8, 8)))


def test_dilated_sum_starts_small_without_a_bias() -> None:
    torch.manual_seed(0)
    head = ASPPSum(in_channels=64, num_outputs=5, rates=(1, 2))
    for branch in head.branches:
        assert isinstance(branch, nn.Conv2d)
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert branch.bias is not None
        assert branch.bias.count_nonzero() == 0


def test_dilated_sum_adds_one_convolution_a_rate() -> None:
    """A single pixel is seen by the taps of each convolution at its own distance."""
    head = ASPPSum(in_channels=1, num_outputs=1, rates=(1, 3))
    for parameter in head.parameters():
        nn.init.ones_(parameter)
    pixel = torch.zeros(1, 1, 9, 9)
    pixel[..., 4, 4] = 1
    found = head(pixel)[0, 0] - 2  # the biases of both
    expected = torch.zeros(9, 9)
    for rate in (1, 3):
        expected[4 - rate : 5 + rate : rate, 4 - rate : 5 + rate : rate] += 1
    assert torch.equal(found, expected)
