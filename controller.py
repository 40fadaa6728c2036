"""The controller: encoder, performance predictor and decoder; fitting them, and better architectures out of them.

Paper, sections 3.2-3.4. An architecture is a row of tokens (architecture.Vocabulary); which tokens are legal at which
position is data, so that any search space fits. All tensors are (batch, length, features) or (batch, length).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

START = 0  # the token that a decoder begins with
LOG_EVERY = 100  # epochs between two reports of a fit
SURE = 1e-7  # predictions nearer to 0 or 1 are all one: their log-odds may be infinite, and infinities do not add up


class Encoder(nn.Module):
    """Embed a sequence (LSTM) and predict the performance of its architecture (multi-layer perceptron)."""

    def __init__(self, vocab_size: int, pair: int, layers: int, hidden_size: int, emb_size: int, dropout: float,
                 mlp_layers: int, mlp_hidden_size: int, mlp_dropout: float):
        super().__init__()
        self.pair, self.dropout = pair, dropout
        self.embedding = nn.Embedding(vocab_size, emb_size)
        self.rnn = nn.LSTM(pair * emb_size, hidden_size, layers, batch_first=True, dropout=dropout if layers > 1 else 0)
        self.mlp = nn.Sequential()
        for layer in range(mlp_layers):
            inputs = mlp_hidden_size if layer else hidden_size
            self.mlp.add_module(f'layer_{layer}', nn.Sequential(
                nn.Linear(inputs, mlp_hidden_size), nn.ReLU(), nn.Dropout(mlp_dropout)))
        self.regressor = nn.Linear(mlp_hidden_size if mlp_layers else hidden_size, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        """Tokens (batch, length) -> the LSTM's outputs at unit length, (batch, encoder_length, hidden_size)."""
        edges = sequence.unflatten(1, (-1, self.pair))
        outputs = kernels.embedded_lstm(self.embedding, self.rnn, edges, dropout=self.dropout)
        return F.normalize(F.dropout(outputs, self.dropout, self.training), dim=-1)

    @staticmethod
    def embed(outputs: Tensor) -> Tensor:
        """The architecture's embedding, (batch, hidden_size): the mean of the outputs at unit length."""
        return F.normalize(outputs.mean(1), dim=-1)

    def predict(self, embedding: Tensor) -> Tensor:
        """The predicted performance of embeddings, (batch, 1) in (0, 1)."""
        return torch.sigmoid(self.regressor(self.mlp(embedding)))


class Attention(nn.Module):
    """Let the decoder's outputs look at the encoder's."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.input_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, outputs: Tensor, memory: Tensor) -> Tensor:
        """Outputs (batch, steps, hidden), the encoder's outputs (batch, encoder_length, hidden) -> (batch, steps, hidden)."""
        scores = torch.bmm(self.input_proj(outputs), memory.transpose(1, 2))
        mix = torch.bmm(torch.softmax(scores, dim=-1), memory)
        return torch.tanh(self.output_proj(torch.cat([mix, outputs], dim=-1)))


class Decoder(nn.Module):
    """Write an architecture's tokens, given its embedding and the encoder's outputs."""

    def __init__(self, vocab_size: int, allowed_tokens: Sequence[tuple[int, int]], layers: int, hidden_size: int,
                 dropout: float):
        super().__init__()
        self.allowed_tokens, self.layers, self.dropout = list(allowed_tokens), layers, dropout
        self.rnn = nn.LSTM(hidden_size, hidden_size, layers, batch_first=True, dropout=dropout if layers > 1 else 0)
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.attention = Attention(hidden_size)
        self.out = nn.Linear(hidden_size, vocab_size)

    def start(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM's first state, in all its layers: the architecture's embedding (batch, hidden), twice."""
        return (embedding.expand(self.layers, *embedding.shape).contiguous(),) * 2

    def follow(self, decoder_input: Tensor, embedding: Tensor, memory: Tensor) -> Tensor:
        """Log-probabilities (batch, length, vocab) at each position, given the tokens before it (batch, length)."""
        outputs = kernels.embedded_lstm(self.embedding, self.rnn, decoder_input.unsqueeze(2), self.start(embedding),
                                        self.dropout)
        return F.log_softmax(self.out(self.attention(outputs, memory)), dim=-1)

    def best_legal(self, scores: Tensor, position: int) -> Tensor:
        """Of scores (batch, vocab) the best token (batch,) that may stand at a position."""
        first, last = self.allowed_tokens[position]
        return scores[:, first:last + 1].argmax(1) + first

    @torch.no_grad()
    def decode(self, embedding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Take the best legal token at each position and go on from it; without gradients.

        Returns the tokens' scores, whose softmax are their probabilities (batch, length, vocab), and tokens (batch, length).
        """
        if kernels.on_plain_cpu(memory) and not self.training:
            return kernels.greedy_decode(self, embedding, memory, START)
        state = self.start(embedding)
        token = torch.full((len(embedding),), START, device=embedding.device)
        scores, tokens = [], []
        for position in range(len(self.allowed_tokens)):
            output, state = self.rnn(self.embedding(token).unsqueeze(1), state)
            scores.append(self.out(self.attention(output, memory)).squeeze(1))
            token = self.best_legal(scores[-1], position)
            tokens.append(token)
        return torch.stack(scores, dim=1), torch.stack(tokens, dim=1)


class NAO(nn.Module):
    """Encoder, performance predictor and decoder.

    allowed_tokens[t]: (first, last) legal token at position t, inclusive; encoder_length: the LSTM's steps, each of which
    reads len(allowed_tokens) / encoder_length tokens side by side (2: an edge's input and operation).
    """

    def __init__(self, allowed_tokens: Sequence[tuple[int, int]], vocab_size: int, encoder_length: int,
                 encoder_layers: int = 1, encoder_hidden_size: int = 96, encoder_emb_size: int = 48,
                 encoder_dropout: float = 0, mlp_layers: int = 3, mlp_hidden_size: int = 200, mlp_dropout: float = 0.1,
                 decoder_layers: int = 1, decoder_hidden_size: int = 96, decoder_dropout: float = 0):
        super().__init__()
        if len(allowed_tokens) % encoder_length:
            raise ValueError(f'encoder_length={encoder_length} does not divide the {len(allowed_tokens)} tokens')
        if encoder_hidden_size != decoder_hidden_size:
            raise ValueError('the decoder starts from the embedding: encoder_hidden_size and decoder_hidden_size differ')
        self.encoder = Encoder(vocab_size, len(allowed_tokens) // encoder_length, encoder_layers, encoder_hidden_size,
                               encoder_emb_size, encoder_dropout, mlp_layers, mlp_hidden_size, mlp_dropout)
        self.decoder = Decoder(vocab_size, allowed_tokens, decoder_layers, decoder_hidden_size, decoder_dropout)

    def forward(self, sequence: Tensor, decoder_input: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences (batch, length) -> predictions (batch, 1), log-probabilities (batch, length, vocab), tokens.

        decoder_input: the shifted target (see `shift`) for teacher forcing; None decodes greedily, legal tokens only,
        without gradients.
        """
        memory = self.encoder(sequence)
        embedding = self.encoder.embed(memory)
        prediction = self.encoder.predict(embedding)
        if decoder_input is None:
            scores, tokens = self.decoder.decode(embedding, memory)
            return prediction, F.log_softmax(scores, dim=-1), tokens
        log_probs = self.decoder.follow(decoder_input, embedding, memory)
        tokens = [self.decoder.best_legal(log_probs[:, position], position) for position in range(log_probs.shape[1])]
        return prediction, log_probs, torch.stack(tokens, dim=1)

    def reconstruct(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """What a fit trains: predictions (batch, 1), and log-probabilities (batch, length, vocab) of writing `sequence`."""
        memory = self.encoder(sequence)
        embedding = self.encoder.embed(memory)
        return self.encoder.predict(embedding), self.decoder.follow(shift(sequence), embedding, memory)

    def predict(self, sequence: Tensor) -> Tensor:
        """The predicted performance of sequences (batch, length): (batch, 1) in (0, 1), without decoding anything."""
        return self.encoder.predict(self.encoder.embed(self.encoder(sequence)))

    @torch.no_grad()
    def generate_new_arch(self, sequence: Tensor, predict_lambda: float, direction: str = '+') -> Tensor:
        """Move sequences (batch, length) by λ along the prediction's gradient and decode: tokens (batch, length).

        direction: '+' for better architectures, '-' for worse ones. (Paper, equation 2 of section 3.4.)
        """
        if direction not in ('+', '-'):
            raise ValueError(f"direction={direction!r} is neither '+' nor '-'")
        memory = self.encoder(sequence)
        with torch.enable_grad():
            memory.requires_grad_()
            prediction = self.encoder.predict(self.encoder.embed(memory))
            gradient, = torch.autograd.grad(prediction.sum(), memory)
        step = predict_lambda if direction == '+' else -predict_lambda
        moved = F.normalize(memory + step * gradient, dim=-1)
        return self.decoder.decode(self.encoder.embed(moved), moved)[1]


def shift(sequences: Tensor) -> Tensor:
    """The decoder's input for a target: the start token, then all tokens but the last."""
    return F.pad(sequences[:, :-1], (1, 0), value=START)


def random_sequences(nao: NAO, count: int, generator: torch.Generator) -> Tensor:
    """Sequences (count, length) of legal tokens, uniform at every position and alike ones among them."""
    first, last = torch.tensor(nao.decoder.allowed_tokens, device=generator.device).T
    draws = torch.rand((count, len(first)), generator=generator, device=generator.device)
    return ((draws * (last - first + 1)).long() + first).to(next(nao.parameters()).device)


def redraw(nao: NAO, sequences: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sequences (count, length): some of `sequences` (batch, length), the first ones more often, partly random.

    Of each, any number of positions from one to all are redrawn: the result lies anywhere between a neighbour and chance.
    """
    rows, share, places = (torch.rand(shape, generator=generator, device=generator.device).to(sequences.device)
                           for shape in ((count,), (count, 1), (count, sequences.shape[1])))
    kept = sequences[(rows ** 2 * len(sequences)).long()]
    redrawn = places <= torch.maximum(share, places.amin(1, keepdim=True))
    return torch.where(redrawn, random_sequences(nao, count, generator), kept)


def scale(accuracies: Sequence[float]) -> Tensor:
    """Accuracies as targets: 0-1 by their minimum and maximum, (count, 1); all 0.5 where they are equal."""
    values = torch.tensor(accuracies, dtype=torch.float64)
    spread = values.max() - values.min()
    scaled = (values - values.min()) / spread if spread > 0 else torch.full_like(values, 0.5)
    return scaled.to(torch.get_default_dtype()).unsqueeze(1)


def rank(accuracies: Sequence[float]) -> Tensor:
    """Accuracies as targets: the share that each one beats, in (0, 1), (count, 1); a tie, with itself too, is half a win.

    Any increasing function of the accuracies gives the same targets, and a few bad architectures cannot squeeze the good
    ones together at the top, where a search has to tell them apart.
    """
    values = torch.tensor(accuracies, dtype=torch.float64)
    wins = (values[:, None] > values).double() + (values[:, None] == values).double() / 2
    return wins.mean(1, keepdim=True).to(torch.get_default_dtype())


def pairwise_accuracy(targets: Tensor, predictions: Tensor) -> float:
    """The share of pairs with different targets that the predictions order rightly; 1.0 where there is no pair."""
    above = targets.flatten()[:, None] > targets.flatten()[None]
    ordered = predictions.flatten()[:, None] > predictions.flatten()[None]
    pairs = int(above.sum())
    return int((above & ordered).sum()) / pairs if pairs else 1.0


def hamming_distance(targets: Tensor, tokens: Tensor) -> float:
    """The mean share of positions at which decoded tokens differ from their targets, 0-1."""
    return float((targets != tokens).cpu().double().mean())


# What turns accuracies into targets, and what a prediction pays for missing its target, by the names of the options.
TARGETS = {'scaled': scale, 'ranks': rank}
LOSSES = {'squared': F.mse_loss, 'cross_entropy': F.binary_cross_entropy}


class Settings(NamedTuple):
    """How a search fits its controllers and chooses new architectures; the defaults are the paper's."""

    epochs: int = 1000
    later_updates: int = 0  # gradient steps of a fit after the first, which goes on from its weights
    later_per_token: float = 0.0  # the same for each token of an architecture; the larger counts; both 0: `epochs` again
    predictor_updates: int = 0  # steps after each fit in which the predictor alone begins anew; 0: it stays as fitted
    batch_size: int = 100
    lr: float = 1e-3
    l2_reg: float = 1e-4
    trade_off: float = 0.8
    grad_bound: float = 5.0
    members: int = 1  # controllers, each fitted on its own
    targets: str = 'scaled'  # one of TARGETS
    loss: str = 'squared'  # one of LOSSES
    rewriting: str = 'operands'  # how known cells are rewritten in each epoch; one of architecture.REWRITINGS
    unlabelled: int = 0  # random sequences a batch to reconstruct; 0: the batch is reconstructed
    top: int = 100  # the best known architectures, from which the search ascends
    redrawn: int = 0  # sequences more that it ascends from: those with random positions redrawn
    lambdas: tuple[float, ...] = tuple(range(1, 51))
    candidates: int = 0  # new architectures that each controller decodes to choose from; 0: the first come are taken
    beta: float = 0.0  # the largest weight of the controllers' disagreement when candidates are chosen
    apart: float = 0.0  # share of its tokens in which a chosen one has to differ from all known and chosen, rounded down


PRESETS = {
    'paper': Settings(),
    'best': Settings(epochs=300, later_updates=20, later_per_token=1.5, predictor_updates=150, lr=2e-3, trade_off=0.5,
                     members=4, targets='ranks', loss='cross_entropy', unlabelled=50, redrawn=200, lambdas=(1, 4, 16, 64, 256),
                     candidates=2000, beta=2.0, rewriting='nodes', apart=0.2),
}


@torch.no_grad()
def evaluate(nao: NAO, sequences: Tensor, targets: Tensor) -> dict[str, float]:
    """Pairwise accuracy of the predictions and Hamming distance of the greedy reconstructions."""
    nao.eval()
    predictions, _, tokens = nao(sequences)
    return {'pairwise_accuracy': pairwise_accuracy(targets, predictions),
            'hamming_distance': hamming_distance(sequences, tokens)}


def fit_epochs(settings: Settings, count: int, length: int, first: bool) -> int:
    """The epochs of a fit, or of a later one, to `count` sequences of `length` tokens."""
    updates = max(settings.later_updates, settings.later_per_token * length)
    if first or not updates:
        return settings.epochs
    # Steps, not epochs: what a round of new architectures takes to learn does not grow with what is known already.
    return math.ceil(updates / math.ceil(count / settings.batch_size))


def adam(parameters: Iterable[nn.Parameter], settings: Settings, device: torch.device) -> torch.optim.Adam:
    """The optimizer of a fit."""
    return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.l2_reg, fused=device.type in ('cpu', 'cuda'))


def fit(nao: NAO, sequences: Tensor, targets: Tensor, settings: Settings, generator: torch.Generator, *, first: bool = True,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None, held_out: tuple[Tensor, Tensor] | None = None,
        report: Callable[[dict[str, float]], None] = lambda values: None) -> dict[str, float]:
    """Train on sequences (count, length) and targets (count, 1) in 0-1; return the last report. first: see `fit_epochs`.

    The loss is trade_off · squared error of the prediction (or another of LOSSES) + (1 - trade_off) · negative
    log-likelihood of the reconstruction (paper, equation 1); Adam. With `unlabelled`, that many random legal sequences a
    batch are reconstructed instead of the batch: they need no accuracy, and the decoder learns the whole space.
    `augment(sequences, generator)` rewrites all of them anew into equivalent ones in each epoch; every 100 epochs and at the
    end `report` gets loss, pairwise accuracy and Hamming distance, on `held_out` (sequences, targets) where given. All draws
    but dropout's and fresh weights' come from `generator`.
    """
    epochs = fit_epochs(settings, *sequences.shape, first)
    values = {}
    optimizer = adam(nao.parameters(), settings, sequences.device)
    for epoch in range(1, epochs + 1):
        nao.train()
        order = torch.randperm(len(sequences), generator=generator, device=generator.device).to(sequences.device)
        shuffled = sequences[order] if augment is None else augment(sequences[order], generator)
        total = torch.zeros((), device=sequences.device)
        for batch, wanted in zip(shuffled.split(settings.batch_size), targets[order].split(settings.batch_size), strict=True):
            written = random_sequences(nao, settings.unlabelled, generator) if settings.unlabelled else batch
            prediction, log_probs = nao.reconstruct(written)
            objective = (1 - settings.trade_off) * F.nll_loss(log_probs.flatten(0, 1), written.flatten())
            if settings.trade_off:
                prediction = nao.predict(batch) if settings.unlabelled else prediction
                objective = objective + settings.trade_off * LOSSES[settings.loss](prediction, wanted)
            objective.backward()
            nn.utils.clip_grad_norm_(nao.parameters(), settings.grad_bound)
            optimizer.step()
            optimizer.zero_grad()
            total += objective.detach() * len(batch)
        if epoch == epochs and settings.predictor_updates:
            fit_predictor(nao.encoder, sequences, targets, settings, generator, augment)
        if epoch % LOG_EVERY == 0 or epoch == epochs:
            values = {'epoch': epoch, 'epochs': epochs, 'loss': float(total) / len(sequences),
                      **evaluate(nao, *(held_out or (sequences, targets)))}
            report(values)
    return values


def fit_predictor(encoder: Encoder, sequences: Tensor, targets: Tensor, settings: Settings, generator: torch.Generator,
                  augment: Callable[[Tensor, torch.Generator], Tensor] | None = None) -> None:
    """Fit the predictor alone, from fresh weights, to the embeddings of sequences (count, length) as the encoder has them.

    Predictors that go on from their old weights come to agree and to ask for the same few; fresh ones disagree where little
    is known. It reads standardised embeddings, which its first layer's weights then take in. The learning rate falls to 0.
    """
    encoder.eval()
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.reset_parameters()

    @torch.no_grad()
    def embeddings() -> Tensor:
        return encoder.embed(encoder(sequences if augment is None else augment(sequences, generator)))
    embedded = embeddings()
    mean, deviation = embedded.mean(0), embedded.std(0, correction=0).mean().clamp(min=1e-6)
    optimizer = adam([*encoder.mlp.parameters(), *encoder.regressor.parameters()], settings, sequences.device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.predictor_updates)
    batches: list[Tensor] = []
    encoder.train()
    for update in range(settings.predictor_updates):
        if not batches:
            order = torch.randperm(len(sequences), generator=generator, device=generator.device).to(sequences.device)
            batches = list(order.split(settings.batch_size))
            if augment is not None and update:
                embedded = embeddings()
        rows = batches.pop()
        LOSSES[settings.loss](encoder.predict((embedded[rows] - mean) / deviation), targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        layers[0].weight /= deviation
        layers[0].bias -= layers[0].weight @ mean
    encoder.eval()


def new_architectures(nao: NAO, seeds: Tensor, known: Iterable[Sequence[int]], count: int, lambdas: Iterable[float],
                      admits: Callable[[Sequence[int]], bool] | None = None) -> tuple[list[tuple[int, ...]], dict[float, int]]:
    """Ascend from seeds (batch, length) with growing λ until there are `count` sequences not in `known`, nor twice.

    Of those it writes, only what `admits` says yes to counts. Returns the new sequences and how many each λ gave; fewer than
    `count` only when `lambdas` are used up.
    """
    nao.eval()
    seen = {tuple(sequence) for sequence in known}
    found, per_lambda = [], {}
    for predict_lambda in lambdas:
        if len(found) >= count:
            break
        before = len(found)
        for sequence in map(tuple, nao.generate_new_arch(seeds, predict_lambda).tolist()):
            if sequence not in seen and len(found) < count:
                seen.add(sequence)
                if admits is None or admits(sequence):
                    found.append(sequence)
        per_lambda[predict_lambda] = len(found) - before
    return found, per_lambda


def distances(one: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """In how many tokens sequences (count, length) differ from the nearest of others (at least one, length): (count,).

    one, others: in each of the ways that they are written in; the nearest way counts.
    """
    return torch.stack([torch.cdist(written.cpu().float(), other.cpu().float(), p=0).amin(1)
                        for written, other in zip(one, others, strict=True)]).amin(0)


def choose(predictions: Tensor, count: int, beta: float, candidates: Sequence[Tensor], known: Sequence[Tensor],
           apart: int = 0) -> list[int]:
    """The rows of candidates (rows, length), predicted as (members, rows), to choose: at most `count`, in the order of the
    choice.

    Each is the best that is left by the mean of the members' log-odds + a weight, from 0 to `beta` in even steps, of their
    deviation: some are what the members expect most of, others what they disagree about. It differs in at least `apart`
    tokens from those chosen before it and from the known, or in as many as any that is left; for both see `distances`.
    """
    odds = predictions.cpu().double().clamp(SURE, 1 - SURE).logit()  # not on MPS, which has no double precision
    mean, deviation = odds.mean(0), odds.std(0, correction=0)
    left = torch.ones(len(mean), dtype=torch.bool)
    nearest = distances(candidates, known)
    chosen: list[int] = []
    for weight in torch.linspace(0, beta, count).tolist()[:len(mean)]:
        fits = left & (nearest >= nearest[left].max().clamp(max=apart))
        chosen.append(int((mean + weight * deviation).masked_fill(~fits, -math.inf).argmax()))
        left[chosen[-1]] = False
        nearest = torch.minimum(nearest, distances(candidates, [written[chosen[-1:]] for written in candidates]))
    return chosen


def propose(naos: Sequence[NAO], seeds: Tensor, known: Collection[Sequence[int]], count: int, settings: Settings,
            generator: torch.Generator, admits: Callable[[Sequence[int]], bool] | None = None,
            canonical: Callable[[Tensor], Tensor] | None = None) -> tuple[list[tuple[int, ...]], dict[float, int]]:
    """At most `count` sequences not in `known`, ascended from seeds (batch, length), best first, by every NAO and decoded.

    With settings.redrawn the ascent starts from redrawn seeds as well (see `redraw`). With settings.candidates each NAO
    decodes up to that many, among all of which `choose` does; without, each decodes its share and the first come are taken.
    What `admits` says no to is passed over where it is decoded. canonical: writes sequences that mean the same alike, by which
    `choose` compares them too. Returns them, and how many each λ decoded.
    """
    if settings.redrawn:
        seeds = torch.cat([seeds, redraw(naos[0], seeds, settings.redrawn, generator)])
    pool: dict[tuple[int, ...], None] = {}
    per_lambda: Counter[float] = Counter()
    for member, nao in enumerate(naos):
        share = settings.candidates or math.ceil((count - len(pool)) / (len(naos) - member))
        found, counts = new_architectures(nao, seeds, [*known, *pool], share, settings.lambdas, admits)
        pool.update(dict.fromkeys(found))
        per_lambda.update(counts)
    candidates = list(pool)
    if settings.candidates and candidates:
        tokens, known_tokens = (torch.tensor(list(each), device=seeds.device) for each in (candidates, known))
        with torch.no_grad():
            predictions = torch.cat([nao.predict(tokens) for nao in naos], dim=1).T
        ways = [lambda sequences: sequences, *filter(None, [canonical])]
        chosen = choose(predictions, count, settings.beta, [way(tokens) for way in ways], [way(known_tokens) for way in ways],
                        int(settings.apart * tokens.shape[1]))
        candidates = [candidates[row] for row in chosen]
    return candidates, dict(per_lambda)


def fit_all(naos: Sequence[NAO], sequences: Tensor, targets: Tensor, settings: Settings, generator: torch.Generator, *,
            first: bool, report: Callable[[int, dict[str, float]], None] = lambda member, values: None,
            **options: Any) -> list[dict[str, float]]:
    """Fit every NAO as the settings say; a later fit (first=False) goes on from their weights. `options` go to `fit`.

    Returns their last reports; report(member, values), members from 0, gets all.
    """
    return [fit(nao, sequences, targets, settings, generator, first=first, report=partial(report, member), **options)
            for member, nao in enumerate(naos)]
