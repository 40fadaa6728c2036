"""Let the controller search tables of known accuracies, beside random search, evolution, local search and a Gaussian process.

    python tools/benchmark_search.py --table cifar10.csv --table other.csv --seeds 20 --plot regret.png --json regret.json

A search asks a table (see search_tables.py) for the accuracy of one architecture after another and is judged by its regret:
the table's best accuracy minus the best that it found, after 50, 100, 150, 200 and 300 different ones. All methods begin with
the same random architectures at the same seed and then ask in rounds.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from search_tables import (
    Sequence,
    Table,
    UserError,
    add_result,
    curve_of,
    fingerprint,
    read_results,
    read_tables,
    regrets,
    steps_of,
)

from controller import NAO, PRESETS, TARGETS, Settings, fit_all, propose, rank

CHECKPOINTS = (50, 100, 150, 200, 300)  # queries after which the regret is reported
POPULATION, SAMPLE = 50, 10  # of regularised evolution
PATIENCE = 100  # children in a row that had been asked before, after which evolution takes a random architecture
LENGTHS = (1, 2, 4, 8)  # what the Gaussian process chooses from
NOISE = 0.05  # its variance; that of the targets is 1
ROWS = 20_000  # random architectures that it ranks where a table has more
LARGEST_BETA = 2
KEY = ('table', 'method', 'settings', 'seed', 'queries', 'initial', 'round')  # what makes a search the one that --keep has


class Search(NamedTuple):
    """What a method sees of a search: the table's space, what has been asked, what comes when it proposes too little."""

    table: Table
    asked: dict[Sequence, float]
    order: list[Sequence]  # all architectures in a random order, which the search begins with
    round: int  # architectures to propose at a time
    generator: torch.Generator

    def pick(self, items: list) -> object:
        """A random one of a list."""
        return items[int(torch.randint(len(items), (), generator=self.generator))]

    def fresh(self, besides: Iterable[Sequence] = ()) -> Iterator[Sequence]:
        """Random architectures that have not been asked and are not among others."""
        besides = set(besides)
        return (sequence for sequence in self.order if sequence not in self.asked and sequence not in besides)

    def mutations(self, sequence: Sequence) -> list[Sequence]:
        """The architectures of the table that differ from one in a single position."""
        near = ((*sequence[:position], token, *sequence[position + 1:])
                for position, (first, last) in enumerate(self.table.allowed_tokens) for token in range(first, last + 1)
                if token != sequence[position])
        return [neighbour for neighbour in near if neighbour in self.table.accuracies]


# A method yields the proposals of one round after another; when it goes on, `asked` has their accuracies.


def random_search(search: Search) -> Iterator[list[Sequence]]:
    """Propose nothing: random architectures fill the rounds."""
    while True:
        yield []


def evolution(search: Search) -> Iterator[list[Sequence]]:
    """Regularised evolution (Real et al., 2019): the best of a sample is mutated, the oldest dies.

    The children of a round come from the population at its beginning. Where PATIENCE children in a row had been asked before,
    or the table lacks all mutations, a random architecture joins, so that a small table does not stop the search.
    """
    population = deque(search.asked, maxlen=POPULATION)
    while True:
        children: list[Sequence] = []
        new: set[Sequence] = set()
        repeats = 0
        while len(new) < min(search.round, len(search.order) - len(search.asked)):
            rivals = [search.pick(population) for _ in range(SAMPLE)]
            mutations = search.mutations(max(rivals, key=search.asked.__getitem__))
            child = search.pick(mutations) if mutations and repeats < PATIENCE else next(search.fresh(new))
            repeats = 0 if child not in search.asked and child not in new else repeats + 1
            children.append(child)
            new.update({child} - search.asked.keys())
        yield children
        population.extend(child for child in children if child in search.asked)


def local_search(search: Search) -> Iterator[list[Sequence]]:
    """Local search (White et al., 2020, arXiv:2005.02960): ask for all neighbours, go to the best, until none is better.

    It begins with the best of the first architectures, and anew with a random one.
    """
    place = max(search.asked, key=search.asked.__getitem__)
    while True:
        neighbours = search.mutations(place)
        while unknown := [neighbour for neighbour in neighbours if neighbour not in search.asked]:
            yield unknown[:search.round]
        best = max(neighbours, key=search.asked.__getitem__, default=place)
        if search.asked[best] > search.asked[place]:
            place = best
        else:
            place = next(search.fresh())
            yield [place]


def posterior(known: Tensor, targets: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation at one-hot rows `others` of a Gaussian process with targets (count,) at one-hot rows `known`.

    The kernel is exp(-Hamming distance / length), the length that of LENGTHS under which the targets are likeliest.
    """
    distances, cross = (known.sum(1)[0] - rows @ known.T for rows in (known, others))

    def solve(length: int) -> tuple[float, Tensor, Tensor, int]:
        factor = torch.linalg.cholesky((-distances / length).exp() + NOISE * torch.eye(len(known)))
        weights = torch.cholesky_solve(targets[:, None], factor)
        return float(-targets @ weights[:, 0] / 2 - factor.diagonal().log().sum()), factor, weights, length
    _, factor, weights, length = max(map(solve, LENGTHS), key=lambda solution: solution[0])
    kernel = (-cross / length).exp()
    explained = torch.linalg.solve_triangular(factor, kernel.T, upper=False).square().sum(0)
    return (kernel @ weights)[:, 0], (1 - explained).clamp(min=0).sqrt()


def gaussian_process(search: Search) -> Iterator[list[Sequence]]:
    """Rank the table by a Gaussian process on ranks: a round's maximise mean + β·deviation, β evenly from 0 to LARGEST_BETA."""
    words = search.table.allowed_tokens[-1][1] + 1

    def one_hot(sequences: list[Sequence]) -> Tensor:
        return torch.zeros(len(sequences), words).scatter_(1, torch.tensor(sequences), 1)
    while True:
        rest = list(search.fresh())
        candidates = [rest[row] for row in torch.randperm(len(rest), generator=search.generator)[:ROWS].tolist()]
        targets = rank(list(search.asked.values())).flatten()
        targets = (targets - targets.mean()) / targets.std().clamp(min=1e-6)
        mean, deviation = posterior(one_hot(list(search.asked)), targets, one_hot(candidates))
        chosen = []
        for beta in torch.linspace(0, LARGEST_BETA, search.round).tolist()[:len(candidates)]:
            chosen.append(int((mean + beta * deviation).argmax()))
            mean[chosen[-1]] = -math.inf
        yield [candidates[column] for column in chosen]


def nao(search: Search, settings: Settings) -> Iterator[list[Sequence]]:
    """Fit the controller to what has been asked and let it write new architectures; what the table lacks is passed over."""
    allowed_tokens = search.table.allowed_tokens
    naos = [NAO(allowed_tokens, allowed_tokens[-1][1] + 1, len(allowed_tokens)) for _ in range(settings.members)]
    for number in itertools.count():
        tokens, targets = torch.tensor(list(search.asked)), TARGETS[settings.targets](list(search.asked.values()))
        fit_all(naos, tokens, targets, settings, search.generator, first=not number)
        best = tokens[targets.flatten().argsort(descending=True, stable=True)[:settings.top]]
        yield propose(naos, best, list(search.asked), search.round, settings, search.generator,
                      search.table.accuracies.__contains__)[0]


METHODS: dict[str, Callable[[Search], Iterator[list[Sequence]]]] = {
    'random': random_search, 'evolution': evolution, 'local_search': local_search, 'gp': gaussian_process,
    **{f'nao_{preset}': functools.partial(nao, settings=settings) for preset, settings in PRESETS.items()}}
NAMES = {'random': 'random search', 'evolution': 'regularised evolution', 'local_search': 'local search',
         'gp': 'Gaussian process', **{f'nao_{preset}': f'NAO, preset {preset}' for preset in PRESETS}}


def run(method: Callable[[Search], Iterator[list[Sequence]]], table: Table, queries: int, initial: int, round_size: int,
        seed: int) -> list[Sequence]:
    """Ask for `initial` random architectures, then for what a method proposes, in rounds; the asked in order.

    Where it proposes too few that are new and in the table, random ones fill the round.
    """
    torch.manual_seed(seed)  # the initial weights and the dropout
    generator = torch.Generator().manual_seed(seed)
    sequences = list(table.accuracies)
    order = [sequences[row] for row in torch.randperm(len(sequences), generator=generator).tolist()]
    asked = {sequence: table.accuracies[sequence] for sequence in order[:min(initial, queries)]}
    search = Search(table, asked, order, round_size, generator)
    proposals = method(search)
    while len(asked) < min(queries, len(table.accuracies)):
        proposed = next(proposals)
        new = dict.fromkeys(sequence for sequence in proposed if sequence in table.accuracies and sequence not in asked)
        for sequence in itertools.islice(itertools.chain(new, search.fresh(new)), min(round_size, queries - len(asked))):
            asked[sequence] = table.accuracies[sequence]
    return list(asked)


def measure(method: str, name: str, table: Table, arguments: argparse.Namespace) -> tuple[Tensor, float]:
    """Regrets (seeds, queries) of a method and its mean processor seconds a seed; what --keep has is not measured again."""
    kept = read_results(arguments.keep, KEY) if arguments.keep else {}
    curves, seconds = [], []
    settings = fingerprint(PRESETS.get(method.removeprefix('nao_')))
    for seed in range(arguments.seeds):
        key = (name, method, settings, seed, arguments.queries, arguments.initial, arguments.round)
        if key not in kept:
            start = time.process_time()
            asked = run(METHODS[method], table, arguments.queries, arguments.initial, arguments.round, seed)
            kept[key] = dict(zip(KEY, key, strict=True)) | {'seconds': round(time.process_time() - start, 2),
                                                            'steps': steps_of(regrets(table, asked, arguments.queries))}
            if arguments.keep:
                add_result(arguments.keep, kept[key])
        curves.append(curve_of(kept[key]['steps'], arguments.queries))
        seconds.append(kept[key]['seconds'])
    return torch.stack(curves), sum(seconds) / len(seconds)


def standard_error(curves: Tensor) -> Tensor:
    """The standard error (queries,) of the mean of regrets (seeds, queries); that of one seed is 0."""
    return curves.std(0) / len(curves) ** 0.5 if len(curves) > 1 else torch.zeros_like(curves[0])


def summary(curves: Tensor) -> dict[int, tuple[float, float]]:
    """Mean and standard error of regrets (seeds, queries) at each checkpoint."""
    errors = standard_error(curves)
    return {count: (float(curves[:, count - 1].mean()), float(errors[count - 1]))
            for count in CHECKPOINTS if count <= curves.shape[1]}


def draw(path: str, results: dict[str, dict[str, Tensor]]) -> None:
    """Write the mean regrets (seeds, queries) of all tables and methods, with a band of one standard error, to a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    columns = min(2, len(results))
    rows = math.ceil(len(results) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns + 1, 3.5 * rows + 1), layout='constrained', squeeze=False)
    for axes, (name, curves_of) in itertools.zip_longest(panels.flat, results.items(), fillvalue=('', {})):
        if not name:
            axes.remove()
            continue
        for method, curves in curves_of.items():
            mean, error = curves.mean(0), standard_error(curves)
            queries = range(1, len(mean) + 1)
            line, = axes.plot(queries, mean, label=NAMES[method])
            axes.fill_between(queries, mean - error, mean + error, alpha=0.2, color=line.get_color())
        # Linear below a hundredth of a per cent: a logarithm has no zero, which good searches reach.
        axes.set_yscale('symlog', linthresh=0.01)
        axes.set_ylim(bottom=0)
        axes.set(title=name, xlabel='architectures evaluated', ylabel='regret (per cent)')
        axes.grid(alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
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
    parser.add_argument('--table', required=True, action='append', metavar='FILE',
                        help='CSV file of architectures and accuracies, may be repeated')
    parser.add_argument('--seeds', type=int, default=20, help='searches a method, seeded 0, 1, … (default: %(default)s)')
    parser.add_argument('--queries', type=int, default=300, help='architectures a search asks for (default: %(default)s)')
    parser.add_argument('--initial', type=int, default=40, help='random ones that it begins with (default: %(default)s)')
    parser.add_argument('--round', type=int, default=10, help='those that it asks for at a time (default: %(default)s)')
    parser.add_argument('--method', type=methods_of, action='append', metavar='METHOD[,METHOD]',
                        help=f'what to measure, may be repeated: {", ".join(METHODS)} (default: all of them)')
    parser.add_argument('--keep', type=Path, metavar='JSONL', help='add each search to this file, and make none again that it '
                        'has: what was interrupted goes on')
    parser.add_argument('--plot', metavar='PNG', help='draw the curves to this file (needs matplotlib)')
    parser.add_argument('--json', metavar='FILE', help='write the numbers to this file')
    arguments = parser.parse_args()
    for name, least in (('seeds', 1), ('initial', 1), ('round', 1), ('queries', CHECKPOINTS[0])):
        if getattr(arguments, name) < least:
            parser.error(f'--{name}={getattr(arguments, name)}, but at least {least} is needed')
    arguments.method = list(dict.fromkeys(itertools.chain.from_iterable(arguments.method or [METHODS])))
    return arguments


def main() -> None:
    """Measure the methods that were asked for on each table, print the regrets and write the files."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other
    tables = read_tables(arguments.table)
    for output in filter(None, (arguments.plot, arguments.json)):
        if not Path(output).parent.is_dir() or Path(output).is_dir():
            raise UserError(f'{output}: cannot be written, it is a folder or in one that does not exist')
    if arguments.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError('--plot needs matplotlib: pip install -r requirements-tools.txt')
    reported = [count for count in CHECKPOINTS if count <= arguments.queries]
    results: dict[str, dict[str, Tensor]] = {name: {} for name in tables}
    report = {name: {'regret': {}, 'seconds_per_seed': {}} for name in tables}
    for name, table in tables.items():
        if len(tables) > 1:
            print(name)
        print(f'{"regret after":<14}' + ''.join(f'{count:>16}' for count in reported) + f'{"seconds/seed":>14}')
        for method in arguments.method:
            results[name][method], seconds = measure(method, name, table, arguments)
            values = report[name]['regret'][method] = summary(results[name][method])
            report[name]['seconds_per_seed'][method] = seconds
            print(f'{method:<14}' + ''.join(f'{f"{mean:.3f} ± {error:.3f}":>16}' for mean, error in values.values())
                  + f'{seconds:>14.2f}', flush=True)
    if arguments.json:
        alone = next(iter(report.values())) if len(report) == 1 else {}
        Path(arguments.json).write_text(json.dumps({**alone, 'tables': report}, indent=2) + '\n')
    if arguments.plot:
        draw(arguments.plot, results)


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'benchmark_search.py: {error}', file=sys.stderr)
        sys.exit(2)
