"""Who proposes new architectures to a search: the controllers, fitted to what is known, or baselines that they have to beat.

A row of PROPOSERS is a function of what the search knows and how many are wanted; it returns new architectures, at most that
many, all within the budget, and what the log says of them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import architecture
import controller
import costs
from architecture import Architecture, Vocabulary
from controller import NAO, Settings
from costs import Budget
from training import NotFiniteError
from utils import Run

POPULATION, TOURNAMENT = 50, 10  # of regularised evolution: the newest, of which a parent is the best of a sample
UNLEARNT = 0.1  # Hamming distance from which a controller cannot be said to know the architectures
PATIENCE = 100  # children in a row that are known already or beyond the budget, after which a random architecture joins


class Known(NamedTuple):
    """What a search knows when it fits its controllers and asks for new architectures."""

    pool: Sequence[Architecture]  # best first
    accuracies: Sequence[float]
    born: Sequence[int]  # how many architectures were proposed before each
    vocabulary: Vocabulary
    generator: torch.Generator
    naos: Sequence[NAO]
    settings: Settings
    budget: Budget


def fit(run: Run, known: Known, expand: int | None, first: bool) -> dict[str, float]:
    """Fit the controllers to the pool and its accuracies (paper, section 3.2-3.3); returns the last report of the last one.

    expand: with N, to N-1 rewritten copies of each architecture besides, of which a tenth is held out; first: see
    controller.fit_epochs. Raises NotFiniteError.
    """
    naos, settings, generator = known.naos, known.settings, known.generator
    sequences = known.vocabulary.tokens(known.pool, run.device)
    targets = controller.TARGETS[settings.targets](known.accuracies).to(run.device)
    rewrite = architecture.REWRITINGS[settings.rewriting]
    augment, held_out = rewrite, None
    if expand:
        order = torch.randperm(len(sequences), generator=generator).to(run.device)
        train, test = order[len(order) // 10:], order[:len(order) // 10]
        held_out = (sequences[test], targets[test]) if len(test) else None
        copies = [sequences[train]] + [rewrite(sequences[train], generator) for _ in range(expand - 1)]
        sequences, targets, augment = torch.cat(copies), targets[train].repeat(expand, 1), None

    def report(member: int, values: dict[str, float]) -> None:
        which = f' {member + 1}/{len(naos)}' if len(naos) > 1 else ''
        if not which or values['epoch'] == values['epochs']:  # of several, one line each
            run.log(f'controller{which} epoch {values["epoch"]}/{values["epochs"]} loss {values["loss"]:.5f} '
                    f'pairwise accuracy {values["pairwise_accuracy"]:.4f} Hamming distance {values["hamming_distance"]:.4f}')
    reports = controller.fit_all(naos, sequences, targets, settings, generator, first=first, augment=augment,
                                 held_out=held_out, report=report)
    losses = [values['loss'] for values in reports]
    distance = max(values['hamming_distance'] for values in reports)
    if not all(map(math.isfinite, losses)):
        raise NotFiniteError(f'the loss of the controller is {max(losses)}; the last checkpoint is kept; a smaller '
                             '--controller_lr may help')
    if distance > UNLEARNT:
        run.warn(f'the controller writes {distance:.0%} of the tokens of known architectures wrongly: what it proposes is near '
                 'to chance; more --controller_epochs help')
    return reports[-1]


Proposal = tuple[list[Architecture], dict[str, Any]]


def by_controllers(known: Known, count: int) -> Proposal:
    """Ascend the predicted performance from the best architectures and decode (paper, section 3.4).

    Where a budget leaves too few of what is decoded, the next best follow.
    """
    def admits(sequence: Sequence[int]) -> bool:
        return known.budget.admits(known.vocabulary.decode(sequence))
    tokens = known.vocabulary.tokens(known.pool, next(known.naos[0].parameters()).device)
    new: list[tuple[int, ...]] = []
    per_lambda: Counter[float] = Counter()
    for seeds in tokens.split(known.settings.top):
        found, written = controller.propose(known.naos, seeds, [*tokens.tolist(), *new], count - len(new), known.settings,
                                            known.generator, admits if known.budget.limits else None,
                                            architecture.canonical)
        new += found
        per_lambda.update(written)
        if len(new) >= count or not known.budget.limits:
            break
    return [known.vocabulary.decode(each) for each in new], {'written per λ': dict(per_lambda)}


def by_chance(known: Known, count: int) -> Proposal:
    """Random search: any legal architectures."""
    return costs.sample(count, known.vocabulary, known.generator, known.budget, known.pool), {}


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
        repeats = 0 if child not in seen and known.budget.admits(child) else repeats + 1
        if repeats >= PATIENCE:
            child = next(iter(costs.sample(1, known.vocabulary, known.generator, known.budget, seen)), None)
            if child is None:  # the space has no more
                break
            repeats = 0
        elif repeats:
            continue
        seen.add(child)
        children.append(child)
    return children, {}


LEARNING = ('controller',)  # those that need controllers fitted to the accuracies first
PROPOSERS: dict[str, Callable[[Known, int], Proposal]] = {
    'controller': by_controllers, 'random': by_chance, 'evolution': by_evolution}
