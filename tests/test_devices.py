"""What depends on the device: several GPUs, precision and layout, by stand-ins on the CPU. test_gpu.py has the real ones."""

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, Program, assert_equal, few_digits, load, make_run, run
from torch import nn

import parallel
import training
import utils
from model import NASNetworkCIFAR


@pytest.fixture
def few(tmp_path):
    return few_digits(tmp_path)


@pytest.fixture
def precision():
    """PyTorch's own settings of TF32, which a test may change."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def visible(monkeypatch):
    """A function that makes a run on the first of so many GPUs, whose generators are the CPU's."""
    monkeypatch.setattr(utils, 'default_generator', lambda device: torch.Generator())
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))

    def make(gpus, **flags):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        run = make_run(**{'device': 'cpu'} | flags)
        run.args.device, run.device = flags.get('device'), torch.device('cuda', 0)
        run.devices = [run.device]
        return run
    return make


# ----------------------------------------------------------------------------------------------- several GPUs, one process

@pytest.mark.parametrize('gpus, flags, by_torchrun, wanted', [
    (4, {}, False, 4), (1, {}, False, 1), (4, {'device': 'cuda:1'}, False, 1), (4, {'compile': True}, False, 1),
    (4, {}, True, 1)])  # torchrun may start a single process too
def test_found_architectures_train_on_all_visible_gpus(gpus, flags, by_torchrun, wanted, visible, monkeypatch, capsys):
    monkeypatch.setattr(utils, 'choose_device', lambda name: torch.device('cpu'))
    run, model, wrapped = visible(gpus, **flags), nn.Linear(2, 2), []
    monkeypatch.setattr(parallel, 'EvenDataParallel', lambda model, autocast, devices: wrapped.append(devices) or model)
    assert run.parallel(model) is model and not wrapped  # as in a search
    if by_torchrun:
        monkeypatch.setenv('LOCAL_RANK', '0')
    run.use_all_gpus()
    assert run.parallel(model) is model
    assert wrapped == [[torch.device('cuda', index) for index in range(gpus)]] * (wanted > 1)
    assert len(run.devices) == wanted
    assert ('--compile uses one of 4 GPUs in a process' in capsys.readouterr().out) == ('compile' in flags)


def test_dropout_of_the_other_gpus_is_seeded_each_otherwise_and_goes_on(visible):
    def started(gpus, seed=0):
        run = visible(gpus, seed=seed)
        run.use_all_gpus()
        return run

    def draws(run):
        return [float(torch.rand((), generator=run.generators[f'device {index}'])) for index in range(1, len(run.devices))]
    run = started(4)
    first = draws(run)
    assert draws(started(4)) == first != draws(started(4, seed=1)) and len({*first}) == 3
    state = run.state()
    second = draws(run)
    again = started(4)
    again.resume(state, 'epoch 1')
    assert draws(again) == second
    more = started(6)  # of which the checkpoint knows three
    more.resume(state, 'epoch 1')
    assert draws(more)[:3] == second and len({*draws(more)}) == 5


@pytest.mark.parametrize('batch, gpus, world, words, warns', [
    (128, 4, 1, '128 images a step, 32 on each of 4 GPUs', False), (128, 8, 1, '128 images a step, 16 on each of 8 GPUs', True),
    (96, 1, 4, '96 images a step, 24 on each of 4 GPUs', True), (16, 1, 1, '', False)])
def test_the_first_lines_say_how_many_images_each_gpu_gets(batch, gpus, world, words, warns, visible, capsys):
    run = visible(gpus)
    run.use_all_gpus()
    run.world = world
    training.log_share(run, SimpleNamespace(bounds=[(0, batch), (batch, 2 * batch + 1)]))
    out, err = capsys.readouterr()
    assert words in out and bool(words) == bool(out)
    assert (f'warning: batch-norm normalises by the {batch // (gpus * world)} images on each of' in err) == warns


class OnTheCPU(parallel.EvenDataParallel):
    """As on `gpus` GPUs, but each part is computed on the CPU, by the network itself, in one thread for all."""

    def __init__(self, run, model, gpus):
        super().__init__(model, run.autocast)
        self.dim, self.device_ids, self.src_device_obj, self.output_device = 0, list(range(gpus)), torch.device('cpu'), 0
        self.threads = [ThreadPoolExecutor(1)] * gpus

    def replicate(self, module, device_ids):
        return [module] * len(device_ids)

    def gather(self, outputs, device):
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def scatter_on_the_cpu(inputs, kwargs, devices, dim):
    """As PyTorch's, which cuts with torch.chunk too."""
    images, *others = inputs
    parts = [(part, *others) for part in images.chunk(len(devices), dim)]
    return parts, [kwargs or {}] * len(parts)


def apply_on_the_cpu(modules, inputs, kwargs, devices):
    """As PyTorch's of a single module, which takes autocast from its thread, where it is off."""
    (module,), (each,), (more,), _ = modules, inputs, kwargs, devices
    with torch.autocast('cpu', enabled=False):
        return [module(*each, **more)]


@pytest.fixture
def scatter(monkeypatch):
    monkeypatch.setattr(sys.modules['torch.nn.parallel.data_parallel'], 'scatter_kwargs', scatter_on_the_cpu)
    monkeypatch.setattr(parallel, 'parallel_apply', apply_on_the_cpu)


@pytest.mark.usefixtures('scatter')
def test_each_gpu_keeps_its_thread():
    """cuDNN keeps the plans that it has chosen for each thread: in new threads it would choose at every step."""
    seen = []

    class Where(nn.Module):
        def forward(self, images):
            seen.append((threading.get_ident(), torch.is_grad_enabled()))
            return (images,)
    model = OnTheCPU(make_run(), Where(), 3)
    model.threads = [ThreadPoolExecutor(1) for _ in range(3)]
    for _ in range(4):
        model(torch.zeros(6, 1))
    with torch.no_grad():
        model(torch.zeros(6, 1))
    assert len({thread for thread, _ in seen}) == 3 and [enabled for _, enabled in seen] == [True] * 12 + [False] * 3


def test_gradients_of_any_layout_are_averaged(monkeypatch):
    monkeypatch.setattr(parallel.dist, 'all_reduce', lambda flat: flat.mul_(2))  # of two processes that agree
    shapes = [(4, 3, 3, 3), (4, 3, 1, 1), (7,), (4, 1, 3, 3)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
        if parameter.dim() == 4:
            parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
    before = [parameter.grad.clone() for parameter in parameters]
    parallel.average_gradients(parameters, 2)
    assert all(torch.equal(parameter.grad, grad) and parameter.grad.stride() == grad.stride()
               for parameter, grad in zip(parameters, before, strict=True))


@pytest.mark.usefixtures('scatter')
@pytest.mark.parametrize('gpus', [2, 3, 4, 8])
def test_no_gpu_gets_a_single_image_of_a_batch(gpus):
    """The auxiliary head's batch-norm refuses it: PyTorch's own DataParallel fails with 5 images on 4 GPUs."""
    run = make_run()
    model = run.place(NASNetworkCIFAR(10, 1, 1, 4, 1.0, 1.0, True, 10, TINY)).train()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for batch in range(2, 20):
        logits, aux_logits = OnTheCPU(run, model, gpus)(torch.randn(batch, 3, 32, 32), 0)
        assert logits.shape == aux_logits.shape == (batch, 10)
        assert sum(seen) == batch and min(seen) >= 2 and len(seen) <= gpus
        seen.clear()
    OnTheCPU(run, model, gpus)(torch.randn(16 * gpus, 3, 32, 32), 0)
    assert seen == [16] * gpus


@pytest.mark.usefixtures('scatter')
@pytest.mark.parametrize('amp, dtype', [('off', None), ('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_every_gpu_computes_in_the_precision_asked_for(amp, dtype):
    """A thread knows another dtype by default: fp16 on GPUs, bf16 on the CPU."""
    class Reader(nn.Module):
        def forward(self, images):
            seen.append(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None)
            return images, images
    run, seen = make_run(amp=amp), []
    with run.autocast():
        OnTheCPU(run, Reader(), 3)(torch.zeros(6, 2))
    assert seen == [dtype] * 3


def test_a_checkpoint_under_data_parallel_has_the_names_of_one_gpu(few, tmp_path):
    """DataParallel on the CPU hands everything to the network, but its parameters are called module.…"""
    command = ['train_cifar.py', '--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=2', '--epochs=2',
               f'--fixed_arc={TINY}', '--batch_size=16', '--lr_max=0.1']
    several = few + """
import parallel, torch, utils
utils.Run.parallel = lambda self, model: parallel.EvenDataParallel(model, self.autocast)
"""
    started = [Program(*command, f'--output_dir={tmp_path / name}', preamble=preamble)
               for name, preamble in (('one', few), ('several', several))]
    for program in started:
        result = program.wait()
        assert result.status == 0, result
    one, several = (load(tmp_path / name / 'checkpoint.pt') for name in ('one', 'several'))
    assert list(one['model']) == list(several['model'])
    assert_equal(one['model'], several['model'])


def test_cuda_without_a_number_is_a_gpu_for_each_process(monkeypatch):
    chosen = []
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setattr(torch, 'empty', lambda *shape, device: chosen.append(device))
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    assert utils.choose_device('cuda') == torch.device('cuda:2')
    assert utils.choose_device('cuda:1') == torch.device('cuda:1')
    assert chosen == [torch.device('cuda:2')] * 2 + [torch.device('cuda:1')] * 2


# ---------------------------------------------------------------------------------------------------- precision and layout

@pytest.mark.usefixtures('precision')
@pytest.mark.parametrize('flag, convolutions, products', [(None, True, False), (True, True, True), (False, False, False)])
def test_tf32_is_pytorchs_default_unless_a_flag_says_otherwise(flag, convolutions, products, monkeypatch):
    run = make_run(tf32=flag)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (convolutions, products)
    assert run.tf32 == (False, False)  # on a CPU
    run.device = torch.device('cuda', 0)
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, capability=capability: capability)
        assert run.tf32 == ((convolutions, products) if capability >= (8, 0) else (False, False))


@pytest.mark.usefixtures('precision')
@pytest.mark.parametrize('device, amp, tf32, capability, wanted', [
    ('cpu', 'off', None, None, 'channels_last'), ('cpu', 'bf16', False, None, 'channels_last'),
    ('cuda', 'off', None, (9, 0), 'channels_last'), ('cuda', 'off', False, (9, 0), 'contiguous'),
    ('cuda', 'off', True, (7, 0), 'contiguous'), ('cuda', 'bf16', False, (9, 0), 'channels_last'),
    ('cuda', 'fp16', None, (7, 0), 'channels_last'), ('mps', 'off', None, None, 'contiguous')])
def test_the_layout_is_channels_last_where_that_is_fast(device, amp, tf32, capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    for layout in ('auto', 'channels_last', 'contiguous'):
        run = make_run(amp=amp, tf32=tf32, layout=layout)
        run.device = torch.device(device)
        name = wanted if layout == 'auto' else layout
        assert run.layout() == utils.LAYOUTS[name]
        words = {'channels_last': ', channels-last', 'contiguous': ', default'}[name]
        differs = (device, amp, layout, name) == ('cuda', 'off', 'auto', 'channels_last')
        assert run.layout(supernet=True) == utils.LAYOUTS['contiguous' if differs else name]
        assert run.environment().endswith(words + ' (of a supernet default)' * differs + ' layout')


@pytest.mark.usefixtures('precision')
@pytest.mark.parametrize('amp, tf32, capability, words', [
    ('off', None, (8, 0), 'float32 with TF32 in convolutions only'), ('off', True, (8, 0), 'float32 with TF32'),
    ('off', False, (8, 0), 'float32 without TF32'), ('off', True, (7, 5), 'float32 without TF32'),
    ('bf16', None, (8, 0), 'bf16 mixed precision with TF32 in convolutions only')])
def test_the_first_lines_say_the_precision(amp, tf32, capability, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    run = make_run(amp=amp, tf32=tf32)
    run.device = torch.device('cuda', 0)
    assert f'device cuda:0 (a GPU), PyTorch {torch.__version__}, {words}, ' in run.environment()


def test_weights_and_images_are_in_one_layout_which_changes_no_result():
    results = []
    for layout, given in itertools.product(('auto', 'contiguous'), (torch.contiguous_format, torch.channels_last)):
        torch.manual_seed(0)
        run, outputs = make_run(layout=layout), []
        network = run.place(NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 10, '0 1 1 2 2 0 0 3 0 3 1 0 2 2 1 4')).train()
        for cell in network.cells:
            cell.register_forward_hook(lambda module, inputs, output, seen=outputs: seen.append(output.raw))
        results.append(network(torch.randn(4, 3, 32, 32).contiguous(memory_format=given), 0)[0])
        wanted = torch.channels_last if layout == 'auto' else torch.contiguous_format
        assert network.stem[0].weight.is_contiguous(memory_format=wanted)
        assert len(outputs) == 5 and all(output.is_contiguous(memory_format=wanted) for output in outputs)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('flags, words', [
    ([], '--tf32=None --'), (['--tf32'], '--tf32=True '),
    (['--no-tf32', '--layout=contiguous'], '--tf32=False --layout=contiguous')])
def test_flags_of_precision_and_layout_are_logged(flags, words, few, tmp_path):
    result = run('train_cifar.py', '--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=4', '--epochs=1',
                 f'--fixed_arc={TINY}', '--batch_size=32', '--lr_max=0.1', f'--output_dir={tmp_path / "out"}', *flags,
                 preamble=few)
    assert result.status == 0 and words in result.out, result
    assert f', float32, {"default" if len(flags) == 2 else "channels-last"} layout' in result.out
