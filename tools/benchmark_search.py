"""Let the controller search a table of known accuracies, beside random search and regularised evolution.

    python tools/benchmark_search.py --table cifar10.csv --seeds 20 --queries 300 --plot regret.png --json regret.json

The table is a NAS-Bench-201 one: the line `architecture,accuracy`, then one architecture a line with its accuracy in per
cent, all 15,625 of them or some. A search asks for the accuracy of one architecture after another and is judged by its
regret, the table's best accuracy minus the best that it found, after 50, 100, 150, 200 and 300 different ones.
"""

import argparse
import importlib.util
import itertools
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from controller import NAO, PRESETS, Settings, search_step

OPERATIONS = ('none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3')
SOURCES = (0, 0, 1, 0, 1, 2)  # the node that each of the six edges reads; an edge's place says which node it feeds
EDGES = len(SOURCES)
HEADER = 'architecture,accuracy'
ARCHITECTURE = re.compile(r'\|{}~{}\|\+\|{}~{}\|{}~{}\|\+\|{}~{}\|{}~{}\|{}~{}\|'.format(
    *(part for source in SOURCES for part in (r'(\w+)', source))))
# An edge has its own five words, so that an operation's embedding can mean another thing on another edge.
ALLOWED_TOKENS = [(1 + len(OPERATIONS) * edge, len(OPERATIONS) * (edge + 1)) for edge in range(EDGES)]
VOCABULARY_SIZE = 1 + len(OPERATIONS) * EDGES
CHECKPOINTS = (50, 100, 150, 200, 300)  # queries after which the regret is reported

Sequence = tuple[int, ...]
Table = dict[Sequence, float]


class UserError(ValueError):
    """The table or an option is not as it should be; the message is one line for the user."""


def encode(architecture: str) -> Sequence:
    """The six tokens of an architecture string; raises ValueError that says what is wrong."""
    match = ARCHITECTURE.fullmatch(architecture)
    if not match:
        raise ValueError(f'{architecture!r} is not an architecture of six edges such as |none~0|+|none~0|none~1|+|...|')
    for operation in match.groups():
        if operation not in OPERATIONS:
            raise ValueError(f'{operation!r} is not one of the operations {", ".join(OPERATIONS)}')
    return tuple(first + OPERATIONS.index(operation)
                 for (first, _), operation in zip(ALLOWED_TOKENS, match.groups(), strict=True))


def read_table(path: str) -> Table:
    """The accuracies in per cent by tokens; raises UserError, which names the file and the line that is wrong."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{path}: cannot be read ({reason}); a table of accuracies is needed here') from None
    if not lines or lines[0].strip() != HEADER:
        raise UserError(f'{path}, line 1: is {lines[0] if lines else ""!r}, but a table begins with the line {HEADER!r}')
    table: Table = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        architecture, _, value = line.strip().rpartition(',')
        try:
            sequence, accuracy = encode(architecture), float(value)
            if not math.isfinite(accuracy):
                raise ValueError(f'the accuracy {value!r} is not a finite number')
            if sequence in table:
                raise ValueError(f'{architecture} stands in the table twice')
        except ValueError as error:
            raise UserError(f'{path}, line {number}: {error}') from None
        table[sequence] = accuracy
    if not table:
        raise UserError(f'{path}: has no architecture; a table has one a line under {HEADER!r}')
    return table


def shuffled(table: Table, generator: torch.Generator) -> list[Sequence]:
    """The table's architectures in a random order."""
    sequences = list(table)
    return [sequences[row] for row in torch.randperm(len(sequences), generator=generator).tolist()]


def pick(count: int, generator: torch.Generator) -> int:
    """A random number below `count`."""
    return int(torch.randint(count, (), generator=generator))


def random_search(table: Table, queries: int, generator: torch.Generator) -> list[Sequence]:
    """Ask for random architectures; the asked ones in order."""
    return shuffled(table, generator)[:queries]


def mutations(sequence: Sequence, table: Table) -> list[Sequence]:
    """The architectures of the table that differ from one in a single operation."""
    near = ((*sequence[:edge], token, *sequence[edge + 1:])
            for edge, (first, last) in enumerate(ALLOWED_TOKENS) for token in range(first, last + 1)
            if token != sequence[edge])
    return [neighbour for neighbour in near if neighbour in table]


def evolution(table: Table, queries: int, generator: torch.Generator, population_size: int = 50, sample_size: int = 10,
              patience: int = 100) -> list[Sequence]:
    """Regularised evolution (Real et al., 2019): the best of a sample is mutated, the oldest dies; the asked in order.

    After `patience` children in a row that had been asked before, or where the table lacks all mutations, a random
    architecture joins, so that a small table does not stop the search.
    """
    order = shuffled(table, generator)
    population = deque(order[:min(population_size, queries)], maxlen=population_size)
    asked, repeats = dict.fromkeys(population), 0
    while len(asked) < min(queries, len(table)):
        rivals = [pick(len(population), generator) for _ in range(sample_size)]
        children = mutations(max((population[rival] for rival in rivals), key=table.__getitem__), table)
        if children and repeats < patience:
            child = children[pick(len(children), generator)]
        else:
            child = next(sequence for sequence in order if sequence not in asked)
        repeats = repeats + 1 if child in asked else 0
        asked[child] = None
        population.append(child)
    return list(asked)


class Plan(NamedTuple):
    """How a controller spends its queries: at first so many random ones, then rounds of new ones."""

    initial: int
    new: int
    settings: Settings


# The presets' fits are made for pools of hundreds of long sequences; here are tens of short ones and many rounds.
PLANS = {'nao_best': Plan(40, 10, PRESETS['best']._replace(epochs=60, later_updates=20)),
         'nao_paper': Plan(100, 50, PRESETS['paper']._replace(epochs=300))}


def controller_search(table: Table, queries: int, generator: torch.Generator, plan: Plan) -> list[Sequence]:
    """Ask for random architectures, then in rounds for those that the controller proposes; the asked in order.

    Where it proposes too few, random ones fill the round. What the table lacks cannot be asked: the controller is told not
    to propose it again, and proposes more at once the smaller the table's share of the space is.
    """
    order = shuffled(table, generator)
    asked = {sequence: table[sequence] for sequence in order[:min(plan.initial, queries)]}
    naos = [NAO(ALLOWED_TOKENS, VOCABULARY_SIZE, EDGES) for _ in range(plan.settings.members)]
    per_answer = math.ceil(len(OPERATIONS) ** EDGES / len(table))
    refused: set[Sequence] = set()
    first = True
    while len(asked) < min(queries, len(table)):
        proposed = search_step(naos, list(asked), list(asked.values()), plan.new * per_answer, plan.settings, generator,
                               first=first, refused=refused)
        first = False
        refused.update(sequence for sequence in proposed if sequence not in table)
        fillers = (sequence for sequence in order if sequence not in asked)
        wanted = dict.fromkeys(sequence for sequence in [*proposed, *fillers] if sequence in table)
        for sequence in list(wanted)[:min(plan.new, queries - len(asked))]:
            asked[sequence] = table[sequence]
    return list(asked)


def nao_method(plan: Plan) -> Callable[[Table, int, torch.Generator], list[Sequence]]:
    """The search of a plan, called like the other methods."""
    return lambda table, queries, generator: controller_search(table, queries, generator, plan)


METHODS = {**{name: nao_method(plan) for name, plan in PLANS.items()}, 'random': random_search, 'evolution': evolution}


def regrets(table: Table, asked: list[Sequence], queries: int) -> Tensor:
    """The regret after 1, 2, … queries, (queries,); when the whole table has been asked it stays where it is, at 0."""
    best = torch.tensor([table[sequence] for sequence in asked], dtype=torch.float64).cummax(0).values
    return max(table.values()) - torch.cat([best, best[-1:].expand(queries - len(best))])


def measure(method: str, table: Table, seeds: int, queries: int) -> tuple[Tensor, float]:
    """Regrets (seeds, queries) of a method and its mean seconds a seed."""
    curves, start = [], time.perf_counter()
    for seed in range(seeds):
        torch.manual_seed(seed)  # the initial weights and the dropout
        asked = METHODS[method](table, queries, torch.Generator().manual_seed(seed))
        curves.append(regrets(table, asked, queries))
    return torch.stack(curves), (time.perf_counter() - start) / seeds


def summary(curves: Tensor) -> dict[int, tuple[float, float]]:
    """Mean and standard error of regrets (seeds, queries) at each checkpoint; the error of one seed is 0."""
    seeds, queries = curves.shape
    errors = curves.std(0, correction=1) / seeds ** 0.5 if seeds > 1 else torch.zeros(queries)
    return {count: (float(curves[:, count - 1].mean()), float(errors[count - 1]))
            for count in CHECKPOINTS if count <= queries}


def draw(path: str, results: dict[str, Tensor]) -> None:
    """Write the mean regrets (seeds, queries) of all methods, with a band of one standard error, to a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for method, curves in results.items():
        mean = curves.mean(0)
        error = curves.std(0) / len(curves) ** 0.5 if len(curves) > 1 else torch.zeros_like(mean)
        queries = range(1, len(mean) + 1)
        line, = axes.plot(queries, mean, label=method)
        axes.fill_between(queries, mean - error, mean + error, alpha=0.2, color=line.get_color())
    # Linear below a hundredth of a per cent: a logarithm has no zero, which good searches reach.
    axes.set_yscale('symlog', linthresh=0.01)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('queries')
    axes.set_ylabel('regret (per cent accuracy)')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format='png')


def methods_of(names: str) -> list[str]:
    """The methods in a comma list; raises argparse's error for a name that is none of them."""
    methods = names.split(',')
    for name in methods:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f'{name!r} is not one of {", ".join(METHODS)}')
    return methods


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with status 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--table', required=True, help='CSV file of architectures and accuracies')
    parser.add_argument('--seeds', type=int, default=20, help='searches a method, seeded 0, 1, … (default: %(default)s)')
    parser.add_argument('--queries', type=int, default=300, help='architectures a search asks for (default: %(default)s)')
    parser.add_argument('--method', type=methods_of, action='append', metavar='METHOD[,METHOD]',
                        help=f'what to measure, may be repeated: {", ".join(METHODS)} (default: all of them)')
    parser.add_argument('--plot', metavar='PNG', help='draw the curves to this file (needs matplotlib)')
    parser.add_argument('--json', metavar='FILE', help='write the numbers to this file')
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f'--seeds={arguments.seeds}, but at least 1 is needed')
    if arguments.queries < CHECKPOINTS[0]:
        parser.error(f'--queries={arguments.queries}, but the regret is first reported after {CHECKPOINTS[0]}')
    arguments.method = list(dict.fromkeys(itertools.chain.from_iterable(arguments.method or [METHODS])))
    return arguments


def main() -> None:
    """Measure the methods that were asked for, print the table and write the files."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other
    table = read_table(arguments.table)
    for output in filter(None, (arguments.plot, arguments.json)):
        if not Path(output).parent.is_dir():
            raise UserError(f'{output}: cannot be written, its folder does not exist')
    if arguments.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError('--plot needs matplotlib: pip install -r requirements-tools.txt')
    reported = [count for count in CHECKPOINTS if count <= arguments.queries]
    print(f'{"regret after":<14}' + ''.join(f'{count:>16}' for count in reported) + f'{"seconds/seed":>14}')
    results, report = {}, {'regret': {}, 'seconds_per_seed': {}}
    for method in arguments.method:
        results[method], seconds = measure(method, table, arguments.seeds, arguments.queries)
        values = summary(results[method])
        report['regret'][method] = values
        report['seconds_per_seed'][method] = seconds
        print(f'{method:<14}' + ''.join(f'{f"{mean:.3f} ± {error:.3f}":>16}' for mean, error in values.values())
              + f'{seconds:>14.2f}', flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + '\n')
    if arguments.plot:
        draw(arguments.plot, results)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'benchmark_search.py: {error}', file=sys.stderr)
        sys.exit(2)
