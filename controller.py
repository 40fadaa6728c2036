"""The controller: encoder, performance predictor and decoder; fitting them, and better architectures out of them.

Paper, sections 3.2-3.4. An architecture is a row of tokens (architecture.Vocabulary); which tokens are legal at which
position is data, so that any search space fits. All tensors are (batch, length, features) or (batch, length).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 0  # the token that a decoder begins with
LOG_EVERY = 100  # epochs between two reports of a fit


def run_lstm(rnn: nn.LSTM, embedding: nn.Embedding, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The outputs (batch, steps, hidden) of an LSTM that reads `tokens` (batch, steps, k), k embeddings side by side.

    An embedding is a choice of row, so the first layer's input weights are multiplied with the few rows of the embedding
    once, and one-hot tokens choose among the products: the same outputs for half the arithmetic.
    """
    first, *others = rnn.all_weights
    weight = torch.cat([part @ embedding.weight.T for part in first[0].chunk(tokens.shape[2], dim=1)], dim=1)
    chosen = torch.eye(embedding.num_embeddings, dtype=weight.dtype, device=weight.device)[tokens].flatten(2)
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
        keys = (memory @ self.input_proj.weight).transpose(1, 2)
        return keys, F.linear(memory, self.output_proj.weight[:, :memory.shape[2]])

    def forward(self, outputs: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs (batch, steps, hidden) over projected memory -> (batch, steps, hidden)."""
        own = F.linear(outputs, self.output_proj.weight[:, values.shape[2]:])
        return torch.tanh(torch.baddbmm(own, torch.softmax(torch.bmm(outputs, keys), dim=-1), values))


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
        return F.log_softmax(self.out(self.attention(outputs, *self.attention.project(memory))), dim=-1)

    def best_legal(self, scores: Tensor, position: int) -> Tensor:
        """Of scores (batch, vocab) the best token (batch,) that may stand at a position."""
        first, last = self.allowed_tokens[position]
        return scores[:, first:last + 1].argmax(1) + first

    def decode(self, embedding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Take the best legal token at each position and go on from it.

        Returns log-probabilities (batch, length, vocab) and tokens (batch, length).
        """
        keys, values = self.attention.project(memory)
        keys, size = keys.contiguous(), self.rnn.hidden_size
        # tanh(x) = 2·sigmoid(2x) - 1, several times as fast: the gates i, f, g, o all become sigmoids, g of twice its input
        twice = torch.ones(4 * size, 1, dtype=memory.dtype, device=memory.device)
        twice[2 * size:3 * size] = 2
        layers = [[(twice * weight_ih).T, (twice * weight_hh).T, twice[:, 0] * (bias_ih + bias_hh)]
                  for weight_ih, weight_hh, bias_ih, bias_hh in self.rnn.all_weights]
        inputs = self.embedding.weight @ layers[0][0] + layers[0][2]  # what each token adds to the first layer's gates
        # the last layer's state goes through its own weights and the attention's in one product
        layers[-1][1] = torch.cat([layers[-1][1], self.attention.output_proj.weight[:, size:].T], dim=1)
        cells = [embedding] * self.layers
        products = [embedding @ weight_hh for _, weight_hh, _ in layers]
        hidden, token = embedding, torch.full((len(embedding),), START, device=embedding.device)
        scores, tokens = [], []
        for position in range(len(self.allowed_tokens)):
            gates = inputs.index_select(0, token)
            for layer, (_, weight_hh, _) in enumerate(layers):
                if layer:
                    gates = torch.addmm(layers[layer][2], hidden, layers[layer][0])
                i, f, g, o = (gates + products[layer][:, :4 * size]).sigmoid_().chunk(4, dim=1)
                cells[layer] = torch.addcmul(f * cells[layer] - i, i, g, value=2)
                hidden = torch.addcmul(-o, o, torch.sigmoid(2 * cells[layer]), value=2)
                products[layer] = hidden @ weight_hh
            mix = torch.baddbmm(products[-1][:, None, 4 * size:], torch.softmax(hidden.unsqueeze(1).bmm(keys), dim=-1), values)
            scores.append(self.out(torch.tanh(mix.squeeze(1))))
            token = self.best_legal(scores[-1], position)
            tokens.append(token)
        return F.log_softmax(torch.stack(scores, dim=1), dim=-1), torch.stack(tokens, dim=1)


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

        decoder_input: the shifted target (see `shift`) for teacher forcing; None decodes greedily, legal tokens only.
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

    @torch.no_grad()
    def generate_new_arch(self, sequence: Tensor, predict_lambda: float, direction: str = '+') -> Tensor:
        """Move sequences (batch, length) by λ along the prediction's gradient and decode: tokens (batch, length).

        direction: '+' for better architectures, '-' for worse ones. (Paper, equation 2 of section 3.4.)
        """
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


def scale(accuracies: Sequence[float]) -> Tensor:
    """Accuracies as targets: 0-1 by their minimum and maximum, (count, 1); all 0.5 where they are equal."""
    values = torch.tensor(accuracies, dtype=torch.float64)
    spread = values.max() - values.min()
    scaled = (values - values.min()) / spread if spread > 0 else torch.full_like(values, 0.5)
    return scaled.to(torch.get_default_dtype()).unsqueeze(1)


def pairwise_accuracy(targets: Tensor, predictions: Tensor) -> float:
    """The share of pairs with different targets that the predictions order rightly; 1.0 where there is no pair."""
    above = targets.flatten()[:, None] > targets.flatten()[None]
    ordered = predictions.flatten()[:, None] > predictions.flatten()[None]
    pairs = int(above.sum())
    return int((above & ordered).sum()) / pairs if pairs else 1.0


def hamming_distance(targets: Tensor, tokens: Tensor) -> float:
    """The mean share of positions at which decoded tokens differ from their targets, 0-1."""
    return float((targets != tokens).double().mean())


@torch.no_grad()
def evaluate(nao: NAO, sequences: Tensor, targets: Tensor) -> dict[str, float]:
    """Pairwise accuracy of the predictions and Hamming distance of the greedy reconstructions."""
    nao.eval()
    predictions, _, tokens = nao(sequences)
    return {'pairwise_accuracy': pairwise_accuracy(targets, predictions),
            'hamming_distance': hamming_distance(sequences, tokens)}


def fit(nao: NAO, sequences: Tensor, targets: Tensor, *, epochs: int, batch_size: int, lr: float, l2_reg: float,
        trade_off: float, grad_bound: float, generator: torch.Generator,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None, held_out: tuple[Tensor, Tensor] | None = None,
        report: Callable[[dict[str, float]], None] = lambda values: None) -> dict[str, float]:
    """Train on sequences (count, length) and targets (count, 1) in 0-1; return the last report.

    The loss is trade_off · squared error of the prediction + (1 - trade_off) · negative log-likelihood of the
    reconstruction (paper, equation 1); Adam. `augment(sequences, generator)` rewrites each batch into equivalent
    sequences; every 100 epochs and at the end `report` gets loss, pairwise accuracy and Hamming distance, on `held_out`
    (sequences, targets) where given. All draws but dropout's come from `generator`.
    """
    optimizer = torch.optim.Adam(nao.parameters(), lr=lr, weight_decay=l2_reg, fused=sequences.device.type in ('cpu', 'cuda'))
    values = {}
    for epoch in range(1, epochs + 1):
        nao.train()
        order = torch.randperm(len(sequences), generator=generator, device=generator.device).to(sequences.device)
        total = torch.zeros((), device=sequences.device)
        for chosen in order.split(batch_size):
            batch = sequences[chosen] if augment is None else augment(sequences[chosen], generator)
            prediction, log_probs = nao.reconstruct(batch)
            loss = trade_off * F.mse_loss(prediction, targets[chosen]) + (1 - trade_off) * F.nll_loss(
                log_probs.flatten(0, 1), batch.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(nao.parameters(), grad_bound)
            optimizer.step()
            total += loss.detach() * len(chosen)
        if epoch % LOG_EVERY == 0 or epoch == epochs:
            values = {'epoch': epoch, 'loss': float(total) / len(sequences),
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
