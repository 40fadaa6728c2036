"""Searches of a surrogate of real trainings: what a proposer finds where good cells differ little and noise is large.

    python tools/surrogate.py exp/search/seed* --proposer=evolution
    python tools/surrogate.py exp/search/seed* --controller_preset=best --controller_apart=0.3 --keep surrogate.jsonl

Each seed draws its own truth from a Gaussian process's posterior given the trainings (results.*.jsonl; nodes 5, small space)
of all the directories, so that it fits what was measured and varies where nothing was. The kernel is over what cells compute,
however they are written; directories of the same name have a mean of their own (other images). A search measures truth +
noise. Printed are accuracies in per cent above a random architecture's mean: what it measured, and the truth. --keep has the
searches, a line each. To choose settings by, not to report: what is found here has to be shown by trainings.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import runs
import torch
from search_tables import UserError, add_result, fingerprint, read_results

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import architecture
import costs
import flags
import operations
import proposers
import search_setup
from architecture import Architecture
from costs import Budget
from disk import read_records
from proposers import Known

NODES, SPACE = 5, 'small'
CONVOLUTIONS, POOLS = (0, 1), (2, 3)  # operations of the small space
NOISE, SIGNAL, OFFSET, GAMMA = 2.0, 7.0, 4.0, 0.006  # variances in per cent², and the kernel exp(-GAMMA · distance²)
FOURIER = 4000  # random features of a draw from the prior
SEARCH = {'initial': 40, 'round': 10, 'rounds': 8}
KEY = ('settings', 'seed')


def describe(cell: tuple[int, ...]) -> list[float]:
    """What a cell computes, in numbers that do not depend on how it is written."""
    nodes = list(architecture.nodes_of(cell))
    edges = [edge for x, x_op, y, y_op in nodes for edge in ((x, x_op), (y, y_op))]
    deepest, shallowest, pooled = ([0.0, 0.0] for _ in range(3))  # of each state: convolutions and pools on the way to it
    for x, x_op, y, y_op in nodes:
        pair = ((x, x_op), (y, y_op))
        deepest.append(max(deepest[state] + (op in CONVOLUTIONS) for state, op in pair))
        shallowest.append(min(shallowest[state] + (op in CONVOLUTIONS) for state, op in pair))
        pooled.append(fmean(pooled[state] + (op in POOLS) for state, op in pair))
    out = architecture.unread_states(cell)
    last = [op for state in out if state > 1 for op in nodes[state - 2][1::2]]
    return [*(sum(op == each for _, op in edges) for each in range(5)),
            *(sum(edge == (state, each) for edge in edges) for state in (0, 1) for each in range(5)),
            *(last.count(each) for each in range(5)),
            len(out), *(fmean(values[state] for state in out) for values in (deepest, shallowest, pooled)),
            max(deepest[state] for state in out), min(shallowest[state] for state in out),
            *(any(state == each for state, _ in edges) for each in (0, 1)),
            sum(x == y for x, _, y, _ in nodes), sum(node[:2] == node[2:] for node in nodes)]


def features(archs: list[Architecture]) -> np.ndarray:
    """(count, features) of architectures."""
    return np.array([describe(arch.normal) + describe(arch.reduction) for arch in archs], dtype=float)


class Measured(NamedTuple):
    """Trainings."""

    inputs: np.ndarray  # what the architectures compute, (count, features)
    groups: np.ndarray  # numbers of their directories' names, (count,)
    accuracies: np.ndarray  # per cent, (count,)


def read_measured(folders: list[Path]) -> Measured:
    """The trainings of directories. Raises UserError."""
    found = {}
    for path in [path for folder in folders for path in sorted(folder.glob('results.*.jsonl'))]:
        try:
            for record in read_records(path, {'candidate': {'arch': str, 'accuracy': (int, float)}}):
                if record['kind'] == 'candidate' and 'error' not in record:
                    arch = architecture.parse(record['arch'], NODES, operations.SEARCH_SPACES[SPACE])
                    found[path.parent.name, arch] = 100 * record['accuracy']
        except OSError as error:
            raise flags.UserError(f'{path}: cannot be read ({error.strerror})') from None
        except architecture.ArchitectureError as error:
            raise flags.UserError(f'{path}: {error}') from None
    if not found:
        raise flags.UserError(f'{folders[0]}: has no results.*.jsonl with a training, which a search by --method=NAO leaves')
    groups, archs = zip(*found, strict=True)
    return Measured(features(list(archs)), np.unique(groups, return_inverse=True)[1], np.array(list(found.values())))


class Truth:
    """One draw from the posterior (Matheron's rule: a draw from the prior, corrected by what was measured)."""

    def __init__(self, measured: Measured, seed: int):
        random = np.random.default_rng((seed, 0))
        self.mean, self.deviation = measured.inputs.mean(0), measured.inputs.std(0) + 1e-9
        self.known = (measured.inputs - self.mean) / self.deviation
        self.waves = random.normal(0, (2 * GAMMA) ** 0.5, (self.known.shape[1], FOURIER))
        self.phases = random.uniform(0, 2 * np.pi, FOURIER)
        self.weights = random.normal(0, (2 * SIGNAL / FOURIER) ** 0.5, FOURIER)
        same = measured.groups[:, None] == measured.groups
        covariance = self.kernel(self.known) + OFFSET * same + NOISE * np.eye(len(same))
        offsets = random.normal(0, OFFSET ** 0.5, measured.groups.max() + 1)[measured.groups]
        drawn = self.prior(self.known) + offsets + random.normal(0, NOISE ** 0.5, len(same))
        gap = measured.accuracies - measured.accuracies.mean() - drawn
        self.correction = np.linalg.solve(covariance, gap)

    def kernel(self, inputs: np.ndarray) -> np.ndarray:
        """Covariance (count, known) of standardised inputs with those known."""
        squares = (inputs ** 2).sum(1)[:, None] + (self.known ** 2).sum(1) - 2 * inputs @ self.known.T
        return SIGNAL * np.exp(-GAMMA * squares)

    def prior(self, inputs: np.ndarray) -> np.ndarray:
        """The draw from the prior at standardised inputs."""
        return np.cos(inputs @ self.waves + self.phases) @ self.weights

    def __call__(self, archs: list[Architecture]) -> np.ndarray:
        """The truth (count,) of architectures, in per cent."""
        inputs = (features(archs) - self.mean) / self.deviation
        return self.prior(inputs) + self.kernel(inputs) @ self.correction


def search(truth: Truth, args: argparse.Namespace, seed: int) -> dict:
    """One search as train_search.py makes it: 40 random architectures, then eight rounds of ten."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    space, settings = architecture.vocabulary(NODES, SPACE), search_setup.settings_of(args)
    budget = Budget({}, '', lambda arch: None)  # no limits
    naos = search_setup.build_controllers(args, space, torch.device('cpu'))
    average = truth(costs.sample(2000, space, torch.Generator().manual_seed(seed + 10 ** 6), budget, ())).mean()
    pool = costs.sample(SEARCH['initial'], space, generator, budget, ())
    real = list(truth(pool) - average)
    noise = np.random.default_rng((seed, 1))  # other numbers than the truth's
    measured = [value + noise.normal(0, NOISE ** 0.5) for value in real]
    born = list(range(len(pool)))
    run = SimpleNamespace(device=torch.device('cpu'), log=lambda line: None, warn=lambda line: None)
    for number in range(SEARCH['rounds']):
        order = sorted(range(len(pool)), key=lambda index: -measured[index])
        known = Known(*([values[index] for index in order] for values in (pool, measured, born)), space, generator, naos,
                      settings, budget)
        if args.proposer in proposers.LEARNING:
            proposers.fit(run, known, args.controller_expand, first=number == 0)
        new, _ = proposers.PROPOSERS[args.proposer](known, SEARCH['round'])
        if not new:
            break
        born += range(len(pool), len(pool) + len(new))
        pool += new
        real += list(truth(new) - average)
        measured += [value + noise.normal(0, NOISE ** 0.5) for value in real[len(measured):]]
    return {'measured': [float(value) for value in measured], 'truth': [float(value) for value in real]}


def parse_args() -> argparse.Namespace:
    """The tool's flags; those of the controller are the search's. Raises UserError."""
    parser = flags.Parser('Search a surrogate of real trainings.', 'DIR ...')
    parser.add_argument('folders', type=Path, nargs='+', metavar='DIR', help='of a search, whose results.*.jsonl are known')
    flags.add(parser, 'proposer', 'who proposes new architectures', 'controller', choices=proposers.PROPOSERS)
    flags.add(parser, 'seeds', 'searches, of seeds from 1000', 8, type=flags.POSITIVE_INT)
    flags.add(parser, 'keep', 'file that searches are kept in, and not made again', type=Path)
    search_setup.add_controller_flags(parser, without=('seed_arch', 'new_arch'))
    search_setup.set_preset(parser)
    args = parser.parse_args()
    search_setup.check_controller(args)
    return args


def show(searches: list[dict]) -> None:
    """Print means and standard errors over the searches."""
    best = defaultdict(list)
    for each in searches:
        measured, truth = np.array(each['measured']), np.array(each['truth'])
        for count in (60, 120):
            found = measured[:count].argmax()
            best[f'best score after {count}'].append(measured[found])
            best[f'its truth, after {count}'].append(truth[found])
        best['mean truth of the chosen'].append(truth[SEARCH['initial']:].mean())
        best['of the last 20'].append(truth[-20:].mean())
    for what, values in best.items():
        error = f' ± {stdev(values) / len(values) ** 0.5:.2f}' if len(values) > 1 else ''
        print(f'{what:>26} {fmean(values):6.2f}{error}')


def main() -> None:
    """Search, keep and show."""
    args = parse_args()
    torch.set_num_threads(1)
    measured = read_measured(args.folders)
    learnt = args.proposer in proposers.LEARNING
    given = {name: value for name, value in vars(args).items() if name.startswith('controller_')} if learnt else {}
    settings = fingerprint((args.proposer, given, measured.accuracies.tolist()))
    try:
        kept = read_results(args.keep, KEY) if args.keep else {}
    except UserError as error:
        raise flags.UserError(str(error)) from None
    searches = []
    for seed in range(1000, 1000 + args.seeds):
        if (settings, seed) not in kept:
            start = time.process_time()
            line = {'proposer': args.proposer, 'changed': args.changed, 'settings': settings, 'seed': seed}
            line |= search(Truth(measured, seed), args, seed) | {'seconds': time.process_time() - start}
            kept[settings, seed] = line
            if args.keep:
                add_result(args.keep, line)
        searches.append(kept[settings, seed])
    print(f'{args.proposer}, {len(searches)} searches, {fmean(each["seconds"] for each in searches):.0f} CPU s each')
    show(searches)


if __name__ == '__main__':
    runs.run_tool(main)
