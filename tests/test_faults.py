"""Nothing lost, nothing silently wrong: faults put into real runs, each with the one line that it has to end in."""

import argparse
import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY,
    Program,
    assert_user_error,
    few_digits,
    files,
    kill_at,
    load,
    make_run,
    metrics,
    run,
    wait_until,
    write_images,
)
from hypothesis import given
from hypothesis import strategies as st

import architecture
import candidates
import checkpoint
import disk
import search_setup
import train_controller
import train_search
import training
import utils
from flags import UserError, run_program
from operations import SEARCH_SPACES

TRAIN = ['train_cifar.py', '--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=2', '--seed=3',
         f'--fixed_arc={TINY}', '--epochs=2', '--batch_size=32']
CONTROLLER = ['--controller_epochs=10', '--controller_lr=0.01', '--controller_encoder_hidden_size=8',
              '--controller_encoder_emb_size=4', '--controller_decoder_hidden_size=8', '--controller_mlp_hidden_size=8']
SEARCH = ['train_search.py', '--dataset=digits', '--device=cpu', '--seed=1', '--child_layers=1', '--child_channels=2',
          '--child_nodes=1', '--child_batch_size=36', '--child_eval_batch_size=20', '--child_rank_count=1',
          '--child_rank_epochs=1', '--child_epochs=1', '--controller_seed_arch=6', '--controller_new_arch=2', *CONTROLLER]
TINY_CHILD = ['--child_layers=1', '--child_channels=2', '--child_nodes=1']
COMPLETE = [*SEARCH, '--method=NAO', '--rounds=1', '--no-child_use_aux_head']


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, few):
    """A finished training's folder."""
    folder = tmp_path_factory.mktemp('trained') / 'out'
    assert run(*TRAIN, f'--output_dir={folder}', preamble=few).status == 0
    return folder


def one_line(result, *words):
    """Status 1 and one line on stderr, after those of progress, with all words."""
    assert result.status == 1, result
    line, = (line for line in result.err.splitlines() if 'files in memory' not in line)
    assert all(word in line for word in words), line


# ------------------------------------------------------------------------------------------------------------ candidates

DEADLY = """
import os, signal, torch, image_files
real = image_files.ImageFiles.__getitem__
def deadly(self, key):
    if torch.utils.data.get_worker_info() is not None and key[1] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, key)
image_files.ImageFiles.__getitem__ = deadly
"""


def test_a_killed_worker_counts_against_no_candidate(tmp_path):
    write_images(tmp_path / 'train', {'a': 10, 'b': 10})
    write_images(tmp_path / 'valid', {'a': 2, 'b': 2})
    command = [*COMPLETE, '--dataset=imagenet', f'--data={tmp_path}', '--workers=1', '--rounds=1', '--controller_seed_arch=2',
               '--controller_new_arch=1', '--child_batch_size=9', '--proposer=random', f'--output_dir={tmp_path / "out"}']
    one_line(run(*command, preamble=DEADLY), 'candidate 1/2 failed', 'a process that reads images was killed', 'not recorded')
    assert not list((tmp_path / 'out').glob('results.*'))
    result = run(*command)
    assert result.status == 0 and 'failed' not in result.out, result


def test_a_killed_worker_ends_a_training_in_one_line(tmp_path):
    write_images(tmp_path / 'train', {'a': 10, 'b': 10})
    write_images(tmp_path / 'valid', {'a': 2, 'b': 2})
    result = run('train_imagenet.py', *TRAIN[2:-1], '--batch_size=10', '--lr=0.0078125', '--workers=1', f'--data={tmp_path}',
                 f'--output_dir={tmp_path / "out"}', preamble=DEADLY)
    assert result.status == 1 and 'a process that reads images was killed' in result.err.splitlines()[-1], result
    assert 'Traceback' not in result.err


def test_what_a_kill_left_behind_a_result_is_cleaned_up(few, tmp_path):
    command = [*COMPLETE, '--child_epochs=2', '--proposer=random', f'--output_dir={tmp_path}']
    # dies between a candidate's result and the removal of its checkpoint
    watch = few + """
import os, signal, pathlib
real = pathlib.Path.unlink
def unlink(self, *args, **kwargs):
    if self.name.startswith('candidate-') and self.suffix == '.pt' and self.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
pathlib.Path.unlink = unlink
"""
    assert run(*command, preamble=watch).status == -signal.SIGKILL
    assert [name for name in files(tmp_path) if name.startswith('candidate-')]
    assert run(*command, preamble=few).status == 0
    assert not [name for name in files(tmp_path) if name.startswith('candidate-')]


def test_a_damaged_line_of_results_is_named_and_its_candidate_trained_again(few, tmp_path):
    command = [*COMPLETE, '--proposer=random', f'--output_dir={tmp_path}']
    assert run(*command, preamble=few + kill_at('a candidate', 4)).status == -signal.SIGKILL
    path = tmp_path / 'results.0.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([b'\xff\x00\xfe\n', lines[0], b'null\n', b'[1]\n', b'{}\n', *lines[2:]]))
    result = run(*command, preamble=few)
    assert result.status == 0 and 'results.0.jsonl, lines 1, 3, 4, 5: no record' in result.err, result
    assert result.out.count('candidate 3/6 epoch 1/1') == 1  # the second one's line is gone: 2 of 6 are known


# ---------------------------------------------------------------------------------------------------- one run a directory

def test_a_second_run_in_the_same_directory_says_who_is_there_and_touches_nothing(few, tmp_path):
    out = tmp_path / 'out'
    command = [*TRAIN, '--epochs=1000', f'--output_dir={out}']
    first = Program(*command, preamble=few)
    first.wait_for('epoch 2/1000')
    first.signal(signal.SIGSTOP)
    wait_until(lambda: Path(f'/proc/{first.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'T')
    (out / 'checkpoint.pt').unlink()  # as before its first one, when a run begins anew and drops what was left
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {'train.log', 'metrics.jsonl', '.lock'} <= before.keys()
    second = run(*command, preamble=few)
    assert_user_error(second, f'--output_dir={out} is in use by process {first.pid} on ', ' since 20')
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    first.signal(signal.SIGKILL)  # releases it
    first.wait()
    assert run(*TRAIN, f'--output_dir={out}', '--epochs=3', preamble=few).status == 0
    assert not (out / '.lock').exists()


def test_a_finished_training_whose_checkpoint_is_gone_is_put_aside(few, tmp_path):
    command = [*TRAIN, '--epochs=1', f'--output_dir={tmp_path}']
    for number in range(3):
        result = run(*command, preamble=few)
        assert result.status == 0 and (' is of an earlier run, ' in result.out) == bool(number), result
        for name in ('checkpoint_best.pt', 'metrics.jsonl')[:2 * bool(number)]:
            assert f'{tmp_path / name} is of an earlier run' in result.out and f' it is {name}.old{number} now' in result.out
        (tmp_path / 'checkpoint.pt').unlink()
    assert [name for name in files(tmp_path) if 'old' in name] == [
        f'{name}.old{number}' for name in ('checkpoint_best.pt', 'metrics.jsonl') for number in (1, 2)]


def open_anew(folder):
    """Begin a run in a folder: what is there then, but for its log."""
    make_run(output_dir=str(folder)).open_output(anew=True)
    return {path.name: path.read_text() for path in folder.iterdir() if path.name not in ('train.log', '.lock')}


START, EPOCH = '{"kind": "start"}\n', '{"kind": "epoch", "epoch": 1}\n'


@pytest.mark.parametrize('text', [START + EPOCH, START + EPOCH[:9], '{"loss": 1}\n', 'mine\n' + START])
def test_metrics_that_tell_of_more_than_a_start_are_put_aside(text, tmp_path):
    """Someone made room by rm *.pt, or the file is another program's."""
    (tmp_path / 'metrics.jsonl').write_text(text)
    assert open_anew(tmp_path) == {'metrics.jsonl.old1': text}


def test_of_a_run_that_only_began_nothing_is_left(tmp_path):
    for name, text in (('metrics.jsonl', START + START), ('rank-0123abcd.pt', 'half')):
        (tmp_path / name).write_text(text)
    assert open_anew(tmp_path) == {}


def test_what_an_earlier_search_found_is_put_aside(tmp_path):
    found = ['arch_pool.final', 'arch_pool.perf.final', 'arch_pool.30', 'arch_pool.perf.30', 'arch_pool.pareto',
             'arch_pool.pareto.perf', 'checkpoint_30.pt']
    for name in (*found, 'arch_pool', 'arch_pool.mine', 'checkpoint_of_mine.pt'):
        (tmp_path / name).write_text(name)
    assert open_anew(tmp_path) == {f'{name}.old1': name for name in found} | {
        name: name for name in ('arch_pool', 'arch_pool.mine', 'checkpoint_of_mine.pt')}


def test_a_lock_file_of_another_program_is_not_touched(tmp_path):
    (tmp_path / '.lock').write_text('mine')
    with pytest.raises(UserError, match='lock is the file of another program'):
        open_anew(tmp_path)
    assert (tmp_path / '.lock').read_text() == 'mine'


@pytest.mark.parametrize('count', [2, 3])
def test_a_ranking_by_more_epochs_trains_all_of_the_ranked_anew(count, few, tmp_path):
    command = [*SEARCH, '--child_rank_count=2', f'--output_dir={tmp_path}']
    assert run(*command, preamble=few).status == 0
    result = run(*command, f'--child_rank_count={count}', '--child_rank_epochs=2', preamble=few)
    assert result.status == 0 and result.out.count(' epoch 2/2 ') == count, result
    epochs = [record['epochs'] for record in disk.read_records(tmp_path / 'results.0.jsonl', {})]
    assert epochs == [1, 1, *[2] * count] and len((tmp_path / 'arch_pool.final').read_text().splitlines()) == count
    assert ' epoch 2/2 ' not in run(*command, f'--child_rank_count={count}', '--child_rank_epochs=2', preamble=few).out


def test_one_of_the_best_resumed_with_fewer_epochs_is_evaluated_as_it_is(few, tmp_path):
    command = [*SEARCH, f'--output_dir={tmp_path}']
    assert run(*command, '--child_rank_epochs=4', preamble=few + kill_at('an epoch', 4)).status == -signal.SIGKILL
    result = run(*command, '--child_rank_epochs=2', preamble=few)
    assert result.status == 0 and 'rank 1/1 epoch' not in result.out and 'rank 1/1 accuracy' in result.out, result


def test_results_of_shorter_trainings_are_refused(few, tmp_path):
    (tmp_path / 'results').write_text('{"kind": "candidate", "arch": "0", "accuracy": 0.5, "epochs": 3}\n')
    result = run(*COMPLETE, f'--child_results={tmp_path / "results"}', f'--output_dir={tmp_path / "out"}', preamble=few)
    assert_user_error(result, f'--child_results={tmp_path / "results"}: has trainings of 3 epochs; give --child_epochs=3')
    assert not (tmp_path / 'out').exists()


def test_what_may_not_be_entered_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train_cifar.py'])
    with pytest.raises(SystemExit, match='2'):
        run_program(lambda: (_ for _ in ()).throw(PermissionError(13, 'Permission denied', '/home/other')))
    assert capsys.readouterr().err == ('train_cifar.py: error: /home/other: Permission denied; name a place that you may read, '
                                       'and write to\n')


def test_where_locks_do_not_work_there_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(disk.fcntl, 'lockf', refuse)
    disk.Lock(tmp_path).release()
    assert 'cannot be locked (Function not implemented)' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize('program', ['training', 'search'])
def test_a_momentum_of_another_shape_is_refused(program, trained, few, tmp_path):
    if program == 'training':
        command, state = TRAIN, load(trained / 'checkpoint.pt')
    else:
        command = SEARCH
        assert run(*command, f'--output_dir={tmp_path}', preamble=few + kill_at('an epoch', 1)).status == -signal.SIGKILL
        state = load(tmp_path / 'checkpoint.pt')
    state['optimizer']['state'][3]['momentum_buffer'] = torch.zeros(7)
    torch.save(state, tmp_path / 'checkpoint.pt')
    assert_user_error(run(*command, '--epochs=3' if program == 'training' else '--child_epochs=2', f'--output_dir={tmp_path}',
                          preamble=few), 'checkpoint.pt', 'its "optimizer" is not that of its network')


@pytest.mark.parametrize('field, value', [('pool', ['1 2 3']), ('pool', [5]), ('pool', 'x'), ('epoch', -1), ('epoch', 'x'),
                                          ('random', 5), ('accuracies', None), ('phase', 7), ('controller', {}), ('fits', 'x'),
                                          ('born', [5]), ('metrics_bytes', 'x')])
def test_a_searchs_checkpoint_with_a_damaged_field_ends_in_one_line(field, value, few, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'a search that was killed'
    if not folder.exists():
        assert run(*SEARCH, f'--output_dir={folder}', preamble=few + kill_at('an epoch', 1)).status == -signal.SIGKILL
        torch.save(load(folder / 'checkpoint.pt'), folder / 'whole.pt')
    torch.save(load(folder / 'whole.pt') | {field: value}, folder / 'checkpoint.pt')
    assert_user_error(run(*SEARCH, f'--output_dir={folder}', preamble=few), 'checkpoint.pt')


@given(where=st.floats(0.05, 0.9), bit=st.integers(0, 7))
def test_flipped_bits_in_a_checkpoint_are_noticed(where, bit, trained, tmp_path_factory):
    """Wherever the flip lies in the tensors' bytes, their check sum is wrong."""
    data = bytearray((trained / 'checkpoint.pt').read_bytes())
    path = tmp_path_factory.getbasetemp() / 'flipped.pt'
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        state = checkpoint.load(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:  # it was padding, or a header that nobody reads
        for name, tensor in load(trained / 'checkpoint.pt')['model'].items():
            assert torch.equal(state['model'][name], tensor)


def test_checkpoints_of_save_every_are_written_whole(few, tmp_path):
    """Killed within the writing of checkpoint_1.pt, which then is not there; nothing else suffers."""
    result = run(*SEARCH, '--save_every=1', f'--output_dir={tmp_path}', preamble=few + kill_at('a rename', 2))
    assert result.status == -signal.SIGKILL and not (tmp_path / 'checkpoint_1.pt').exists()
    assert run(*SEARCH, '--save_every=1', f'--output_dir={tmp_path}', preamble=few).status == 0
    assert load(tmp_path / 'checkpoint_1.pt')['epoch'] == 1


def test_a_planted_link_is_not_written_through(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    (tmp_path / 'checkpoint.pt.tmp').symlink_to(victim)
    checkpoint.save({'model': {}, 'args': {}}, tmp_path / 'checkpoint.pt')
    disk.write_lines(tmp_path / 'arch_pool', [1, 2])
    assert victim.read_text() == 'mine' and (tmp_path / 'arch_pool').read_text() == '1\n2\n'


def test_a_full_disk_at_the_first_checkpoint_claims_no_earlier_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    for before in (False, True):
        with pytest.raises(UserError) as error:
            checkpoint.save({'model': {}}, tmp_path / 'checkpoint.pt')
        assert ('is intact' in str(error.value)) == before
        (tmp_path / 'checkpoint.pt').touch()


def test_hyper_parameters_of_a_resumed_run_are_the_new_commands():
    network = torch.nn.Linear(2, 2)
    alone = argparse.Namespace(device=torch.device('cpu'))
    saved = training.sgd(alone, network, 0.1).state_dict()
    optimizer = training.sgd(alone, network, 0.2)
    checkpoint.fill_optimizer(optimizer, saved, 'x.pt')
    assert optimizer.param_groups[0]['weight_decay'] == 0.2


@pytest.mark.parametrize('flag', ['--seed=4', '--dataset=cifar10', '--holdout=20', '--train_images=50'])
def test_another_seed_or_data_set_or_part_of_it_does_not_go_on_from_a_checkpoint(flag, trained, few):
    result = run(*TRAIN, flag, f'--output_dir={trained}', preamble=few + 'import datasets\ndatasets.SOURCES["cifar10"] = '
                 'datasets.SOURCES["digits"]\n')
    assert_user_error(result, 'is of a run with ', 'name another --output_dir')


def test_classes_in_another_order_do_not_go_on_from_a_checkpoint():
    checkpoint.same_classes({'classes': ['ant', 'bee']}, ('ant', 'bee'), 'x.pt')
    checkpoint.same_classes({}, ('ant',), 'x.pt')
    for classes, word in ((['bee', 'ant'], 'class 0 is ant, that of these is bee'), (['ant'], 'class 1 is bee')):
        with pytest.raises(UserError, match=word):
            checkpoint.same_classes({'classes': ['ant', 'bee']}, classes, 'x.pt')


@pytest.mark.parametrize('name, words', [('data', '"data" of the checkpoint'), ('device', 'of dropout in the checkpoint')])
def test_a_checkpoint_of_another_kind_of_device_draws_anew(name, words, trained, few, tmp_path):
    state = load(trained / 'checkpoint_best.pt')
    state['random'][0][name] = torch.zeros(16, dtype=torch.uint8)  # as a GPU's generator
    torch.save(state, tmp_path / 'checkpoint.pt')
    result = run(*TRAIN, '--epochs=3', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert [line for line in result.out.splitlines() if 'of another kind of device: they begin anew' in line and words in line]


def test_what_is_written_is_seen_to_the_disk(tmp_path, monkeypatch):
    """Checkpoints, pool files and metrics, before they get their names."""
    flushed = []
    monkeypatch.setattr(os, 'fsync', lambda file: flushed.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
    checkpoint.save({'model': {}}, tmp_path / 'checkpoint.pt')
    disk.write_lines(tmp_path / 'arch_pool', [1, 2])
    disk.append_line(tmp_path / 'metrics.jsonl', '{}')
    disk.append_line(tmp_path / 'metrics.jsonl', '{}')
    sizes = {'checkpoint.pt': (tmp_path / 'checkpoint.pt').stat().st_size, 'arch_pool': 4, 'metrics.jsonl': 6}
    assert flushed[:2] + flushed[3:] == [((tmp_path / name).stat().st_ino, size) for name, size in sizes.items()]


@pytest.fixture
def impatient():
    """Whoever waits for a pipe fails."""
    def over(*_):
        raise BaseException('it waits for the pipe')
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize('use', [
    disk.read_lines, architecture.read_pool, checkpoint.load, lambda path: disk.read_records(path, {}),
    lambda path: disk.append_line(path, 'x'), lambda path: disk.log_to(path, 'x'),
    lambda path: train_controller.read_accuracies(path, 1)],
    ids=['lines', 'pool', 'checkpoint', 'records', 'metrics', 'log', 'accuracies'])
def test_a_pipe_in_place_of_a_file_is_refused(use, impatient, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='pipe: is a pipe or a device; a file is needed here'):
        use(tmp_path / 'pipe')


# ------------------------------------------------------------------------------------------------------------------- logs

def test_what_was_logged_before_there_was_a_directory_is_in_the_log(tmp_path, monkeypatch):
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, io.StringIO())
    run_here = make_run(output_dir=tmp_path / 'out')
    run_here.log('early')
    run_here.open_output(anew=True)
    run_here.log('late')
    assert [line.split()[-1] for line in (tmp_path / 'out' / 'train.log').read_text().splitlines()] == ['early', 'late']


def test_what_cannot_be_encoded_is_escaped_in_the_log(tmp_path, monkeypatch):
    """As names of files that are not UTF-8."""
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, io.StringIO())
    disk.log_to(tmp_path / 'train.log', 'early λ \udcff\n')
    print('late λ \udcff')
    assert (tmp_path / 'train.log').read_text(encoding='utf-8') == 'early λ \\udcff\nlate λ \\udcff\n'


def test_a_log_that_cannot_be_written_hides_no_message():
    """On a full disk the line that says so has to reach the terminal."""
    terminal, full = io.StringIO(), open('/dev/full', 'wb', buffering=0)  # noqa: SIM115 - nothing to close
    print('the disk is full', file=disk.LoggedStream(terminal, full))
    assert terminal.getvalue() == 'the disk is full\n'


def test_a_run_that_has_just_begun_there_is_not_begun_anew(tmp_path):
    """Another run wrote its first checkpoint and ended after this one had looked for it."""
    torch.save({}, tmp_path / 'checkpoint.pt')
    (tmp_path / 'metrics.jsonl').write_text('of the other\n')
    with pytest.raises(UserError, match='another run has just written a checkpoint there'):
        make_run(output_dir=tmp_path).open_output(anew=True)
    assert (tmp_path / 'metrics.jsonl').read_text() == 'of the other\n'


def test_a_search_finishes_where_the_terminal_knows_no_greek(few, tmp_path):
    plain = few + "import sys\nsys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    result = run(*SEARCH, '--child_epochs=2', '--child_eval_epochs=1', f'--output_dir={tmp_path}', preamble=plain)
    assert result.status == 0 and r'per \u03bb' in result.out, result
    assert 'per λ' in (tmp_path / 'train.log').read_text(encoding='utf-8')


def test_a_run_keeps_its_log_and_appends_to_it(trained, few):
    before = (trained / 'train.log').read_text()
    assert 'epoch 2/2 train' in before and 'finished: best test' in before
    assert re.search(r'images 80 to train, 20 to evaluate, 10 classes, 32×32 pixels', before)
    assert run(*TRAIN, f'--output_dir={trained}', '--epochs=x', preamble=few).status == 2
    assert (trained / 'train.log').read_text() == before  # a mistake before anything began
    result = run(*TRAIN, f'--output_dir={trained}', preamble=few)
    assert (trained / 'train.log').read_text() == before + result.out


def test_flags_that_have_no_effect_are_accepted_with_a_line(few, tmp_path):
    idle = ['--mode=train', '--controller_optimizer=adam', '--controller_source_length=40', '--controller_encoder_length=20',
            '--controller_decoder_vocab_size=12']
    result = run(*SEARCH, '--child_rank_count=0', *idle, f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert [line for line in result.err.splitlines() if line.endswith('has no effect')] == [
        f'{flag} has no effect' for flag in idle]


def test_images_that_cannot_tell_the_pool_apart_are_warned_of(few, tmp_path):
    result = run(*SEARCH, '--child_eval_batch_size=4', '--child_rank_count=0', f'--output_dir={tmp_path}', preamble=few)
    assert 'warning: --child_eval_batch_size=4 images cannot tell 6 architectures apart; there are 8' in result.err, result


@pytest.mark.parametrize('images, pool, there, warned', [(4, 6, 8, 1), (8, 9, 20, 1), (9, 9, 20, 0), (20, 9, 8, 0)])
def test_a_split_that_has_no_more_images_is_not_warned_of(images, pool, there, warned, monkeypatch, capsys):
    def nothing(*_):
        pass
    monkeypatch.setattr(train_search, 'score_pool', nothing)
    run_here = make_run()
    run_here.average_statistics = nothing
    batches = argparse.Namespace(count=there, batch=lambda chosen: (chosen, chosen))
    train_search.WeightSharingSearch.score(argparse.Namespace(
        args=argparse.Namespace(child_eval_batch_size=images), run=run_here, pool=range(pool), supernet=None, epoch=1,
        task=argparse.Namespace(candidate=argparse.Namespace(valid_batches=lambda _: batches), classes=10), sort_pool=nothing,
        is_over=lambda: False))
    assert ('cannot tell' in capsys.readouterr().err) == warned


@pytest.mark.parametrize(('accuracies', 'over', 'told'), [
    ([0.1, 0.2], True, True), ([0.1, 0.2], False, False), ([0.1, 0.3], True, False)])
def test_scores_that_are_no_better_than_guessing_are_named_at_the_end(accuracies, over, told, monkeypatch, capsys):
    """Of 100 images and ten classes guessing gets 10 % right, with a standard deviation of 3."""
    monkeypatch.setattr(train_search, 'score_pool', lambda *_: accuracies)
    run_here = make_run()
    run_here.average_statistics = lambda _: None
    batches = argparse.Namespace(count=100, batch=lambda chosen: (chosen, chosen))
    train_search.WeightSharingSearch.score(argparse.Namespace(
        args=argparse.Namespace(child_eval_batch_size=100), run=run_here, pool=[0, 1], supernet=None, epoch=1,
        task=argparse.Namespace(candidate=argparse.Namespace(valid_batches=lambda _: batches), classes=10),
        sort_pool=lambda *_: None, is_over=lambda: over))
    assert ('no better than guessing one of 10 classes' in capsys.readouterr().out) == told


def test_no_new_architectures_are_a_warning_and_end_the_search(few, tmp_path):
    """The time that is left is that of all rounds: 6 candidates and 2 to come."""
    none = few + """
import proposers, training
proposers.PROPOSERS['random'] = lambda known, count: ([], {})
real = training.Clock
training.Clock = lambda first, steps: print('clock of', steps) or real(first, steps)
"""
    result = run(*COMPLETE, '--proposer=random', f'--output_dir={tmp_path}', preamble=none)
    assert result.status == 0, result
    assert 'warning: no new architectures: all that were written are in the pool already' in result.err
    assert 'clock of 8' in result.out and 'left' in result.out


def test_images_of_one_class_are_warned_of(tmp_path):
    for part in ('train', 'valid'):
        write_images(tmp_path / part, {'alone': 4}, size=16)
    command = [part for part in TRAIN if 'dataset' not in part] + ['--dataset=folder', f'--data={tmp_path}']
    result = run(*command, '--image_size=16', '--epochs=1', f'--output_dir={tmp_path / "out"}')
    assert result.status == 0 and 'warning: all images are of one class, alone: nothing can be learnt' in result.err, result


def test_a_search_of_each_data_set_has_a_place_of_its_own(monkeypatch):
    for flags, place in (('', 'exp/search_cifar10'), ('--dataset=digits', 'exp/search_digits'),
                         ('--dataset=digits --output_dir=x', 'x')):
        assert parsed(monkeypatch, *flags.split()).output_dir == place


# ------------------------------------------------------------------------------------------------------------ absurd flags

@pytest.mark.parametrize('flag, words', [
    (f'--child_epochs={10 ** 320}', '--child_epochs: must be a whole number'),
    ('--child_channels=1000000000', 'at most 10,000'), ('--child_cutout_size=100000000000000000000', 'must be a whole number'),
    ('--child_nodes=1000000', 'at most 100'), ('--controller_seed_arch=1000000000000', 'at most 1,000,000'),
    ('--child_layers=3000000', 'at most 1,000'), ('--child_lr_min=1', 'is above --child_lr_max'),
    ('--child_eval_epochs=[999]', 'names epoch 999, but there are 1 epochs'), ('--output_dir=', 'must name a directory'),
    ('--output_dir=a\nb', 'must name a directory'), ('--seed=1\n2', 'must be a whole number'),
    ('--controller_encoder_layers=1000000', 'at most')])
def test_absurd_flags_of_a_search_end_at_once(flag, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [*SEARCH, flag])
    with pytest.raises(UserError) as error:
        search_setup.parse_args()
    assert words in str(error.value), error.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, words', [
    (['--lr_min=1'], '--lr_min=1 is above --lr_max=0.025'), (['--channels=1000000000'], 'at most 10,000'),
    (['--holdout=80'], '--holdout=80 of 80 training images leaves none'),
    (['--train_images=81'], '--train_images=81, but there are 80'), (['--output_dir='], 'must name a directory')])
def test_absurd_flags_of_a_training_create_nothing(flags, words, few, tmp_path):
    assert_user_error(run(*TRAIN, '--output_dir=out', *flags, cwd=tmp_path, preamble=few), words)
    assert not list(tmp_path.iterdir())


def test_world_size_alone_is_named(few, tmp_path):
    assert_user_error(run(*TRAIN, f'--output_dir={tmp_path / "out"}', preamble=few, WORLD_SIZE='2'), 'WORLD_SIZE=2 is set, but')


# ---------------------------------------------------------------------------------------------- as the specification has it

def test_a_pool_left_in_the_output_directory_is_the_start(few, tmp_path):
    lines = ['0 0 1 1 0 4 1 4', '1 3 0 2 0 1 1 0']
    (tmp_path / 'arch_pool').write_text('\n'.join(lines) + '\n')
    result = run(*SEARCH, '--child_rank_count=0', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert sorted((tmp_path / 'arch_pool.1').read_text().splitlines()) == sorted(lines)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'arch_pool').write_text('what is this?\n')
    assert_user_error(run(*SEARCH, f'--output_dir={tmp_path / "other"}', preamble=few), 'arch_pool, line 1')
    assert (tmp_path / 'other' / 'arch_pool').read_text() == 'what is this?\n'


def test_the_split_of_a_search_is_shuffled_by_the_seed():
    labels = torch.arange(100) % 10
    splits = [search_setup.split_images(labels, argparse.Namespace(train_images=None, valid_images=0, seed=seed, data='x'))
              for seed in (1, 1, 2)]
    for train, valid in splits:
        assert len(train) == 90 and sorted([*train.tolist(), *valid.tolist()]) == list(range(100))
    assert torch.equal(splits[0][1], splits[1][1]) and not torch.equal(splits[0][1], splits[2][1])
    train, valid = search_setup.split_images(labels, argparse.Namespace(train_images=20, valid_images=0, seed=1, data='x'))
    assert len(train) == 18 and torch.cat([train, valid]).remainder(10).bincount().tolist() == [2] * 10
    train, valid = search_setup.split_images(labels, argparse.Namespace(train_images=20, valid_images=30, seed=1, data='x'))
    assert (len(train), len(valid)) == (20, 30) and not set(train.tolist()) & set(valid.tolist())


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, 'argv', ['train_search.py', *flags])
    return search_setup.parse_args()


def test_candidates_and_rankings_are_trained_as_specified(monkeypatch):
    args = parsed(monkeypatch, '--method=NAO')
    assert (args.child_batch_size, args.child_l2_reg, args.child_epochs) == (128, 5e-4, 25)
    run_here = argparse.Namespace(first_alone=lambda load: load(), device=torch.device('cpu'), rank=0, world=1, is_first=True,
                                  generators={'data': torch.Generator()})
    lr = search_setup.open_task(parsed(monkeypatch, '--method=NAO', '--dataset=digits', *TINY_CHILD), run_here).candidate.lr
    assert lr(0) == pytest.approx(0.024) and lr(50) == pytest.approx(0.012) and lr(100) == pytest.approx(0)
    args = parsed(monkeypatch, '--dataset=digits', '--child_epochs=7', *TINY_CHILD)
    task = search_setup.open_task(args, run_here)
    ranking = task.ranking
    assert ranking.steps == 7 * len(task.candidate.train_batches(run_here)) and not ranking.best_epoch
    network = ranking.build(search_setup.architecture.parse(TINY), ranking.steps)
    assert (network.keep_prob, network.drop_path_keep_prob, network.steps) == (0.6, 0.8, ranking.steps)
    assert hasattr(network, 'auxiliary_head') and task.candidate.best_epoch


def test_a_ranking_on_image_files_is_one_pass_without_label_smoothing(monkeypatch, tmp_path):
    write_images(tmp_path / 'train', {'a': 10, 'b': 10})
    args = parsed(monkeypatch, '--dataset=imagenet', f'--data={tmp_path}', '--child_batch_size=4', *TINY_CHILD,
                  '--workers=0')
    run_here = argparse.Namespace(device=torch.device('cpu'), rank=0, world=1, is_first=False, store=None,
                                  generators={'data': torch.Generator()})
    recipe = search_setup.open_task(args, run_here).ranking
    assert (recipe.epochs, recipe.max_steps, recipe.label_smooth) == (1, 500, 0)
    network = recipe.build(search_setup.architecture.parse(TINY), 10)
    assert (network.keep_prob, network.drop_path_keep_prob) == (1.0, 1.0)


def test_a_candidate_is_judged_by_its_best_epoch_also_across_a_kill(few, tmp_path):
    """Epochs are made ever worse: the first is the best, and lies before the kill."""
    def worse(first):
        return few + f"""
import training
evaluate_it, evaluated = training.evaluate, []
def evaluate(*args):
    evaluated.append(None)
    return evaluate_it(*args) | {{'top1': {first} - len(evaluated)}}
training.evaluate = evaluate
"""
    command = [*COMPLETE, '--child_epochs=3', '--proposer=random', '--controller_seed_arch=1', f'--output_dir={tmp_path}']
    assert run(*command, preamble=worse(90) + kill_at('an epoch', 3)).status == -signal.SIGKILL
    assert run(*command, preamble=worse(50) + kill_at('a candidate', 2)).status == -signal.SIGKILL
    result, = disk.read_records(tmp_path / 'results.0.jsonl', {})
    assert result['accuracy'] == pytest.approx(0.89)


def test_results_of_another_search_are_not_made_again(few, tmp_path):
    for name, more in (('one', []), ('two', [f'--child_results={tmp_path / "one" / "results.0.jsonl"}'])):
        result = run(*COMPLETE, '--proposer=random', *more, f'--output_dir={tmp_path / name}', preamble=few)
        assert result.status == 0, result
    assert 'candidate 1/' not in result.out and not list((tmp_path / 'two').glob('results.*'))
    for name in ('arch_pool', 'arch_pool.perf'):
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()


def test_candidates_can_be_trained_without_a_search(tmp_path, monkeypatch):
    args = parsed(monkeypatch, '--dataset=digits', '--child_epochs=1', *TINY_CHILD, '--train_images=100',
                  f'--output_dir={tmp_path}', '--device=cpu')
    run_here = utils.Run(args)
    recipe = search_setup.open_task(args, run_here).candidate
    pool = [search_setup.architecture.parse(TINY, 1, SEARCH_SPACES['small'])]
    first = candidates.train_all(run_here, recipe, pool, 0)
    assert candidates.read_results(run_here, recipe) == {TINY: first[0]}
    assert candidates.train_all(run_here, recipe, pool, 1) == first
    assert candidates.read_results(run_here, recipe._replace(epochs=2)) == {}  # a longer training says something else
    args.child_results, args.output_dir = str(tmp_path / 'results.0.jsonl'), str(tmp_path / 'other')
    elsewhere = utils.Run(args)
    assert candidates.read_results(elsewhere, recipe) == {TINY: first[0]}
    assert candidates.read_results(elsewhere, recipe._replace(kind='rank')) == {}  # which --child_results is not for
    args.child_results = None
    old = disk.read_records(tmp_path / 'results.0.jsonl', {})
    old[0].pop('epochs')
    (tmp_path / 'results.0.jsonl').write_text(json.dumps(old[0]) + '\n')
    assert candidates.read_results(run_here, recipe) == {TINY: first[0]}  # of before their number was recorded


def test_a_recipe_says_how_many_steps_are_trained_and_how_many_drop_path_counts(tmp_path, monkeypatch):
    args = parsed(monkeypatch, '--dataset=digits', '--child_epochs=1', *TINY_CHILD, '--train_images=100',
                  '--child_batch_size=30', f'--output_dir={tmp_path}', '--device=cpu')
    run_here = utils.Run(args)
    recipe = search_setup.open_task(args, run_here).candidate
    built, updates, update = [], [], training.update
    monkeypatch.setattr(training, 'update', lambda *args: updates.append(None) or update(*args))

    def build(arch, steps):
        built.append(steps)
        return recipe.build(arch, steps)
    for more in ({}, {'max_steps': 2}, {'steps': 700}):
        candidates.train_candidate(run_here.alone(), recipe._replace(build=build, **more), architecture.parse(TINY))
    assert built == [3, 2, 700] and len(updates) == 3 + 2 + 3


# -------------------------------------------------------------------------------------------------------- held-out images

def test_held_out_images_choose_the_epoch_and_the_test_images_are_looked_at_once(few, tmp_path):
    result = run(*TRAIN, '--holdout=16', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert 'images 64 to train, 16 to evaluate' in result.out and result.out.count('test images, looked at once:') == 1
    *epochs, final = metrics(tmp_path)
    assert all('valid' in line and 'test' not in line for line in epochs) and final['kind'] == 'final'
    best = max(epochs, key=lambda line: line['valid']['top1'])
    assert final['epoch'] == best['epoch']
    state = load(tmp_path / 'checkpoint_best.pt')
    assert state['epoch'] == best['epoch'] and state['best_acc_top1'] == best['valid']['top1']


def test_the_last_line_names_the_last_epochs_error_too(trained):
    last = next(line for line in (trained / 'train.log').read_text().splitlines() if 'finished:' in line)
    epochs = metrics(trained)
    assert f'that of the last epoch {100 - epochs[-1]["test"]["top1"]:.2f} %' in last


def test_folders_of_small_images_train_and_are_tested_from_the_checkpoint_alone(tmp_path):
    write_images(tmp_path / 'data' / 'train', {'cat': 12, 'dog': 12}, size=20)
    write_images(tmp_path / 'data' / 'test', {'cat': 4, 'dog': 4}, size=20)
    command = [part for part in TRAIN if 'dataset' not in part] + ['--dataset=folder', f'--data={tmp_path / "data"}']
    result = run(*command, '--image_size=16', '--batch_size=8', '--no-flip', f'--output_dir={tmp_path / "out"}')
    assert result.status == 0 and '2 classes, 16×16 pixels' in result.out and 'top-5' not in result.out, result
    (tmp_path / 'data' / 'train').rename(tmp_path / 'gone')
    test = run('train_cifar.py', '--mode=test', '--device=cpu', f'--data={tmp_path / "data"}',
               f'--output_dir={tmp_path / "out"}')
    assert test.status == 0, test
    state = load(tmp_path / 'out' / 'checkpoint_best.pt')
    assert f'top-1 error {100 - state["best_acc_top1"]:.2f} %' in test.out
    (tmp_path / 'gone').rename(tmp_path / 'data' / 'train')
    held = [*command, '--image_size=16', '--batch_size=8', '--holdout=4', '--epochs=1', f'--output_dir={tmp_path / "held"}']
    assert run(*held).status == 0
    write_images(tmp_path / 'data' / 'train' / 'cat', {'more': 1}, size=20)
    other = run(*held, '--epochs=2')
    assert other.status == 2 and 'was trained on other images: their number or classes differ' in other.err.splitlines()[-1]
    small = run(*command, '--image_size=16', '--use_aux_head', f'--output_dir={tmp_path / "aux"}')
    assert small.status == 2 and '16×16 pixels are too small for the auxiliary head' in small.err.splitlines()[-1]
    assert not (tmp_path / 'aux').exists()
