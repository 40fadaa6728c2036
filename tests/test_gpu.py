"""What a machine with GPUs is to try first: `python -m pytest -m gpu`. The same tests run on the CPU, where they may.

Besides these, test_processes.py has the computations of several processes on GPUs, with NCCL.
"""

import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, TINY, Program, few_digits, fill, load, make_run, metrics, run, torchrun, write_images
from tooling import tool

import architecture
import datasets
import training
from model import NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR

GPU, GPUS, SLOW = pytest.mark.gpu, pytest.mark.gpu(2), pytest.mark.slow
DEVICES = [pytest.param('cpu', marks=SLOW), pytest.param('cuda', marks=GPU)]
TWO = [pytest.param('cpu', marks=SLOW), pytest.param('cuda', marks=GPUS)]
ROUNDED = 10.0  # per cent of a few test images, which another precision or device may tip over
CIFAR = ['train_cifar.py', '--dataset=digits', '--nodes=1', '--layers=1', '--channels=4', f'--fixed_arc={TINY}',
         '--batch_size=16', '--eval_batch_size=7', '--lr_max=0.1', '--drop_path_keep_prob=0.7', '--keep_prob=0.8',
         '--use_aux_head']
IMAGENET = ['train_imagenet.py', '--nodes=1', '--layers=1', '--channels=4', f'--fixed_arc={TINY}', '--batch_size=8',
            '--lr=0.00625', '--eval_batch_size=5', '--workers=1', '--epochs=1']
SEARCH = ['train_search.py', '--dataset=digits', '--child_nodes=2', '--child_layers=1', '--child_channels=4',
          '--child_batch_size=36', '--child_eval_batch_size=16', '--child_epochs=1', '--child_rank_count=2',
          '--child_rank_epochs=1', '--controller_seed_arch=8', '--controller_new_arch=4', '--controller_epochs=5',
          '--controller_encoder_hidden_size=24', '--controller_decoder_hidden_size=24', '--rounds=1']


EAGER = """
import torch
compiled = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **options: compiled(self, backend='eager', **options)  # no minutes of code
"""


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'))


def trained(few, out, *flags, start=Program, epochs=1, command=CIFAR):
    """Train to so many epochs in a process, or in those that `start` starts; the log. The last loss is a number."""
    result = start(*command, f'--epochs={epochs}', f'--output_dir={out}', *flags, preamble=few).wait(600)
    assert result.status == 0, result
    last = metrics(out)[-1]
    assert (last['kind'], last['epoch']) == ('epoch', epochs) and last['train']['loss'] < 10
    return result.out


def error_of(few, out, *flags, command=CIFAR):
    """The error of the best epoch as --mode=test finds it, which is that of the checkpoint."""
    result = run(command[0], '--mode=test', f'--output_dir={out}', *flags, preamble=few)
    assert result.status == 0, result
    error = float(re.search(r'top-1 error ([\d.]+) %', result.out)[1])
    assert error == pytest.approx(100 - load(out / 'checkpoint_best.pt')['best_acc_top1'], abs=ROUNDED)
    return error


# -------------------------------------------------------------------------------------------------------------- one device

@pytest.mark.parametrize('device, flags, words', [
    pytest.param(*values, marks=SLOW if values[0] == 'cpu' else GPU, id=' '.join([values[0], *values[1]])) for values in (
        ('cpu', [], 'float32'), ('cpu', ['--amp=bf16'], 'bf16 mixed precision'),
        ('cpu', ['--layout=contiguous'], 'default layout'), ('cuda', [], 'float32'), ('cuda', ['--tf32'], 'float32 with'),
        ('cuda', ['--no-tf32'], 'without TF32, default layout'), ('cuda', ['--amp=bf16'], 'bf16 mixed precision'),
        ('cuda', ['--amp=fp16'], 'fp16 mixed precision'), ('cuda', ['--layout=contiguous'], 'default layout'),
        ('cuda', ['--layout=channels_last', '--no-tf32'], 'without TF32, channels-last layout'))])
def test_a_network_trains_goes_on_and_is_tested(device, flags, words, few, tmp_path):
    log = trained(few, tmp_path, f'--device={device}', *flags)
    assert f'device {device}' in log and words in log
    assert 'resumed after epoch 1' in trained(few, tmp_path, f'--device={device}', *flags, epochs=2)
    error_of(few, tmp_path, f'--device={device}', *flags)


@pytest.mark.parametrize('device', DEVICES)
def test_a_training_moves_between_devices(device, few, tmp_path):
    for epochs, where in enumerate((device, 'cpu', device), start=1):
        log = trained(few, tmp_path, f'--device={where}', epochs=epochs)
        moved = where != device or (epochs == 3 and device != 'cpu')
        assert ('are of another kind of device: they begin anew' in log) == moved
    assert error_of(few, tmp_path, '--device=cpu') == pytest.approx(error_of(few, tmp_path, f'--device={device}'), abs=ROUNDED)


@pytest.mark.parametrize('device', DEVICES)
def test_photographs_train_on_batches_of_files(device, tmp_path):
    for part, count in (('train', 4), ('valid', 3)):
        write_images(tmp_path / part, {f'n{number}': count for number in range(6)}, seed=count)
    flags = [f'--data={tmp_path}', f'--device={device}']
    trained('', tmp_path / 'out', *flags, command=IMAGENET)
    error_of('', tmp_path / 'out', *flags, command=IMAGENET)


@pytest.mark.parametrize('method', ['NAO-WS', 'NAO'])
@pytest.mark.parametrize('device', DEVICES)
def test_a_search_finds_architectures(device, method, few, tmp_path):
    result = run(*SEARCH, f'--device={device}', f'--method={method}', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0 and f'device {device}' in result.out, result
    final = (tmp_path / 'arch_pool.final').read_text().splitlines()
    assert len(final) == 2 and all(architecture.parse(line) for line in final)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=GPU)])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('kind', [NASNetworkCIFAR, NASNetworkImageNet, NASWSNetworkCIFAR])
@pytest.mark.usefixtures('float64')
def test_a_step_has_the_gradients_of_the_cpus_plain_operations(kind, layout, device, monkeypatch):
    """In double precision; on the CPU its own forms of operations are compared with PyTorch's."""
    arch, found = architecture.parse('0 1 1 2 2 0 0 3 0 3 1 0 2 2 1 4'), []
    images = torch.randn((4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr('kernels.on_plain_cpu', lambda x: False)
    for where in ('cpu', device):
        run = make_run(device=where, layout=layout)
        sizes, path = ((10, 1, 2, 4, 1.0, 1.0, False, 10), [arch])
        network = kind(*sizes) if kind is NASWSNetworkCIFAR else kind(*sizes, *path)
        fill(network)
        network = run.place(network).train()
        logits, _ = network(images.to(run.device), *(path if kind is NASWSNetworkCIFAR else []), 0)
        torch.nn.functional.cross_entropy(logits, torch.arange(4, device=run.device)).backward()
        found.append({name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None})
        monkeypatch.undo()
    wanted, gradients = found
    assert wanted.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), wanted[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('device', DEVICES)
def test_cells_are_compiled(device, few, tmp_path):
    trained(few + (EAGER if device == 'cpu' else ''), tmp_path, f'--device={device}', '--compile')
    error_of(few, tmp_path, f'--device={device}')


@GPU
@pytest.mark.parametrize('amp', ['off', 'bf16'])
@pytest.mark.parametrize('kind', [NASNetworkCIFAR, NASNetworkImageNet, NASWSNetworkCIFAR])
def test_no_step_waits_for_the_gpu(kind, amp):
    """Between the first step and the end of an epoch, its batches included; --amp=fp16 asks for its scale at each step."""
    run, path = make_run(device='cuda', amp=amp), [architecture.parse('0 1 1 2 2 0 0 3 0 3 1 0 2 2 1 4')]
    shared = kind is NASWSNetworkCIFAR
    network = run.place(kind(10, 1, 2, 4, 0.9, 0.9, kind is not NASNetworkImageNet, 10, *([] if shared else path))).train()
    pixels, labels = torch.randint(1 << 24, (48, 72, 72), dtype=torch.int32), torch.arange(48) % 10
    mean, std = torch.full((2, 3, 1, 1), 0.5)
    images = datasets.ImageSet(*(tensor.to(run.device) for tensor in (pixels, labels, mean, std)), flip=True)

    class Watched(datasets.TrainBatches):
        def __iter__(self):
            for done, batch in enumerate(super().__iter__(), start=1):
                torch.cuda.set_sync_debug_mode('default' if done in (1, len(self)) else 'error')
                yield batch
    try:
        values, steps = training.train_epoch(
            run, lambda images, step: network(images, *(path if shared else []), step), training.sgd(run, network, 1e-4),
            Watched(images, 8, torch.Generator(), cutout_size=8), title='', lr=0.01, step=0, clock=training.Clock(0, 6),
            grad_bound=5.0, shares_weights=shared)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert steps == 6 and values['loss'] < 10


@GPU
@pytest.mark.usefixtures('float64')
def test_steps_replayed_as_graphs_train_as_steps_do():
    """Weights and statistics after three epochs at different rates; the last batch of an epoch is a smaller one."""
    pixels, labels = torch.randint(1 << 24, (52, 24, 24), dtype=torch.int32), torch.arange(52) % 10
    mean, std = torch.full((2, 3, 1, 1), 0.5)
    states, steps, plain = [], tool('tools/graphed.py').GraphedSteps(), training.make_step
    for make_step in (plain, steps):
        run = make_run(device='cuda')
        images = datasets.ImageSet(*(tensor.to(run.device) for tensor in (pixels, labels, mean, std)), flip=True)
        network = NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 10, '0 1 1 2 2 0 0 3 0 3 1 0 2 2 1 4')
        fill(network)
        network = run.place(network).train()
        optimizer, batches = training.sgd(run, network, 1e-4), datasets.TrainBatches(images, 8, torch.Generator())
        training.make_step = make_step
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for lr in (0.1, 0.05, 0.01):
                    values, _ = training.train_epoch(run, network, optimizer, batches, title='', lr=lr, step=0,
                                                     clock=training.Clock(0, 21), grad_bound=5.0, label_smooth=0.1)
        finally:
            training.make_step = plain
        states.append(({name: tensor.double().cpu() for name, tensor in network.state_dict().items()}, values['loss']))
    assert [batch[0] for batch in steps.recorded] == [8] and steps.seen[8, 3, 16, 16, 1.0] == 18
    (wanted, loss), (state, replayed) = states
    assert replayed == pytest.approx(loss, rel=1e-4)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


LITTLE = """
import torch
total = torch.cuda.mem_get_info()[1]
torch.cuda.set_per_process_memory_fraction(0.1 * 2 ** 30 / total)
"""
LITTLE_AT_FIRST = """
import torch, candidates
train = candidates.train_candidate

def with_little(*args):
    candidates.train_candidate = train
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        return train(*args)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

candidates.train_candidate = with_little
"""


@GPU
@pytest.mark.parametrize('command, flag', [(CIFAR, '--channels=1024'), ([*SEARCH, '--method=NAO'], '--child_channels=1024')])
def test_what_does_not_fit_into_the_gpu_is_said_in_one_line(command, flag, few, tmp_path):
    result = run(*command, flag, f'--output_dir={tmp_path}', preamble=few + LITTLE)
    assert result.status == 1 and len(result.err.splitlines()) == 1, result
    assert 'the memory does not hold the network and a batch' in result.err


@GPU
def test_a_candidate_that_does_not_fit_counts_0(few, tmp_path):
    result = run(*SEARCH, '--method=NAO', f'--output_dir={tmp_path}', preamble=few + LITTLE_AT_FIRST)
    assert result.status == 0 and 'candidate 1/8 failed and counts 0: CUDA out of memory' in result.out, result
    results = [json.loads(line) for line in (tmp_path / 'results.0.jsonl').read_text().splitlines()]
    assert ['error' in result for result in results] == [True] + [False] * (len(results) - 1)


@GPU
def test_more_processes_than_gpus(few, tmp_path):
    gpus = torch.cuda.device_count()
    result = torchrun(gpus + 1, *CIFAR, '--epochs=1', f'--output_dir={tmp_path}', preamble=few).wait()
    assert result.status and f'--device=cuda:{gpus} cannot be used here' in result.err, result


@GPU
def test_the_benchmark_measures_the_gpu():
    command = [sys.executable, str(ROOT / 'tools' / 'benchmark.py'), '--device=cuda', '--repeats=1']
    done = subprocess.run([*command, '--only=supernet_step channels_last bf16'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and torch.cuda.get_device_name() in done.stdout, done


# -------------------------------------------------------------------------------------------------------- several devices

@pytest.mark.parametrize('device', TWO)
def test_two_processes_train_together(device, few, tmp_path):
    log = trained(few, tmp_path, f'--device={device}', '--amp=bf16', start=partial(torchrun, 2))
    assert '2 processes' in log and '16 images a step, 8 on each of 2' in log
    assert 'resumed after epoch 1' in trained(few, tmp_path, f'--device={device}', epochs=2)  # by one
    error_of(few, tmp_path, f'--device={device}')


@pytest.mark.parametrize('method', ['NAO-WS', 'NAO'])
@pytest.mark.parametrize('device', TWO)
def test_two_processes_search_together(device, method, few, tmp_path):
    flags = [f'--device={device}', f'--method={method}', f'--output_dir={tmp_path}']
    result = torchrun(2, *SEARCH, *flags, preamble=few).wait()
    assert result.status == 0 and '2 processes' in result.out, result
    assert len((tmp_path / 'arch_pool.final').read_text().splitlines()) == 2


@GPUS
@pytest.mark.parametrize('amp', ['off', 'bf16', 'fp16'])
def test_one_process_trains_on_all_gpus(amp, few, tmp_path):
    """DataParallel: what a program does by itself where several GPUs are visible."""
    gpus = torch.cuda.device_count()
    log = trained(few, tmp_path, f'--batch_size={4 * gpus}', f'--amp={amp}')
    assert f'{4 * gpus} images a step, 4 on each of {gpus} GPUs' in log
    assert 'resumed after epoch 1' in trained(few, tmp_path, f'--batch_size={4 * gpus}', f'--amp={amp}', epochs=2)
    random, = load(tmp_path / 'checkpoint.pt')['random']
    assert {'device', *(f'device {index}' for index in range(1, gpus))} < random.keys()
    error_of(few, tmp_path, f'--amp={amp}')


@GPUS
def test_compiling_takes_one_gpu_and_says_so(few, tmp_path):
    assert '--compile uses one of' in trained(few + EAGER, tmp_path, '--compile')
