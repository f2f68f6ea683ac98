"""The encoder: Megatron-LM's BERT on flat, packed tokens.

Hidden states are (T, h): the T tokens of several documents, one after the other, without a batch dimension or padding.
The residual stream and its layer-normed copy travel together, because `ops.add_norm` computes both. The norm after a
block's MLP therefore belongs to the next block, and is passed in.

    T tokens   h hidden   H heads   d = h / H head width   f FFN width   V vocabulary   M masked tokens

No process group is known here. Under tensor parallelism `parallel/` replaces whole linears by their slices.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minisobert.config import ModelConfig
from minisobert.ops import Documents, Dropout, add_norm, attention, bias_gelu, drop


class Linear(nn.Linear):
    """x Wᵀ. The bias is a parameter of this layer, but the op behind it adds it (`add_norm`, `bias_gelu`)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embeddings(nn.Module):
    """Word + position + token type (always 0 here), then dropout; no layer norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.hidden)
        self.position = nn.Embedding(config.positions, config.hidden)
        self.token_type = nn.Embedding(2, config.hidden)

    def forward(self, tokens: Tensor, positions: Tensor, dropout: Dropout | None) -> Tensor:
        x = self.word(tokens) + self.position(positions) + self.token_type.weight[0]
        return drop(x, dropout)


class Block(nn.Module):
    """Attention and an MLP, each a branch of the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        h, f = config.hidden, config.ffn
        self.config = config
        self.attention_norm = nn.LayerNorm(h, config.norm_eps)
        # One matrix for query, key and value; its 3h outputs are (H, 3, d), so that a slice of them is whole heads.
        self.qkv = nn.Linear(h, 3 * h)
        self.attention_output = Linear(h, h)
        self.ffn_norm = nn.LayerNorm(h, config.norm_eps)
        self.ffn_input = Linear(h, f)
        self.ffn_output = Linear(f, h)

    def forward(
        self,
        residual: Tensor,  # (T, h)
        normed: Tensor,  # (T, h): attention_norm(residual)
        next_norm: nn.LayerNorm,
        documents: Documents,
        dropout_at,  # site → Dropout | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(normed).unflatten(1, (-1, 3, self.config.head_width)).unbind(2)  # each (T, H, d)
        context = attention(q, k, v, documents, dropout_at("attention")).flatten(1)  # (T, h)
        residual, normed = _add_norm(
            self.attention_output, context, residual, self.ffn_norm, dropout_at("attention_output")
        )
        inner = bias_gelu(self.ffn_input(normed), self.ffn_input.bias, self.config.gelu)  # (T, f)
        return _add_norm(self.ffn_output, inner, residual, next_norm, dropout_at("ffn_output"))


def _add_norm(linear: Linear, x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: Dropout | None):
    return add_norm(linear(x), linear.bias, residual, norm.weight, norm.bias, norm.eps, dropout)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.recompute = False  # whether the backward computes each block again from its two inputs, kept alone

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: Documents, dropout: Dropout | None = None
    ) -> Tensor:
        """tokens, positions: (T,) integers; positions restart at 0 in each document. Returns (T, h), normalised."""

        def dropout_at(layer: int, site: str) -> Dropout | None:
            return dropout and dropout.at(layer, site)

        norms = [block.attention_norm for block in self.blocks] + [self.final_norm]
        residual = self.embeddings(tokens, positions, dropout_at(0, "embedding"))
        normed = norms[0](residual)
        for i, block in enumerate(self.blocks):
            arguments = residual, normed, norms[i + 1], documents, partial(dropout_at, i)
            if self.recompute and torch.is_grad_enabled():
                # no generator to rewind: the same masks come from the same hashes
                residual, normed = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                residual, normed = block(*arguments)
        return normed


class Decoder(nn.Module):
    """Logits: how much a state is like each word embedding, plus a bias."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(x, word_embeddings, self.bias)


class MaskedLMHead(nn.Module):
    """Dense → GELU → layer norm → decoder. Meant for the masked rows alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gelu = config.gelu
        self.dense = Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.decoder = Decoder(config.vocabulary)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """hidden: (M, h), word_embeddings: (V, h). Returns logits (M, V)."""
        x = self.norm(bias_gelu(self.dense(hidden), self.dense.bias, self.gelu))
        return self.decoder(x, word_embeddings)


class Model(nn.Module):
    """An encoder with a head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    @torch.no_grad()
    def initialise(self, seed: int) -> Model:
        """All initial weights, in the order of the parameters, from one CPU generator: the same on every layout.

        Weights N(0, 0.02); the matrices that write into the residual stream N(0, 0.02 / sqrt(2 · layers)); biases 0;
        layer-norm weights 1 (Megatron-LM's scaled initialisation).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                into_residual = name.endswith(("attention_output.weight", "ffn_output.weight"))
                std = 0.02 / (2 * self.config.layers) ** 0.5 if into_residual else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
        return self


class MaskedLM(Model):
    """The encoder with its masked-language-model head: what pre-training trains."""

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
        """masked: (M,) int64, different indices into the T tokens. Returns their logits (M, V)."""
        hidden = self.encoder(tokens, positions, documents, dropout)
        # index_select, not indexing: the indices differ, so that its backward adds nothing twice and is deterministic
        return self.mlm_head(hidden.index_select(0, masked), self.encoder.embeddings.word.weight)


class Classifier(Model):
    """The encoder with a classifier of single states: what fine-tuning trains.

    pooled: the states, first tokens of documents, go through Megatron-BERT's pooler, a dense layer and tanh, before
    they are classified. Without it, final states are classified as they are.
    """

    def __init__(self, config: ModelConfig, classes: int, pooled: bool):
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden, config.hidden) if pooled else None
        self.classifier = nn.Linear(config.hidden, classes)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Documents,
        places: Tensor,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """places: (R,) int64, different indices into the T tokens. Returns their logits (R, classes).

        dropout: with keys for one layer more than the encoder has; the last are the head's.
        """
        x = self.encoder(tokens, positions, documents, dropout).index_select(0, places)
        if self.pooler is not None:
            x = self.pooler(x).tanh()
        return self.classifier(drop(x, dropout and dropout.at(self.config.layers, "embedding")))
