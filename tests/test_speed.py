"""What keeps a GPU from waiting, as far as it shows without one."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from helpers import NAONET_B, ROOT, make_run
from torch.profiler import ProfilerActivity, profile

import architecture
import datasets
import training
from model import NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet

STEPS = 10


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


@pytest.mark.parametrize('kind', [NASNetworkCIFAR, NASWSNetworkCIFAR])
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
        torch.nn.Module.compile = lambda self: compiled(self, backend='eager')  # the graphs, without minutes of code
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
