"""The controller: encoder, performance predictor and decoder; fitting them, and better architectures out of them.

Paper, sections 3.2-3.4. An architecture is a row of tokens (architecture.Vocabulary); which tokens are legal at which
position is data, so that any search space fits. All tensors are (batch, length, features) or (batch, length).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear, log_softmax, tanh

START = 0  # the token that a decoder begins with
LOG_EVERY = 100  # epochs between two reports of a fit
ALIGNMENT = 64  # numbers; the parts of a whole begin at multiples of it


def run_lstm(rnn: nn.LSTM, embedding: nn.Embedding, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The outputs (batch, steps, hidden) of an LSTM that reads `tokens` (batch, steps, k), k embeddings side by side.

    An embedding is a choice of row, so the first layer's input weights are multiplied with the few rows of the embedding
    once, and one-hot tokens choose among the products: the same outputs for half the arithmetic.
    """
    first, *others = rnn.all_weights
    weight = torch.cat([part @ embedding.weight.T for part in first[0].chunk(tokens.shape[2], dim=1)], dim=1)
    chosen = weight.new_zeros(*tokens.shape, embedding.num_embeddings).scatter_(3, tokens.unsqueeze(3), 1).flatten(2)
    if state is None:
        state = (weight.new_zeros(rnn.num_layers, len(tokens), rnn.hidden_size),) * 2
    weights = [weight, *first[1:], *(tensor for layer in others for tensor in layer)]
    return torch.lstm(chosen, state, weights, True, rnn.num_layers, rnn.dropout, rnn.training, False, True)[0]


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
        if self.dropout and self.training:
            outputs, _ = self.rnn(F.dropout(self.embedding(edges), self.dropout).flatten(2))
        else:
            outputs = run_lstm(self.rnn, self.embedding, edges)
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

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (batch, hidden, encoder_length) and values (batch, encoder_length, hidden) of the encoder's outputs.

        The projections are applied to the encoder's outputs, of which there are fewer than decoder steps: the dot product
        of a projected output with them, and the projection of their mix, come out the same.
        """
        size = memory.shape[2]
        weight = torch.cat([self.input_proj.weight.T, self.output_proj.weight[:, :size]])
        keys, values = linear(memory, weight).split(size, dim=2)
        return keys.transpose(1, 2), values

    def forward(self, outputs: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs (batch, steps, hidden) over projected memory -> (batch, steps, hidden)."""
        own = linear(outputs, self.output_proj.weight[:, values.shape[2]:])
        return tanh(torch.baddbmm(own, torch.softmax(torch.bmm(outputs, keys), dim=-1), values))


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

    def follow(self, decoder_input: Tensor, embedding: Tensor, memory: Tensor) -> Tensor:
        """Log-probabilities (batch, length, vocab) at each position, given the tokens before it (batch, length)."""
        start = embedding.expand(self.layers, *embedding.shape).contiguous()
        if self.dropout and self.training:
            outputs, _ = self.rnn(F.dropout(self.embedding(decoder_input), self.dropout), (start, start))
        else:
            outputs = run_lstm(self.rnn, self.embedding, decoder_input.unsqueeze(2), (start, start))
        mixed = self.attention(outputs, *self.attention.project(memory))
        return log_softmax(linear(mixed, self.out.weight, self.out.bias))

    def best_legal(self, scores: Tensor, position: int) -> Tensor:
        """Of scores (batch, vocab) the best token (batch,) that may stand at a position."""
        first, last = self.allowed_tokens[position]
        return scores[:, first:last + 1].argmax(1) + first

    def step_weights(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
        """The weights of `decode`, where tanh is a sigmoid, cells are kept doubled and hidden states halved.

        tanh(x) = 2·sigmoid(2x) - 1, several times as fast: of the gates i, f, g, o all become sigmoids, g of twice its input.
        Returns what each token adds to the first layer's gates (vocab, 4·hidden); each layer's weights of the layer below,
        bias, and weights of its own last state, those of the last layer beside the attention's; the output's weights and bias.
        """
        size = self.rnn.hidden_size
        twice = self.out.weight.new_ones(4 * size, 1)
        twice[2 * size:3 * size] = 2
        layers = [((2 * twice * weight_ih).T, twice[:, 0] * (bias_ih + bias_hh), (2 * twice * weight_hh).T)
                  for weight_ih, weight_hh, bias_ih, bias_hh in self.rnn.all_weights]
        inputs = self.embedding.weight @ layers[0][0] / 2 + layers[0][1]  # embeddings, unlike hidden states, are not halved
        attended = 4 * self.attention.output_proj.weight[:, size:].T  # twice for the halved state, twice for tanh
        layers[-1] = *layers[-1][:2], torch.cat([layers[-1][2], attended], dim=1)
        return inputs, layers, 2 * self.out.weight.T, self.out.bias - self.out.weight.sum(1)

    @torch.no_grad()
    def decode(self, embedding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Take the best legal token at each position and go on from it; without gradients.

        Returns log-probabilities (batch, length, vocab) and tokens (batch, length). In place, because operations of this
        size take longer to begin than to do.
        """
        keys, values = (2 * projected for projected in self.attention.project(memory))  # for the halved state; for tanh
        inputs, layers, out_weight, out_bias = self.step_weights()
        cells, hidden = [[torch.mul(embedding, factor) for _ in layers] for factor in (2, 0.5)]
        products = [state @ weight_hh for state, (_, _, weight_hh) in zip(hidden, layers, strict=True)]
        gates = [product[:, :inputs.shape[1]] for product in products]
        parts = [each.chunk(4, dim=1) for each in gates]
        attended, query = products[-1][:, None, inputs.shape[1]:], hidden[-1].unsqueeze(1)
        token = torch.full((len(embedding),), START, device=embedding.device)
        scores, tokens = [], []
        for position in range(len(self.allowed_tokens)):
            for layer, (weight_ih, bias, weight_hh) in enumerate(layers):
                i, f, g, o = parts[layer]
                below = torch.addmm(bias, hidden[layer - 1], weight_ih) if layer else inputs.index_select(0, token)
                gates[layer].add_(below).sigmoid_()
                cells[layer].mul_(f).sub_(i, alpha=2).addcmul_(i, g, value=4)
                torch.mul(o, torch.sigmoid(cells[layer]).sub_(0.5), out=hidden[layer])
                torch.mm(hidden[layer], weight_hh, out=products[layer])
            mix = torch.baddbmm(attended, torch.softmax(torch.bmm(query, keys), dim=-1), values)
            scores.append(torch.addmm(out_bias, mix.squeeze(1).sigmoid_(), out_weight))
            token = self.best_legal(scores[-1], position)
            tokens.append(token)
        return log_softmax(torch.stack(scores, dim=1)), torch.stack(tokens, dim=1)


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
            return prediction, *self.decoder.decode(embedding, memory)
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
    return float((targets != tokens).double().mean())


@contextlib.contextmanager
def as_whole(module: nn.Module) -> Iterator[nn.Parameter]:
    """While the body runs, a module's parameters and gradients are parts of one long parameter, which is yielded.

    To clip, update and zero the small ones takes longer to begin than to do, each time for each of them.
    """
    parameters = list(module.parameters())
    whole = nn.Parameter(torch.cat([F.pad(each.detach().flatten(), (0, -each.numel() % ALIGNMENT)) for each in parameters]))
    whole.grad, start = torch.zeros_like(whole), 0
    for each in parameters:
        part = slice(start, start + each.numel())
        start += each.numel() + -each.numel() % ALIGNMENT
        each.data, each.grad = whole.detach()[part].view_as(each), whole.grad[part].view_as(each)
    try:
        yield whole
    finally:
        for each in parameters:
            each.data, each.grad = each.data.clone(), None


# What turns accuracies into targets, and what a prediction pays for missing its target, by the names of the options.
TARGETS = {'scaled': scale, 'ranks': rank}
LOSSES = {'squared': F.mse_loss, 'cross_entropy': F.binary_cross_entropy}


class Settings(NamedTuple):
    """How a search fits its controllers and chooses new architectures; the defaults are the paper's."""

    epochs: int = 1000
    later_updates: int = 0  # gradient steps of a fit after the first, which goes on from its weights; 0: `epochs` again
    batch_size: int = 100
    lr: float = 1e-3
    l2_reg: float = 1e-4
    trade_off: float = 0.8
    grad_bound: float = 5.0
    members: int = 1  # controllers, each fitted on its own
    targets: str = 'scaled'  # one of TARGETS
    loss: str = 'squared'  # one of LOSSES
    unlabelled: int = 0  # random sequences a batch to reconstruct; 0: the batch is reconstructed
    top: int = 100  # the best known architectures, from which the search ascends
    lambdas: tuple[float, ...] = tuple(range(1, 51))
    candidates: int = 0  # new architectures that each controller decodes to choose from; 0: the first come are taken


PRESETS = {
    'paper': Settings(),
    'best': Settings(epochs=300, later_updates=600, members=4, targets='ranks', loss='cross_entropy', unlabelled=25,
                     lambdas=(1, 4, 16, 64, 256), candidates=500),
}


@torch.no_grad()
def evaluate(nao: NAO, sequences: Tensor, targets: Tensor) -> dict[str, float]:
    """Pairwise accuracy of the predictions and Hamming distance of the greedy reconstructions."""
    nao.eval()
    predictions, _, tokens = nao(sequences)
    return {'pairwise_accuracy': pairwise_accuracy(targets, predictions),
            'hamming_distance': hamming_distance(sequences, tokens)}


def fit(nao: NAO, sequences: Tensor, targets: Tensor, *, epochs: int, batch_size: int, lr: float, l2_reg: float,
        trade_off: float, grad_bound: float, generator: torch.Generator,
        loss: str = 'squared', unlabelled: int = 0,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None, held_out: tuple[Tensor, Tensor] | None = None,
        report: Callable[[dict[str, float]], None] = lambda values: None) -> dict[str, float]:
    """Train on sequences (count, length) and targets (count, 1) in 0-1; return the last report.

    The loss is trade_off · squared error of the prediction (or another of LOSSES) + (1 - trade_off) · negative
    log-likelihood of the reconstruction (paper, equation 1); Adam. With `unlabelled`, that many random legal sequences a
    batch are reconstructed instead of the batch: they need no accuracy, and the decoder learns the whole space.
    `augment(sequences, generator)` rewrites all of them anew into equivalent ones in each epoch; every 100 epochs and at the
    end `report` gets loss, pairwise accuracy and Hamming distance, on `held_out` (sequences, targets) where given. All draws
    but dropout's come from `generator`.
    """
    fused = sequences.device.type in ('cpu', 'cuda')
    values = {}
    with as_whole(nao) as parameter:
        optimizer = torch.optim.Adam([parameter], lr=lr, weight_decay=l2_reg, fused=fused)
        for epoch in range(1, epochs + 1):
            nao.train()
            order = torch.randperm(len(sequences), generator=generator, device=generator.device).to(sequences.device)
            shuffled = sequences[order] if augment is None else augment(sequences[order], generator)
            total = torch.zeros((), device=sequences.device)
            for batch, wanted in zip(shuffled.split(batch_size), targets[order].split(batch_size), strict=True):
                if unlabelled:
                    prediction, written = nao.predict(batch), random_sequences(nao, unlabelled, generator)
                    _, log_probs = nao.reconstruct(written)
                else:
                    written = batch
                    prediction, log_probs = nao.reconstruct(batch)
                objective = trade_off * LOSSES[loss](prediction, wanted) + (1 - trade_off) * F.nll_loss(
                    log_probs.flatten(0, 1), written.flatten())
                objective.backward()
                nn.utils.clip_grad_norm_(parameter, grad_bound)
                optimizer.step()
                parameter.grad.zero_()
                total += objective.detach() * len(batch)
            if epoch % LOG_EVERY == 0 or epoch == epochs:
                values = {'epoch': epoch, 'epochs': epochs, 'loss': float(total) / len(sequences),
                          **evaluate(nao, *(held_out or (sequences, targets)))}
                report(values)
    return values


def new_architectures(nao: NAO, seeds: Tensor, known: Iterable[Sequence[int]], count: int,
                      lambdas: Iterable[float]) -> tuple[list[tuple[int, ...]], dict[float, int]]:
    """Ascend from seeds (batch, length) with growing λ until there are `count` sequences not in `known`, nor twice.

    Returns the new sequences and how many each λ gave; fewer than `count` only when `lambdas` are used up.
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
                found.append(sequence)
        per_lambda[predict_lambda] = len(found) - before
    return found, per_lambda


def take_turns(predictions: Tensor, count: int) -> list[int]:
    """The columns of predictions (members, candidates) to choose, at most `count`, in the order of the choice.

    The members choose in turn, each the best by its own prediction that is left: what they agree on comes first, and where
    they differ each one's favourites are tried, which an average would never try.
    """
    orders = [iter(order) for order in predictions.argsort(dim=1, descending=True, stable=True).tolist()]
    chosen = {}
    while len(chosen) < min(count, predictions.shape[1]):
        order = orders[len(chosen) % len(orders)]
        chosen[next(column for column in order if column not in chosen)] = True
    return list(chosen)


def propose(naos: Sequence[NAO], seeds: Tensor, known: Collection[Sequence[int]], count: int,
            settings: Settings) -> tuple[list[tuple[int, ...]], dict[float, int]]:
    """At most `count` sequences not in `known`, ascended from seeds (batch, length) by every NAO and decoded.

    With settings.candidates each NAO decodes up to that many and they choose in turn among all of them, best first;
    without, each decodes its share and the first come are taken. Returns them, and how many each λ decoded.
    """
    pool: dict[tuple[int, ...], None] = {}
    per_lambda: Counter[float] = Counter()
    for member, nao in enumerate(naos):
        share = settings.candidates or math.ceil((count - len(pool)) / (len(naos) - member))
        found, counts = new_architectures(nao, seeds, [*known, *pool], share, settings.lambdas)
        pool.update(dict.fromkeys(found))
        per_lambda.update(counts)
    candidates = list(pool)
    if settings.candidates and candidates:
        with torch.no_grad():
            tokens = torch.tensor(candidates, device=seeds.device)
            predictions = torch.cat([nao.predict(tokens) for nao in naos], dim=1).T
        candidates = [candidates[column] for column in take_turns(predictions, count)]
    return candidates, dict(per_lambda)


def fit_epochs(settings: Settings, count: int, first: bool) -> int:
    """The epochs of a fit, or of a later one, to `count` sequences."""
    if first or not settings.later_updates:
        return settings.epochs
    # Steps, not epochs: what a round of new architectures takes to learn does not grow with what is known already.
    return math.ceil(settings.later_updates / math.ceil(count / settings.batch_size))


def fit_all(naos: Sequence[NAO], sequences: Tensor, targets: Tensor, settings: Settings, generator: torch.Generator, *,
            first: bool, **options: Any) -> dict[str, float]:
    """Fit every NAO as the settings say; a later fit (first=False) goes on from their weights. `options` go to `fit`.

    Returns the last NAO's last report.
    """
    epochs, values = fit_epochs(settings, len(sequences), first), {}
    for nao in naos:
        values = fit(nao, sequences, targets, epochs=epochs, batch_size=settings.batch_size, lr=settings.lr,
                     l2_reg=settings.l2_reg, trade_off=settings.trade_off, grad_bound=settings.grad_bound,
                     loss=settings.loss, unlabelled=settings.unlabelled, generator=generator, **options)
    return values


def search_step(naos: Sequence[NAO], sequences: Sequence[Sequence[int]], accuracies: Sequence[float], count: int,
                settings: Settings, generator: torch.Generator, *, first: bool = True,
                refused: Collection[Sequence[int]] = (), **options: Any) -> list[tuple[int, ...]]:
    """Fit every NAO to the known accuracies of sequences, ascend from the best: at most `count` new ones, best first.

    naos: settings.members of them, on one device; a later step (first=False) goes on from their weights. refused:
    sequences that are not to be proposed either. options: see `fit`.
    """
    device = next(naos[0].parameters()).device
    tokens = torch.tensor(sequences, device=device)
    targets = TARGETS[settings.targets](accuracies).to(device)
    fit_all(naos, tokens, targets, settings, generator, first=first, **options)
    seeds = tokens[targets.flatten().argsort(descending=True, stable=True)[:settings.top]]
    return propose(naos, seeds, [*map(tuple, sequences), *map(tuple, refused)], count, settings)[0]
