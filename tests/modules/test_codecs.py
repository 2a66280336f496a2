"""The convolutions of codecs, by their definitions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfvlm.modules.dvae import GROUPS, CodebookBlock, decoder_groups, encoder_groups, init_by_inputs
from hfvlm.modules.vqgan import Resample
from tests.support.suite import close


def test_a_block_adds_little_to_its_shortcut():
    block, x = CodebookBlock(8, 16, 0.25), torch.randn(1, 8, 4, 4)
    y = x
    for conv in (block.conv1, block.conv2, block.conv3, block.conv4):
        y = conv(F.relu(y))
    close(block(x), block.shortcut(x) + 0.25 * y, 1e-6, "block")
    assert isinstance(CodebookBlock(8, 8, 1.0).shortcut, nn.Identity)


def test_an_encoder_and_a_decoder_undo_each_other_s_sizes():
    encoder, decoder = encoder_groups(3, 4, 2, 10), decoder_groups(10, 6, 4, 1, 6)
    codes = encoder(torch.rand(2, 3, 16, 24))
    assert codes.shape == (2, 10, 2, 3)
    assert decoder(codes).shape == (2, 6, 16, 24)
    blocks = [module for module in encoder.modules() if isinstance(module, CodebookBlock)]
    assert {block.gain for block in blocks} == {(GROUPS * 2) ** -2}
    assert [block.conv4.out_channels for block in blocks[::2]] == [4, 8, 16, 32]


def test_weights_begin_by_the_number_of_inputs():
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 32, 3)
    init_by_inputs(nn.Sequential(conv))
    assert conv.weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)


def test_halving_sees_zeros_behind_the_last_pixel():
    """Convolution's padding is on one side, which is what shifts the original's images by half a pixel."""
    half, x = Resample(2, down=True, conv=True), torch.randn(1, 2, 4, 4)
    assert half.conv is not None
    close(half(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), half.conv.weight, half.conv.bias, stride=2), 1e-6, "half")
    assert torch.equal(Resample(2, down=True, conv=False)(x), F.avg_pool2d(x, 2))
    assert Resample(2, down=False, conv=True)(x).shape == (1, 2, 8, 8)
