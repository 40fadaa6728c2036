"""Search for an architecture by NAO-WS or by NAO, the complete way (paper, section 3 and appendix; Algorithm 1), or by NAO-V2.

    python train_search.py --output_dir=exp/search_cifar10       # search; again: goes on where it stopped
    python train_search.py --method=NAO-V2 --output_dir=exp/v2   # the authors' later recipe (arXiv:1909.10815)
    python train_search.py --method=NAO --output_dir=exp/nao     # every candidate is trained on its own
    torchrun --nproc_per_node=4 train_search.py ...              # on four GPUs; --nnodes for several machines
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --use_aux_head --cutout_size=16

NAO-WS: a supernet trains on random architectures of a pool; now and then every architecture of the pool is scored, the
controller learns which are good and writes new ones, which replace the worst; at last the best are trained from scratch and
ranked. NAO-V2: the same in iterations, each of which trains on the new ones alone and then scores all so far. NAO: every
candidate is trained on its own, the controller learns from all results so far, and what it writes are the next candidates.
`next_phase` says what follows what; a checkpoint, written after each phase, says which one comes next.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import architecture
import candidates
import checkpoint
import proposers
import search_cost
import search_files
import search_setup
import training
from architecture import Architecture
from flags import run_program
from model_search import score_pool
from proposers import LEARNING, PROPOSERS, Known
from search_setup import NETWORK_FLAGS
from utils import Run


def next_phase(search: 'Search') -> str:
    """The phase after the one that a search has just done: Algorithm 1 of the paper, with or without weight sharing.

    measure: `train` the supernet on the pool, then `score` the pool with it, or `evaluate`: train each candidate on its own;
    learn: `fit` encoder, predictor and decoder to the accuracies; improve: `propose` new architectures, by ascending the
    predicted accuracy from the best; and so on. At last `rank` the best: with weight sharing by training them from scratch.
    NAO-V2's iterations are these phases too; what differs is which architectures `train` draws and `score` scores.

    search.phase is that which was just done; in checkpoints, where the search goes on, it is the next one.
    """
    if search.phase == 'train':
        return 'score' if search.is_scored(search.epoch) else 'train'
    if search.phase in ('score', 'evaluate'):
        return 'rank' if search.is_over() else search.after_measuring
    if search.phase == 'fit':
        return 'propose'
    if search.phase == 'propose':
        return search.phases[0] if search.has_work else 'rank'
    return 'done'


class Search:
    """What all methods share: the pool, the controllers that learn from it, new architectures, the final ranking.

    A phase is a method of this class. A method of searching brings those that measure the pool, and: is_over (no new
    architectures are wanted any more), wanted (how many are), replace (take them in), number (how far it is, in epochs or
    rounds), progress (for the log), measured (how many architectures there are each time that all are measured), log_start.
    """

    phases: tuple[str, ...]  # those of a round, in order, and the last one
    trains_best = True  # whether those of the final ranking are trained once more
    has_work = True  # whether, after new architectures were asked for, anything is left to be measured
    fields: Mapping[str, type] = {'phase': str, 'accuracies': list, 'fits': int}  # in a checkpoint beside networks and pool
    extent: str  # the flag that says how long the search goes on
    unit: str  # what it counts, for the log

    def __init__(self, args: argparse.Namespace, run: Run):
        self.args, self.run = args, run
        self.vocabulary = architecture.vocabulary(args.child_nodes, args.search_space)
        self.checkpoint = run.output_dir / 'checkpoint.pt'
        self.task = search_setup.open_task(args, run)
        self.budget = search_setup.budget_of(args, self.task)
        self.pool: list[Architecture] = []  # best first, once it is measured; `load` takes the checkpoint's
        if not self.checkpoint.exists():
            self.pool = search_setup.first_pool(args, self.vocabulary, run, self.budget)
        self.accuracies: list[float] = []  # of the pool when it was measured
        self.born = list(range(len(self.pool)))  # how many architectures there were before each
        self.rounds = [[0, 0]]  # [number, how many there were before] of each round of new ones; first the start
        self.settings = search_setup.settings_of(args)
        self.naos = search_setup.build_controllers(args, self.vocabulary, run.device)
        self.share_controllers()
        self.fits = 0  # how often the controllers were fitted
        self.after_measuring = 'fit' if args.proposer in LEARNING else 'propose'
        self.phase, self.resumed = self.phases[0], None

    # The search and its state.

    def go_on(self) -> None:
        """Do phase after phase to the end, with a checkpoint before the first and after each."""
        if self.resumed:
            self.run.resume(self.resumed, f'{self.progress()}, next: {self.phase}')
        self.log_start()
        for line in search_setup.without_use(self.args):
            self.run.log(line)
        if self.budget.limits:
            self.run.log(f'all architectures stay within {self.budget}')
        if not self.resumed:
            self.save()
        while self.phase != 'done':
            done = self.phase
            getattr(self, done)()
            self.phase = next_phase(self)
            self.save(after=done)
        final = [arch for arch in search_files.read_final(self.run) if arch in self.pool] if self.args.child_rank_count else []
        if final:
            born = [self.born[self.pool.index(arch)] for arch in final]
            came = [max(number for number, first in self.rounds if first <= each) for each in born]
            self.run.log(f'finished: the best architecture is {final[0]}; the ranked ones are in '
                         f'{self.run.output_dir / "arch_pool.final"}, best first; {sum(map(bool, came))} of these '
                         f'{len(final)} were proposed in the search ({self.unit} {", ".join(map(str, came))}; 0: the start)')
        else:
            self.run.log(f'finished: none was trained from scratch to be ranked; the best by its score is {self.pool[0]}, the '
                         f'first of {self.run.output_dir / "arch_pool"}')

    def load(self) -> dict[str, Any] | None:
        """Go on from the checkpoint in the output directory, if there is one; returns it. Raises UserError."""
        state = search_files.load(self)
        if state and self.phase in ('rank', 'done'):
            self.phase = self.reopen(state['args'])
        return state

    def save(self, after: str = '', **more: Any) -> None:
        """Write the checkpoint after a phase; `more` goes into it."""
        self.run.save(search_files.state_of(self) | more, *self.checkpoints(after))

    def reopen(self, saved: dict[str, Any]) -> str:
        """The phase in which a search that was over goes on, as it may if the flags ask for more than those `saved` did."""
        if saved.get(self.extent, math.inf) < getattr(self.args, self.extent) and not self.is_over():
            return self.after_measuring
        unranked = set(self.pool[:self.args.child_rank_count]) - set(search_files.read_final(self.run))
        epochs = self.args.child_rank_epochs
        longer = self.trains_best and self.args.dataset != 'imagenet' and saved.get('child_rank_epochs', epochs) < epochs
        return 'rank' if self.phase == 'rank' or unranked or longer else 'done'

    def checkpoints(self, after: str) -> list[Path]:
        """Where the checkpoint after a phase is written to."""
        return [self.checkpoint]

    # The pool.

    def file_number(self) -> int:
        """What this round's files are called by."""
        return self.number()

    def share_controllers(self) -> None:
        """Give the first process's controllers to all."""
        for nao in self.naos:
            self.run.broadcast(nao)

    def sort_pool(self, accuracies: Sequence[float], what: str) -> None:
        """Sort the pool by its accuracies, best first, and write it as arch_pool and arch_pool.NAME."""
        order = sorted(range(len(self.pool)), key=lambda index: -accuracies[index])
        self.pool, self.accuracies, self.born = ([values[i] for i in order] for values in (self.pool, accuracies, self.born))
        for suffix in (f'.{self.file_number()}', ''):
            search_files.write_pool(self.run, suffix, self.pool, self.accuracies)
        madds = [self.budget.count(arch).madds for arch in self.pool]
        search_files.write_front(self.run, self.pool, self.accuracies, madds)
        mean = sum(accuracies) / len(accuracies)
        self.run.log(f'{what}: best {self.accuracies[0]:.4f}, mean {mean:.4f}, worst {self.accuracies[-1]:.4f}')
        self.run.write_metrics(kind='score', epoch=self.number(), accuracies=self.accuracies, best_arch=str(self.pool[0]),
                               multiply_adds=madds)

    def an_architecture(self) -> Architecture:
        """One of the search space, for logged sizes, the same in every start of a search."""
        return architecture.sample(1, self.args.child_nodes, self.vocabulary.operations, torch.Generator().manual_seed(0))[0]

    def shared_cost(self, step: float, count: int) -> list[search_cost.Part]:
        """The cost of the phases below: fits, and a ranking of the best of `count`, whose steps take `step` seconds."""
        count = min(self.args.child_rank_count, count) if self.trains_best else 0
        parts = [search_cost.ranking(self.run, self.task.ranking, step, count)]
        if self.after_measuring == 'fit':
            tokens = self.vocabulary.tokens(self.pool[:self.settings.batch_size], self.run.device)
            parts.append(search_cost.fits(self.run, self.naos[0], tokens, self.settings, self.measured()[:-1],
                                          self.args.controller_expand))
        return parts

    def known(self) -> Known:
        """What controllers learn from and proposers propose by."""
        return Known(self.pool, self.accuracies, self.born, self.vocabulary, self.run.generators['search'], self.naos,
                     self.settings, self.budget)

    # The phases that all methods share.

    def fit(self) -> None:
        """Fit the controllers to the pool and its accuracies (paper, section 3.2-3.3)."""
        with self.run.meeting():  # one process may be slower by more than the others would wait for it elsewhere
            report = proposers.fit(self.run, self.known(), self.args.controller_expand, first=not self.fits)
        self.share_controllers()
        self.fits += 1
        self.run.write_metrics(kind='controller', search_epoch=self.number(), **report)

    def propose(self) -> None:
        """Ask the proposer for architectures that are not in the pool, and take them in (paper, section 3.4)."""
        generator, proposer = self.run.generators['search'], PROPOSERS[self.args.proposer]
        wanted = self.wanted()
        def ask() -> tuple:
            new, notes = proposer(self.known(), wanted)
            return [str(arch) for arch in new], notes, generator.get_state()
        lines, notes, state = self.run.together(ask)  # equal in all processes, down to the last rounding
        generator.set_state(state)
        few = f' of {wanted} asked for' if len(lines) < wanted else ''
        self.run.log(f'{len(lines)} new architectures{few}' + ''.join(f'; {what}: {value}' for what, value in notes.items()))
        if not lines:
            self.run.warn('no new architectures: all that were written are in the pool already or beyond the budget; more '
                          '--controller_lambdas, a larger --controller_top or longer fits write others')
        self.run.write_metrics(kind='new', epoch=self.number(), new=len(lines), per_lambda=notes.get('written per λ', {}))
        born = max(self.born) + 1
        self.replace([architecture.parse(line) for line in lines])
        self.rounds.append([self.file_number(), born])
        self.born = self.born + list(range(born, born + len(lines)))
        search_files.write_pool(self.run, '', self.pool)

    def rank(self) -> None:
        """Rank the best architectures, by trainings from scratch or by those they had, and write arch_pool.final, if any."""
        best = self.pool[:self.args.child_rank_count]
        accuracies = self.rank_accuracies(best)
        for index, (arch, accuracy) in enumerate(zip(best, accuracies, strict=True)):
            self.run.write_metrics(kind='rank', index=index, accuracy=accuracy, arch=str(arch))
        ranked = sorted(zip(accuracies, best, strict=True), key=lambda pair: -pair[0])
        if ranked:
            search_files.write_pool(self.run, '.final', [arch for _, arch in ranked], [accuracy for accuracy, _ in ranked])

    def rank_accuracies(self, best: list[Architecture]) -> list[float]:
        """What the best are ranked by."""
        return candidates.train_all(self.run, self.task.ranking, best, self.number())


class WeightSharingSearch(Search):
    """NAO-WS: a supernet trains on architectures of the pool, which it then scores."""

    phases = ('train', 'score', 'fit', 'propose', 'rank')
    fields = Search.fields | {'epoch': int, 'step': int}
    extent, unit = 'child_epochs', 'after epochs'
    began = 0  # the epoch at which learning rate and drop path began

    def __init__(self, args: argparse.Namespace, run: Run):
        super().__init__(args, run)
        self.batches = self.task.candidate.train_batches(run)
        self.supernet = run.place(self.task.supernet(
            self.task.classes, args.child_layers, args.child_nodes, args.child_channels, args.child_keep_prob,
            args.child_drop_path_keep_prob, args.child_use_aux_head, args.child_epochs * len(self.batches)))
        self.optimizer = training.sgd(run, self.supernet, args.child_l2_reg)
        self.parameters = search_setup.parameter_counter(args, self.task)
        self.epoch, self.step = 0, 0

    def is_scored(self, epoch: int) -> bool:
        """Whether the pool is scored after so many epochs."""
        every = self.args.child_eval_epochs
        return epoch >= self.args.child_epochs or (epoch in every if isinstance(every, list) else epoch % every == 0)

    def epochs(self) -> int:
        """The epochs of the whole search."""
        return self.args.child_epochs

    def trained_on(self) -> list[Architecture]:
        """The architectures that the supernet trains on."""
        return self.pool

    def draw(self, pool: list[Architecture], count: int) -> list[Architecture]:
        """Draw so many architectures of a pool, as --child_sampling says: uniformly, or by their networks' parameters."""
        generator = self.run.generators['search']
        if self.args.child_sampling == 'uniform':
            chosen = torch.randint(len(pool), (count,), generator=generator)
        else:
            weights = torch.tensor([self.parameters(arch) for arch in pool], dtype=torch.float64)
            chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        return [pool[index] for index in chosen.tolist()]

    def train(self) -> None:
        """One epoch of the supernet, each step on an architecture drawn from the pool."""
        args, epoch, first = self.args, self.epoch - self.began, self.began * len(self.batches)
        if epoch >= args.child_epochs:  # it was resumed with fewer epochs
            return
        self.supernet.train()
        drawn = iter(self.draw(self.trained_on(), len(self.batches)))

        def forward(images: torch.Tensor, step: int) -> tuple:
            return self.supernet(images, next(drawn), step - first)
        rate = self.task.candidate.lr(epoch)
        title = f'epoch {self.epoch + 1}/{self.epochs()}'
        values, self.step = training.train_epoch(
            self.run, forward, self.optimizer, self.batches, title=title, lr=rate, step=self.step, clock=self.clock,
            grad_bound=args.child_grad_bound, label_smooth=self.task.candidate.label_smooth, shares_weights=True)
        self.run.average_statistics(self.supernet)
        self.epoch += 1
        self.run.log(f'{title} train {training.describe(values)} lr {rate:.3g} left {self.clock.left(self.step)}')
        self.run.write_metrics(kind='epoch', epoch=self.epoch, step=self.step, lr=rate, train=values)

    def score(self) -> None:
        """Score the pool, all on one validation batch."""
        run, batches = self.run, self.task.candidate.valid_batches(self.run)
        if self.args.child_eval_batch_size < min(len(self.pool), batches.count):
            run.warn(f'--child_eval_batch_size={self.args.child_eval_batch_size} images cannot tell {len(self.pool)} '
                     f'architectures apart; there are {batches.count}')
        chosen = torch.randperm(batches.count, generator=run.generators['search'])[:self.args.child_eval_batch_size]
        images, labels = batches.batch(chosen.to(run.device))
        accuracies = score_pool(run, self.supernet, self.pool, images, labels)
        run.average_statistics(self.supernet)  # which scoring updates, by each process's share of the pool
        self.sort_pool(accuracies, f'epoch {self.epoch}: scored {len(self.pool)} architectures on {len(labels)} images')
        guess = 1 / self.task.classes
        if self.is_over() and sum(accuracies) / len(accuracies) < guess + 2 * math.sqrt(guess * (1 - guess) / len(labels)):
            run.log(f'these scores are on average no better than guessing one of {self.task.classes} classes, so that the best '
                    'are hardly more than drawn at random: more --child_epochs, or another learning rate, help')

    def is_over(self) -> bool:
        """Whether no new architectures are wanted any more: the pool of the last epoch is the result."""
        return self.epoch >= self.args.child_epochs

    def wanted(self) -> int:
        """How many new architectures to ask for."""
        return min(self.args.controller_new_arch, len(self.pool))

    def replace(self, new: list[Architecture]) -> None:
        """Put new architectures in place of the worst."""
        kept = len(self.pool) - len(new)
        self.pool, self.born = self.pool[:kept] + new, self.born[:kept]

    def go_on(self) -> None:
        """Do phase after phase to the end."""
        self.run.part_ways()
        self.clock = training.Clock(self.step, self.epochs() * len(self.batches))
        super().go_on()

    def load(self) -> dict[str, Any] | None:
        """Go on from the checkpoint in the output directory, if there is one; returns it."""
        state = super().load()
        if state:
            checkpoint.require(state, {'optimizer': dict}, self.checkpoint)
            checkpoint.fill_model(self.supernet, state['model'], self.checkpoint, NETWORK_FLAGS)
            checkpoint.fill_optimizer(self.optimizer, state['optimizer'], self.checkpoint)
            self.step = self.epoch * len(self.batches)  # in today's steps, see training.train
        return state

    def save(self, after: str = '', **more: Any) -> None:
        """Write the checkpoint after a phase."""
        super().save(after, model=self.supernet.state_dict(), optimizer=self.optimizer.state_dict(), **more)

    def checkpoints(self, after: str) -> list[Path]:
        """Where the checkpoint after a phase is written to: that of an epoch is kept as --save_every says."""
        every = self.args.save_every
        kept = every and after == 'train' and self.epoch % every == 0
        return [self.run.output_dir / f'checkpoint_{self.epoch}.pt'] * bool(kept) + super().checkpoints(after)

    def number(self) -> int:
        """How far the search is: epochs done."""
        return self.epoch

    def progress(self) -> str:
        """How far the search is, for the log."""
        return f'epoch {self.epoch}'

    def measured(self) -> list[int]:
        """How many architectures there are each time that they are scored."""
        return [len(self.pool) for epoch in range(1, self.args.child_epochs + 1) if self.is_scored(epoch)]

    def log_start(self) -> None:
        """Log sizes, arguments and the cost to come."""
        args, run, valid = self.args, self.run, self.task.candidate.valid_batches(self.run)
        training.log_start(run, self.batches, valid, self.supernet, self.an_architecture(),
                           records=self.phase != 'done')
        training.log_share(run, self.batches)
        if self.phase == 'done':
            return
        if args.method == 'NAO-WS' and args.controller_new_arch >= len(self.pool) and len(self.measured()) > 1:
            run.warn(f'--controller_new_arch={args.controller_new_arch} replaces all of a pool of {len(self.pool)}, the best '
                     'too; a smaller one keeps them')
        step = search_cost.seconds_of_step(run, self.supernet, args.child_batch_size, valid.size, self.pool[0])
        score = search_cost.seconds_of_score(run, self.supernet, self.pool[0], min(args.child_eval_batch_size, valid.count),
                                             valid.size)
        steps, epochs, counts = len(self.batches), self.epochs(), self.measured()
        scored = ' to '.join(map(str, sorted({counts[0], counts[-1]})))
        search_cost.log(
            run,
            search_cost.Part(f'{epochs} epochs of {steps} steps', step, epochs * steps),
            search_cost.Part(f'{len(counts)} scorings of {scored} architectures', score, sum(counts)),
            *self.shared_cost(step, counts[-1]))


class Rounds:
    """Mixin of methods that go in rounds: new architectures join all those before, and then all are known anew."""

    extent = unit = 'rounds'
    round = 0  # how often new architectures have joined

    def is_over(self) -> bool:
        """Whether no new architectures are wanted any more: all rounds are done."""
        return self.round >= self.args.rounds

    def wanted(self) -> int:
        """How many new architectures to ask for."""
        return self.args.controller_new_arch

    def replace(self, new: list[Architecture]) -> None:
        """Add new architectures to the pool."""
        self.pool, self.round, self.has_work = self.pool + new, self.round + 1, bool(new)

    def file_number(self) -> int:
        """What this round's files are called by."""
        return self.round

    def measured(self) -> list[int]:
        """How many architectures there are each time that all are measured; at most."""
        new = self.args.controller_new_arch
        return [max(1, len(self.pool) + (index - self.round) * new) for index in range(self.args.rounds + 1)]


class IteratedSearch(Rounds, WeightSharingSearch):
    """NAO-V2 (arXiv:1909.10815): in each iteration the supernet trains on what is new alone, then scores all so far.

    Learning rate and drop path begin anew in each iteration; the supernet's weights and momentum go on.
    """

    fields = WeightSharingSearch.fields | {'round': int, 'began': int}

    def is_scored(self, epoch: int) -> bool:
        """Whether all architectures are scored after so many epochs: the iteration is over."""
        return epoch - self.began >= self.args.child_epochs

    def epochs(self) -> int:
        """The epochs of the whole search."""
        return self.began + (max(0, self.args.rounds - self.round) + 1) * self.args.child_epochs

    def trained_on(self) -> list[Architecture]:
        """The architectures that the supernet trains on: those of this iteration."""
        _, first = self.rounds[-1]
        return [arch for arch, born in zip(self.pool, self.born, strict=True) if born >= first]

    def replace(self, new: list[Architecture]) -> None:
        """Add new architectures to the pool, and begin an iteration on them."""
        super().replace(new)
        self.began = self.epoch


class CompleteSearch(Rounds, Search):
    """NAO, the complete way: each candidate is trained on its own, and the controller learns from all results so far."""

    phases = ('evaluate', 'fit', 'propose', 'rank')
    fields = Search.fields | {'round': int}
    trains_best = False

    def evaluate(self) -> None:
        """Train the candidates that have no result yet, and sort all results."""
        accuracies = candidates.train_all(self.run, self.task.candidate, self.pool, self.round,
                                          to_come=(self.args.rounds - self.round) * self.args.controller_new_arch)
        self.sort_pool(accuracies, f'round {self.round}: trained {len(self.pool)} architectures so far')

    def rank_accuracies(self, best: list[Architecture]) -> list[float]:
        """What the best are ranked by: their own trainings."""
        return self.accuracies[:len(best)]

    def number(self) -> int:
        """How far the search is: rounds of new architectures."""
        return self.round

    def progress(self) -> str:
        """How far the search is, for the log."""
        results = candidates.read_results(self.run, self.task.candidate)
        return f'{sum(str(arch) in results for arch in self.pool)} of {len(self.pool)} architectures in round {self.round}'

    def log_start(self) -> None:
        """Log the sizes of the first candidate, arguments and the cost to come."""
        args, run, size = self.args, self.run, self.task.image_size
        with torch.random.fork_rng(devices=[]):  # a resumed search goes on with the generators as they were saved
            network = run.place(self.task.candidate.build(self.an_architecture(), 1))
        training.log_start(run, self.task.candidate.train_batches(run), self.task.candidate.valid_batches(run), network,
                           records=self.phase != 'done')
        if self.phase == 'done':
            return
        count = len(self.pool) + (args.rounds - self.round) * args.controller_new_arch
        steps = len(self.task.candidate.train_batches(run))
        step = search_cost.seconds_of_step(run, network, args.child_batch_size, size) / run.world
        search_cost.log(
            run,
            search_cost.Part(f'up to {count} candidates of {args.child_epochs} epochs of {steps} steps', step,
                             count * args.child_epochs * steps),
            *self.shared_cost(step, count))


SEARCHES: dict[str, type[Search]] = {'NAO-WS': WeightSharingSearch, 'NAO-V2': IteratedSearch, 'NAO': CompleteSearch}


def main() -> None:
    """Search to the end, from the checkpoint in the output directory if there is one."""
    args = search_setup.parse_args()
    run = Run(args)
    search = SEARCHES[args.method](args, run)
    search.load()
    run.open_output(anew=search.resumed is None)
    search.go_on()


if __name__ == '__main__':
    run_program(main)
