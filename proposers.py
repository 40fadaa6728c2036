"""Who proposes new architectures to a search: the controllers, or the baselines that they have to beat.

A row of PROPOSERS is a function of what the search knows and how many are wanted; it returns new architectures, at most that
many, and what the log says of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import architecture
import controller
from architecture import Architecture, Vocabulary
from controller import NAO, Settings

POPULATION, TOURNAMENT = 50, 10  # of regularised evolution: the newest, of which a parent is the best of a sample
PATIENCE = 100  # children in a row that are known already, after which a random architecture joins


class Known(NamedTuple):
    """What a search knows when it asks for new architectures."""

    pool: Sequence[Architecture]  # best first
    accuracies: Sequence[float]
    born: Sequence[int]  # how many architectures were proposed before each
    vocabulary: Vocabulary
    generator: torch.Generator
    naos: Sequence[NAO]
    settings: Settings


Proposal = tuple[list[Architecture], dict[str, Any]]


def by_controllers(known: Known, count: int) -> Proposal:
    """Ascend the predicted performance from the best architectures and decode (paper, section 3.4)."""
    tokens = known.vocabulary.tokens(known.pool, next(known.naos[0].parameters()).device)
    new, per_lambda = controller.propose(known.naos, tokens[:known.settings.top], tokens.tolist(), count, known.settings,
                                         known.generator)
    return [known.vocabulary.decode(each) for each in new], {'written per λ': per_lambda}


def by_chance(known: Known, count: int) -> Proposal:
    """Random search: any legal architectures."""
    space = known.vocabulary
    return architecture.sample(count, space.nodes, space.operations, known.generator, known.pool), {}


def by_evolution(known: Known, count: int) -> Proposal:
    """Regularised evolution (Real et al., 2019): each is a mutation of the best of a sample of the newest.

    The children of one round all have their parents among those that are measured.
    """
    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=known.generator))
    newest = sorted(range(len(known.pool)), key=lambda index: -known.born[index])[:POPULATION]
    seen, children, repeats = set(known.pool), [], 0
    while len(children) < count:
        parent = max((newest[draw(len(newest))] for _ in range(TOURNAMENT)), key=lambda index: known.accuracies[index])
        child = architecture.mutate(known.pool[parent], known.vocabulary.operations, known.generator)
        repeats = repeats + 1 if child in seen else 0
        if repeats >= PATIENCE:
            child, = architecture.sample(1, *known.vocabulary, known.generator, seen) or [child]
        if child not in seen:
            seen.add(child)
            children.append(child)
        elif repeats >= PATIENCE:  # the space has no more
            break
    return children, {}


LEARNING = ('controller',)  # those that need controllers fitted to the accuracies first
PROPOSERS: dict[str, Callable[[Known, int], Proposal]] = {
    'controller': by_controllers, 'random': by_chance, 'evolution': by_evolution}
