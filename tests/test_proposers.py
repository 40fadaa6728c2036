"""Who proposes new architectures: legal, new, and as the baselines' descriptions say."""

import re

import pytest
import torch
from helpers import architectures, make_run
from hypothesis import given
from hypothesis import strategies as st

import architecture
import controller
import costs
from architecture import Vocabulary, mutate, parse, sample
from controller import NAO, Settings, random_sequences
from costs import Budget, Size, counter
from model import NASNetworkCIFAR
from proposers import PATIENCE, POPULATION, PROPOSERS, Known, fit

BUDGET = Budget({}, '', counter(Size(NASNetworkCIFAR, 1, 4, 10, 8)))  # without limits


def known(count, nodes, operations, seed, generator):
    words = Vocabulary(nodes, operations)
    pool = sample(count, nodes, operations, torch.Generator().manual_seed(seed))
    naos = [NAO(words.allowed_tokens, words.size, 4 * nodes, encoder_hidden_size=8, decoder_hidden_size=8, encoder_emb_size=4)]
    return Known(pool, [1 - index / len(pool) for index in range(len(pool))], list(range(len(pool))), words, generator, naos,
                 Settings(lambdas=(1, 10)), BUDGET)


@pytest.mark.parametrize('proposer', PROPOSERS)
@given(nodes=st.integers(1, 3), operations=st.sampled_from([range(5), range(5, 16), range(2)]), seed=st.integers(0, 99),
       count=st.integers(1, 30))
def test_proposals_are_new_distinct_legal_and_no_more_than_asked(proposer, nodes, operations, seed, count):
    given_to = known(20, nodes, operations, seed, torch.Generator().manual_seed(seed))
    new, _ = PROPOSERS[proposer](given_to, count)
    assert len(new) <= count and len({*new, *given_to.pool}) == len(new) + len(given_to.pool)
    for arch in new:
        assert parse(str(arch), nodes, operations) == arch
    if proposer != 'controller' and (nodes, operations) != (1, range(2)):
        assert len(new) == count


@pytest.mark.parametrize('expand', [None, 3])
@pytest.mark.parametrize('rewriting', architecture.REWRITINGS)
def test_fits_are_to_architectures_rewritten_as_the_settings_say(rewriting, expand, monkeypatch):
    called = []
    for name, rewrite in architecture.REWRITINGS.items():
        def watched(sequences, generator, name=name, rewrite=rewrite):
            called.append(name)
            return rewrite(sequences, generator)
        monkeypatch.setitem(architecture.REWRITINGS, name, watched)
    given_to = known(20, 2, range(5), 0, torch.Generator().manual_seed(0))
    fit(make_run(), given_to._replace(settings=Settings(epochs=4, rewriting=rewriting)), expand, first=True)
    assert called == [rewriting] * (2 if expand else 4), 'one a copy, or one an epoch'


@pytest.mark.parametrize('distance', [0.11, 0.1])
@pytest.mark.parametrize('members', [1, 2])
def test_a_fit_says_which_member_it_is_of_and_whether_it_was_too_short(members, distance, monkeypatch, capsys):
    """Of several members one line each, of one all its reports."""
    def fit_all(naos, *_, report, **__):
        for member in range(members):
            for epoch in (100, 200):
                values = {'epoch': epoch, 'epochs': 200, 'loss': 0.1, 'pairwise_accuracy': 1.0,
                          'hamming_distance': distance if member + 1 == members else 0.0}
                report(member, values)
            yield values
    monkeypatch.setattr(controller, 'fit_all', lambda *args, **options: [*fit_all(*args, **options)])
    given_to = known(20, 1, range(5), 0, torch.Generator().manual_seed(0))
    fit(make_run(), given_to._replace(naos=given_to.naos * members), None, first=True)
    logged, warned = capsys.readouterr()
    assert re.findall(r'controller(.*) epoch (\d+)/200', logged) == (
        [('', '100'), ('', '200')] if members == 1 else [(' 1/2', '200'), (' 2/2', '200')])
    assert ('writes 11% of the tokens of known architectures wrongly' in warned) == ('--controller_epochs' in warned) == (
        distance > 0.1)


@pytest.mark.parametrize('proposer', ['random', 'evolution'])
def test_a_space_that_has_no_more_is_used_up(proposer):
    given_to = known(250, 1, range(2), 0, torch.Generator().manual_seed(0))
    assert len(given_to.pool) == 250  # of 2^8 = 256
    new, _ = PROPOSERS[proposer](given_to, 20)
    assert len({*new, *given_to.pool}) == 256


@pytest.mark.parametrize('proposer', PROPOSERS)
@pytest.mark.parametrize('candidates', [0, 50])
def test_proposals_stay_within_the_budget_and_are_as_many_as_asked(proposer, candidates, monkeypatch):
    """A quarter of what is drawn, mutated or decoded is within, and decoding the best does not give enough."""
    draws = torch.Generator().manual_seed(2)
    monkeypatch.setattr(NAO, 'generate_new_arch', lambda nao, seeds, step: random_sequences(nao, len(seeds) // 4, draws))
    given_to = known(200, 3, range(5), 0, torch.Generator().manual_seed(0))
    madds = sorted(BUDGET.count(arch).madds for arch in given_to.pool)
    given_to = given_to._replace(budget=BUDGET._replace(limits={'max_madds': madds[50]}), settings=Settings(
        lambdas=(1, 10, 100), candidates=candidates))
    new, _ = PROPOSERS[proposer](given_to, 20)
    assert len(new) == 20 == len({*new} - {*given_to.pool}) and all(given_to.budget.admits(arch) for arch in new)


@given(architectures(), st.integers(0, 999))
def test_a_mutation_changes_one_integer(arch, seed):
    child = mutate(arch, range(16), torch.Generator().manual_seed(seed))
    pairs = zip(arch.normal + arch.reduction, child.normal + child.reduction, strict=True)
    assert sum(one != other for one, other in pairs) == 1 and parse(str(child)) == child


def test_a_random_architecture_joins_after_many_failures_and_evolution_goes_on(monkeypatch):
    given_to = known(20, 3, range(5), 0, torch.Generator().manual_seed(0))
    others, drawn = iter(sample(40, 3, range(5), torch.Generator().manual_seed(7))), []
    failures = iter([given_to.pool[0]] * (PATIENCE + 1))  # one more than a random one joins after
    monkeypatch.setattr(architecture, 'mutate', lambda *_: next(failures, None) or next(others))
    draw = costs.sample
    monkeypatch.setattr(costs, 'sample', lambda *args: drawn.append(None) or draw(*args))
    children, _ = PROPOSERS['evolution'](given_to, 10)
    assert len(children) == 10 and len(drawn) == 1


def test_children_come_from_the_newest():
    """The oldest architecture is the best by far, but is too old to be a parent."""
    given_to = known(POPULATION + 10, 4, range(5), 1, torch.Generator().manual_seed(1))
    given_to = given_to._replace(born=list(range(len(given_to.pool))))  # the best ten are the oldest
    children, _ = PROPOSERS['evolution'](given_to, 60)

    def distance(one, other):
        return sum(a != b for a, b in zip(one.normal + one.reduction, other.normal + other.reduction, strict=True))
    parents = [min(range(len(given_to.pool)), key=lambda index: distance(given_to.pool[index], child)) for child in children]
    assert min(parents) >= 10
    assert sum(parents) / len(parents) < 25  # the best of a sample of ten: far above the mean of the newest, 35
