"""Measure what each change of the controller's preset `best` contributes to its searches of tables.

    python tools/ablation.py --table cifar10.csv --table other.csv --seeds 5 --output ablation.jsonl

Measures `paper`, `paper` with each single change of `best`, `best`, and `best` without each change. Every search adds a line
to the output, {"what", "settings", "table", "seed", "round", "regret", "seconds"}, and is not made again where that file has
it; a table in Markdown of the mean regrets after 150 / 200 queries, with their standard errors after 200, is printed at the
end.
"""

import argparse
import functools
import re
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import torch
from benchmark_search import CHECKPOINTS, nao, run
from search_tables import Table, UserError, add_result, fingerprint, read_results, read_tables, regrets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from controller import PRESETS, Settings

INITIAL = 40  # random architectures that a search begins with
# What is one change: fields that mean something only together.
CHANGES = {
    'first fit of 300 epochs': ('epochs',),
    'later fits of a few steps': ('later_updates', 'later_per_token'),
    'predictor fitted anew': ('predictor_updates',),
    'trade-off of a half': ('trade_off',),
    'ranks and cross-entropy': ('targets', 'loss'),
    'unlabelled': ('unlabelled',),
    'learning rate': ('lr',),
    'members': ('members',),
    'choice among candidates': ('candidates', 'beta'),
    'disagreement': ('beta',),
    'redrawn starts': ('redrawn',),
    'lambdas': ('lambdas',)}


def variants() -> dict[str, Settings]:
    """The settings to measure, by what they are, without those in which a change does nothing."""
    paper, best = PRESETS['paper'], PRESETS['best']
    settings = {'best': best, 'paper': paper}
    for what, fields in CHANGES.items():
        settings[f'best without: {what}'] = best._replace(**{field: getattr(paper, field) for field in fields})
        settings[f'paper with: {what}'] = paper._replace(**{field: getattr(best, field) for field in fields})
    return {what: each for what, each in settings.items() if each.candidates or not each.beta}


def measure(settings: Settings, table: Table, seed: int, queries: int, in_round: int) -> dict:
    """The regrets of one search at the checkpoints and its processor seconds."""
    start = time.process_time()
    curve = regrets(table, run(functools.partial(nao, settings=settings), table, queries, INITIAL, in_round, seed), queries)
    return {'regret': {str(count): float(curve[count - 1]) for count in CHECKPOINTS if count <= queries},
            'seconds': time.process_time() - start}


def cell(lines: list[dict]) -> str:
    """The mean regrets of searches of one kind after 150 / 200 queries, with the standard error of the latter."""
    if not lines:
        return '–'
    early, late = ([line['regret'][count] for line in lines] for count in ('150', '200'))
    error = f' ± {stdev(late) / len(late) ** 0.5:.3f}' if len(late) > 1 else ''
    return f'{fmean(early):.3f} / {fmean(late):.3f}{error}'


def show(lines: list[dict], tables: list[str]) -> None:
    """Print the searches' mean regrets as a table in Markdown."""
    print('| rounds of | | ' + ' | '.join(tables) + ' | seeds | seconds |\n|---|---|' + '---|' * (len(tables) + 2))
    for in_round, what in dict.fromkeys((line['round'], line['what']) for line in lines):
        of = [line for line in lines if (line['round'], line['what']) == (in_round, what)]
        cells = [cell([line for line in of if line['table'] == name]) for name in tables]
        print(f'| {in_round} | {what} | ' + ' | '.join(cells) + f' | {len({line["seed"] for line in of})} '
              f'| {fmean(line["seconds"] for line in of):.0f} |')


def main() -> None:
    """Measure what has not been measured, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--table', required=True, action='append', metavar='FILE', help='CSV file, may be repeated')
    parser.add_argument('--seeds', type=int, default=5, help='searches a variant (default: %(default)s)')
    parser.add_argument('--queries', type=int, default=200, help='architectures a search asks for (default: %(default)s)')
    parser.add_argument('--round', type=int, default=10, help='architectures to ask for at a time (default: %(default)s)')
    parser.add_argument('--only', default='', help='a regular expression: only variants in whose names it is found')
    parser.add_argument('--output', required=True, type=Path, metavar='JSONL', help='file that the results are added to')
    arguments = parser.parse_args()
    if arguments.queries < 200:
        parser.error(f'--queries={arguments.queries}, but the regret is reported after 150 and 200')
    for name in ('seeds', 'round'):
        if getattr(arguments, name) < 1:
            parser.error(f'--{name}={getattr(arguments, name)}, but at least 1 is needed')
    try:
        only = re.compile(arguments.only)
    except re.error as error:
        parser.error(f'--only={arguments.only} is no regular expression ({error})')
    torch.set_num_threads(1)
    tables = read_tables(arguments.table)
    results = read_results(arguments.output, ('what', 'settings', 'table', 'seed', 'round'))
    for seed in range(arguments.seeds):
        for what, settings in variants().items():
            for name, table in tables.items():
                key = {'what': what, 'settings': fingerprint(settings), 'table': name, 'seed': seed, 'round': arguments.round}
                if tuple(key.values()) not in results and only.search(what):
                    line = key | measure(settings, table, seed, arguments.queries, arguments.round)
                    add_result(arguments.output, line)
                    results[tuple(key.values())] = line
    prints = {what: fingerprint(settings) for what, settings in variants().items()}
    show([line for line in results.values() if line['settings'] == prints.get(line['what'])], list(tables))


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'ablation.py: {error}', file=sys.stderr)
        sys.exit(2)
