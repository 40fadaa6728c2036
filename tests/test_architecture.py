"""The encoding: parsing and its errors, pool files, sampling, tokens, swapped operands."""

import math
import re
from collections import Counter

import pytest
import torch
from helpers import NAONET_A, NAONET_B, architectures, inputs
from hypothesis import given
from hypothesis import strategies as st

import architecture
from architecture import (
    Architecture,
    ArchitectureError,
    canonical,
    parse,
    read,
    read_pool,
    reorder_nodes,
    sample,
    swap_operands,
    vocabulary,
)
from model import NASNetworkCIFAR
from model_search import NASWSNetworkCIFAR
from operations import SEARCH_SPACES

SPACES = st.sampled_from(sorted(SEARCH_SPACES))


def values_of(arch):
    return [*arch.normal, *arch.reduction]


@given(architectures())
def test_every_way_to_write_an_architecture_parses_to_it(arch):
    for written in (str(arch), f'  {arch}\n', values_of(arch), tuple(values_of(arch)), arch, tuple(arch),
                    [list(arch.normal), list(arch.reduction)], list(map(str, values_of(arch)))):
        assert parse(written) == arch
    assert parse(str(arch), nodes=len(arch.normal) // 4) == arch


def test_the_published_architectures_parse_to_their_cells():
    assert parse(NAONET_A, 5).normal == (0, 7, 1, 15, 2, 8, 1, 7, 0, 6, 1, 7, 0, 8, 4, 7, 1, 5, 0, 7)
    assert parse(NAONET_B, 5, SEARCH_SPACES['small']).reduction == (1, 1, 1, 0, 2, 1, 2, 4, 1, 0, 2, 3, 3, 1, 2, 2, 0, 2, 0, 2)


@given(architectures())
def test_unread_states_are_those_that_no_node_reads_in_order(arch):
    for cell in arch:
        unread = architecture.unread_states(cell)
        inputs_read = set(cell[0::2])
        assert unread == sorted(set(range(len(cell) // 4 + 2)) - inputs_read)
        assert unread[-1] == len(cell) // 4 + 1  # nobody can read the last node


@given(architectures(), st.data())
def test_an_error_names_the_position_and_what_would_be_right(arch, data):
    values = values_of(arch)
    position = data.draw(st.integers(0, len(values) - 1))
    node, is_operation = position % (len(values) // 2) // 4, position % 2
    last = 15 if is_operation else node + 1
    wrong = data.draw(st.one_of(st.integers(last + 1, 10 ** 6), st.integers(-10 ** 6, -1)))
    values[position] = wrong
    with pytest.raises(ArchitectureError) as error:
        parse(' '.join(map(str, values)))
    message = str(error.value)
    cell = 'normal' if position < len(values) // 2 else 'reduction'
    assert f'integer {position + 1} of {len(values)} ({cell} cell) is {wrong},' in message
    assert message.endswith(f'0..{last}')


@given(architectures(), st.data(), st.sampled_from(['x', '1.5', '1e0', '0x1', '-', '½', 'None', '1,', '1_0']))
def test_a_word_that_is_no_integer_is_named_with_its_position(arch, data, word):
    values = list(map(str, values_of(arch)))
    position = data.draw(st.integers(0, len(values) - 1))
    values[position] = word
    with pytest.raises(ArchitectureError, match=re.escape(f'integer {position + 1} of {len(values)}')) as error:
        parse(' '.join(values))
    assert f'is {word!r}, not an integer' in str(error.value)


@given(architectures(), st.sampled_from([0.5, 1.0, None, 'x', (1,)]), st.data())
def test_a_value_that_is_no_integer_is_named_with_its_position(arch, value, data):
    values = values_of(arch)
    position = data.draw(st.integers(0, len(values) - 1))
    values[position] = value
    with pytest.raises(ArchitectureError, match=re.escape(f'integer {position + 1} of {len(values)}')):
        parse(values)


@given(architectures(nodes=3), st.integers(0, 40).filter(lambda count: count % 8), st.integers(1, 8))
def test_a_wrong_count_says_the_right_one(arch, count, nodes):
    with pytest.raises(ArchitectureError, match=f'has a multiple of 8 .* integers, this one has {count}$'):
        parse([0] * count)
    if nodes != 3:
        with pytest.raises(ArchitectureError, match=f'has 8 x {nodes} nodes = {8 * nodes} integers, this one has 24$'):
            parse(arch, nodes)


def test_cells_of_different_sizes_are_no_architecture():
    with pytest.raises(ArchitectureError):
        parse(((0, 4, 1, 4), (0, 4, 1, 4) * 3))


@pytest.mark.parametrize('space, other', [('small', 'large'), ('large', 'small')])
def test_an_operation_of_another_search_space_is_refused(space, other):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (sample(1, 5, SEARCH_SPACES[name], generator)[0] for name in (space, other))
    mixed = Architecture(mine.normal, theirs.reduction)
    operations = SEARCH_SPACES[space]
    with pytest.raises(ArchitectureError, match=rf'integer 22 of 40 \(reduction cell\) is {theirs.reduction[1]}, but an '
                       rf'operation of this search space is one of {operations.start}\.\.{operations.stop - 1}'):
        parse(mixed, 5, operations)


# ------------------------------------------------------------------------------------------------------------ pool files

@given(pool=st.lists(architectures(nodes=2), min_size=1, max_size=5), newline=st.sampled_from(['\n', '\r\n', '\n\n']))
def test_a_pool_file_reads_back(tmp_path_factory, pool, newline):
    path = tmp_path_factory.mktemp('pool') / 'arch_pool'
    path.write_bytes(''.join(f'{arch}{newline}' for arch in pool).encode())
    assert read_pool(path, 2) == pool
    for index, arch in enumerate(pool):
        assert read(str(path), index, 2) == arch
    with pytest.raises(ArchitectureError, match=rf'--arc_index={len(pool)}, .*0\.\.{len(pool) - 1}'):
        read(str(path), len(pool), 2)


@given(architectures(nodes=5))
def test_read_takes_a_line_of_integers(arch):
    assert read(str(arch), nodes=5) == arch


@pytest.mark.parametrize('name', ['arch_pool', 'my arch pool', '12', '0 1'])
def test_read_takes_a_path_even_with_spaces_or_digits(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(f'{NAONET_A}\n{NAONET_B}\n')
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name), f'./{name}'):
        assert str(read(path, 1, 5)) == NAONET_B


def test_a_wrong_line_of_a_pool_file_is_named(tmp_path):
    path = tmp_path / 'arch_pool'
    path.write_text(f'{NAONET_A}\n\n{NAONET_B[:-1]}99\n')
    with pytest.raises(ArchitectureError, match=re.escape(f'{path}, line 3: integer 40 of 40 (reduction cell) is 99')):
        read(str(path), 0, 5)


@pytest.mark.parametrize('content', [b'', b'\n \n', b'\x80\x02}q\x00', b'\x00' * 64, bytes(range(256)), b'PK\x03\x04\n'])
def test_a_file_that_is_no_pool_is_named_in_one_line(content, tmp_path):
    path = tmp_path / 'pool'
    path.write_bytes(content)
    for nodes in (5, None):
        with pytest.raises(ArchitectureError) as error:
            read(str(path), 0, nodes)
        assert str(error.value).startswith(str(path))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('name', ['no/such/file', '.'])
def test_a_path_that_cannot_be_read_is_named_with_the_reason(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchitectureError, match=rf'^{re.escape(name)}: cannot be read \(.+\); an arch_pool file is needed'):
        read(name)


@pytest.mark.parametrize('text', ['', '  ', '\n'])
def test_an_empty_argument_is_refused(text):
    with pytest.raises(ArchitectureError, match='empty'):
        read(text)


# -------------------------------------------------------------------------------------------------------------- sampling

@given(st.integers(0, 200), st.integers(1, 6), SPACES, st.integers(0, 2 ** 32))
def test_samples_are_distinct_legal_and_repeatable(count, nodes, space, seed):
    def draw():
        return sample(count, nodes, SEARCH_SPACES[space], torch.Generator().manual_seed(seed))
    pool = draw()
    assert len(pool) == count == len(set(pool))
    assert all(parse(arch, nodes, SEARCH_SPACES[space]) == arch for arch in pool)
    assert pool == draw()


def test_a_small_space_is_sampled_to_the_last_architecture(generator):
    operations = range(4, 6)
    pool = sample(10 ** 6, 1, operations, generator)
    assert len(set(pool)) == len(pool) == (2 * 2 * 2 * 2) ** 2


@pytest.mark.parametrize('space', sorted(SEARCH_SPACES))
def test_sampled_inputs_and_operations_are_uniform(space, generator):
    nodes, count = 4, 6000
    pool = [values_of(arch) for arch in sample(count, nodes, SEARCH_SPACES[space], generator)]
    for position in range(8 * nodes):
        legal = SEARCH_SPACES[space] if position % 2 else range(position % (4 * nodes) // 4 + 2)
        seen = Counter(values[position] for values in pool)
        assert set(seen) == set(legal)
        expected = count / len(legal)
        for times in seen.values():  # five standard deviations
            assert abs(times - expected) < 5 * math.sqrt(expected)


# ---------------------------------------------------------------------------------------------------------------- tokens

@given(st.integers(1, 8), SPACES, st.data())
def test_tokens_read_back_and_are_legal(nodes, space, data):
    words = vocabulary(nodes, space)
    arch = data.draw(architectures(nodes, SEARCH_SPACES[space]))
    tokens = words.encode(arch)
    assert words.decode(tokens) == arch
    assert len(tokens) == len(words.allowed_tokens) == 8 * nodes
    assert all(first <= token <= last for token, (first, last) in zip(tokens, words.allowed_tokens, strict=True))


@given(st.integers(1, 8), SPACES)
def test_every_legal_token_means_an_architecture_and_no_other_token_does(nodes, space):
    words = vocabulary(nodes, space)
    assert words.size == nodes + 2 + len(SEARCH_SPACES[space])
    lowest = [first for first, _ in words.allowed_tokens]
    for position, (first, last) in enumerate(words.allowed_tokens):
        for token in range(-1, words.size + 2):
            tokens = [*lowest[:position], token, *lowest[position + 1:]]
            if first <= token <= last:
                assert words.encode(words.decode(tokens)) == tokens
            else:
                with pytest.raises(ArchitectureError):
                    words.decode(tokens)


def test_the_published_search_has_twelve_words_and_forty_tokens():
    words = vocabulary(5, 'small')
    assert (words.size, len(words.allowed_tokens)) == (12, 40)
    assert words.allowed_tokens[:5] == [(1, 2), (7, 11), (1, 2), (7, 11), (1, 3)]
    assert words.encode(parse(NAONET_B))[:8] == [1, 8, 1, 9, 1, 8, 3, 9]


# ------------------------------------------------------------------------------------------------------ swapped operands

@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2 ** 32), st.data())
def test_a_swap_exchanges_the_operands_of_exactly_one_node_per_cell(nodes, batch, seed, data):
    pool = [data.draw(architectures(nodes)) for _ in range(batch)]
    before = torch.tensor([values_of(arch) for arch in pool])
    kept = before.clone()
    after = swap_operands(before, torch.Generator().manual_seed(seed))
    assert torch.equal(before, kept)
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        for cell in (slice(0, 4 * nodes), slice(4 * nodes, None)):
            old_nodes, new_nodes = (list(architecture.nodes_of(values[cell])) for values in (old, new))
            swapped = [(x, y) for x, y in zip(old_nodes, new_nodes, strict=True) if x != y]
            assert len(swapped) <= 1
            assert all(y == (*x[2:], *x[:2]) for x, y in swapped)
            symmetric = any(node[:2] == node[2:] for node in old_nodes)
            assert swapped or symmetric


def test_every_node_is_swapped_equally_often_and_cells_independently(generator):
    nodes, count = 5, 4000
    before = torch.arange(8 * nodes).expand(count, -1)  # all operands differ
    after = swap_operands(before, generator)
    changed = (after != before).reshape(count, 2, nodes, 4).any(-1).long().argmax(-1)
    times = torch.bincount(changed[:, 0] * nodes + changed[:, 1], minlength=nodes ** 2)
    expected = count / nodes ** 2
    assert ((times - expected).abs() < 5 * math.sqrt(expected)).all()


def test_a_swapped_architecture_is_the_same_network(generator, float64):
    """In the fixed network the weights change places with the operands; those of its two nodes' sides are exchanged here."""
    arch = parse('0 1 1 0 2 1 1 4 0 0 1 1 0 4 2 3')
    swapped = parse(swap_operands(torch.tensor([values_of(arch)]), generator)[0].tolist())
    assert swapped != arch
    models = [NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1, each) for each in (arch, swapped)]
    renamed = {}
    for name, tensor in models[0].state_dict().items():
        found = re.match(r'cells\.(\d+)\.ops\.(\d+)\.([xy])_(.*)', name)
        if found:
            index, node, side, rest = found.groups()
            cell = 'reduction' if int(index) in (1, 3) else 'normal'
            one, other = (list(architecture.nodes_of(getattr(each, cell)))[int(node)] for each in (arch, swapped))
            if one != other:
                name = f'cells.{index}.ops.{node}.{"y" if side == "x" else "x"}_{rest}'
        renamed[name] = tensor
    models[1].load_state_dict(renamed)
    images = inputs([2, 3, 16, 16], 0)
    outputs = [model.eval()(images)[0] for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_the_supernet_accepts_every_way_to_write_an_architecture(float64):
    arch = sample(1, 2, SEARCH_SPACES['small'], torch.Generator().manual_seed(1))[0]
    model = NASWSNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1).eval()
    images = inputs([2, 3, 16, 16], 0)
    one, other = model(images, arch)[0], model(images, ([*arch.normal], [*arch.reduction]))[0]
    assert torch.equal(one, other)


def test_a_word_that_names_nothing_is_answered_by_what_could_be_meant():
    with pytest.raises(ArchitectureError, match=r'^NAONet_C: is no arch_pool file and none of the names NAONet_A, NAONet_B'):
        read('NAONet_C')


# ------------------------------------------------------------------------------------------------------ reordered nodes

def computed(cell):
    """What a cell's nodes compute and what it puts out, however it is written: as nested, sorted terms."""
    terms = ['0', '1']
    for x, x_op, y, y_op in architecture.nodes_of(cell):
        terms.append('({})'.format(' + '.join(sorted([f'{x_op} {terms[x]}', f'{y_op} {terms[y]}']))))
    return sorted(terms), sorted(terms[state] for state in architecture.unread_states(cell))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2 ** 32), st.data())
def test_reordered_cells_compute_the_same(nodes, batch, seed, data):
    pool = [data.draw(architectures(nodes, operations=range(5))) for _ in range(batch)]
    words = vocabulary(nodes, 'small')
    before = words.tokens(pool, torch.device('cpu'))
    kept = before.clone()
    after = reorder_nodes(before, torch.Generator().manual_seed(seed))
    assert torch.equal(before, kept)
    for old, new in zip(pool, after.tolist(), strict=True):
        new = words.decode(new)
        assert computed(new.normal) == computed(old.normal) and computed(new.reduction) == computed(old.reduction)


def test_a_cell_is_written_in_all_ways(generator):
    """Nodes of the first cell: 2, 3 and 4 in any order that has 2 before 4; of the second: 2, 3, 4. Operands either way."""
    words = vocabulary(3, 'small')
    arch = parse('0 0 1 1  0 2 1 3  2 0 1 4   0 0 1 1  2 0 1 2  3 0 1 3')
    rows = words.tokens([arch] * 4000, torch.device('cpu'))
    written = [words.decode(row) for row in reorder_nodes(rows, generator).tolist()]
    assert len({each.normal for each in written}) == 3 * 2 ** 3
    assert len({each.reduction for each in written}) == 2 ** 3
    assert len(set(written)) == 3 * 2 ** 6


@given(st.integers(1, 6), st.integers(0, 2 ** 32), st.data())
def test_a_canonical_cell_is_the_same_cell_however_it_was_written(nodes, seed, data):
    arch = data.draw(architectures(nodes, operations=range(5)))
    words = vocabulary(nodes, 'small')
    before = words.tokens([arch] * 8, torch.device('cpu'))
    after = canonical(reorder_nodes(before, torch.Generator().manual_seed(seed)))
    written = [words.decode(row) for row in after.tolist()]
    for cell in ('normal', 'reduction'):
        terms = computed(getattr(arch, cell))
        assert all(computed(getattr(each, cell)) == terms for each in written)
        if len(set(terms[0])) == len(terms[0]):  # no two nodes compute the same
            assert len({getattr(each, cell) for each in written}) == 1
    assert torch.equal(canonical(after), after)
