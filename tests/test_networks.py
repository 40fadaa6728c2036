"""The fixed network and the supernet on random architectures; drop path, batch statistics, gradients."""

import copy
import itertools
import math

import pytest
import torch
from helpers import NAONET_A, NAONET_B, architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import architecture
from architecture import parse, sample, unread_states
from model import Cell, NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet, WSBatchNorm
from operations import SEARCH_SPACES, FactorizedReduce, State

SIZES = {'classes': 10, 'layers': 1, 'nodes': 2, 'channels': 2, 'keep_prob': 1.0, 'drop_path_keep_prob': 1.0,
         'use_aux_head': False, 'steps': 10}

EVERY_REDUCTION = parse('0 4 1 0 1 1 0 2 0 4 0 4 0 4 2 4')  # identities of stride 2 for x and y, and an unread input


def fixed(arch, kind=NASNetworkCIFAR, **sizes):
    return kind(**(SIZES | sizes), arch=arch)


def supernet(kind=NASWSNetworkCIFAR, **sizes):
    return kind(**(SIZES | sizes))


def images(size=8, batch=2, seed=0):
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(seed))


def in_random_order(*ranges, seed=0):
    """Endless random choices, one of each range."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield [chosen[int(torch.randint(len(chosen), (), generator=generator))] for chosen in ranges]


# --------------------------------------------------------------------------------------------------- random architectures

@pytest.mark.parametrize('nodes, count', [
    (1, 50), (2, 50), (3, 50), (5, 50), *(pytest.param(nodes, 300, marks=pytest.mark.slow) for nodes in (2, 3, 5))])
def test_many_random_architectures_run_through_the_fixed_network(nodes, count, generator):
    choices = in_random_order([2, 3, 4], [10, 100], [8, 9, 12], [True, False])
    for arch in sample(count, nodes, range(16), generator):
        channels, classes, size, training = next(choices)
        model = fixed(arch, nodes=nodes, channels=channels, classes=classes).train(training)
        with torch.no_grad():
            logits, aux_logits = model(images(size), 0)
        assert logits.shape == (2, classes) and logits.isfinite().all(), arch
        assert aux_logits is None
        for index, cell in enumerate(model.cells):  # the classifier's input grows with the number of unread states
            values = arch.reduction if index in (1, 3) else arch.normal
            halvings = sum(index >= reduction for reduction in (1, 3))
            assert cell.output_shape == (halvings, channels * 2 ** halvings * len(unread_states(values))), arch
        assert model.classifier.in_features == 4 * channels * len(unread_states(arch.normal))


@pytest.mark.parametrize('nodes, count', [
    (1, 50), (2, 50), (3, 50), (5, 50), *(pytest.param(nodes, 300, marks=pytest.mark.slow) for nodes in (2, 3, 5))])
def test_many_random_architectures_run_through_the_supernet(nodes, count, generator):
    model = supernet(nodes=nodes, channels=3, classes=100)
    choices = in_random_order([8, 9, 12], ['train', 'score', 'eval'])
    for arch in sample(count, nodes, SEARCH_SPACES['small'], generator):
        size, mode = next(choices)
        model.train(mode == 'train')
        with torch.no_grad():
            logits, aux_logits = model(images(size), arch, 0, bn_train=mode == 'score')
        assert logits.shape == (2, 100) and logits.isfinite().all(), arch
        assert aux_logits is None


@pytest.mark.usefixtures('form')
@settings(max_examples=30)
@given(architectures(nodes=3, operations=SEARCH_SPACES['small']), st.booleans())
def test_gradients_of_random_architectures_are_finite(arch, weight_sharing):
    model = supernet(nodes=3, use_aux_head=True) if weight_sharing else fixed(arch, nodes=3, use_aux_head=True)
    extras = (arch,) if weight_sharing else ()
    logits, aux_logits = model(images(32), *extras, 0)
    assert aux_logits.shape == logits.shape == (2, 10)
    (logits.square().sum() + aux_logits.square().sum()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    if not weight_sharing:
        assert len(gradients) == len([*model.parameters()])  # every parameter of a fixed network is used


@pytest.mark.parametrize('classes', [10, 100])
@pytest.mark.parametrize('arch', [NAONET_A, parse(NAONET_A), tuple(parse(NAONET_A)), [[*cell] for cell in parse(NAONET_A)]])
def test_an_architecture_may_be_a_line_a_pair_or_an_architecture(arch, classes):
    torch.manual_seed(0)
    model = fixed(arch, nodes=5, classes=classes).eval()
    torch.manual_seed(0)
    same = fixed(NAONET_A, nodes=5, classes=classes).eval()
    assert torch.equal(model(images())[0], same(images())[0])
    assert model(images())[0].shape == (2, classes)


def test_an_impossible_architecture_raises_the_errors_of_the_encoding():
    with pytest.raises(architecture.ArchitectureError, match='8 x 4 nodes = 32'):
        fixed(NAONET_A, nodes=4)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('size', [64, 224])
def test_imagenet_networks_run_and_only_train_with_the_auxiliary_head(size):
    aux = size == 224  # the auxiliary head wants 7×7 pixels
    nets = [(fixed(NAONET_B, NASNetworkImageNet, nodes=5, channels=4, classes=7, use_aux_head=aux), ()),
            (supernet(NASWSNetworkImageNet, nodes=5, channels=4, classes=7, use_aux_head=aux), (parse(NAONET_B),))]
    for model, extras in nets:
        logits, aux_logits = model(images(size), *extras, 0)
        assert logits.shape == (2, 7)
        assert (aux_logits.shape == (2, 7)) if aux else (aux_logits is None)
        with torch.no_grad():
            assert model.eval()(images(size), *extras)[1] is None


def test_weights_are_kaiming_normal():
    torch.manual_seed(0)
    for model in (fixed(NAONET_A, nodes=5, channels=32), supernet(nodes=3, channels=32)):
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                assert torch.equal(parameter, torch.full_like(parameter, float(parameter.detach()[0]))) or 'classifier' in name
            elif parameter.numel() > 2000:
                fan_in = parameter[0].numel()
                assert abs(float(parameter.detach().std()) / math.sqrt(2 / fan_in) - 1) < 0.1, name


# ------------------------------------------------------------------------------------------------------------- drop path

def keep(index, cells, q, step, steps):
    """The schedule in the specification's words."""
    p = 1 - (index + 1) / cells * (1 - q)
    return p if step is None else 1 - (step + 1) / steps * (1 - p)


@pytest.mark.parametrize('step', [0, 3, 9, None])
@pytest.mark.parametrize('layers, q', [(1, 0.5), (2, 0.2)])
def test_drop_path_masks_follow_the_schedule(layers, q, step):
    torch.manual_seed(0)
    model, batch = fixed('0 4 1 4 0 4 1 4 0 4 1 4 0 4 1 4', layers=layers, drop_path_keep_prob=q), 4000
    cells = 3 * layers + 2
    masks = model.drop_path_masks(images(1, batch), step)
    assert masks.shape == (cells, 4, batch, 1, 1, 1)
    for index in range(cells):
        p = keep(index, cells, q, step, 10)
        values = masks[index].flatten()
        kept = values > 0
        torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / p))
        assert (values[~kept] == 0).all()
        deviation = math.sqrt(p * (1 - p) / len(values))
        assert abs(float(kept.double().mean()) - p) < 5 * deviation
    # every operand and every sample draws for itself
    drops = (masks[-1].reshape(4, batch) == 0).double()
    correlation = torch.corrcoef(drops)
    assert (correlation - torch.eye(4)).abs().max() < 0.1


def test_drop_path_drops_whole_operands_of_single_samples():
    """One cell, one node, identities on constant images: a node's value is m_x·1 + m_y·10 with masks of 0 or 1/p."""
    torch.manual_seed(0)
    model = fixed('0 4 1 4 0 4 1 4', nodes=1, channels=2, drop_path_keep_prob=0.5)
    cell = Cell((0, 4, 1, 4), [(0, 2), (0, 2)], 2, reduction=False)
    masks = model.drop_path_masks(images(1, 500), 9)[0]
    ones = torch.ones(500, 2, 4, 4)
    output = cell(State(ones), State(10 * ones), masks).raw
    p = keep(0, 5, 0.5, 9, 10)
    allowed = torch.tensor([0, 1 / p, 10 / p, 11 / p])
    distances = (output.reshape(500, -1)[..., None] - allowed).abs()
    assert distances.amin(-1).max() < 1e-5
    which = distances.argmin(-1)
    assert (which == which[:, :1]).all()  # the same for all channels and pixels of a sample
    assert set(which[:, 0].tolist()) == {0, 1, 2, 3}


def test_drop_path_changes_training_and_nothing_else():
    arch = sample(1, 2, range(16), torch.Generator().manual_seed(3))[0]
    for model, extras in ((fixed(arch, drop_path_keep_prob=0.5), ()),
                          (supernet(drop_path_keep_prob=0.5), (parse('0 4 1 0 2 4 1 4 0 4 1 2 1 4 2 0'),))):
        with torch.no_grad():
            model.train()
            assert not torch.equal(model(images(), *extras, 9)[0], model(images(), *extras, 9)[0])
            model.eval()
            assert model.drop_path_masks(images(), 0) is None
            assert torch.equal(model(images(), *extras, 9)[0], model(images(), *extras, 9)[0])
            model.train()
            model.drop_path_keep_prob = 1.0
            assert model.drop_path_masks(images(), 0) is None
            assert torch.equal(model(images(), *extras, 9)[0], model(images(), *extras, 9)[0])


def test_dropout_before_the_classifier_follows_keep_prob():
    torch.manual_seed(0)
    model = fixed(NAONET_B, nodes=5, channels=8, keep_prob=0.25)
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images(batch=300), 0)
    assert abs(float((seen[0] == 0).double().mean()) - 0.75) < 0.05
    model.eval()(images(batch=4))
    assert not (seen[1] == 0).all(0).any()


# ------------------------------------------------------------------------------------------------------- batch statistics

def statistics(model):
    return {name.rpartition('.')[0]: tensor.clone() for name, tensor in model.state_dict().items()
            if name.endswith('running_mean')}


@pytest.mark.usefixtures('form')
def test_scoring_uses_and_updates_the_statistics_of_every_batch_norm_after_the_stem():
    torch.manual_seed(0)
    model = supernet(nodes=1, layers=1, channels=4).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d | WSBatchNorm)):
        nn.init.normal_(norm.running_mean)
    touched = set()
    # both inputs through every operation that has a batch-norm, and each input unread once
    for x_id, x_op, y_id, y_op in itertools.product((0, 1), (0, 1, 4), (0, 1), (0, 1, 4)):
        cell = (x_id, x_op, y_id, y_op)
        before = statistics(model)
        model(images(8, 16), (cell, cell), bn_train=True)
        after = statistics(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        on_path = {name for name in before if used_by(name, cell)}
        assert changed == on_path
        touched |= changed
    assert touched == {name for name in statistics(model) if not name.startswith('stem')}


def used_by(norm, cell):
    """Whether the batch-norm of this name is on the path of an architecture whose two cells are this one-node cell."""
    parts = norm.split('.')
    if parts[0] == 'stem':
        return False
    reduction = parts[1] in '13'
    if parts[2].startswith('fac_'):
        return reduction and int(parts[2][-1]) - 1 in unread_states(cell)
    if parts[2] != 'ops':
        return True
    x_id, x_op, y_id, y_op = cell
    state, operation = (x_id, x_op) if parts[4].startswith('x') else (y_id, y_op)
    if 'sep_conv' in parts[4]:
        return operation == {'3': 0, '5': 1}[parts[4][-1]]
    return operation == 4 and int(parts[4][-1]) - 1 == state


@pytest.mark.usefixtures('form')
def test_scores_do_not_depend_on_running_statistics_but_for_the_stem():
    torch.manual_seed(0)
    model = supernet(nodes=1, channels=4).eval()
    arch = ((0, 0, 0, 4), (1, 4, 1, 1))
    before = model(images(8, 16), arch, bn_train=True)[0]
    for name, tensor in model.state_dict().items():
        if name.endswith('running_mean') and not name.startswith('stem'):
            tensor.add_(5)
    torch.testing.assert_close(model(images(8, 16), arch, bn_train=True)[0], before)
    model.stem[1].running_mean.add_(5)
    assert not torch.allclose(model(images(8, 16), arch, bn_train=True)[0], before)


def test_evaluating_without_bn_train_changes_no_statistics():
    model = supernet(nodes=1).eval()
    before = statistics(model)
    model(images(), ((0, 0, 1, 1), (0, 4, 1, 4)))
    after = statistics(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures('form')
def test_x_and_y_have_reduction_modules_of_their_own():
    model = supernet(nodes=2)
    arch = ((0, 2, 1, 2, 0, 2, 1, 2), (0, 2, 1, 4, 0, 3, 0, 4))
    model(images(), arch, 0)[0].sum().backward()
    for index, node in itertools.product((1, 3), (0, 1)):
        operations = model.cells[index].ops[node]
        used = {name for name, module in operations.named_children()
                if isinstance(module, FactorizedReduce) and module.path1[1].weight.grad is not None}
        assert used == ({'y_id_reduce_2'} if node == 0 else {'y_id_reduce_1'})


# ------------------------------------------------------------------------------------------------------- batches counted

def some_network(kind):
    """A small network with an auxiliary head, and architectures to call it with (a fixed network: none)."""
    if kind is NASNetworkCIFAR:
        return fixed(EVERY_REDUCTION, use_aux_head=True), [()]
    archs = sample(6, 2, SEARCH_SPACES['small'], torch.Generator().manual_seed(0))
    return kind(**SIZES | {'use_aux_head': True}), [(arch,) for arch in (EVERY_REDUCTION, *archs)]


@pytest.mark.parametrize('kind', [NASNetworkCIFAR, NASWSNetworkCIFAR])
def test_batch_norms_count_the_batches_that_they_trained_on_as_pytorchs_do(kind):
    model, archs = some_network(kind)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    trained = dict.fromkeys(norms, 0)
    for name, norm in norms.items():
        def count(module, *_, name=name):
            trained[name] += module.training
        norm.register_forward_hook(count)
    for number, arch in enumerate(archs * 3):
        model.train(number % 3 > 0)
        norms['stem.1'].train(number % 2 > 0)  # as someone may freeze one
        model(images(32), *arch, 0)
    assert sum(trained.values()) > 0 and len({*trained.values()}) > 1
    for network in (model, copy.deepcopy(model)):
        counts = {name.removesuffix('.num_batches_tracked'): int(value) for name, value in network.state_dict().items()
                  if name.endswith('num_batches_tracked')}
        assert counts == trained


@pytest.mark.parametrize('kind, launches', [(NASNetworkCIFAR, 1), (NASWSNetworkCIFAR, 1 + 8)])  # 8 reductions of this path
def test_batches_are_counted_at_once(kind, launches):
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            first = args[0] if args else None
            first = first[0] if isinstance(first, list) and first else first
            if 'add' in str(function) and isinstance(first, torch.Tensor) and first.dtype == torch.int64:
                seen.append(str(function))
            return function(*args, **kwargs or {})
    model, (arch, *_) = some_network(kind)
    seen = []
    with Counting():
        model(images(32), *arch, 0)
    assert len(seen) == launches


def test_of_a_networks_replicas_only_the_one_on_its_own_device_counts():
    model, _ = some_network(NASNetworkCIFAR)
    replicas = [copy.copy(model) for _ in range(2)]  # which share everything but their buffers
    for replica, device in zip(replicas, ('cpu', 'meta'), strict=True):
        replica._buffers = {'depth': model.depth.to(device)}
        replica.count_batch()
    assert {int(norm.num_batches_tracked) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {1}


# ------------------------------------------------------------------------------------------------------------- gradients

@pytest.mark.usefixtures('form')
@settings(max_examples=30)
@given(architectures(nodes=2, operations=SEARCH_SPACES['small']))
def test_only_the_sampled_path_gets_gradients(arch):
    model = supernet()
    model(images(), arch, 0)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        parts = name.split('.')
        if parts[0] != 'cells':
            assert parameter.grad is not None, name
            continue
        cell = arch.reduction if parts[1] in '13' else arch.normal
        if parts[2] == 'ops':
            x_id, x_op, y_id, y_op = cell[4 * int(parts[3]):][:4]
            state, operation = (x_id, x_op) if parts[4][0] == 'x' else (y_id, y_op)
            kind = 'id_reduce' if operation == 4 else f'sep_conv_{3 + 2 * operation}'
            used = kind in parts[4] and str(state + (operation == 4)) == (parts[4] if operation == 4 else parts[-1])[-1]
        elif parts[2].startswith('fac_'):
            used = int(parts[2][-1]) - 1 in unread_states(cell)
        elif parts[3] == 'w':
            used = int(parts[4]) in unread_states(cell)
        else:
            used = True
        assert (parameter.grad is not None) == used, name


def test_every_weight_of_the_supernet_is_on_some_path():
    model = supernet(nodes=2)
    untouched = list(model.named_parameters())
    for arch in sample(400, 2, SEARCH_SPACES['small'], torch.Generator().manual_seed(0)):
        model(images(2), arch, 0)[0].sum().backward()
        untouched = [(name, parameter) for name, parameter in untouched if parameter.grad is None]
        if not untouched:
            break
    assert untouched == []
