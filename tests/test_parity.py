"""Names, shapes and values against those measured on the reference implementation (tests/data)."""

import pytest
import torch
import torch.nn.functional as F
from helpers import NAONET_A, NAONET_B, fill, inputs, reference

import architecture
from controller import NAO, shift
from model import NASNetworkCIFAR, NASNetworkImageNet, count_parameters
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet

NETWORKS = {  # name: (class, classes, layers, channels, architecture, parameters without the auxiliary head)
    'NAONet_A_36_cifar10': (NASNetworkCIFAR, 10, 6, 36, NAONET_A, 11_470_150),
    'NAONet_A_128_cifar10': (NASNetworkCIFAR, 10, 6, 128, NAONET_A, 144_576_394),
    'NAONet_B_36_cifar10': (NASNetworkCIFAR, 10, 6, 36, NAONET_B, 2_921_302),
    'NAONet_A_imagenet': (NASNetworkImageNet, 1000, 4, 42, NAONET_A, 11_353_831),
}
TOLERANCE = 1e-8


def network(kind, classes, layers, channels, arch, nodes=5):
    return kind(classes=classes, layers=layers, nodes=nodes, channels=channels, keep_prob=1.0, drop_path_keep_prob=1.0,
                use_aux_head=True, steps=10, arch=arch)


def supernet(layers, channels, use_aux_head, kind=NASWSNetworkCIFAR):
    return kind(classes=10, layers=layers, nodes=5, channels=channels, keep_prob=1.0, drop_path_keep_prob=1.0,
                use_aux_head=use_aux_head, steps=10)


def controller():
    vocabulary = architecture.vocabulary(5, 'small')
    return NAO(vocabulary.allowed_tokens, vocabulary.size, encoder_length=20)


def names_and_shapes(model):
    return [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]


def difference(mine, theirs):
    mine, theirs = torch.as_tensor(mine), torch.as_tensor(theirs, dtype=torch.float64)
    assert mine.dtype == torch.float64 and mine.shape == theirs.shape
    return float((mine - theirs).abs().max() / theirs.abs().max())


def gradient_norm(model):
    return torch.sqrt(sum((parameter.grad ** 2).sum() for parameter in model.parameters() if parameter.grad is not None))


@pytest.mark.parametrize('name', NETWORKS)
def test_network_has_the_published_state_dict_and_parameter_count(name):
    *sizes, parameters = NETWORKS[name]
    with torch.device('meta'):
        model = network(*sizes)
    assert names_and_shapes(model) == list(reference('state_dicts')[name].items())
    assert count_parameters(model) == parameters


def test_supernet_has_the_published_state_dict():
    with torch.device('meta'):
        model = supernet(2, 8, use_aux_head=True)
    assert names_and_shapes(model) == list(reference('state_dicts')['supernet'].items())


def test_supernet_of_the_search_has_the_published_parameter_count():
    with torch.device('meta'):
        assert count_parameters(supernet(3, 20, use_aux_head=False)) == 7_387_350


def test_imagenet_supernet_has_the_cells_of_the_cifar_one():
    with torch.device('meta'):
        cifar, imagenet = (supernet(2, 8, True, kind) for kind in (NASWSNetworkCIFAR, NASWSNetworkImageNet))
    cells = [[pair for pair in names_and_shapes(model) if pair[0].startswith('cells.') and 'calibrate' not in pair[0]]
             for model in (cifar, imagenet)]
    assert cells[0] == cells[1]


def test_controller_has_the_published_state_dict():
    with torch.device('meta'):
        model = controller()
    assert names_and_shapes(model) == list(reference('state_dicts')['controller'].items())


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('kind, index', [*(('cifar', index) for index in range(4)), ('imagenet', 0)])
def test_network_computes_the_reference_values(kind, index, float64):
    values = reference('parity')[kind][index]
    model = network({'cifar': NASNetworkCIFAR, 'imagenet': NASNetworkImageNet}[kind], values['classes'], values['layers'],
                    values['channels'], values['arch'], values['nodes'])
    assert count_parameters(model) == values['params']
    assert len(model.state_dict()) == values['state_entries']
    fill(model)
    images = inputs(values['shape'], values['seed'])
    labels = torch.arange(len(images)) % values['classes']
    columns = len(values['eval_logits'][0])

    model.eval()
    logits, aux_logits = model(images)
    assert aux_logits is None and logits.shape == (len(images), values['classes'])
    assert difference(logits[:, :columns].detach(), values['eval_logits']) < TOLERANCE

    model.train()
    logits, aux_logits = model(images, 0)
    loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(aux_logits, labels)
    loss.backward()
    assert difference(logits[:, :columns].detach(), values['train_logits']) < TOLERANCE
    assert difference(aux_logits[:, :columns].detach(), values['aux_logits']) < TOLERANCE
    assert difference(loss.detach(), values['loss']) < TOLERANCE
    assert difference(gradient_norm(model), values['grad_norm']) < TOLERANCE
    means = sum(tensor.sum() for name, tensor in model.state_dict().items() if name.endswith('running_mean'))
    assert difference(means, values['running_mean_sum']) < TOLERANCE


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('index', range(2))
def test_supernet_computes_the_reference_values(index, float64):
    values = reference('parity')['supernet'][index]
    arch = architecture.parse(values['arch'])
    model = supernet(2, 8, use_aux_head=True)
    fill(model)
    images = inputs([4, 3, 32, 32], values['seed'])
    labels = torch.arange(4) % 10

    model.train()
    logits, aux_logits = model(images, arch, 0)
    (F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(aux_logits, labels)).backward()
    assert difference(logits.detach(), values['train_logits']) < TOLERANCE
    assert difference(aux_logits.detach(), values['aux_logits']) < TOLERANCE
    assert difference(gradient_norm(model), values['grad_norm']) < TOLERANCE
    assert sum(parameter.grad is not None for parameter in model.parameters()) == values['used_params']

    fill(model)
    model.eval()
    logits, aux_logits = model(images, arch, bn_train=True)
    assert aux_logits is None
    assert difference(logits.detach(), values['bn_train_logits']) < TOLERANCE


@pytest.mark.usefixtures('form')
def test_controller_computes_the_reference_values(float64):
    values = reference('parity')['controller']
    sequences = torch.tensor(values['sequences'])
    model = controller()
    fill(model)
    model.eval()
    prediction, log_probs, _ = model(sequences, shift(sequences))
    assert difference(prediction.flatten().detach(), values['predict']) < TOLERANCE
    sums = log_probs.gather(2, sequences[..., None]).sum((1, 2)).detach()
    assert difference(sums, values['log_prob_sum']) < TOLERANCE
    assert difference(log_probs[0].detach(), values['log_prob_first']) < TOLERANCE
    assert model(sequences)[2].tolist() == values['greedy']


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('step', reference('parity')['controller']['new'])
def test_controller_finds_the_architectures_of_the_reference(step, float64):
    values = reference('parity')['controller']
    model = controller()
    fill(model)
    model.eval()
    new = model.generate_new_arch(torch.tensor(values['sequences']), float(step))
    assert new.tolist() == values['new'][step]
