"""Compare groups of searches, or of trainings, that differ in their seeds: is one better than another, by how much, how sure?

    python tools/compare.py best='exp/best/seed*' random='exp/random/seed*' -o compare.png --json compare.json

Of searches by NAO, the complete way, it takes the best accuracy so far against the architectures evaluated, from
results.*.jsonl; of others the pool's scores; of trainings the accuracy of each epoch on the test, or the held-out, images.
Groups are compared where all their runs are, so that it works while runs go on. Differences are between runs of the same
--seed, in points of per cent: their mean, a bootstrap interval of 95 %, and p of the exact permutation test, which flips their
signs in all 2^n ways (two-sided).
"""

import glob
import itertools
import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plot
import runs
from runs import RunFiles
from table import aligned

import flags
from disk import read_lines, read_records

RESAMPLES = 10_000  # of the bootstrap


class Member(NamedTuple):
    """What a run of a group has reached so far."""

    path: Path
    seed: int | None
    unit: str  # of x
    x: np.ndarray  # (points,): architectures evaluated, or epochs
    y: np.ndarray  # (points,): accuracy in per cent, of a search the best so far
    final: float | None  # in per cent: a search's best after training from scratch; what held-out images chose, tested once
    hours: float

    def at(self, x: float) -> float:
        """The accuracy at a point that the run has reached, else nan."""
        index = np.searchsorted(self.x, x, side='right') - 1
        return float(self.y[index]) if index >= 0 and x <= self.x[-1] else np.nan


def flag_of(run: RunFiles, name: str) -> Any:
    """The value of one of the run's flags, None while nothing names it; the seed may then be in its directory's name."""
    try:
        return run.args.get(name)
    except flags.UserError:
        match = re.search(r'seed(\d+)$', str(run.path))
        return int(match.group(1)) if match and name == 'seed' else None


def given(run: RunFiles) -> list[tuple[float, dict[str, Any]]]:
    """(0, record) of what another search had trained already, as --child_results says."""
    path = flag_of(run, 'child_results')
    if not path:
        return []
    try:
        records = read_records(Path(path), runs.RESULTS)
    except OSError as error:
        raise flags.UserError(f'{run.path}: its --child_results={path} cannot be read ({error.strerror})') from None
    file = run.path / 'arch_pool'  # a finished search's, where the checkpoint was not kept
    pool = run.checkpoint.get('pool') or (read_lines(file) if file.exists() else None)
    if pool is None:
        raise flags.UserError(f'{run.path}: which results of --child_results={path} are its own is not known without '
                              'checkpoint.pt or arch_pool; left out')
    return [(0.0, record) for record in records
            if record['kind'] == 'candidate' and 'error' not in record and record['arch'] in pool]


def evaluations(run: RunFiles) -> list[float]:
    """The accuracies of candidates that were trained on their own, in the order of their ends.

    Each process writes its own file; the time that its trainings took so far says what came before what. Where some were
    another search's, and took no time, they are in the order in which they were proposed, as far as checkpoint.pt says that.
    A training that failed counts, as in the search itself, only until it was tried again.
    """
    others = given(run)
    ended = [*others]
    for path in sorted(run.path.glob('results.*.jsonl')):
        records = read_records(path, runs.RESULTS)
        times = list(itertools.accumulate(record['seconds'] for record in records))
        ended += [(time, record) for time, record in zip(times, records, strict=True) if record['kind'] == 'candidate']
    first: dict[str, dict[str, Any]] = {}
    for _, record in sorted(ended, key=lambda result: result[0]):
        if 'error' in first.setdefault(record['arch'], record):
            first[record['arch']] = record
    if others:
        born = dict(zip(run.checkpoint.get('pool', []), run.checkpoint.get('born', []), strict=False))
        first = dict(sorted(first.items(), key=lambda item: born.get(item[0], 0)))
    return [record['accuracy'] for record in first.values()]


def scores(run: RunFiles) -> list[tuple[int, float]]:
    """(architectures evaluated so far, best accuracy of the pool) after each scoring of a search."""
    points, count = [], 0
    for record in run.lines:
        if record['kind'] == 'score':
            count = count or len(record['accuracies'])
            points.append((count, max(record['accuracies'])))
        elif record['kind'] == 'new':
            count += record['new']
    return points


def member(run: RunFiles) -> Member:
    """What a run has reached; raises UserError while that is nothing."""
    accuracies = evaluations(run)
    unit, points = 'architectures evaluated', [*enumerate(accuracies, start=1)] or scores(run)
    if points:
        x, y = zip(*points, strict=True)
        y = 100 * np.maximum.accumulate(y)
    elif run.is_search:
        raise flags.UserError(f'{run.path}: has no scoring yet; left out')
    else:
        unit, x, y = 'epoch', *zip(*(
            (record['epoch'], runs.evaluation(record)['top1']) for record in run.records('epoch')), strict=True)
    # A search whose candidates were trained on their own ranks them by that: nothing is trained once more.
    ranked = [] if accuracies else [100 * record['accuracy'] for record in run.ranked]
    tested = [record['test']['top1'] for record in run.lines if record['kind'] == 'final']
    final = tested[-1] if tested else max(ranked, default=None)
    return Member(run.path, flag_of(run, 'seed'), unit, np.array(x), np.array(y, float), final, (run.seconds or 0) / 3600)


def merge(members: list[Member], count: int) -> list[Member]:
    """Members whose seeds agree when they are divided by `count` as one, with their means: repeats are not independent.

    Those that do not have as many repeats as others yet are left out.
    """
    merged, numbers = [], Counter(member.seed // count for member in members)
    for seed in sorted(seed for seed, number in numbers.items() if number == max(numbers.values())):
        repeats = [member for member in members if member.seed // count == seed]
        x = min((member.x for member in repeats), key=len)
        finals = [member.final for member in repeats]
        merged.append(Member(repeats[0].path, seed, repeats[0].unit, x, np.mean([member.y[:len(x)] for member in repeats], 0),
                             None if None in finals else float(np.mean(finals)), sum(member.hours for member in repeats)))
    return merged


def read_groups(arguments: list[str], mistakes: list[str], repeats: int = 1) -> dict[str, list[Member]]:
    """The members of the groups that the user names as GROUP=GLOB; repeats: see `merge`. Raises UserError."""
    groups: dict[str, list[Member]] = {}
    for argument in arguments:
        name, equals, pattern = argument.partition('=')
        paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        if not (name and equals) or name in groups:
            raise flags.UserError(f"{argument}: must be GROUP=GLOB, each group once, such as best='exp/best/seed*'")
        if not paths:
            raise flags.UserError(f'{argument}: no file or directory is called so')
        groups[name] = []
        for run in runs.find(paths, mistakes):
            runs.succeeds(mistakes, lambda run=run, name=name: groups[name].append(member(run)))
        seeds = [one.seed for one in groups[name] if one.seed is not None]
        if len(set(seeds)) < len(seeds):
            raise flags.UserError(f'{argument}: several of these runs have the same --seed; name one for each')
        if repeats > 1 and len(seeds) < len(groups[name]):
            raise flags.UserError(f'{argument}: the --seed of some of these runs is unknown, and --repeats goes by it')
        if repeats > 1:
            groups[name] = merge(groups[name], repeats)
    groups = {name: members for name, members in groups.items() if members}
    units = {one.unit for members in groups.values() for one in members}
    if len(units) > 1:
        raise flags.UserError('searches and trainings cannot be compared with each other')
    return groups


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean, and its standard error: None for a single value."""
    return values.mean().item(), (values.std(ddof=1) / len(values) ** 0.5).item() if len(values) > 1 else None


def permutation_p(differences: np.ndarray) -> float:
    """The share of all 2^n choices of signs for which the differences' mean is at least as far from 0 as it is."""
    def sums(values: np.ndarray) -> np.ndarray:
        total = np.zeros(1)
        for value in values:
            total = np.concatenate([total - value, total + value])
        return np.sort(total)
    limit = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if limit <= 0:
        return 1.0
    ones, others = (sums(half) for half in np.array_split(differences, 2))  # of which every pair is one choice
    beyond = len(others) - np.searchsorted(others, limit - ones) + np.searchsorted(others, -limit - ones, side='right')
    return beyond.sum().item() / 2 ** len(differences)


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """The interval in which 95 % of the means of resampled differences lie; always the same draws."""
    drawn = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences)))
    return tuple(np.percentile(drawn.mean(1), [2.5, 97.5]).tolist())


def compare(one: list[Member], other: list[Member], value: Any) -> dict[str, Any] | None:
    """The differences of a value between runs of the same seed, None without any."""
    values = [{member.seed: value(member) for member in members if member.seed is not None and value(member) is not None
               and np.isfinite(value(member))} for members in (one, other)]
    seeds = sorted(values[0].keys() & values[1].keys())
    if not seeds:
        return None
    differences = np.array([values[0][seed] - values[1][seed] for seed in seeds])
    interval = bootstrap_interval(differences) if len(seeds) > 1 else None
    return {'seeds': seeds, 'differences': differences.tolist(), 'mean': differences.mean().item(), 'interval': interval,
            'p': permutation_p(differences)}


def report(groups: dict[str, list[Member]], at: int | None = None) -> dict[str, Any]:
    """All numbers, as --json writes them; `at`: where to compare, None: as far as all runs are."""
    members = [member for group in groups.values() for member in group]
    at = at or min(int(member.x[-1]) for member in members)
    now, final = (f'accuracy after epoch {at}', runs.TEST_ONCE) if members[0].unit == 'epoch' else (
        f'best after {at}', 'best, trained from scratch')
    what = {now: lambda member: member.at(at), final: lambda member: member.final}
    found: dict[str, Any] = {'unit': members[0].unit, 'at': at, 'groups': {}, 'differences': []}
    for name, group in groups.items():
        values = {title: np.array([got for member in group if (got := value(member)) is not None and np.isfinite(got)])
                  for title, value in what.items()}
        found['groups'][name] = {
            'values': {title: mean_and_error(got) for title, got in values.items() if len(got)},
            'hours': mean_and_error(np.array([member.hours for member in group])),
            'runs': [member._asdict() | {'path': str(member.path), 'x': member.x.tolist(), 'y': member.y.tolist()}
                     for member in group]}
    for (one, two), (title, value) in itertools.product(itertools.combinations(groups, 2), what.items()):
        if difference := compare(groups[one], groups[two], value):
            found['differences'].append({'of': [one, two], 'what': title} | difference)
    return found


def tables(found: dict[str, Any]) -> str:
    """The numbers as a reader wants them."""
    def pair(values: tuple[float, float | None] | None, unit: str = '') -> str:
        return '-' if values is None else ' ± '.join(f'{value:.2f}' for value in values if value is not None) + unit
    groups = found['groups']
    titles = list(dict.fromkeys(title for group in groups.values() for title in group['values']))
    rows = [['group', 'runs', found['unit'], *titles, 'hours']]
    for name, group in groups.items():
        reached = sorted({run['x'][-1] for run in group['runs']})
        rows.append([name, str(len(group['runs'])), '-'.join(map(str, dict.fromkeys([reached[0], reached[-1]]))),
                     *(pair(group['values'].get(title), ' %') for title in titles), pair(group['hours'])])
    several = any(len(group['runs']) > 1 for group in groups.values())
    parts = [aligned(rows) + ('\n±: standard error of the mean' if several else '')]
    if found['differences']:
        rows = [['paired by seed', 'of', 'seeds', 'difference', '95 % interval', 'p']]
        rows += [[' - '.join(each['of']), each['what'], str(len(each['seeds'])), f'{each["mean"]:+.2f}',
                  '[{:+.2f}, {:+.2f}]'.format(*each['interval']) if each['interval'] else '-', f'{each["p"]:.4f}']
                 for each in found['differences']]
        parts.append(aligned(rows))
    return '\n\n'.join(parts)


def figure(groups: dict[str, list[Member]], at: int) -> Any:
    """A matplotlib Figure: what each group has reached so far, mean ± standard error, and each run's value at `at`."""
    runs.need('matplotlib')
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(plot.STYLE):
        drawing = Figure(figsize=(9.6, 3.8), layout='constrained')
        left, right = drawing.subplots(1, 2, width_ratios=[2, 1])
        unit, curves, ends = next(iter(groups.values()))[0].unit, [], []
        how = {'drawstyle': 'default' if unit == 'epoch' else 'steps-post'}
        for (name, members), colour in zip(groups.items(), itertools.cycle(plot.COLOURS)):
            x = np.unique(np.concatenate([member.x for member in members]))
            reached = np.array([[member.at(value) for value in x] for member in members])
            there = np.isfinite(reached)
            mean = np.nanmean(reached, axis=0)
            whole = there.all(0)
            left.plot(x, np.where(whole, mean, np.nan), color=colour, label=plot.literal(name),
                      marker='o' if len(x) < plot.FEW else None, markersize=4, **how)
            left.plot(x[there.any(0)], mean[there.any(0)], ':', color=colour, linewidth=1, **how)  # where not all are yet
            curves.append(mean)
            if len(members) > 1:
                error = reached.std(0, ddof=1) / len(members) ** 0.5
                left.fill_between(x, mean - error, mean + error, where=whole, color=colour, alpha=0.2, linewidth=0,
                                  step=None if unit == 'epoch' else 'post')
                curves += [mean - error, mean + error]
            ends.append([member.at(at) for member in members])
        places = [np.full(len(values), place) for place, values in enumerate(ends)]
        for seed in sorted({member.seed for members in groups.values() for member in members if member.seed is not None}):
            pairs = [(place, member.at(at)) for place, members in enumerate(groups.values()) for member in members
                     if member.seed == seed]
            right.plot(*zip(*pairs, strict=True), color='#bbbbbb', linewidth=1, zorder=1)
        for place, values, colour in zip(places, ends, itertools.cycle(plot.COLOURS)):
            right.scatter(place, values, color=colour, s=24, zorder=2)
            mean, error = mean_and_error(np.array(values))
            right.errorbar(place[0] + 0.18, mean, error or 0, fmt='D', color=colour, markersize=5, capsize=3)
        right.set_xticks(range(len(groups)), [textwrap.fill(plot.literal(name), 14) for name in groups])
        right.set_xlim(-0.5, len(groups) - 0.5)
        plot.finish(left, 'mean of the seeds ± standard error', unit,
                    'accuracy (%)' if unit == 'epoch' else 'best so far, validation accuracy (%)', curves, 100)
        where = f'at epoch {at}' if unit == 'epoch' else f'after {at}'
        plot.finish(right, f'each seed {where}', 'lines join runs of the same seed', 'accuracy (%)', ends, 100)
        plot.count_from_left(left)
        for axes in (left, right):
            axes.set_title(axes.get_title('left'), pad=20)
    return drawing


def main() -> None:
    """Print the numbers and write the files."""
    parser = flags.Parser('Compare groups of searches, or of trainings, that differ in their seeds.', 'GROUP=GLOB ...')
    parser.add_argument('groups', metavar='GROUP=GLOB', nargs='+', help='a name, and output directories of runs, in quotes: '
                        "best='exp/best/seed*'")
    parser.add_argument('--at', type=flags.POSITIVE_INT, metavar='N', help='compare after so many architectures, or epochs '
                        '(default: as many as all runs have)')
    parser.add_argument('--repeats', type=flags.POSITIVE_INT, default=1, metavar='N', help='runs whose seeds agree when '
                        'divided by N, such as 30, 31 and 32 by 10, repeat one thing and count as one, with their mean')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='a figure to draw: FILE.png, FILE.svg or FILE.pdf')
    parser.add_argument('--json', type=Path, metavar='FILE', help='where to write all numbers, the curves too')
    args = parser.parse_args()
    mistakes: list[str] = []
    form = runs.format_of(args.output) if args.output else ''
    groups = read_groups(args.groups, mistakes, args.repeats)
    if groups:
        found = report(groups, args.at)
        print(tables(found), flush=True)
        if args.json:
            runs.write(args.json, json.dumps(found) + '\n')
        if form:
            runs.write(args.output, plot.render(figure(groups, found['at']), form))
    runs.name_mistakes(mistakes)


if __name__ == '__main__':
    runs.run_tool(main)
