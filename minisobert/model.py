"""The encoder for flat, packed tokens, in two architectures: Megatron-LM's BERT and ModernBERT (Warner et al. 2024).

Hidden states are (T, h): the T tokens of several documents, one after the other, without a batch dimension. Padding at
the end of a row is a document of its own. The residual stream and its layer-normed copy travel together, because
`ops.add_norm` computes both. The norm after a block's MLP therefore belongs to the next block, and is passed in.

    T tokens   h hidden   H heads   d = h / H head width   f FFN width   V vocabulary   M masked tokens

                      megatron-bert                      modernbert
    embeddings        word + position + token type       word, then layer norm
    positions         a table                            rotary, on q and k
    attention         whole document                     in two layers of three: a window
    MLP               GELU, h → f → h                    gated GELU, h → 2f, f → h
    biases            everywhere                         only in the decoder

Nothing here depends on process groups. Under tensor parallelism, `parallel/` replaces linears by their slices.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisobert.config import ModelConfig
from minisobert.ops import Documents, Dropout, add_norm, bias_gelu, drop, gated_gelu, rotation, self_attention


class Linear(nn.Linear):
    """x Wᵀ. The bias is a parameter of this layer, but the next operation adds it (`add_norm`, `bias_gelu`)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QKVLinear(nn.Linear):
    """x Wᵀ + b. The gradient of b comes from the next operation, `self_attention`, which adds it up in its backward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.detach())


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden, config.norm_eps, bias=not config.is_modern)


class Embeddings(nn.Module):
    """Word embeddings, the architecture's other embeddings or norm, then dropout. The token type is always 0."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.hidden)
        if config.is_modern:
            self.norm = layer_norm(config)
        else:
            self.position = nn.Embedding(config.positions, config.hidden)
            self.token_type = nn.Embedding(2, config.hidden)

    def forward(self, tokens: Tensor, positions: Tensor, dropout: Dropout | None) -> Tensor:
        x = self.word(tokens)
        if hasattr(self, "norm"):
            return drop(self.norm(x), dropout)
        return drop(x + self.position(positions) + self.token_type.weight[0], dropout)


class Block(nn.Module):
    """Attention and an MLP, each a branch of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        h, f, biases = config.hidden, config.ffn, not config.is_modern
        self.config, self.window, self.rope_base = config, config.window_of(layer), config.rope_base_of(layer)
        # modernbert normalises the embeddings before the first block
        self.attention_norm = nn.Identity() if config.is_modern and layer == 0 else layer_norm(config)
        # One matrix for query, key and value. Its 3h outputs are (H, 3, d), so that a slice of them holds whole heads.
        self.qkv = QKVLinear(h, 3 * h, biases)
        self.attention_output = Linear(h, h, biases)
        self.ffn_norm = layer_norm(config)
        if config.is_modern:
            self.gated_ffn_input = Linear(h, 2 * f, biases)
        else:
            self.ffn_input = Linear(h, f, biases)
        self.ffn_output = Linear(f, h, biases)

    def forward(
        self,
        residual: Tensor,  # (T, h)
        normed: Tensor,  # (T, h): attention_norm(residual)
        next_norm: nn.LayerNorm,
        documents: Documents,
        rotations: dict[float, Tensor],  # rotary base → (2, T, d/2); empty without rotary positions
        dropout_at,  # site → Dropout | None
    ) -> tuple[Tensor, Tensor]:
        qkv = self.qkv(normed).unflatten(1, (-1, 3, self.config.head_width))  # (T, H, 3, d)
        rotation = rotations.get(self.rope_base)
        dropout = dropout_at("attention")
        context = self_attention(qkv, documents, dropout, self.window, rotation, self.qkv.bias).flatten(1)  # (T, h)
        residual, normed = _add_norm(
            self.attention_output, context, residual, self.ffn_norm, dropout_at("attention_output")
        )
        if self.config.is_modern:
            inner = gated_gelu(self.gated_ffn_input(normed), self.config.gelu)  # (T, f)
        else:
            inner = bias_gelu(self.ffn_input(normed), self.ffn_input.bias, self.config.gelu)  # (T, f)
        return _add_norm(self.ffn_output, inner, residual, next_norm, dropout_at("ffn_output"))


def _add_norm(linear: Linear, x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: Dropout | None):
    return add_norm(linear(x), linear.bias, residual, norm.weight, norm.bias, norm.eps, dropout)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = layer_norm(config)
        self.config = config
        self.recompute = False  # keep only each block's two inputs, and compute the block again in the backward

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: Documents, dropout: Dropout | None = None
    ) -> Tensor:
        """tokens, positions: (T,) integers; positions restart at 0 in each document. Returns (T, h), normalised."""

        def dropout_at(layer: int, site: str) -> Dropout | None:
            return dropout and dropout.at(layer, site)

        norms = [block.attention_norm for block in self.blocks] + [self.final_norm]
        residual = self.embeddings(tokens, positions, dropout_at(0, "embedding"))
        normed = norms[0](residual)
        bases = {block.rope_base for block in self.blocks} if self.config.is_modern else ()
        rotations = {base: rotation(positions, self.config.head_width, base) for base in bases}
        for i, block in enumerate(self.blocks):
            arguments = residual, normed, norms[i + 1], documents, rotations, partial(dropout_at, i)
            if self.recompute and torch.is_grad_enabled():
                # masks come from hashes, so no state of a random generator has to be restored
                residual, normed = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                residual, normed = block(*arguments)
        return normed


class Decoder(nn.Module):
    """Logits: the dot product of a state with each word embedding, plus a bias."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(x, word_embeddings, self.bias)


class Head(nn.Module):
    """Dense → GELU → layer norm, between the final states and the classifier or decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gelu = config.gelu
        self.dense = Linear(config.hidden, config.hidden, bias=not config.is_modern)
        self.norm = layer_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(M, h) → (M, h)."""
        return self.norm(bias_gelu(self.dense(hidden), self.dense.bias, self.gelu))


class MaskedLMHead(Head):
    """Head → decoder, meant for the masked tokens only."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.decoder = Decoder(config.vocabulary)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """hidden: (M, h), word_embeddings: (V, h). Returns logits (M, V)."""
        return self.decoder(super().forward(hidden), word_embeddings)


class Model(nn.Module):
    """An encoder with a head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    @torch.no_grad()
    def initialise(self, seed: int) -> Model:
        """Draws all weights in the order of the parameters, from one CPU generator: they do not depend on the layout.

        Weights N(0, std); the matrices that write into the residual stream N(0, std / sqrt(2 · layers)); biases 0;
        layer-norm weights 1 (Megatron-LM's scaled initialisation). For megatron-bert std is 0.02. For modernbert it is
        0.02 at h = 768 and proportional to 1 / sqrt(h), so that a matrix's outputs for normalised states are as large
        at every width.
        """
        std = 0.02 * (768 / self.config.hidden) ** 0.5 if self.config.is_modern else 0.02
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                into_residual = name.endswith(("attention_output.weight", "ffn_output.weight"))
                own = std / (2 * self.config.layers) ** 0.5 if into_residual else std
                parameter.copy_(torch.empty(parameter.shape).normal_(0, own, generator=generator))
        return self


class MaskedLM(Model):
    """The encoder with its masked-language-model head, as pre-training trains it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.mlm_head = MaskedLMHead(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents,
        masked: Tensor,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """masked: (M,) int64, distinct indices into the T tokens. Returns their logits (M, V)."""
        hidden = self.encoder(tokens, positions, documents, dropout)
        # index_select, not indexing: as the indices are distinct, its backward is deterministic
        return self.mlm_head(hidden.index_select(0, masked), self.encoder.embeddings.word.weight)


def mean_states(states: Tensor, documents: Documents) -> Tensor:
    """(T, h) → (D, h) fp32: the mean of the states of each document."""
    lengths = documents.bounds.diff().to(states.device)
    return torch.segment_reduce(states.float(), "mean", lengths=lengths, axis=0)


class Embedder(Model):
    """The encoder, returning one vector per document: the mean of its final states."""

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: Documents, dropout: Dropout | None = None
    ) -> Tensor:
        """(D, h) fp32."""
        return mean_states(self.encoder(tokens, positions, documents, dropout), documents)


class Classifier(Model):
    """The encoder with a classifier of tokens or of documents, as fine-tuning trains it.

    pooling: "" classifies tokens. "cls" classifies each document by the state of its first token, "mean" by the mean of
    its states (modernbert only). The layers before the classifier are those of Hugging Face's classes. modernbert has
    the head, with its pre-trained weights. megatron-bert has a pooler (a dense layer and tanh, with random initial
    weights) for documents, and nothing for tokens.
    """

    def __init__(self, config: ModelConfig, classes: int, pooling: str):
        super().__init__(config)
        if pooling == "mean" and not config.is_modern:
            raise ValueError(f"pooling is 'mean', which a {config.architecture} does not have; choose 'cls'")
        self.pooling = pooling
        self.head = Head(config) if config.is_modern else None
        self.pooler = nn.Linear(config.hidden, config.hidden) if pooling and not config.is_modern else None
        self.classifier = nn.Linear(config.hidden, classes)

    def start_from(self, trained: MaskedLM) -> None:
        """Copies all pre-trained weights that this model has too."""
        self.encoder.load_state_dict(trained.encoder.state_dict())
        if self.head is not None:
            self.head.load_state_dict({name: trained.mlm_head.state_dict()[name] for name in self.head.state_dict()})

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents,
        places: Tensor,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """places: (R,) int64, distinct indices into the T tokens: those to classify, or the first of each document.
        Returns their logits (R, classes).

        dropout: has keys for one layer more than the encoder; the last keys are for the classifier's input.
        """
        x = self.encoder(tokens, positions, documents, dropout)
        if self.pooling == "mean":
            x = mean_states(x, documents).to(x.dtype)
        else:
            x = x.index_select(0, places)
        if self.head is not None:
            x = self.head(x)
        if self.pooler is not None:
            x = self.pooler(x).tanh()
        return self.classifier(drop(x, dropout and dropout.at(self.config.layers, "embedding")))
