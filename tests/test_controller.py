"""The controller: legal decoding, teacher forcing, measures, fitting, better architectures."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

import controller
from architecture import sample, swap_operands, vocabulary
from controller import NAO, hamming_distance, new_architectures, pairwise_accuracy, scale, shift
from operations import SEARCH_SPACES

SPACES = [(nodes, space) for nodes in (1, 2, 5, 7) for space in sorted(SEARCH_SPACES)]
FIT = controller.Settings(epochs=30, batch_size=20, lr=0.003)


def make(nodes=2, space='small', seed=0, spread=None, **sizes):
    """A controller with random weights; `spread` draws all of them from a wide normal distribution."""
    words = vocabulary(nodes, space)
    torch.manual_seed(seed)
    nao = NAO(words.allowed_tokens, words.size, 4 * nodes, **sizes).eval()
    if spread:
        for parameter in nao.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    return nao


def sequences(count, nodes=2, space='small', seed=0):
    words = vocabulary(nodes, space)
    pool = sample(count, nodes, SEARCH_SPACES[space], torch.Generator().manual_seed(seed))
    return torch.tensor([words.encode(arch) for arch in pool])


def performances(tokens):
    """Targets that can be learnt: the share of operations with an odd token, (count, 1) in 0-1."""
    return (tokens[:, 1::2] % 2).float().mean(1, keepdim=True)


# -------------------------------------------------------------------------------------------------------------- decoding

@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('nodes, space', SPACES)
@pytest.mark.parametrize('spread', [0.1, 1.0])
def test_greedy_decoding_writes_the_most_likely_legal_tokens(nodes, space, spread):
    words = vocabulary(nodes, space)
    for seed in range(5):
        nao, tokens = make(nodes, space, seed, spread), sequences(10, nodes, space, seed)
        with torch.no_grad():
            _, log_probs, decoded = nao(tokens)
        assert log_probs.shape == (10, 8 * nodes, words.size) and decoded.shape == tokens.shape
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(10, 8 * nodes))
        for position, (first, last) in enumerate(words.allowed_tokens):
            best = first + log_probs[:, position, first:last + 1].argmax(-1)
            assert torch.equal(decoded[:, position], best)
        for row in decoded.tolist():
            words.decode(row)  # raises if anything is illegal


@pytest.mark.parametrize('nodes, space', SPACES)
def test_new_architectures_are_legal_for_every_step_and_direction(nodes, space):
    nao, tokens, words = make(nodes, space, spread=0.5), sequences(10, nodes, space), vocabulary(nodes, space)
    for step, direction in itertools.product((0.1, 1, 50, 1e6), '+-'):
        for row in nao.generate_new_arch(tokens, step, direction).tolist():
            words.decode(row)


def test_a_direction_that_is_none_is_refused():
    with pytest.raises(ValueError, match="direction='up'"):
        make().generate_new_arch(sequences(2), 1, 'up')


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('layers', [1, 2])
@pytest.mark.parametrize('nodes, space', SPACES)
def test_teacher_forcing_the_greedy_tokens_gives_the_greedy_log_probabilities(nodes, space, layers):
    nao = make(nodes, space, spread=0.3, decoder_layers=layers, encoder_layers=layers)
    tokens = sequences(6, nodes, space)
    with torch.no_grad():
        prediction, log_probs, decoded = nao(tokens)
        forced_prediction, forced, forced_decoded = nao(tokens, shift(decoded))
    torch.testing.assert_close(forced, log_probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(forced_decoded, decoded)
    assert torch.equal(forced_prediction, prediction)


def literal(nao, tokens, given):
    """Prediction and log-probabilities as the specification words them, token by token, out of the published weights."""
    encoder, decoder = nao.encoder, nao.decoder
    edges = encoder.embedding(tokens).reshape(len(tokens), tokens.shape[1] // 2, -1)
    memory = torch.nn.functional.normalize(encoder.rnn(edges)[0], dim=-1)
    embedding = torch.nn.functional.normalize(memory.mean(1), dim=-1)
    state, steps = (embedding.expand(decoder.rnn.num_layers, -1, -1).contiguous(),) * 2, []
    for token in given.unbind(1):
        output, state = decoder.rnn(decoder.embedding(token)[:, None], state)
        scores = torch.einsum('bh,bsh->bs', decoder.attention.input_proj(output[:, 0]), memory)
        mix = torch.einsum('bs,bsh->bh', scores.softmax(-1), memory)
        attended = torch.tanh(decoder.attention.output_proj(torch.cat([mix, output[:, 0]], dim=-1)))
        steps.append(decoder.out(attended).log_softmax(-1))
    hidden = embedding
    for layer in encoder.mlp:
        hidden = layer(hidden)
    return torch.sigmoid(encoder.regressor(hidden)), torch.stack(steps, dim=1)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('layers', [1, 2])
@pytest.mark.parametrize('nodes, space', SPACES)
def test_teacher_forced_values_and_gradients_are_those_of_reading_token_by_token(nodes, space, layers, float64):
    nao = make(nodes, space, spread=0.3, decoder_layers=layers, encoder_layers=layers, encoder_hidden_size=24,
               decoder_hidden_size=24, encoder_emb_size=10)
    tokens, weight = sequences(4, nodes, space), torch.randn(4, 8 * nodes, vocabulary(nodes, space).size)
    gradients = []
    expected, given = literal(nao, tokens, shift(tokens)), nao(tokens, shift(tokens))[:2]
    for prediction, log_probs in (expected, given):
        loss = prediction.sum() + (weight * log_probs).sum()
        gradients.append(torch.autograd.grad(loss, list(nao.parameters())))
    for one, other in zip([*expected, *gradients[0]], [*given, *gradients[1]], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('layers', [1, 2])
def test_greedy_log_probabilities_are_those_of_reading_the_chosen_tokens_one_by_one(layers, float64):
    nao, tokens = make(5, spread=0.3, decoder_layers=layers), sequences(6, 5)
    with torch.no_grad():
        prediction, log_probs, decoded = nao(tokens)
        expected_prediction, expected = literal(nao, tokens, shift(decoded))
    torch.testing.assert_close(log_probs, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction, expected_prediction, rtol=1e-9, atol=1e-9)


def test_a_position_sees_only_the_tokens_before_it():
    nao, tokens = make(spread=0.3), sequences(1)
    other = tokens.clone()
    other[0, 8:] = sequences(50, seed=1)[-1, 8:]
    with torch.no_grad():
        one, two = (nao(tokens, shift(each))[1] for each in (tokens, other))
    torch.testing.assert_close(one[:, :9], two[:, :9])
    assert not torch.allclose(one[:, 9:], two[:, 9:])


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('name', ['encoder_dropout', 'mlp_dropout', 'decoder_dropout'])
def test_dropout_acts_in_training_only(name):
    nao, tokens = make(encoder_layers=2, decoder_layers=2, **({'mlp_dropout': 0.0} | {name: 0.5})), sequences(5)
    with torch.no_grad():
        one, two = (nao(tokens, shift(tokens))[:2] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        nao.train()
        one, two = (nao(tokens, shift(tokens))[:2] for _ in range(2))
    assert [not torch.equal(a, b) for a, b in zip(one, two, strict=True)] == {
        'encoder_dropout': [True, True], 'mlp_dropout': [True, False], 'decoder_dropout': [False, True]}[name]


@pytest.mark.usefixtures('form')
def test_a_batch_is_read_as_its_rows():
    nao, tokens = make(spread=0.3), sequences(5)
    with torch.no_grad():
        together = nao(tokens)
        for index, row in enumerate(tokens):
            for one, all_ in zip(nao(row[None]), together, strict=True):
                torch.testing.assert_close(one[0], all_[index], rtol=1e-4, atol=1e-5)


def test_predictions_lie_between_zero_and_one_and_embeddings_have_unit_length():
    nao, tokens = make(), sequences(20)
    prediction, _, _ = nao(tokens)
    assert prediction.shape == (20, 1) and ((prediction > 0) & (prediction < 1)).all()
    memory = nao.encoder(tokens)
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(20, 8))
    torch.testing.assert_close(nao.encoder.embed(memory).norm(dim=-1), torch.ones(20))


@pytest.mark.usefixtures('form')
def test_generating_leaves_no_gradients_and_no_mode_behind():
    nao = make()
    nao.generate_new_arch(sequences(3), 1.0)
    assert not nao.training and all(parameter.grad is None for parameter in nao.parameters())


@pytest.mark.parametrize('sizes, word', [({'encoder_length': 7}, 'encoder_length=7'), ({'encoder_hidden_size': 8}, 'hidden')])
def test_sizes_that_do_not_fit_are_refused(sizes, word):
    words = vocabulary(2, 'small')
    with pytest.raises(ValueError, match=word):
        NAO(words.allowed_tokens, words.size, **({'encoder_length': 8} | sizes))


# -------------------------------------------------------------------------------------------------------------- measures

@given(st.lists(st.lists(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_shift_puts_the_start_token_in_front_and_drops_the_last(rows):
    assert shift(torch.tensor(rows)).tolist() == [[0, *row[:-1]] for row in rows]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_scaled_accuracies_run_from_zero_to_one_and_keep_their_order(accuracies):
    scaled = scale(accuracies)
    assert scaled.shape == (len(accuracies), 1) and scaled.dtype == torch.get_default_dtype()
    assert ((scaled >= 0) & (scaled <= 1)).all()
    if max(accuracies) > min(accuracies):
        assert float(scaled.min()) == 0 and float(scaled.max()) == 1
        order = sorted(range(len(accuracies)), key=lambda index: accuracies[index])
        assert (scaled[order].diff(dim=0) >= 0).all()
    else:
        assert torch.equal(scaled, torch.full_like(scaled, 0.5))


def test_accuracies_are_scaled_linearly():
    torch.testing.assert_close(scale([0.2, 0.3, 0.6]), torch.tensor([[0.0], [0.25], [1.0]]))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_pairwise_accuracy_counts_rightly_ordered_pairs(pairs):
    targets, predictions = (torch.tensor([[float(pair[side])] for pair in pairs]) for side in (0, 1))
    right = wrong = 0
    for (target, prediction), (other_target, other_prediction) in itertools.combinations(pairs, 2):
        if target != other_target:
            ordered = (target > other_target and prediction > other_prediction) or (
                target < other_target and prediction < other_prediction)
            right, wrong = right + ordered, wrong + (not ordered)
    expected = right / (right + wrong) if right + wrong else 1.0
    assert pairwise_accuracy(targets, predictions) == pytest.approx(expected)


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_hamming_distance_is_the_mean_share_of_different_positions(count, length, data):
    rows = st.lists(st.lists(st.integers(1, 3), min_size=length, max_size=length), min_size=count, max_size=count)
    one, other = data.draw(rows), data.draw(rows)
    different = sum(a != b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    assert hamming_distance(torch.tensor(one), torch.tensor(other)) == pytest.approx(different / (count * length))


# --------------------------------------------------------------------------------------------------------------- fitting

def fit(nao, tokens, targets, seed=0, **options):
    torch.manual_seed(seed)
    fields = {name: options.pop(name) for name in list(options) if name in controller.Settings._fields}
    generator = options.pop('generator', torch.Generator().manual_seed(seed))
    return controller.fit(nao, tokens, targets, FIT._replace(**fields), generator, **options)


@pytest.mark.usefixtures('form')
def test_fitting_lowers_the_loss_and_learns_order_and_reconstruction():
    nao, tokens = make(seed=1), sequences(60)
    reports = []
    before = controller.evaluate(nao, tokens, performances(tokens))
    first = fit(make(seed=1), tokens, performances(tokens), epochs=1)
    last = fit(nao, tokens, performances(tokens), epochs=120, report=reports.append)
    assert [report['epoch'] for report in reports] == [100, 120]
    assert last == reports[-1]
    assert last['loss'] < reports[0]['loss'] * 2 < first['loss'] / 5
    assert last['pairwise_accuracy'] > 0.9 > before['pairwise_accuracy']
    assert last['hamming_distance'] < 0.2 < before['hamming_distance']


@pytest.mark.usefixtures('form')
def test_the_reported_loss_is_the_weighted_sum_of_both_losses():
    tokens, targets = sequences(20), performances(sequences(20))
    nao = make(mlp_dropout=0.0)
    with torch.no_grad():
        prediction, log_probs, _ = nao(tokens, shift(tokens))
    mse = float((prediction - targets).square().mean())
    nll = -float(log_probs.gather(2, tokens[..., None]).mean())
    for trade_off in (0.0, 0.3, 1.0):
        values = fit(make(mlp_dropout=0.0), tokens, targets, epochs=1, trade_off=trade_off)
        assert values['loss'] == pytest.approx(trade_off * mse + (1 - trade_off) * nll, rel=1e-5)


@pytest.mark.usefixtures('form')
def test_a_fit_is_repeatable_and_depends_on_its_generator():
    tokens, targets = sequences(40), performances(sequences(40))

    def weights(seed):
        nao = make(mlp_dropout=0.0)
        fit(nao, tokens, targets, seed, epochs=3, augment=swap_operands)
        return torch.cat([parameter.detach().flatten() for parameter in nao.parameters()])
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_held_out_architectures_are_measured_and_not_trained_on():
    tokens, targets = sequences(50), performances(sequences(50))
    nao = make(mlp_dropout=0.0)
    values = fit(nao, tokens[:40], targets[:40], held_out=(tokens[40:], targets[40:]))
    measured = controller.evaluate(nao, tokens[40:], targets[40:])
    assert {key: values[key] for key in measured} == measured
    other = make(mlp_dropout=0.0)
    fit(other, tokens[:40], targets[:40])
    assert all(torch.equal(one, two) for one, two in zip(nao.parameters(), other.parameters(), strict=True))


def test_augment_rewrites_all_sequences_of_every_epoch(generator, monkeypatch):
    tokens, seen, rewritten, trained = sequences(50), [], [], []

    def augment(rows, given_generator):
        assert given_generator is generator
        seen.append(rows)
        rewritten.append(swap_operands(rows, given_generator))
        return rewritten[-1]
    reconstruct = NAO.reconstruct
    monkeypatch.setattr(NAO, 'reconstruct', lambda nao, batch: trained.append(batch) or reconstruct(nao, batch))
    fit(make(), tokens, performances(tokens), epochs=3, augment=augment, generator=generator)
    assert [len(batch) for batch in trained] == [20, 20, 10] * 3
    assert torch.equal(torch.cat(trained), torch.cat(rewritten))
    for rows in seen:
        assert sorted(rows.tolist()) == sorted(tokens.tolist())  # each exactly once
        assert not torch.equal(rows, tokens)  # shuffled


def test_targets_follow_their_sequences_through_the_shuffling(monkeypatch):
    tokens, pairs, batches = sequences(50), {}, []
    wanted = dict(zip(map(tuple, tokens.tolist()), performances(tokens).flatten().tolist(), strict=True))
    reconstruct = NAO.reconstruct
    monkeypatch.setattr(NAO, 'reconstruct', lambda nao, batch: batches.append(batch) or reconstruct(nao, batch))
    monkeypatch.setitem(controller.LOSSES, 'watched', lambda prediction, targets: pairs.update(
        zip(map(tuple, batches[-1].tolist()), targets.flatten().tolist(), strict=True)) or prediction.sum())
    fit(make(), tokens, performances(tokens), epochs=1, loss='watched')
    assert pairs == wanted


def test_equal_accuracies_can_be_fitted():
    nao, tokens = make(), sequences(30)
    values = fit(nao, tokens, scale([0.1] * 30), epochs=2)
    assert all(math.isfinite(value) for value in values.values())
    assert all(parameter.isfinite().all() for parameter in nao.parameters())


@pytest.mark.usefixtures('form')
def test_gradients_are_clipped_to_the_bound():
    norms = []

    def watch(optimizer, *_):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group['params']]
        norms.append(float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()))
    hook = register_optimizer_step_pre_hook(watch)
    try:
        fit(make(), sequences(60), performances(sequences(60)), epochs=2, grad_bound=1e-3)
    finally:
        hook.remove()
    assert len(norms) == 6 and max(norms) <= 1e-3 * 1.001 and max(norms) > 0.9e-3


# ----------------------------------------------------------------------------------------------------- new architectures

@pytest.fixture(scope='module')
def fitted():
    nao, tokens = make(seed=1), sequences(100)
    fit(nao, tokens, performances(tokens), epochs=60, augment=swap_operands)
    return nao.eval(), tokens


@pytest.mark.usefixtures('form')
def test_ascending_raises_the_prediction_and_descending_lowers_it(fitted):
    nao, tokens = fitted
    with torch.no_grad():
        base = nao(tokens)[0].mean()
        better, worse = (nao(nao.generate_new_arch(tokens, 10.0, direction))[0].mean() for direction in '+-')
    assert worse < base < better


@settings(max_examples=15)
@given(count=st.integers(0, 60), known=st.integers(0, 100), seeds=st.integers(1, 40))
def test_new_architectures_are_new_distinct_legal_and_as_many_as_asked(fitted, count, known, seeds):
    nao, tokens = fitted
    old = {tuple(row) for row in tokens[:known].tolist()}
    tried = []

    def lambdas():
        for step in range(1, 8):
            tried.append(step)
            yield step
    found, per_lambda = new_architectures(nao, tokens[:seeds], iter(old), count, lambdas())
    assert len(found) == len(set(found)) <= count
    assert not old & set(found)
    assert sum(per_lambda.values()) == len(found)
    assert list(per_lambda) == tried[:len(per_lambda)]
    for row in found:
        vocabulary(2, 'small').decode(row)
    if len(found) < count:
        assert list(per_lambda) == list(range(1, 8))  # fewer only when the step sizes are used up
    # the greedy search in plain words
    expected = []
    for step in range(1, 8):
        if len(expected) < count:
            for row in map(tuple, nao.generate_new_arch(tokens[:seeds], step).tolist()):
                if row not in old and row not in expected and len(expected) < count:
                    expected.append(row)
    assert found == expected


def test_new_architectures_are_decoded_without_dropout(fitted):
    nao, tokens = fitted
    nao.train()
    one = new_architectures(nao, tokens, [], 50, range(1, 20))
    assert one == new_architectures(nao.train(), tokens, [], 50, range(1, 20))
    assert not nao.training
