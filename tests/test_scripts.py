"""The shell scripts, as people run them: from any directory, with flags and variables of their own."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import NAONET_A, NAONET_B, NAONET_V2, ROOT, TIMEOUT, files, load, metrics, wait_until

from search_setup import METHOD_DEFAULTS

TRAINING = {  # script: (output directory, flags that the published setting has)
    'train_NAONet_A_36_cifar10.sh': ('exp/NAONet_A_36_cifar10', NAONET_A, {
        'channels': '36', 'batch_size': '128', 'epochs': '600', 'layers': '6', 'cutout_size': '16',
        'l2_reg': '0.0003', 'keep_prob': '0.6', 'drop_path_keep_prob': '0.8', 'lr_max': '0.025', 'lr_min': '0.0',
        'grad_bound': '5.0', 'eval_batch_size': '500', 'use_aux_head': 'True', 'dataset': 'cifar10', 'data': 'data'}),
    'train_NAONet_A_128_cifar10_4cards.sh': ('exp/NAONet_A_128_cifar10', NAONET_A, {
        'channels': '128', 'l2_reg': '0.0005', 'keep_prob': '0.6', 'drop_path_keep_prob': '0.7', 'cutout_size': '16',
        'use_aux_head': 'True', 'epochs': '600', 'layers': '6'}),
    'train_NAONet_B_36_cifar10.sh': ('exp/NAONet_B_36_cifar10', NAONET_B, {
        'channels': '36', 'l2_reg': '0.0003', 'keep_prob': '0.6', 'drop_path_keep_prob': '0.8', 'cutout_size': '16',
        'use_aux_head': 'True', 'epochs': '600', 'layers': '6'}),
}
UNTRAINED = {  # those that no test here trains
    'train_NAONet_V2_36_cifar10.sh': ('exp/NAONet_V2_36_cifar10', NAONET_V2, {
        'channels': '36', 'l2_reg': '0.0005', 'keep_prob': '0.6', 'drop_path_keep_prob': '0.8', 'cutout_size': '16',
        'use_aux_head': 'True', 'epochs': '600', 'layers': '6'}),
    **{f'train_NAONet_{name}_imagenet{cards}.sh': (f'exp/NAONet_{name}_imagenet', arch, {
        'channels': channels, 'batch_size': batch_size, 'lr': lr, 'epochs': '250', 'layers': '4', 'l2_reg': '3e-5',
        'gamma': '0.97', 'decay_period': '1', 'label_smooth': '0.1', 'grad_clip': '5', 'keep_prob': '1',
        'drop_path_keep_prob': '1', 'use_aux_head': 'True'})
       for name, arch, channels in (('A', NAONET_A, '42'), ('V2', NAONET_V2, '52'))
       for cards, batch_size, lr in (('', '128', '0.1'), ('_4cards', '512', '0.4'))},
}
SEARCH = 'train_search_NAO-WS_cifar10.sh'
TINY_TRAINING = ['--dataset=digits', '--device=cpu', '--channels=4', '--layers=1', '--epochs=1', '--train_images=100',
                 '--batch_size=100', '--drop_path_keep_prob=1']
TINY_SEARCH = ['--dataset=digits', '--device=cpu', '--child_channels=2', '--child_layers=1', '--child_nodes=1',
               '--child_epochs=1', '--child_batch_size=500', '--child_eval_batch_size=20', '--controller_seed_arch=5',
               '--child_rank_count=1', '--child_rank_epochs=1']
SCRIPTS = [path.relative_to(ROOT) for folder in ('.', 'tests', 'tools') for path in sorted((ROOT / folder).glob('*.sh'))]


def environment(**variables):
    kept = {name: value for name, value in os.environ.items()
            if name not in ('MODEL', 'OUTPUT_DIR', 'DATA_DIR', 'fixed_arc', 'VIRTUAL_ENV', 'CONDA_PREFIX',
                            'CUDA_VISIBLE_DEVICES', 'LAUNCH', 'SEEDS')}
    return kept | {'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'} | variables


def script(name, *flags, cwd, **variables):
    """Run a script with bash from `cwd`."""
    return subprocess.run(['bash', ROOT / name, *flags], cwd=cwd, env=environment(**variables), capture_output=True, text=True,
                          timeout=TIMEOUT, check=False)


def echo(tmp_path):
    """A program in place of Python that prints its arguments: shows what a script runs, at no cost."""
    program = tmp_path / 'bin' / 'python'
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor argument; do echo "argument: $argument"; done\n')
    program.chmod(0o755)
    return {'PYTHON': str(program)}


@pytest.fixture(scope='module', params=TRAINING)
def trained(request, tmp_path_factory):
    """A script, its folder after one tiny epoch, and how that ended."""
    folder = tmp_path_factory.mktemp('another place')
    return request.param, folder, script(request.param, *TINY_TRAINING, cwd=folder)


def test_a_training_script_trains_from_any_directory(trained):
    name, folder, first = trained
    output_dir, arch, _ = TRAINING[name]
    assert first.returncode == 0, first
    assert f'--fixed_arc={arch} ' in first.stdout
    assert files(folder / output_dir) == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    state = load(folder / output_dir / 'checkpoint.pt')
    assert any(key.startswith('auxiliary_head') for key in state['model'])
    assert state['args']['channels'] == 4  # flags of the user come after the script's own


@pytest.mark.parametrize('trained', ['train_NAONet_B_36_cifar10.sh'], indirect=True)
def test_a_second_run_goes_on_and_appends_to_the_log(trained):
    name, folder, first = trained
    second = script(name, *TINY_TRAINING, '--epochs=2', cwd=folder)
    output_dir = folder / TRAINING[name][0]
    assert second.returncode == 0 and 'resumed after epoch 1' in second.stdout
    assert (output_dir / 'train.log').read_text() == first.stdout + second.stdout
    assert [line['epoch'] for line in metrics(output_dir)] == [1, 2]


@pytest.mark.parametrize('name', TRAINING | UNTRAINED)
def test_a_training_script_has_the_published_setting(name, tmp_path):
    output_dir, arch, flags = (TRAINING | UNTRAINED)[name]
    result = script(name, cwd=tmp_path, **echo(tmp_path))
    assert result.returncode == 0, result
    arguments = re.findall(r'^argument: (.*)$', result.stdout, re.M)
    given = dict(argument.removeprefix('--').partition('=')[::2] for argument in arguments if argument.startswith('--'))
    assert given['fixed_arc'] == arch and given['output_dir'] == output_dir
    for flag, value in flags.items():
        actual = given[flag] if value != 'True' else str(flag in given)
        assert actual == value or float(actual) == float(value), flag


def test_the_search_script_has_the_published_setting(tmp_path):
    result = script(SEARCH, cwd=tmp_path, **echo(tmp_path))
    for flag in ('data=data', 'dataset=cifar10', 'output_dir=exp/search_cifar10', 'child_batch_size=64', 'child_epochs=150',
                 'child_eval_batch_size=500', 'child_layers=3', 'child_nodes=5', 'child_channels=20', 'child_eval_epochs=30',
                 'child_lr_max=0.025', 'child_lr_min=0.001', 'child_keep_prob=1.0', 'child_drop_path_keep_prob=0.9',
                 'child_l2_reg=3e-4', 'controller_seed_arch=600', 'controller_new_arch=300'):
        assert f'argument: --{flag}\n' in result.stdout


def test_the_script_of_nao_v2_spells_out_the_defaults_of_its_method(tmp_path):
    result = script('train_search_NAO-V2_cifar10.sh', cwd=tmp_path, **echo(tmp_path))
    given = dict(re.findall(r'^argument: --(\w+)=(.*)$', result.stdout, re.M))
    assert given['output_dir'] == 'exp/search_V2_cifar10' and given['method'] == 'NAO-V2' and given['rounds'] == '3'
    for name, value in METHOD_DEFAULTS['NAO-V2'].items():
        assert name == 'search_space' or given[name] == str(value) or float(given[name]) == value, name


@pytest.mark.parametrize('name', [*TRAINING, SEARCH])
def test_variables_override_what_a_script_starts_with_and_flags_pass_through(name, tmp_path):
    variables = {'OUTPUT_DIR': str(tmp_path / 'my output'), 'DATA_DIR': 'my data', 'fixed_arc': 'some where/arch_pool.final'}
    result = script(name, '--epochs=1', '--two words', '--star=*', cwd=tmp_path, **variables, **echo(tmp_path))
    assert result.returncode == 0, result
    wanted = [f'--output_dir={tmp_path / "my output"}', '--data=my data', '--epochs=1', '--two words', '--star=*']
    for argument in wanted + [f'--fixed_arc={variables["fixed_arc"]}'] * (name in TRAINING):
        assert f'argument: {argument}\n' in result.stdout
    other = script(name, cwd=tmp_path, MODEL='mine', PYTHON=str(tmp_path / 'bin' / 'python'))
    assert 'argument: --output_dir=exp/mine\n' in other.stdout


@pytest.mark.parametrize('name', sorted(path.name for path in ROOT.glob('train_*.sh')))
def test_several_seeds_run_one_after_the_other_into_places_of_their_own(name, tmp_path):
    result = script(name, '--epochs=1', cwd=tmp_path, SEEDS='0 12 0', OUTPUT_DIR='my output', **echo(tmp_path))
    assert result.returncode == 0, result
    arguments = re.findall(r'^argument: (--(?:output_dir|seed|epochs)=.*)$', result.stdout, re.M)
    wanted = [argument for seed in (0, 12)
              for argument in (f'--output_dir=my output/seed{seed}', '--epochs=1', f'--seed={seed}')]
    assert [argument for argument in arguments if argument not in ('--epochs=600', '--epochs=250')] == wanted
    for flags in (['--seed=3'], ['--output_dir', 'out']):
        refused = script(name, *flags, cwd=tmp_path, SEEDS='0 1', PYTHON=str(tmp_path / 'bin' / 'python'))
        assert refused.returncode == 2 and 'OUTPUT_DIR' in refused.stderr and 'argument' not in refused.stdout


@pytest.mark.parametrize('seeds', ['0 x', '0,1', '0 -1'])
def test_seeds_are_checked_before_the_first_run(seeds, tmp_path):
    refused = script(SEARCH, cwd=tmp_path, SEEDS=seeds, **echo(tmp_path))
    assert refused.returncode == 2 and f'SEEDS="{seeds}"' in refused.stderr and 'argument' not in refused.stdout


def test_a_seed_that_fails_ends_the_script(tmp_path):
    program = tmp_path / 'python'
    program.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *--seed=1) exit 3 ;; esac\n')
    program.chmod(0o755)
    result = script(SEARCH, cwd=tmp_path, PYTHON=str(program), SEEDS='0 1 2')
    assert result.returncode == 3 and re.findall(r'--seed=(\d)', result.stdout) == ['0', '1']


@pytest.mark.parametrize('name', ['train_NAONet_A_imagenet.sh', SEARCH])
def test_help_leaves_nothing(name, tmp_path):
    result = script(name, '--help', cwd=tmp_path)
    assert result.returncode == 0 and '--output_dir' in result.stdout and files(tmp_path) == []


def test_the_search_script_searches_and_its_result_goes_into_a_training_script(tmp_path):
    result = script(SEARCH, *TINY_SEARCH, cwd=tmp_path)
    assert result.returncode == 0, result
    output_dir = tmp_path / 'exp' / 'search_cifar10'
    assert {'arch_pool', 'arch_pool.1', 'arch_pool.final', 'arch_pool.perf.final', 'checkpoint.pt'} <= set(
        files(output_dir))
    assert (output_dir / 'train.log').read_text() == result.stdout
    best = (output_dir / 'arch_pool.final').read_text().splitlines()[0]
    trained = script('train_NAONet_B_36_cifar10.sh', *TINY_TRAINING, '--nodes=1', cwd=tmp_path, OUTPUT_DIR='out',
                     fixed_arc='exp/search_cifar10/arch_pool.final')
    assert trained.returncode == 0 and f'--fixed_arc={best} ' in trained.stdout
    tested = script('train_NAONet_B_36_cifar10.sh', *TINY_TRAINING, '--nodes=1', '--mode=test', cwd=tmp_path, OUTPUT_DIR='out',
                    fixed_arc='exp/search_cifar10/arch_pool.final')
    assert tested.returncode == 0 and re.search(r'top-1 error \d+\.\d+ % top-5 error \d+\.\d+ %', tested.stdout)


@pytest.mark.parametrize('name, flag', [('train_NAONet_A_36_cifar10.sh', '--epochs=0'), (SEARCH, '--child_epochs=0')])
def test_a_failing_program_makes_the_script_fail_and_leaves_nothing_behind(name, flag, tmp_path):
    result = script(name, flag, cwd=tmp_path)
    assert result.returncode == 2 and flag[:-2] in result.stdout + result.stderr
    assert files(tmp_path) == []


@pytest.mark.parametrize('status', [1, 3, 130])
def test_a_script_ends_with_the_programs_status(status, tmp_path):
    program = tmp_path / 'python'
    program.write_text(f'#!/bin/sh\necho failed\nexit {status}\n')
    program.chmod(0o755)
    for name in [*TRAINING, SEARCH]:
        result = script(name, cwd=tmp_path, PYTHON=str(program), OUTPUT_DIR='out')
        assert result.returncode == status


def test_an_output_directory_that_cannot_be_made_ends_in_one_line_and_status_2(tmp_path):
    (tmp_path / 'file').write_text('mine')
    for directory in ('file/out', '-x/../file/out'):
        result = script('train_NAONet_A_36_cifar10.sh', *TINY_TRAINING, cwd=tmp_path, OUTPUT_DIR=directory)
        assert result.returncode == 2, result
        assert f'--output_dir={directory} cannot be written' in result.stderr.splitlines()[-1]
    assert (tmp_path / 'file').read_text() == 'mine'


def test_scripts_can_be_executed():
    for path in SCRIPTS:
        assert path.parent != Path() or os.access(ROOT / path, os.X_OK), path


@pytest.mark.parametrize('visible, launch, wanted', [
    (None, None, '0'), ('3', None, '3'), ('', None, ''), (None, 'torchrun --nproc_per_node=2', ''),
    ('1,2', 'torchrun', '1,2')])
def test_one_gpu_scripts_take_one_gpu_unless_started_by_torchrun(visible, launch, wanted, tmp_path):
    program = tmp_path / 'python'
    program.write_text('#!/bin/sh\necho "visible: $CUDA_VISIBLE_DEVICES"\n')
    program.chmod(0o755)
    variables = {'PYTHON': str(program)} | ({} if visible is None else {'CUDA_VISIBLE_DEVICES': visible}) | (
        {'LAUNCH': launch} if launch else {})
    gpus = {'4cards': '0,1,2,3', 'imagenet.sh': ''}
    for name in (*TRAINING, *UNTRAINED, SEARCH, 'train_search_NAO_cifar10.sh', 'train_search_NAO-V2_cifar10.sh'):
        own = next((value for part, value in gpus.items() if part in name), '0')
        default = own if (visible, launch) == (None, None) else wanted
        result = script(name, cwd=tmp_path, **variables)
        assert f'visible: {default}\n' in result.stdout, (name, result)


def test_ctrl_c_ends_script_and_program_with_the_last_line_in_the_log(tmp_path):
    process = subprocess.Popen(['bash', ROOT / 'train_NAONet_B_36_cifar10.sh', *TINY_TRAINING, '--epochs=1000'], cwd=tmp_path,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    log = tmp_path / 'exp' / 'NAONet_B_36_cifar10' / 'train.log'
    try:
        wait_until(lambda: log.exists() and 'epoch 1/1000' in log.read_text())
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert output == log.read_text()
    assert 'the same command goes on from the last checkpoint' in output.splitlines()[-1]
    assert 'Traceback' not in output


def test_nvidia_smi_is_called_where_it_exists_and_may_fail(tmp_path):
    variables = echo(tmp_path)
    smi = tmp_path / 'bin' / 'nvidia-smi'
    smi.write_text('#!/bin/sh\necho a GPU\nexit 9\n')
    smi.chmod(0o755)
    path = f'{smi.parent}{os.pathsep}{os.environ["PATH"]}'
    result = script(SEARCH, cwd=tmp_path, PATH=path, **variables)
    assert result.returncode == 0 and 'a GPU' in result.stdout and 'argument: --dataset=cifar10' in result.stdout
    if not shutil.which('nvidia-smi'):
        without = script(SEARCH, cwd=tmp_path, **variables)
        assert without.returncode == 0 and without.stderr == '' and 'GPU' not in without.stdout


def test_quickstart_searches_trains_evaluates_and_says_what_it_found(tmp_path):
    """Quickstart with a program in place of Python that writes what the real ones do; the real run takes minutes."""
    project = tmp_path / 'project'
    program = project / '.venv' / 'bin' / 'python'
    program.parent.mkdir(parents=True)
    arch = '0 1 2 3'
    program.write_text(f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
for argument; do case $argument in --output_dir=*) out=${{argument#*=}};; esac; done
mkdir -p "$out"
case "$*" in
*train_search.py*)
  echo "{arch}" > "$out/arch_pool.final"
  echo "finished: ... best first; 2 of these 3 were proposed in the search (after epochs 2, 4, 0; 0: the start)" \
    > "$out/train.log" ;;
*--mode=test*) ;;
*) echo "2026-01-01 finished: best test top-1 error 2.50 %, that of the last epoch 3.00 %, checkpoints in $out" \
  >> "$out/train.log" ;;
esac
""")
    program.chmod(0o755)
    shutil.copytree(ROOT / 'tools', project / 'tools')
    shutil.copy(ROOT / 'quickstart.sh', project)
    shutil.copy(ROOT / 'requirements.txt', project)
    checksum = subprocess.run("cat requirements.txt | cksum | tr ' ' '-'", shell=True, cwd=project, capture_output=True,
                              text=True, check=True).stdout.strip()
    (project / '.venv' / f'installed-{checksum}').touch()  # installed already: a second run installs nothing
    result = subprocess.run(['bash', project / 'quickstart.sh'], cwd=tmp_path, env=environment(PYTHON='false'),
                            capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result
    search, train, test = (tmp_path / 'calls').read_text().splitlines()
    assert 'train_search.py' in search and '--dataset=digits' in search
    assert 'train_cifar.py' in train and '--fixed_arc=exp/quickstart/search/arch_pool.final' in train
    assert '--mode=test' in test
    end = result.stdout[-600:]
    for word in (arch, '2 of these 3 were proposed in the search (after epochs 2, 4, 0; 0: the start)',
                 '97 % on the digits after the last epoch; 97.5 % the best', 'exp/quickstart/search',
                 'exp/quickstart/train', 'checkpoint_best.pt'):
        assert word in end


def install(project, **variables):
    """What `install` of a project's tools/common.sh says and ends with."""
    return subprocess.run(['bash', '-c', '. tools/common.sh; install requirements.txt'], cwd=project, capture_output=True,
                          text=True, env=environment(**variables), check=False)


def fake_python(path, body):
    """A program in place of Python; 3.10 or newer, if its body lets it come so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$0 $*" >> calls\n{body}\n')
    path.chmod(0o755)
    return {'PYTHON': str(path)}


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools')
    (tmp_path / 'requirements.txt').write_text('')
    return tmp_path


def test_a_virtual_environment_that_is_half_there_is_made_whole(project):
    """As one without ensurepip, which comes in a package of its own on some systems, or after Ctrl-C."""
    own = project / '.venv' / 'bin' / 'python'
    fake_python(own, 'case "$*" in *pip*) exit 1; esac')
    whole = 'case "$*" in *venv*) printf "#!/bin/sh\\n" > .venv/bin/python; esac'
    for body, status in (('case "$*" in *venv*) exit 1; esac', 2), (whole, 0)):
        result = install(project, **fake_python(project / 'python', body))
        assert result.returncode == status and ('with its venv module' in result.stderr) == bool(status), result
    assert list((project / '.venv').glob('installed-*'))


@pytest.mark.parametrize('old', ['python', '.venv/bin/python'])
def test_an_old_python_is_named_before_anything_is_installed(old, project):
    fake_python(project / old, 'case "$*" in *version_info*) exit 1; esac')
    result = install(project, PYTHON=str(project / 'python'))
    assert result.returncode == 2 and '3.10' in result.stderr and 'Traceback' not in result.stderr, result
    assert ' install ' not in (project / 'calls').read_text() and not list(project.glob('.venv/installed-*'))


@pytest.mark.parametrize('name', [*SCRIPTS, Path('.ci/run')], ids=str)
def test_scripts_are_valid_bash(name):
    result = subprocess.run(['bash', '-n', ROOT / name], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stderr == ''
