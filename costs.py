"""What the network of an architecture costs, by a formula, and the budget that a search has to stay within.

No network is built: an architecture's parameters and multiply-adds are those of its operations, see operations.OPERATIONS, in
all cells together, and those of what stands around them, which the numbers of the cells' outputs decide.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

import architecture
from architecture import Architecture, ArchitectureError, Vocabulary, unread_states
from flags import CHANNELS, LAYERS, UserError, add, amount
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet, Shape, count_madds, count_parameters
from operations import OPERATIONS, halved, pointwise_cost

RAREST = 1000  # of so many random architectures one is within a budget, or it counts as one that (almost) nothing meets
FIRST_DRAWS = 10_000  # random architectures that are looked at before that is said


class Cost(NamedTuple):
    """What a network costs."""

    parameters: int  # without the auxiliary head
    madds: int  # multiply-adds of one image

    def __str__(self) -> str:
        return f'{self.parameters:,} parameters and {self.madds:,} multiply-adds'


class Size(NamedTuple):
    """Which network costs are counted on."""

    network: type[FixedNetwork]
    layers: int
    channels: int
    classes: int
    image_size: int  # pixels of a side


NETWORKS = {'cifar': Size(NASNetworkCIFAR, 6, 36, 10, 32), 'imagenet': Size(NASNetworkImageNet, 4, 42, 1000, 224)}
Counter = Callable[[Architecture], Cost]


# ------------------------------------------------------------------------------------------------------------ the formula

@cache
def of_operation(index: int, channels: int, stride: int, side: int) -> Cost:
    """The cost of the operation with this id; side: of its input, in pixels."""
    operation = OPERATIONS[index]
    if operation.cost:
        return Cost(*operation.cost(channels, stride, side))
    with torch.device('meta'):
        module = operation.make(channels, stride)
    return Cost(count_parameters(module), count_madds(module, side, channels=channels))


def of_stem(size: Size) -> tuple[Cost, list[Shape]]:
    """The cost of a network's stem, whose convolutions follow one another, and the shapes of what the first cell gets."""
    with torch.device('meta'):  # its modules for their sizes alone
        stem = nn.Module()
        inputs = size.network.make_stem(stem, size.channels)
    side, madds = size.image_size, 0
    for module in stem.modules():
        if isinstance(module, nn.Conv2d):
            side = halved(side, module.stride[0])
            madds += module.weight.numel() * side ** 2
    return Cost(count_parameters(stem), madds), inputs


def total(costs: Sequence[tuple[int, int]]) -> Cost:
    """The sum of costs, of one at least."""
    return Cost(*map(sum, zip(*costs, strict=True)))


def counter(size: Size) -> Counter:
    """What counts the parameters and multiply-adds of an architecture's network, equal to those of the built one."""
    layers = size.layers
    stem, stem_outputs = of_stem(size)
    halvings, channels = stem_outputs[1][0], size.channels
    cells = []  # (is it a reduction cell, its channels, the side of its input)
    for index in range(3 * layers + 2):
        reduction = index in (layers, 2 * layers + 1)
        channels *= 1 + reduction
        cells.append((reduction, channels, halved(size.image_size, 2 ** halvings)))
        halvings += reduction

    @cache
    def operation(index: int, reduction: bool, stride: int) -> Cost:
        """An operation in all cells of a kind; in a reduction cell one of stride 1 reads a node, which is halved already."""
        return total([of_operation(index, channels, stride, halved(side, 2) if reduction and stride == 1 else side)
                      for is_reduction, channels, side in cells if is_reduction == reduction])

    @cache
    def around(normal_outputs: int, reduction_outputs: int, reduced: int) -> Cost:
        """All but the nodes, by the number of states that each kind of cell concatenates.

        reduced: how many of them are inputs of the reduction cell, which it has to halve.
        """
        costs, (x, y) = [stem], stem_outputs
        for reduction, channels, side in cells:
            if x[0] != y[0] or x[1] != channels:
                costs.append(pointwise_cost(x[1], channels, side))
            if y[1] != channels:
                costs.append(pointwise_cost(y[1], channels, side))
            if reduction:
                costs += reduced * [pointwise_cost(channels, channels, halved(side, 2))]
            x, y = y, (y[0] + reduction, channels * (reduction_outputs if reduction else normal_outputs))
        return total([*costs, (y[1] * size.classes + size.classes, y[1] * size.classes)])

    def count(arch: Architecture) -> Cost:
        outputs = unread_states(arch.reduction)
        costs = [around(len(unread_states(arch.normal)), len(outputs), sum(state < 2 for state in outputs))]
        costs += [operation(index, False, 1) for index in arch.normal[1::2]]
        costs += [operation(index, True, 2 if state < 2 else 1)
                  for state, index in zip(arch.reduction[::2], arch.reduction[1::2], strict=True)]
        return total(costs)
    return count


# ---------------------------------------------------------------------------------------------------------------- budgets

class Budget(NamedTuple):
    """What an architecture may cost: limits by the flags that give them, none of which may be there."""

    limits: dict[str, int]  # 'max_parameters' and 'max_madds', as far as they are given
    network: str  # that is counted on, in words
    count: Counter

    def excess(self, cost: Cost) -> float:
        """The larger share of its limit that a cost takes; above 1 it is beyond the budget."""
        shares = [getattr(cost, name.removeprefix('max_')) / limit for name, limit in self.limits.items()]
        return max(shares, default=0.0)

    def admits(self, arch: Architecture) -> bool:
        """Whether the architecture's network stays within the limits."""
        return not self.limits or self.excess(self.count(arch)) <= 1

    def check(self, arch: Architecture) -> None:
        """Raise ArchitectureError if the architecture's network is beyond the limits."""
        if not self.admits(arch):
            raise ArchitectureError(f'the network has {self.count(arch)}, beyond {self}')

    def __str__(self) -> str:
        return ' '.join(f'--{name}={limit:,}' for name, limit in self.limits.items()) + f' ({self.network})'


def add_flags(parser: Any) -> None:
    """The flags of a budget."""
    group = parser.add_argument_group('budget: limits on the network that will be trained in the end')
    add(group, 'max_parameters', 'at most so many, the auxiliary head left out, such as 3.5M', type=amount)
    add(group, 'max_madds', 'at most so many multiply-adds of one image, such as 600M', type=amount)
    add(group, 'budget_network', 'what is counted on: the network for small images, or for photographs (default: that of the '
        'data set)', choices=NETWORKS)
    for name, kind in (('layers', LAYERS), ('channels', CHANNELS)):
        default = ', '.join(f'{network} {getattr(size, name)}' for network, size in NETWORKS.items())
        add(group, f'budget_{name}', f'its {name} (default: {default})', type=kind)


def budget_of(args: argparse.Namespace, own: str = 'cifar', **known: int) -> Budget:
    """The budget that the flags give.

    own: the kind of network that the data set is for, one of NETWORKS; known: `classes` and `image_size` of the data set,
    which count if it is that network.
    """
    name = args.budget_network or own
    given = {field: value for field in ('layers', 'channels') if (value := getattr(args, f'budget_{field}'))}
    size = NETWORKS[name]._replace(**given, **(known if name == own else {}))
    limits = {flag: value for flag in ('max_parameters', 'max_madds') if (value := getattr(args, flag))}
    return Budget(limits, f'{name} network, {size.layers} layers, {size.channels} channels', counter(size))


def sample(count: int, space: Vocabulary, generator: torch.Generator, budget: Budget,
           known: Collection[Architecture] = (), needed: int = 0) -> list[Architecture]:
    """As architecture.sample, within a budget; fewer also where almost none is within.

    Raises UserError if it is the budget that leaves fewer than `needed`.
    """
    found: dict[Architecture, None] = {}
    drawn, smallest = 0, None
    while len(found) < count and drawn < max(FIRST_DRAWS, RAREST * (len(found) + 1)):
        batch = architecture.sample(count, *space, generator, {*known, *found})
        drawn += len(batch)
        if not budget.limits or not batch:
            found.update(dict.fromkeys(batch))
            break
        costs = [budget.count(arch) for arch in batch]
        within = [arch for arch, cost in zip(batch, costs, strict=True) if budget.excess(cost) <= 1]
        found.update(dict.fromkeys(within[:count - len(found)]))
        smallest = min([*costs, *([smallest] if smallest else [])], key=budget.excess)
    if budget.limits and len(found) < needed:
        raise UserError(f'{budget}: of {drawn:,} random architectures {len(found)} are within, and {needed} are needed; the '
                        f'smallest has {smallest}')
    return list(found)


def pareto(accuracies: Sequence[float], madds: Sequence[int]) -> list[int]:
    """Which architectures no other beats: none is as accurate and cheaper, nor as cheap and more accurate. Cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(madds)), key=lambda index: (madds[index], -accuracies[index])):
        if not front or accuracies[index] > accuracies[front[-1]] or (
                accuracies[index] == accuracies[front[-1]] and madds[index] == madds[front[-1]]):
            front.append(index)
    return front
