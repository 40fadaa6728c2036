"""hubconf.py: the published networks, checkpoints, and export to other programs."""

import pytest
import torch

import flags
import hubconf
import model
from architecture import PUBLISHED

TINY = {'layers': 1, 'channels': 4}
EVERY_OPERATION = '0 0 1 1 0 2 1 3 2 4 1 5 3 6 4 7 0 8 1 9 0 10 1 11 2 12 0 13 1 14 3 15 4 4 2 5 5 3 0 4'


def tiny(entry=hubconf.naonet_b_36, *arch, **options):
    torch.manual_seed(0)
    network = entry(*arch, **TINY | options).eval()
    size = 224 if hasattr(network, 'stem0') else 32
    return network, torch.randn(2, 3, size, size)


def with_flipped(images):
    """Another batch size."""
    return torch.cat([images, images.flip(3)])


@pytest.mark.parametrize(('entry', 'parameters'), [
    (hubconf.naonet_a_36, 11_470_150), (hubconf.naonet_a_128, 144_576_394), (hubconf.naonet_b_36, 2_921_302),
    (hubconf.naonet_a_imagenet, 11_353_831), (hubconf.naonet_v2_36, 4_387_654), (hubconf.naonet_v2_imagenet, 7_026_850)])
def test_entries_have_the_published_sizes(entry, parameters):
    with torch.device('meta'):
        assert model.count_parameters(entry()) == parameters


def test_torch_hub_loads_an_entry(request):
    network = torch.hub.load(str(request.config.rootpath), 'naonet', 'NAONet_B', source='local', classes=7, **TINY)
    assert network(torch.zeros(2, 3, 32, 32))[0].shape == (2, 7)


@pytest.mark.parametrize('imagenet', [False, True])
def test_a_checkpoint_says_what_network_it_is_of(tmp_path, imagenet):
    saved, images = tiny(hubconf.naonet_a_imagenet if imagenet else hubconf.naonet_a_36, classes=6, use_aux_head=True)
    path = tmp_path / 'checkpoint.pt'
    torch.save({'args': TINY | {'arch': PUBLISHED['NAONet_A']}, 'model': saved.state_dict()}, path)
    for network in (hubconf.naonet(checkpoint=path), hubconf.naonet('NAONet_A', path)):
        torch.testing.assert_close(network.eval()(images)[0], saved(images)[0])


def test_a_wrong_checkpoint_is_one_line(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    torch.save({'args': {}, 'model': tiny()[0].state_dict()}, path)
    with pytest.raises(flags.UserError, match='does not name its architecture'):
        hubconf.naonet(checkpoint=path)
    with pytest.raises(flags.UserError, match='channels'):
        hubconf.naonet_b_36(path)
    torch.save({'args': TINY, 'arch': PUBLISHED['NAONet_A'], 'model': tiny()[0].state_dict()}, path)
    with pytest.raises(flags.UserError, match='is of another architecture'):  # whose weights may fit all the same
        hubconf.naonet('NAONet_B', path)
    for args, weights in (({}, {'weight': torch.zeros(2)}), ({'layers': 'six'}, tiny()[0].state_dict())):
        torch.save({'args': args, 'model': weights}, path)
        with pytest.raises(flags.UserError, match='is not the checkpoint of a network of this project'):
            hubconf.naonet('NAONet_B', path)
    with pytest.raises(flags.UserError, match='no such checkpoint'):
        hubconf.naonet_b_36(tmp_path / 'none.pt')
    with pytest.raises(flags.UserError, match='give arch'):
        hubconf.naonet()


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('imagenet', [False, True])
def test_networks_are_traced(imagenet):
    # in double precision, as what is traced or exported rounds in another way (see kernels.on_plain_cpu)
    network, images = (each.double() for each in tiny(hubconf.naonet, EVERY_OPERATION, imagenet=imagenet))
    traced = torch.jit.trace(network, images)
    torch.testing.assert_close(traced(with_flipped(images))[0], network(with_flipped(images))[0])


@pytest.mark.parametrize('imagenet', [False, True])
def test_networks_are_exported(imagenet):
    # in double precision, as what is traced or exported rounds in another way (see kernels.on_plain_cpu)
    network, images = (each.double() for each in tiny(hubconf.naonet, EVERY_OPERATION, imagenet=imagenet))
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    logits, aux_logits = program.module()(with_flipped(images))
    torch.testing.assert_close(logits, network(with_flipped(images))[0])
    assert aux_logits is None


def test_onnx_gives_the_same(tmp_path):
    pytest.importorskip('onnxscript', reason='onnxscript is not installed: see requirements-tools.txt')
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed: see requirements-tools.txt')
    network, images = tiny(hubconf.naonet, EVERY_OPERATION)
    path = str(tmp_path / 'network.onnx')
    torch.onnx.export(network, (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(images)[0].detach(), atol=1e-3, rtol=1e-3)
