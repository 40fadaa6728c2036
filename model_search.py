"""The weight-sharing network ("supernet"): one set of weights out of which every architecture takes its own.

It mirrors model.py cell by cell. Each node owns, for x and for y, both separable convolutions with one set of weights per
possible input state (paper, section 3.3 and appendix on NAO-WS).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import Architecture, nodes_of, unread_states
from kernels import batch_norm, depthwise_conv
from model import Backbone, CIFARStem, ImageNetStem, MaybeCalibrateSize, Shape, combine_operands
from operations import OPERATIONS, SEARCH_SPACES, BatchNorm2d, FactorizedReduce, State, apply_operation
from utils import LOG_EVERY, Run

SMALL = {operation: OPERATIONS[operation] for operation in SEARCH_SPACES['small']}


class WSBatchNorm(nn.Module):
    """Batch-norm with a scale and a shift per input state and running statistics that all states share."""

    def __init__(self, inputs: int, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.ParameterList(torch.ones(channels) for _ in range(inputs))
        self.bias = nn.ParameterList(torch.zeros(channels) for _ in range(inputs))
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, state: int, bn_train: bool) -> Tensor:
        """Normalise x, (batch, channels, h, w), with the scale and shift of input `state`."""
        statistics, affine = (self.running_mean, self.running_var), (self.weight[state], self.bias[state])
        if self.training or bn_train:
            return batch_norm(x, *statistics, *affine, self.momentum, self.eps)
        return F.batch_norm(x, *statistics, *affine, eps=self.eps)


class WSSepConv(nn.Module):
    """The separable convolution of operations.SepConv with one set of weights per input state."""

    def __init__(self, inputs: int, channels: int, kernel: int):
        super().__init__()
        def weights(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(torch.empty(channels, *shape) for _ in range(inputs))
        self.W1_depthwise = weights(1, kernel, kernel)
        self.W1_pointwise = weights(channels, 1, 1)
        self.bn1 = WSBatchNorm(inputs, channels)
        self.W2_depthwise = weights(1, kernel, kernel)
        self.W2_pointwise = weights(channels, 1, 1)
        self.bn2 = WSBatchNorm(inputs, channels)

    def forward(self, rectified: Tensor, state: int, stride: int, bn_train: bool) -> Tensor:
        """State number `state`, (batch, channels, h, w) after ReLU -> (batch, channels, h / stride, w / stride)."""
        x = depthwise_conv(rectified, self.W1_depthwise[state], stride)
        x = F.relu(self.bn1(F.conv2d(x, self.W1_pointwise[state]), state, bn_train), inplace=True)
        x = depthwise_conv(x, self.W2_depthwise[state])
        return self.bn2(F.conv2d(x, self.W2_pointwise[state]), state, bn_train)


class WSNode(nn.Module):
    """A node of the supernet: every operation of the small space on every state it may read, for x and for y."""

    def __init__(self, index: int, channels: int, reduction: bool):
        super().__init__()
        self.channels, self.reduction = channels, reduction
        for side in ('x', 'y'):
            for operation in SMALL.values():
                if operation.name.startswith('separable'):
                    self.add_module(f'{side}_sep_conv_{operation.kernel}',
                                    WSSepConv(index + 2, channels, operation.kernel))
                elif list(operation.make(channels, 1).parameters()):  # `operand` would make them anew at every step
                    raise ValueError(f'WSNode holds no weights for {operation.name!r}; it needs some for each state')
            if reduction:
                for state in (0, 1):
                    self.add_module(f'{side}_id_reduce_{state + 1}', FactorizedReduce(channels, channels))

    def operand(self, side: str, states: Sequence[State], state: int, operation_id: int, bn_train: bool) -> Tensor:
        """The operation of one side ('x' or 'y') on one state."""
        operation, stride = SMALL[operation_id], 2 if self.reduction and state < 2 else 1
        if operation.name.startswith('separable'):
            sep_conv = getattr(self, f'{side}_sep_conv_{operation.kernel}')
            return sep_conv(states[state].relu, state, stride, bn_train)
        if stride == 2 and not operation.kernel:
            return getattr(self, f'{side}_id_reduce_{state + 1}')(states[state].raw, bn_train)
        return apply_operation(operation.make(self.channels, stride), states[state], (operation_id, stride))

    def forward(self, states: Sequence[State], node: Sequence[int], masks: Tensor | None, bn_train: bool) -> Tensor:
        """The value of the node (x_id, x_op, y_id, y_op), (batch, channels, h, w)."""
        x_id, x_op, y_id, y_op = node
        x = self.operand('x', states, x_id, x_op, bn_train)
        y = self.operand('y', states, y_id, y_op, bn_train)
        return combine_operands(x, y, masks)


class WSFinalCombine(nn.Module):
    """ReLU, 1×1 convolution over the concatenated unread states with one weight slice per state, BN."""

    def __init__(self, states: int, channels: int):
        super().__init__()
        self.w = nn.ParameterList(torch.empty(channels, channels, 1, 1) for _ in range(states))
        self.bn = BatchNorm2d(channels)

    def forward(self, outputs: Sequence[Tensor], concat: Sequence[int], bn_train: bool) -> Tensor:
        """The unread states, (batch, channels, h, w) each, and their numbers -> (batch, channels, h, w)."""
        weight = torch.cat([self.w[state] for state in concat], dim=1)
        return self.bn(F.conv2d(F.relu_(torch.cat(outputs, dim=1)), weight), bn_train)


class WSCell(nn.Module):
    """A normal or a reduction cell of the supernet."""

    def __init__(self, nodes: int, inputs: Sequence[Shape], channels: int, reduction: bool):
        super().__init__()
        self.reduction = reduction
        self.ops = nn.ModuleList(WSNode(index, channels, reduction) for index in range(nodes))
        self.maybe_calibrate_size = MaybeCalibrateSize(inputs, channels)
        if reduction:
            self.fac_1 = FactorizedReduce(channels, channels)
            self.fac_2 = FactorizedReduce(channels, channels)
        self.final_combine_conv = WSFinalCombine(nodes + 2, channels)
        self.output_shape = (self.maybe_calibrate_size.halvings + reduction, channels)

    def forward(self, x: State, y: State, masks: Tensor | None, cell: Sequence[int], bn_train: bool) -> State:
        """The output of the cell `cell` (4·nodes integers), (batch, channels, h, w)."""
        states = self.maybe_calibrate_size(x, y, bn_train)
        for index, (module, node) in enumerate(zip(self.ops, nodes_of(cell), strict=True)):
            node_masks = None if masks is None else masks[2 * index:2 * index + 2]
            states.append(State(module(states, node, node_masks, bn_train)))
        concat = unread_states(cell)
        outputs = [getattr(self, f'fac_{state + 1}')(states[state].raw, bn_train) if self.reduction and state < 2
                   else states[state].raw for state in concat]
        return State(self.final_combine_conv(outputs, concat, bn_train))


class Supernet(Backbone):
    """A backbone whose cells hold the weights of all architectures of the small space."""

    is_supernet = True

    def make_cell(self, inputs: Sequence[Shape], channels: int, reduction: bool) -> WSCell:
        """A cell for inputs of the given shapes."""
        return WSCell(self.nodes, inputs, channels, reduction)

    def always_used(self, name: str) -> bool:
        """Whether every path leads through the module of this name: it is none of the reductions that some paths need."""
        return '_id_reduce_' not in name and '.fac_' not in name

    def forward(self, input: Tensor, arch: 'Architecture | Sequence', step: int | None = None,
                bn_train: bool = False) -> tuple[Tensor, Tensor | None]:
        """Images (batch, 3, h, w) through the path of `arch`, (normal, reduction) -> (logits, auxiliary logits or None).

        step: the global optimiser step, for the drop-path schedule. bn_train: every batch-norm after the stem uses and
        updates batch statistics though the network is in eval mode; that is how an architecture is scored.
        """
        normal, reduction = arch
        return self.propagate(input, step, lambda cell: (reduction if cell.reduction else normal, bn_train))


class NASWSNetworkCIFAR(CIFARStem, Supernet):
    """The supernet for 32×32 images; arguments as model.NASNetworkCIFAR without `arch`."""


class NASWSNetworkImageNet(ImageNetStem, Supernet):
    """The supernet for 224×224 images; arguments as model.NASNetworkCIFAR without `arch`."""


@torch.no_grad()
def score_pool(run: Run, supernet: Supernet, pool: Sequence[Architecture], images: Tensor, labels: Tensor) -> list[float]:
    """The accuracy, 0-1, of each architecture on one batch (count, 3, h, w), normalised by the batch's statistics.

    Of several processes each scores its share of the pool.
    """
    supernet.eval()
    right = torch.zeros(len(pool), device=run.device)
    with run.meeting():
        for index in range(run.rank, len(pool), run.world):
            with run.autocast():
                logits, _ = supernet(images, pool[index], bn_train=True)
            right[index] = (logits.argmax(1) == labels).sum()
            progress = f'scored {index + 1}/{len(pool)} architectures'
            if (index + 1) % LOG_EVERY == 0:
                run.log(progress)
            elif run.live.due:
                run.live.show(progress)
    return [count / len(labels) for count in run.sum(right).tolist()]
