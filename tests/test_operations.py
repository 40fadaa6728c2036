"""Every candidate operation in normal and reduction cells: shapes, and values against literal formulas."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import Cell, Node
from model_search import WSNode
from operations import OPERATIONS, SEARCH_SPACES, BatchNorm2d, FactorizedReduce, State, apply_operation

SIZES = [(8, 8), (7, 7), (6, 9), (2, 2), (1, 5)]
POOLS = {2: ('average', 3, False), 3: ('max', 3, None), 10: ('max', 2, None), 11: ('max', 3, None), 12: ('max', 5, None),
         13: ('average', 2, True), 14: ('average', 3, True), 15: ('average', 5, True)}


def images(height, width, batch=2, channels=4, seed=0):
    return torch.randn((batch, channels, height, width), generator=torch.Generator().manual_seed(seed))


def halved(length, stride):
    return (length + stride - 1) // stride


def literal_pool(x, kind, kernel, counted, stride):
    """Pixel by pixel, as the specification says it; `counted`: whether an average counts the padding."""
    height, width = x.shape[2:]
    before = kernel // 2 if kernel % 2 else 0  # 2×2 pools: one row and column of zeros at the bottom and right only
    result = torch.empty(*x.shape[:2], halved(height, stride), halved(width, stride), dtype=x.dtype)
    for row, column in itertools.product(range(result.shape[2]), range(result.shape[3])):
        window = [(row * stride - before + i, column * stride - before + j)
                  for i in range(kernel) for j in range(kernel)]
        inside = [x[:, :, i, j] for i, j in window if 0 <= i < height and 0 <= j < width]
        zeros = [torch.zeros_like(inside[0])] * (len(window) - len(inside))
        if kind == 'average':
            value = sum(inside) / (len(window) if counted else len(inside))
        else:  # the zeros of a 2×2 pool take part; the padding of the odd ones is minus infinity
            value = torch.stack(inside + (zeros if kernel == 2 else [])).amax(0)
        result[:, :, row, column] = value
    return result


def test_the_table_has_the_sixteen_operations_of_the_paper():
    assert [operation.name for operation in OPERATIONS] == [
        'separable conv 3x3', 'separable conv 5x5', 'average pool 3x3', 'max pool 3x3', 'identity', 'identity', 'conv 1x1',
        'conv 3x3', 'conv 1x3, 3x1', 'conv 1x7, 7x1', 'max pool 2x2', 'max pool 3x3', 'max pool 5x5', 'average pool 2x2',
        'average pool 3x3', 'average pool 5x5']
    assert [*SEARCH_SPACES['small']] == [0, 1, 2, 3, 4] and [*SEARCH_SPACES['large']] == [*range(5, 16)]


@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('operation', range(16))
def test_an_operation_keeps_channels_and_divides_the_size_by_its_stride(operation, stride, height, width):
    module = OPERATIONS[operation].make(4, stride)
    output = apply_operation(module, State(images(height, width)), 'any')
    assert output.shape == (2, 4, halved(height, stride), halved(width, stride))
    assert output.isfinite().all()


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('height, width', [(8, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('operation', POOLS)
def test_a_pool_computes_its_formula(operation, stride, height, width):
    x = images(height, width) - 1  # mostly negative: zeros in a maximum show
    expected = literal_pool(x, *POOLS[operation], stride)
    torch.testing.assert_close(apply_operation(OPERATIONS[operation].make(4, stride), State(x), 'any'), expected)


@pytest.mark.parametrize('operation', [4, 5])
def test_identity_of_stride_one_returns_its_input(operation):
    x = images(5, 6)
    assert torch.equal(apply_operation(OPERATIONS[operation].make(4, 1), State(x), 'any'), x)


def literal_factorized_reduce(module, x):
    batch, _, height, width = x.shape
    shifted = torch.zeros_like(x)  # one pixel up and left; zeros enter at the bottom and right
    for row, column in itertools.product(range(height - 1), range(width - 1)):
        shifted[:, :, row, column] = x[:, :, row + 1, column + 1]
    halves = []
    for image, weight in ((x, module.path1[1].weight), (shifted, module.path2[1].weight)):
        half = torch.zeros(batch, len(weight), halved(height, 2), halved(width, 2), dtype=x.dtype)
        for row, column in itertools.product(range(half.shape[2]), range(half.shape[3])):
            half[:, :, row, column] = image[:, :, 2 * row, 2 * column] @ weight[:, :, 0, 0].T
        halves.append(half)
    return module.bn(torch.cat(halves, dim=1))


@pytest.mark.usefixtures('form')
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(2, 5))
def test_factorized_reduce_does_what_its_definition_says(height, width, channels_in, channels_out):
    module = FactorizedReduce(channels_in, channels_out).eval()
    nn.init.normal_(module.bn.running_mean)
    x = images(height, width, 3, channels_in)
    with torch.no_grad():
        torch.testing.assert_close(module(x), literal_factorized_reduce(module, x), rtol=1e-4, atol=1e-5)


def literal_conv(x, weight, stride, padding, groups=1):
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('operation, kernel', [(0, 3), (1, 5)])
def test_a_separable_convolution_is_depthwise_and_pointwise_twice(operation, kernel, stride):
    module = OPERATIONS[operation].make(4, stride)
    x, (depth1, point1, bn1, depth2, point2, bn2) = images(8, 7), [
        layer for layer in module.op if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    expected = x
    for depth, point, norm, step in ((depth1, point1, bn1, stride), (depth2, point2, bn2, 1)):
        assert depth.weight.shape == (4, 1, kernel, kernel) and point.weight.shape == (4, 4, 1, 1)
        expected = literal_conv(expected.relu(), depth.weight, step, kernel // 2, groups=4)
        expected = F.batch_norm(literal_conv(expected, point.weight, 1, 0), None, None, norm.weight, norm.bias, True)
    torch.testing.assert_close(apply_operation(module, State(x), 'any'), expected)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('operation, shapes', [(6, [(1, 1)]), (7, [(3, 3)]), (8, [(1, 3), (3, 1)]), (9, [(1, 7), (7, 1)])])
def test_a_convolution_is_relu_convolution_and_batch_norm(operation, shapes, stride):
    module, x = OPERATIONS[operation].make(4, stride), images(8, 7)
    layers = [layer for layer in module.ops if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    expected = x
    for shape, conv, norm in zip(shapes, layers[::2], layers[1::2], strict=True):
        assert conv.weight.shape == (4, 4, *shape)
        steps = tuple(stride if length > 1 or len(shapes) == 1 else 1 for length in shape)
        expected = literal_conv(expected.relu(), conv.weight, steps, tuple(length // 2 for length in shape))
        expected = F.batch_norm(expected, None, None, norm.weight, norm.bias, True)
    torch.testing.assert_close(apply_operation(module, State(x), 'any'), expected)


@pytest.mark.usefixtures('form')
def test_an_operation_leaves_the_state_it_reads_as_it_is():
    for operation, stride in itertools.product(OPERATIONS, (1, 2)):
        x = images(6, 6)
        state = State(x.clone())
        for _ in range(2):
            apply_operation(operation.make(4, stride), state, 'any')
        assert torch.equal(state.raw, x), operation.name
        assert torch.equal(state.relu, x.relu()), operation.name


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('training', [True, False])
def test_batch_norm_of_a_scored_architecture_uses_and_updates_batch_statistics(training):
    norm, x = BatchNorm2d(4).train(training), 3 * images(5, 5) + 1
    output = norm(x, bn_train=True)
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
    assert norm.num_batches_tracked == training


# ------------------------------------------------------------------------------------------------------------- in cells

@pytest.mark.parametrize('reduction', [False, True])
@pytest.mark.parametrize('state', range(3))
@pytest.mark.parametrize('operation', range(16))
def test_in_a_reduction_cell_only_operations_on_the_cells_inputs_have_stride_two(operation, state, reduction):
    size = 4 if reduction and state == 2 else 8  # state 2 is a node, which a reduction cell has already halved
    states = [State(images(8, 8, seed=0)), State(images(8, 8, seed=1)), State(images(size, size, seed=2))]
    expected = (2, 4, 4, 4) if reduction else (2, 4, 8, 8)
    for node in ((state, operation, state, operation), (state, operation, 0, 4), (1, 4, state, operation)):
        assert Node(node, 4, reduction)(states, None).shape == expected
        if operation in SEARCH_SPACES['small']:
            assert WSNode(1, 4, reduction)(states, node, None, False).shape == expected


@pytest.mark.parametrize('reduction', [False, True])
def test_a_cell_concatenates_the_unread_states_in_order(reduction):
    x, y = images(8, 8, seed=0), images(8, 8, seed=1)
    module = Cell((1, 2, 1, 3, 2, 2, 2, 3), [(0, 4), (0, 4)], 4, reduction).eval()  # nobody reads states 0 and nobody node 1
    output = module(State(x), State(y), None).raw
    first = x if not reduction else module.final_combine.ops[0](x)
    node0 = module.ops[0]([State(x), State(y)], None)
    node1 = module.ops[1]([State(x), State(y), State(node0)], None)
    assert torch.equal(output, torch.cat([first, node1], dim=1))
    assert module.output_shape == (int(reduction), 8)
