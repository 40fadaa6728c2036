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
        embedded = F.dropout(self.embedding(sequence), self.dropout, self.training)
        outputs, _ = self.rnn(embedded.reshape(len(sequence), sequence.shape[1] // self.pair, -1))
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
        """Outputs (batch, steps, hidden) over memory (batch, encoder_length, hidden) -> (batch, steps, hidden)."""
        weights = torch.softmax(torch.bmm(self.input_proj(outputs), memory.transpose(1, 2)), dim=-1)
        return torch.tanh(self.output_proj(torch.cat([torch.bmm(weights, memory), outputs], dim=-1)))


class Decoder(nn.Module):
    """Write an architecture's tokens, given its embedding and the encoder's outputs."""

    def __init__(self, vocab_size: int, legal: Tensor, layers: int, hidden_size: int, dropout: float):
        super().__init__()
        self.layers, self.dropout = layers, dropout
        self.rnn = nn.LSTM(hidden_size, hidden_size, layers, batch_first=True, dropout=dropout if layers > 1 else 0)
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.attention = Attention(hidden_size)
        self.out = nn.Linear(hidden_size, vocab_size)
        self.register_buffer('illegal', ~legal, persistent=False)

    def read(self, tokens: Tensor, state: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, tuple]:
        """Tokens (batch, steps) -> log-probabilities of the tokens after them (batch, steps, vocab), and the new state."""
        embedded = F.dropout(self.embedding(tokens), self.dropout, self.training)
        outputs, state = self.rnn(embedded, state)
        return F.log_softmax(self.out(self.attention(outputs, memory)), dim=-1), state

    def forward(self, decoder_input: Tensor | None, embedding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (batch, length, vocab) and the best legal token at each position (batch, length).

        decoder_input: the tokens before each position (batch, length), or None to decode greedily.
        """
        start = embedding.expand(self.layers, *embedding.shape).contiguous()
        if decoder_input is not None:
            log_probs, _ = self.read(decoder_input, (start, start), memory)
            return log_probs, log_probs.masked_fill(self.illegal, -torch.inf).argmax(-1)
        state, token, steps, tokens = (start, start), torch.full_like(memory[:, :1, 0], START, dtype=torch.long), [], []
        for illegal in self.illegal:
            log_probs, state = self.read(token, state, memory)
            token = log_probs.masked_fill(illegal, -torch.inf).argmax(-1)
            steps.append(log_probs)
            tokens.append(token)
        return torch.cat(steps, dim=1), torch.cat(tokens, dim=1)


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
        words = torch.arange(vocab_size)
        legal = torch.stack([(words >= first) & (words <= last) for first, last in allowed_tokens])
        self.encoder = Encoder(vocab_size, len(allowed_tokens) // encoder_length, encoder_layers, encoder_hidden_size,
                               encoder_emb_size, encoder_dropout, mlp_layers, mlp_hidden_size, mlp_dropout)
        self.decoder = Decoder(vocab_size, legal, decoder_layers, decoder_hidden_size, decoder_dropout)

    def forward(self, sequence: Tensor, decoder_input: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences (batch, length) -> predictions (batch, 1), log-probabilities (batch, length, vocab), tokens.

        decoder_input: the shifted target (see `shift`) for teacher forcing; None decodes greedily, legal tokens only.
        """
        memory = self.encoder(sequence)
        embedding = self.encoder.embed(memory)
        return self.encoder.predict(embedding), *self.decoder(decoder_input, embedding, memory)

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
        return self.decoder(None, self.encoder.embed(moved), moved)[1]


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
    optimizer = torch.optim.Adam(nao.parameters(), lr=lr, weight_decay=l2_reg)
    values = {}
    for epoch in range(1, epochs + 1):
        nao.train()
        order = torch.randperm(len(sequences), generator=generator, device=generator.device).to(sequences.device)
        total = torch.zeros((), device=sequences.device)
        for chosen in order.split(batch_size):
            batch = sequences[chosen] if augment is None else augment(sequences[chosen], generator)
            prediction, log_probs, _ = nao(batch, shift(batch))
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
