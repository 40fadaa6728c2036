"""How well do scores rank architectures that have been trained on their own as well?

    python tools/ranking.py --alone exp/twice/seed0 exp/twice/seed1 --scores exp/supernet/seed* --json ranking.json

A DIR has an arch_pool and its arch_pool.perf; all have the same architectures. `--alone`: trainings from scratch, repeated with
other seeds. How far these agree with each other is the most that a score can be expected to reach: each is judged by each of
the others. A score is judged by each training in turn, and so are multiply-adds (the more, the better). Judged by Kendall's
τ-b, and by the regret of the top 5: the training's best accuracy minus the best among the five that the score likes most; of
five drawn at random it is expected to be what the row "chance" says. Pools: a ranking's correlation (Pearson) with the number
of average and max pools in the normal cell, which supernets that are not trained long can overrate.
"""

import argparse
import json
import math
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs

import architecture
import flags
from architecture import Architecture
from disk import read_lines
from model import NASNetworkCIFAR, count_madds
from operations import OPERATIONS

TOP = 5


class Judgement(NamedTuple):
    """How a ranking compares with trainings: means over the trainings."""

    tau: float
    regret: float | None = None  # points of per cent
    pools: float | None = None  # correlation with the number of pools in the normal cell


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's τ-b of two rows of values (count,); 0 where one of them is constant, and says nothing."""
    a, b = (np.sign(values[:, None] - values[None])[np.triu_indices(len(values), 1)] for values in (one, other))
    pairs = float((a != 0).sum()) * float((b != 0).sum())
    return float((a * b).sum() / pairs ** 0.5) if pairs else 0.0


def regret(score: np.ndarray, truth: np.ndarray) -> float:
    """What the best of the TOP by score (count,) lacks of the best by truth (count,); of equal scores the first are taken."""
    return float(truth.max() - truth[np.argsort(-score, kind='stable')[:TOP]].max())


def regret_of_chance(truth: np.ndarray) -> float:
    """The regret that TOP architectures drawn at random have on average."""
    best_first, count = np.sort(truth)[::-1], len(truth)
    chances = [math.comb(count - 1 - place, TOP - 1) / math.comb(count, TOP) for place in range(count)]  # that it is their best
    return float(best_first[0] - best_first @ np.array(chances))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's of two rows of values (count,); 0 where one of them is constant, and says nothing."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() > 0 and other.std() > 0 else 0.0


def judge(score: np.ndarray, trainings: list[np.ndarray], pools: np.ndarray) -> Judgement:
    """A score (count,) beside trainings and numbers of pools, (count,) each."""
    return Judgement(float(np.mean([kendall(score, truth) for truth in trainings])),
                     float(np.mean([regret(score, truth) for truth in trainings])), correlation(score, pools))


def read_scores(path: Path) -> dict[str, float]:
    """Architecture -> accuracy in per cent of a search's directory. Raises UserError."""
    try:
        archs, values = (read_lines(path / name) for name in ('arch_pool', 'arch_pool.perf'))
        scores = {str(architecture.parse(line)): 100 * float(value) for line, value in zip(archs, values, strict=True)}
    except OSError as error:
        raise flags.UserError(f'{error.filename}: cannot be read ({error.strerror}); a directory of a search has it') from None
    except ValueError as error:
        raise flags.UserError(f'{path}: arch_pool and arch_pool.perf do not belong together ({error})') from None
    return scores


def multiply_adds(arch: Architecture, layers: int, channels: int) -> int:
    """Those of the CIFAR network of an architecture."""
    return count_madds(NASNetworkCIFAR(10, layers, len(arch.normal) // 4, channels, 1.0, 1.0, False, 1, arch), 32, 0)


def pools_of(arch: Architecture) -> int:
    """How many operations of the normal cell are pools."""
    return sum('pool' in OPERATIONS[operation].name for operation in arch.normal[1::2])


def judgements(args: argparse.Namespace) -> dict[str, Judgement]:
    """All rankings by what they are called. Raises UserError."""
    tables = {path: read_scores(path) for path in (*args.alone, *args.scores)}
    first = tables[args.alone[0]]
    for path, table in tables.items():
        if table.keys() != first.keys():
            raise flags.UserError(f'{path}: has other architectures than {args.alone[0]}')
    if len(first) <= TOP:
        raise flags.UserError(f'{args.alone[0]}: has {len(first)} architectures; more than {TOP} are needed')
    lines = sorted(first)  # in an order that knows nothing of how good they are: of equal scores the first are taken
    archs = [architecture.parse(line) for line in lines]
    values = {path: np.array([table[line] for line in lines]) for path, table in tables.items()}
    pools = np.array([pools_of(arch) for arch in archs], float)
    trainings, scores = ([values[path] for path in paths] for paths in (args.alone, args.scores))
    found = {}
    if len(trainings) > 1:
        each = [judge(one, [other for other in trainings if other is not one], pools) for one in trainings]
        found['trainings among each other'] = Judgement(*np.mean(each, axis=0).tolist())
    found |= {str(path): judge(values[path], trainings, pools) for path in args.scores}
    if len(scores) > 1:
        found['scores among each other'] = Judgement(float(np.mean([kendall(*pair) for pair in combinations(scores, 2)])))
    sizes = [multiply_adds(arch, args.layers, args.channels) for arch in archs]
    found['multiply-adds'] = judge(np.array(sizes, float), trainings, pools)
    return found | {'chance': Judgement(0.0, float(np.mean([regret_of_chance(truth) for truth in trainings])), 0.0)}


def main() -> None:
    """Print the numbers and write the file."""
    parser = flags.Parser('How well scores rank architectures that have been trained on their own as well.',
                          '--alone DIR ... --scores DIR ...')
    parser.add_argument('--alone', type=Path, nargs='+', required=True, metavar='DIR', help='trainings of each on its own')
    parser.add_argument('--scores', type=Path, nargs='+', required=True, metavar='DIR', help='scores of the same architectures')
    parser.add_argument('--layers', type=flags.LAYERS, default=6, help='of the network whose multiply-adds are counted')
    parser.add_argument('--channels', type=flags.CHANNELS, default=36, help='of the network whose multiply-adds are counted')
    parser.add_argument('--json', type=Path, metavar='FILE', help='where to write the numbers')
    args = parser.parse_args()
    found = judgements(args)
    width = max(map(len, found))
    print(f'{"":<{width}}  Kendall τ  regret of the top {TOP}  pools')
    for name, judgement in found.items():
        rest = '' if judgement.regret is None else f'  {judgement.regret:19.2f}  {judgement.pools:5.2f}'
        print(f'{name:<{width}}  {judgement.tau:9.3f}{rest}')
    if args.json:
        runs.write(args.json, json.dumps({name: judgement._asdict() for name, judgement in found.items()}) + '\n')


if __name__ == '__main__':
    runs.run_tool(main)
