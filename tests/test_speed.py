"""What keeps a GPU from waiting, as far as it shows without one."""

import contextlib
import json
import subprocess
import sys

import benchmark
import pytest
import torch
from helpers import NAONET_B, ROOT, make_run
from torch.profiler import ProfilerActivity, profile

import architecture
import datasets
import training
from model import NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet

STEPS = 5


def make_network(kind):
    """A tiny network in training mode with everything that a step may use, and its further arguments."""
    sizes = (10, 1, 5, 4, 0.6, 0.8, True, 100)
    if kind in (NASNetworkCIFAR, NASNetworkImageNet):
        return kind(*sizes, NAONET_B).train(), ()
    return kind(*sizes).train(), (architecture.parse(NAONET_B),)


def steps(run, network, extras, batches):
    """Ten steps of the training loop's body, as between two log lines."""
    optimizer = training.sgd(run, network, 1e-4)
    meter = training.Meter(run)
    for step, (images, labels, weight) in enumerate(batches):
        with run.autocast():
            logits, aux_logits = network(images, *extras, step)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            loss = loss + 0.4 * torch.nn.functional.cross_entropy(aux_logits, labels)
        training.update(run, optimizer, loss * weight, 5.0)
        meter.update(logits, labels, loss)


@pytest.mark.parametrize('kind', [NASNetworkCIFAR, NASNetworkImageNet, NASWSNetworkCIFAR, NASWSNetworkImageNet])
def test_steps_run_where_nothing_can_be_read_back(kind):
    """On the meta device a tensor has no values: reading one on the host, or mixing in one of the CPU, is an error."""
    run = make_run()
    run.device, run.autocast = torch.device('meta'), contextlib.nullcontext
    network, extras = make_network(kind)
    size = 224 if 'ImageNet' in kind.__name__ else 32
    network = network.to('meta', memory_format=torch.channels_last)
    batch = torch.empty(4, 3, size, size, device='meta'), torch.empty(4, dtype=torch.long, device='meta'), 0.5
    steps(run, network, extras, [batch] * STEPS)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize('kind', [NASNetworkCIFAR, pytest.param(NASWSNetworkCIFAR, marks=pytest.mark.slow)])
def test_an_epoch_reads_no_number_between_log_lines(kind):
    run = make_run()
    data = datasets.load('digits', 'data', True, run.device)
    batches = datasets.TrainBatches(data.select(range(20 * STEPS)), 20, run.generators['data'], cutout_size=8)
    network, extras = make_network(kind)
    network = run.place(network)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps(run, network, extras, batches)
    names = {event.key for event in profiler.key_averages()}
    assert 'aten::convolution_backward' in names  # the profiler saw the work
    assert not names & {'aten::_local_scalar_dense', 'aten::item', 'aten::is_nonzero'}


def test_the_profiler_would_notice_a_number_read():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        float(torch.ones(()))
    assert 'aten::_local_scalar_dense' in {event.key for event in profiler.key_averages()}


def test_cells_compile_once_for_all_drop_path_probabilities():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = make_run()
    network, _ = make_network(NASNetworkCIFAR)
    compiled = torch.nn.Module.compile
    names = list(network.state_dict())
    try:
        # The graphs, without minutes of code.
        torch.nn.Module.compile = lambda self, **options: compiled(self, backend='eager', **options)
        run.compile_cells(network)
    finally:
        torch.nn.Module.compile = compiled
    images = torch.randn(4, 3, 32, 32)
    graphs = []
    for step in range(4):
        logits, aux_logits = network(images, step)
        (logits.sum() + aux_logits.sum()).backward()
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs == [len(network.cells)] * 4
    assert not torch._dynamo.utils.counters['graph_break']
    assert list(network.state_dict()) == names


@pytest.mark.parametrize(('amp', 'dtype'), [('off', torch.float32), ('bf16', torch.bfloat16)])
def test_mixed_precision_reaches_the_cells(amp, dtype):
    run = make_run(amp=amp)
    network, _ = make_network(NASNetworkCIFAR)
    seen = []
    network.cells[1].ops[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with run.autocast():
        network(torch.randn(2, 3, 32, 32), 50)
    assert seen == [dtype]


def test_loss_scale_is_in_the_checkpoint(tmp_path):
    run = make_run(amp='fp16', output_dir=str(tmp_path))
    run.scaler.scale(torch.ones(()))  # its tensors are made at the first use
    run.scaler.update(1024.0)
    state = run.state()
    resumed = make_run(amp='fp16', output_dir=str(tmp_path))
    resumed.resume(state, 'here')
    assert resumed.scaler.state_dict()['scale'] == 1024.0


TINY_NETWORKS = {
    'fixed': benchmark.Network(lambda run: run.place(make_network(NASNetworkCIFAR)[0]), 4),
    'supernet': benchmark.Network(lambda run: run.place(NASWSNetworkCIFAR(10, 1, 5, 4, 1.0, 1.0, False, 100)), 4, archs=2)}


@pytest.fixture
def tiny_networks(monkeypatch):
    monkeypatch.setattr(benchmark, 'NETWORKS', TINY_NETWORKS)
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def test_launches_are_what_a_gpu_is_sent():
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 1, 1, requires_grad=True)
    with benchmark.Launches() as launches:
        images.view(2, -1).transpose(0, 1).detach()
        assert launches.count == 0
        result = torch.nn.functional.conv2d(images, weight).relu_()
        assert launches.count == 2
        result.sum().backward()
        assert launches.count == 2 + 1 + 1 + 1 + 1  # the sum, its gradient of ones, ReLU's, the convolution's of its weight


@pytest.mark.usefixtures('tiny_networks')
def test_launches_of_a_step_are_the_same_on_the_meta_device():
    """Where the optimiser and the clipping have no form for all parameters at once, which a GPU and the CPU have."""
    run, (network, extras) = make_run(), make_network(NASNetworkCIFAR)
    counts, used = [], len([*network.parameters()])
    run.device, run.autocast = torch.device('meta'), contextlib.nullcontext
    batch = torch.empty(4, 3, 32, 32, device='meta'), torch.empty(4, dtype=torch.long, device='meta'), 1.0
    for count in (1, 2):
        with benchmark.Launches() as launches:
            steps(run, network.to('meta'), extras, [batch] * count)
        counts.append(launches.count)
    on_meta = counts[1] - counts[0]
    (on_gpu,), per_arch = benchmark.count_launches('fixed'), benchmark.count_launches('supernet')
    assert 0 < on_gpu < on_meta < on_gpu + 8 * used
    assert len({*per_arch}) == 2 and min(per_arch) > 0


@pytest.mark.usefixtures('tiny_networks')
@pytest.mark.parametrize('layout, precision', [('contiguous', 'float32'), ('channels_last', 'tf32'), ('channels_last', 'bf16')])
def test_benchmark_of_a_gpu_measures_networks_in_layouts_and_precisions(layout, precision):
    for name in TINY_NETWORKS:
        seconds, rate = benchmark.network_step(1, name, layout, precision, device='cpu', steps=2)
        assert seconds > 0 and rate == 4 / seconds


def test_benchmark_of_a_gpu_names_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a card')
    monkeypatch.setattr(benchmark, 'run_in_own_process', lambda name, repeats, images: {
        'name': name, 'seconds': 0.5, 'per_second': 256.0, 'peak_mb': 99.0})
    path = tmp_path / 'gpu.json'
    for more in ([f'--json={path}'], [f'--compare={path}']):
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--device=cuda', '--only=naonet_b', *more])
        benchmark.main()
    result = json.loads(path.read_text())
    assert result['device'] == 'a card' and [row['name'] for row in result['rows']] == [
        f'naonet_b_36_step {layout} {precision}' for layout in ('contiguous', 'channels_last')
        for precision in ('float32', 'tf32', 'bf16')]
    out = capsys.readouterr().out
    assert out.count('a card, PyTorch') == 2 and out.count('naonet_b_36_step ') == 12 and f'1.00 of {path}' in out


@pytest.mark.slow
def test_benchmark_writes_its_results(tmp_path):
    path = tmp_path / 'now.json'
    command = [sys.executable, str(ROOT / 'tools' / 'benchmark.py'), '--only', 'new_architectures', '--repeats', '1']
    subprocess.run([*command, '--json', str(path)], check=True, timeout=120)
    result = json.loads(path.read_text())
    assert result['gflops'] > 0
    row, = result['rows']
    assert row['name'] == 'new_architectures'
    assert row.keys() == {'name', 'seconds', 'per_second', 'normalised', 'peak_mb'}
    for mistake in (['--compare', str(tmp_path / 'none')], ['--json', str(tmp_path)]):
        failed = subprocess.run([*command, *mistake], capture_output=True, text=True, timeout=120)
        assert failed.returncode == 2
        assert failed.stderr.count('\n') == 1
    assert json.loads(path.read_text()) == result
