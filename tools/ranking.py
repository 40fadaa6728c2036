"""How well do scores rank architectures that have been trained on their own as well?

    python tools/ranking.py --alone exp/twice/seed0 exp/twice/seed1 --scores exp/supernet/seed* --json ranking.json

A DIR has an arch_pool and its arch_pool.perf; all have the same architectures. `--alone`: trainings from scratch, repeated with
other seeds. How far these agree with each other is the most that a score can be expected to reach: each is judged by each of
the others. A score is judged by each training in turn, and so are multiply-adds (the more, the better). Judged by Kendall's
τ-b, and by the regret of the top 5: the training's best accuracy minus the best among the five that the score likes most.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs

import architecture
import flags
from architecture import Architecture
from disk import read_lines
from model import NASNetworkCIFAR, count_madds

TOP = 5


class Judgement(NamedTuple):
    """How a ranking compares with trainings: means over the trainings."""

    tau: float
    regret: float  # points of per cent


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's τ-b of two rows of values (count,); 0 where one of them is constant, and says nothing."""
    a, b = (np.sign(values[:, None] - values[None])[np.triu_indices(len(values), 1)] for values in (one, other))
    pairs = float((a != 0).sum()) * float((b != 0).sum())
    return float((a * b).sum() / pairs ** 0.5) if pairs else 0.0


def regret(score: np.ndarray, truth: np.ndarray) -> float:
    """What the best of the TOP by score (count,) lacks of the best by truth (count,); of equal scores the first are taken."""
    return float(truth.max() - truth[np.argsort(-score, kind='stable')[:TOP]].max())


def judge(score: np.ndarray, trainings: list[np.ndarray]) -> Judgement:
    """A score (count,) beside trainings (count,) each."""
    return Judgement(float(np.mean([kendall(score, truth) for truth in trainings])),
                     float(np.mean([regret(score, truth) for truth in trainings])))


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


def judgements(args: argparse.Namespace) -> dict[str, Judgement]:
    """All rankings by what they are called. Raises UserError."""
    tables = {path: read_scores(path) for path in (*args.alone, *args.scores)}
    first = tables[args.alone[0]]
    for path, table in tables.items():
        if table.keys() != first.keys():
            raise flags.UserError(f'{path}: has other architectures than {args.alone[0]}')
    if len(first) <= TOP:
        raise flags.UserError(f'{args.alone[0]}: has {len(first)} architectures; more than {TOP} are needed')
    archs = sorted(first)  # in an order that knows nothing of how good they are: of equal scores the first are taken
    values = {path: np.array([table[arch] for arch in archs]) for path, table in tables.items()}
    trainings = [values[path] for path in args.alone]
    found = {}
    if len(trainings) > 1:
        each = [judge(one, [other for other in trainings if other is not one]) for one in trainings]
        found['trainings among each other'] = Judgement(*np.mean(each, axis=0).tolist())
    found |= {str(path): judge(values[path], trainings) for path in args.scores}
    sizes = [multiply_adds(architecture.parse(arch), args.layers, args.channels) for arch in archs]
    return found | {'multiply-adds': judge(np.array(sizes, float), trainings)}


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
    print(f'{"":<{width}}  Kendall τ  regret of the top {TOP}')
    for name, judgement in found.items():
        print(f'{name:<{width}}  {judgement.tau:9.3f}  {judgement.regret:6.2f}')
    if args.json:
        runs.write(args.json, json.dumps({name: judgement._asdict() for name, judgement in found.items()}) + '\n')


if __name__ == '__main__':
    runs.run_tool(main)
