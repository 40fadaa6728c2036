"""What architectures cost by formula, budgets, and the front of accuracy and cost."""

import argparse
import time

import pytest
import torch
from helpers import NAONET_A, NAONET_B, architectures
from hypothesis import given, settings
from hypothesis import strategies as st

import architecture
import costs
import flags
import operations
from architecture import Vocabulary, parse, read_pool
from costs import NETWORKS, Budget, Cost, Size, counter, pareto
from flags import UserError
from model import NASNetworkCIFAR, NASNetworkImageNet, count_madds, count_parameters
from operations import SEARCH_SPACES, Operation

SPACE = Vocabulary(5, SEARCH_SPACES['large'])


def built(size, arch):
    """The cost of the network that is built."""
    with torch.device('meta'):
        network = size.network(size.classes, size.layers, len(arch.normal) // 4, size.channels, 1.0, 1.0, True, 1, arch)
    return Cost(count_parameters(network), count_madds(network, size.image_size))


def budget(size=NETWORKS['cifar'], **limits):
    return Budget(limits, 'network', counter(size))


@settings(max_examples=12)
@given(architectures(st.integers(1, 4)), st.sampled_from([(NASNetworkCIFAR, 8, 40), (NASNetworkImageNet, 32, 64)]), st.data())
def test_the_formula_is_what_the_built_network_has(arch, network, data):
    network, least, most = network
    size = Size(network, data.draw(st.integers(1, 2)), data.draw(st.integers(2, 9)), data.draw(st.integers(1, 12)),
                data.draw(st.integers(least, most)))
    assert counter(size)(arch) == built(size, arch)


def test_the_published_networks():
    """NAONet-A on ImageNet has twice the multiply-adds of the mobile setting, as README.md says."""
    found = counter(NETWORKS['imagenet'])(parse(NAONET_A))
    assert found == (11_353_831, 1_243_996_992) == built(NETWORKS['imagenet'], parse(NAONET_A))
    assert counter(NETWORKS['cifar'])(parse(NAONET_B)).parameters == 2_921_302


def test_ten_thousand_architectures_take_less_than_two_seconds():
    pool = architecture.sample(10_000, *SPACE, torch.Generator().manual_seed(0))
    start = time.process_time()
    count = counter(NETWORKS['imagenet'])
    assert len([count(arch) for arch in pool]) == 10_000
    assert time.process_time() - start < 2


def test_an_operation_without_a_formula_is_counted_on_its_module(monkeypatch):
    """As one of a user's own, which is appended to the table."""
    own = Operation('my conv 3x3', lambda channels, stride: torch.nn.Conv2d(channels, channels, 3, stride, 1), 3)
    monkeypatch.setattr(operations, 'OPERATIONS', (*operations.OPERATIONS, own))
    monkeypatch.setattr(costs, 'OPERATIONS', operations.OPERATIONS)
    assert costs.of_operation(16, 4, 2, 9) == (9 * 16 + 4, 9 * 16 * 25)


# ---------------------------------------------------------------------------------------------------------------- budgets

@pytest.mark.parametrize('text, value', [
    ('600000', 600_000), ('3.5M', 3_500_000), ('600m', 600_000_000), ('1.2G', 1_200_000_000), ('7k', 7000),
    ('3.5e6', 3_500_000), ('1.1B', 1_100_000_000)])
def test_amounts(text, value):
    assert flags.amount(text) == value and isinstance(flags.amount(text), int)


@pytest.mark.parametrize('text', ['', 'M', '0', '-3M', 'nan', 'inf', '1e999', 'infM', '3.5T', '3,5M', '0.1', 'x'])
def test_amounts_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r'such as 3500000, 3\.5M or 600M'):
        flags.amount(text)


@pytest.mark.parametrize('given_flags, own, known, size', [
    ({}, 'cifar', {}, NETWORKS['cifar']),
    ({}, 'imagenet', {'classes': 7}, NETWORKS['imagenet']._replace(classes=7)),
    ({'budget_network': 'imagenet'}, 'cifar', {'classes': 7, 'image_size': 8}, NETWORKS['imagenet']),
    ({'budget_layers': 2, 'budget_channels': 8}, 'cifar', {'classes': 7, 'image_size': 8},
     Size(NASNetworkCIFAR, 2, 8, 7, 8))])
def test_what_costs_are_counted_on(given_flags, own, known, size):
    args = argparse.Namespace(**{'max_parameters': None, 'max_madds': 10, 'budget_network': None, 'budget_layers': None,
                                 'budget_channels': None} | given_flags)
    found = costs.budget_of(args, own, **known)
    assert found.limits == {'max_madds': 10} and found.count(parse(NAONET_A)) == counter(size)(parse(NAONET_A))


@given(architectures(nodes=2), st.integers(-1, 1), st.sampled_from(['max_parameters', 'max_madds']))
def test_a_budget_admits_what_costs_as_much_and_not_one_more(arch, more, name):
    cost = counter(NETWORKS['cifar'])(arch)
    limited = budget(**{name: getattr(cost, name[4:]) + more})
    assert limited.admits(arch) == (more >= 0)
    assert budget().admits(arch)


def test_a_random_pool_within_a_budget_is_full_distinct_and_within():
    limited = budget(max_madds=600_000_000, max_parameters=4_000_000)
    known = architecture.sample(50, *SPACE, torch.Generator().manual_seed(0))
    pool = costs.sample(80, SPACE, torch.Generator().manual_seed(0), limited, known, needed=80)
    assert len({*pool, *known}) == 130
    assert all(limited.admits(arch) for arch in pool) and not all(limited.admits(arch) for arch in known)
    free = costs.sample(80, SPACE, torch.Generator().manual_seed(0), budget(), known)
    assert free == architecture.sample(80, *SPACE, torch.Generator().manual_seed(0), known)


def test_a_budget_that_nothing_meets_says_what_the_smallest_has():
    limited = budget(Size(NASNetworkCIFAR, 1, 4, 10, 8), max_parameters=100)
    with pytest.raises(UserError, match=r'^--max_parameters=100 \(network\): of 1\d,\d+ random architectures 0 are within, and '
                                        r'20 are needed; the smallest has [\d,]+ parameters and [\d,]+ multiply-adds$'):
        costs.sample(20, SPACE, torch.Generator().manual_seed(0), limited, needed=20)
    assert costs.sample(20, SPACE, torch.Generator().manual_seed(0), limited) == []


def test_a_pools_line_beyond_the_budget_is_named(tmp_path):
    (tmp_path / 'pool').write_text(f'{NAONET_B}\n\n{NAONET_A}\n')
    limited = budget(NETWORKS['imagenet'], max_madds=600_000_000)
    with pytest.raises(architecture.ArchitectureError, match=r'pool, line 3: the network has 11,353,831 parameters and '
                                                             r'1,243,996,992 multiply-adds, beyond --max_madds=600,000,000'):
        read_pool(tmp_path / 'pool', check=limited.check)


# --------------------------------------------------------------------------------------------------------------- the front

@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_no_other_beats_cheapest_first(points):
    accuracies, madds = [accuracy for accuracy, _ in points], [cost for _, cost in points]
    front = pareto(accuracies, madds)
    beaten = [any(other[0] >= point[0] and other[1] <= point[1] and other != point for other in points) for point in points]
    assert sorted(front) == [index for index, is_beaten in enumerate(beaten) if not is_beaten]
    assert [madds[index] for index in front] == sorted(madds[index] for index in front)
