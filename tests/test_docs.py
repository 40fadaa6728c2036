"""README.md and the pages in docs/ name only what there is: files, flags, programs, anchors."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT, Program

import search_setup
import train_imagenet

PAGES = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *sorted((ROOT / 'docs').glob('*.md'))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
PROGRAMS = [*ROOT.glob('train_*.py'), *(ROOT / 'tools').glob('*.py')]
OTHERS_FLAGS = {'nproc_per_node', 'nnodes', 'rdzv_backend', 'rdzv_endpoint', 'logdir'}  # of torchrun and TensorBoard


@pytest.fixture(scope='module')
def known_flags() -> set[str]:
    """Every flag of every program and tool, by its --help; and those that are accepted without effect."""
    paths = [str(path.relative_to(ROOT)) for path in PROGRAMS if "__name__ == '__main__'" in path.read_text()]
    started = [Program(path, '--help') for path in paths]
    named = {name for program in started for name in re.findall(r'--([\w-]+)', program.wait().out)}
    return named | OTHERS_FLAGS | {*search_setup.NO_EFFECT, *train_imagenet.NO_EFFECT}


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by."""
    titles = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', title).strip().lower().replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if target.startswith('http'):
            continue
        name, _, anchor = target.partition('#')
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_flags_exist(page, known_flags):
    named = set(re.findall(r'(?<![\w-])--([a-z][\w-]*)', page.read_text()))
    assert not named - known_flags


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_files_exist(page):
    for name in re.findall(r'(?<![\w/.])((?:[\w.-]+/)*[\w-]+\.(?:py|sh|toml|cff))(?!\w)', page.read_text()):
        assert (ROOT / name).exists() or (ROOT / name) in PAGES, name


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_python_is_python(page):
    for code in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL):
        ast.parse(code)


README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('words', [
    *('1Xs5ajX-buseRzOZg9gTJ0Vo4u_OEQFff', '1zrBJroadBXLv59nbcu78ET_H0IOxVJw-', '1heEOkqiJet9Ch2_8VWWZI4VJtvOjkLaw',
      '1ZQbNwz1CdEYRSZraWXyBNAoi3R-O1j60', '--mode=test --checkpoint=downloaded.pt', '1 P40, 3 days', '4 P40, 5 days',
      'Hieu Pham', 'Hanxiao Liu', 'not an official Microsoft product', 'renqianluo/NAO', 'language modelling'),
    "The log's first lines name the size, and how many images and classes were found", 'Another number of threads',
    'Give a fit 500 gradient steps or more', '`--threads=1`, or fewer threads than cores ([measured](docs/speed.md'])
def test_readme_says_it(words):
    assert words in ' '.join(README.split())


@pytest.mark.parametrize('words', [
    'Defaults that differ, and why:', "the reference's own `scheduler.step()`, called before the epoch's steps, shifts it by",
    'Under PyTorch 1 the reference, whose gradients are zeros', '**`arch_pool.perf.final`** holds accuracies of 0–1',
    '**Logs** read otherwise'])
def test_differences_are_listed(words):
    assert words in ' '.join((ROOT / 'docs' / 'differences.md').read_text().split())


def test_the_table_of_what_a_busy_cpu_costs():
    page = (ROOT / 'docs' / 'speed.md').read_text()
    table = page.partition('| | cores free | beside one busy process |\n')[2].partition('\n\n')[0]
    for setting in ('2 threads, as they come', '`OMP_WAIT_POLICY=passive`', '`GOMP_SPINCOUNT=1000`', '`--threads=1`'):
        assert re.search(rf'\| {setting} \| [\d–]+ \| [\d–]+ \|', table), setting


def test_examples_score_on_the_whole_validation_split():
    assert '--child_eval_batch_size=' not in README


def test_modules_import_what_stands_above_them():
    """As README.md says of its table of files."""
    table = README.partition('\n## Files\n')[2].partition('\n## ')[0]
    order = re.findall(r'`(\w+)\.py`', table)
    assert set(order) == {path.stem for path in ROOT.glob('*.py')}
    for place, name in enumerate(order):
        imported = re.findall(r'^\s*(?:import|from) (\w+)', (ROOT / f'{name}.py').read_text(), re.MULTILINE)
        assert not set(imported) & set(order[place:]), name
