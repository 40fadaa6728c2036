"""Measure what each change of the controller's preset `best` contributes to its searches of tables.

    python tools/ablation.py --table cifar10.csv --table other.csv --seeds 5 --output ablation.jsonl

Measures `paper`, `paper` with each single change of `best`, `best`, and `best` without each change. Every search adds a line
to the output, {"what", "table", "seed", "regret", "seconds"}, and is not made again where that file has it; a table in Markdown
of the mean regrets after 150 / 200 queries is printed at the end.
"""

import argparse
import functools
import re
import sys
import time
from pathlib import Path

import torch
from benchmark_search import CHECKPOINTS, nao, run
from search_tables import Table, UserError, add_result, read_results, read_table, regrets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from controller import PRESETS, Settings

# What is one change: fields that mean something only together.
CHANGES = {
    'first fit of 300 epochs': ('epochs',),
    'later fits of a few steps': ('later_updates',),
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


def measure(settings: Settings, table: Table, seed: int, queries: int) -> dict:
    """The regrets of one search at the checkpoints and its processor seconds."""
    start = time.process_time()
    curve = regrets(table, run(functools.partial(nao, settings=settings), table, queries, 40, 10, seed), queries)
    return {'regret': {str(count): float(curve[count - 1]) for count in CHECKPOINTS if count <= queries},
            'seconds': time.process_time() - start}


def show(results: dict[tuple[str, str, int], dict], tables: list[str]) -> None:
    """Print the mean regrets after 150 / 200 queries as a table in Markdown."""
    print('| | ' + ' | '.join(tables) + ' | seeds | seconds |\n|---|' + '---|' * (len(tables) + 2))
    for what in dict.fromkeys(key[0] for key in results):
        columns = [[line for key, line in results.items() if key[:2] == (what, name)] for name in tables]
        cells = [' / '.join(f'{sum(line["regret"][count] for line in lines) / len(lines):.3f}' for count in ('150', '200'))
                 if lines else '–' for lines in columns]
        everything = [line for lines in columns for line in lines]
        print(f'| {what} | ' + ' | '.join(cells) + f' | {max(map(len, columns))} '
              f'| {sum(line["seconds"] for line in everything) / max(1, len(everything)):.0f} |')


def main() -> None:
    """Measure what has not been measured, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--table', required=True, action='append', metavar='FILE', help='CSV file, may be repeated')
    parser.add_argument('--seeds', type=int, default=5, help='searches a variant (default: %(default)s)')
    parser.add_argument('--queries', type=int, default=200, help='architectures a search asks for (default: %(default)s)')
    parser.add_argument('--only', default='', help='a regular expression: only variants in whose names it is found')
    parser.add_argument('--output', required=True, type=Path, metavar='JSONL', help='file that the results are added to')
    arguments = parser.parse_args()
    if arguments.queries < 200:
        parser.error(f'--queries={arguments.queries}, but the regret is reported after 150 and 200')
    torch.set_num_threads(1)
    tables = {Path(path).stem: read_table(path) for path in arguments.table}
    results = read_results(arguments.output, ('what', 'table', 'seed'))
    for seed in range(arguments.seeds):
        for what, settings in variants().items():
            for name, table in tables.items():
                if (what, name, seed) in results or not re.search(arguments.only, what):
                    continue
                line = {'what': what, 'table': name, 'seed': seed, **measure(settings, table, seed, arguments.queries)}
                add_result(arguments.output, line)
                results[what, name, seed] = line
    show(results, list(tables))


if __name__ == '__main__':
    try:
        main()
    except UserError as error:
        print(f'ablation.py: {error}', file=sys.stderr)
        sys.exit(2)
