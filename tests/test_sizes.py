"""Parameters and multiply-adds as the logs count them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import NAONET_A, NAONET_B, assert_equal
from torch import nn

import architecture
from model import NASNetworkCIFAR, count_madds
from model_search import NASWSNetworkCIFAR

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


@pytest.mark.parametrize('arch, gflop', [(NAONET_A, 3.35), (NAONET_B, 0.92)])
def test_multiply_adds_of_the_published_networks(arch, gflop):
    with torch.device('meta'):
        model = NASNetworkCIFAR(10, 6, 5, 36, 1.0, 1.0, True, 1, arch)
    assert 2 * count_madds(model, 32) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert model.training


def test_multiply_adds_of_a_layer_and_of_a_path():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 5)).eval()
    assert count_madds(layer, 8) == 16 * 8 * 27 + 4 * 8 * 9 + 40
    assert not layer.training
    model = NASWSNetworkCIFAR(10, 1, 1, 4, 1.0, 1.0, False, 1)
    heavy, light = (architecture.parse(line) for line in ('0 1 0 1 0 1 0 1', '0 3 0 3 0 3 0 3'))
    assert count_madds(model, 8, heavy) > count_madds(model, 8, light) > 0


def test_multiply_adds_are_those_of_the_operations_not_of_their_faster_forms():
    arch = ' '.join(f'{side} {side + 2}' for side in (0, 1, 1, 0) * 2)  # average and max pools alone
    with torch.device('meta'):
        wanted = count_madds(NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1, arch), 32)
    assert count_madds(NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1, arch), 32) == wanted


def test_counting_leaves_the_random_numbers_alone():
    model = NASNetworkCIFAR(10, 1, 1, 2, 0.5, 0.5, True, 1, '0 0 1 1 0 4 1 4')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    count_madds(model, 32)
    assert_equal(before, (dict(model.state_dict()), torch.get_rng_state()))
