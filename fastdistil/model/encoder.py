"""One packed BERT encoder and its MLM head, for teacher and student. Knows no ranks and no masks.

Post-LN as in Devlin et al. 2018: LayerNorm after each residual sum (eps 1e-12), exact-erf GELU. A DistilBERT is the
same encoder without a token-type table and with one dropout less a layer. A micro-batch is a flat row of N tokens; the
sequence layout says where its sequences begin and end, and only the attention needs to know.

Inside, the operators compute in fp32 whatever the dtype: in bf16 an eps of 1e-12 would vanish.

To freeze the positions as DistilBERT's authors did: `model.encoder.position_embeddings.requires_grad_(False)`.

Shapes: N tokens of the micro-batch, D hidden width, H heads, V padded vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistil.kernels.attention import attention
from fastdistil.kernels.attention_backends import AttentionBackend, ResolvedBackend, resolve_backend
from fastdistil.kernels.dropout import dropout, new_dropout_seed
from fastdistil.kernels.gelu import linear_gelu
from fastdistil.kernels.layernorm import dropout_add_layernorm, layernorm
from fastdistil.kernels.layout import SequenceLayout
from fastdistil.kernels.linear import linear
from fastdistil.model import functions
from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture


class Linear(nn.Linear):
    """x @ W.T + b, on the CPU by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LinearGelu(nn.Linear):
    """gelu(x @ W.T + b), exact erf."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_gelu(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x)), or LayerNorm(x) without a residual.

    A module for its two parameters, because ZeRO-3 gathers them only while it runs.
    """

    def __init__(self, architecture: Architecture, *, dropout_p: float = 0.0, stream: int = 0) -> None:
        super().__init__(architecture.hidden_size, eps=architecture.layer_norm_eps)
        self.dropout_p, self.stream = dropout_p, stream

    def dropout(self, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
        """(seed, stream, probability) as the kernels take them: no seed where nothing is dropped."""
        return seed if self.dropout_p else None, self.stream, self.dropout_p

    def forward(self, input: Tensor, residual_ND: Tensor | None = None, dropout_seed: Tensor | None = None) -> Tensor:
        if residual_ND is None:
            return layernorm(input, self.weight, self.bias, eps=self.eps)
        return dropout_add_layernorm(
            input,
            residual_ND,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=self.dropout_p,
            seed=dropout_seed,
            stream=self.stream,
        )


class EncoderLayer(nn.Module):
    """Attention and feed-forward layer, each with residual and LayerNorm: (N, D) -> (N, D)."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        width, dropout_p = architecture.hidden_size, architecture.dropout
        self.num_heads = architecture.num_heads
        self.attention_dropout = architecture.attention_dropout
        # Places of dropout in the model: 0 is the embeddings', then three a layer.
        self.stream = 1 + 3 * index
        self.qkv = Linear(width, 3 * width)  # rows: all heads' queries, then keys, then values
        self.attention_out = Linear(width, width)
        # transformers' DistilBERT, which the authors trained, has no dropout here; BERT has.
        self.attention_norm = LayerNorm(
            architecture, dropout_p=dropout_p if architecture.token_types else 0.0, stream=self.stream + 1
        )
        self.ffn_in = LinearGelu(width, architecture.ffn_size)
        self.ffn_out = Linear(architecture.ffn_size, width)
        self.ffn_norm = LayerNorm(architecture, dropout_p=dropout_p, stream=self.stream + 2)

    def dropout(self, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
        """(seed, stream, probability) of the attention, no seed where nothing is dropped."""
        return seed if self.attention_dropout else None, self.stream, self.attention_dropout

    def forward(
        self,
        hidden_ND: Tensor,
        layout: SequenceLayout,
        dropout_seed: Tensor | None,
        backend: AttentionBackend,
        with_qkv: bool = False,
    ) -> Any:
        """The layer's output (N, D); `with_qkv` a pair of it and its queries, keys and values (N, 3D).

        This is the definition. `functions.encoder_layer` computes the same, for less.
        """
        qkv_N3D = self.qkv(hidden_ND)
        attended_ND = attention(
            qkv_N3D.unflatten(1, (3, self.num_heads, -1)),
            layout,
            dropout_p=self.attention_dropout,
            seed=dropout_seed,
            stream=self.stream,
            backend=backend,
        ).flatten(1)
        kept_N3D = qkv_N3D if with_qkv else None
        del qkv_N3D  # a teacher, which has no backward, needs the memory now
        hidden_ND = self.attention_norm(self.attention_out(attended_ND), hidden_ND, dropout_seed)
        output_ND = self.ffn_norm(self.ffn_out(self.ffn_in(hidden_ND)), hidden_ND, dropout_seed)
        return output_ND if kept_N3D is None else (output_ND, kept_N3D)


class KeptOutputs(NamedTuple):
    """What an encoder hands out beside its last hidden states."""

    layers: tuple[int, ...] = ()
    """The outputs of these layers, counted from 0, each (N, D)."""
    qkv: int | None = None
    """The queries, keys and values of this layer's attention: (N, 3D), of each all heads side by side."""


class Encoder(nn.Module):
    """Embeddings and layers: token ids to last hidden states."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.hidden_size
        # Set by whoever runs the model; neither changes a weight.
        self.activation_checkpointing = False
        self.attention_backend: AttentionBackend = "auto"
        self.by_modules = False  # module by module, as ZeRO-3, torch.compile and FP8 need it, instead of functions.py
        # As in transformers, [PAD] gets no gradient as an input; it does occur in one, as a random replacement.
        self.word_embeddings = nn.Embedding(architecture.padded_vocab_size, width, padding_idx=architecture.pad_id)
        self.position_embeddings = nn.Embedding(architecture.max_positions, width)
        self.token_type_embeddings = nn.Embedding(architecture.token_types, width) if architecture.token_types else None
        self.embedding_norm = LayerNorm(architecture)
        self.dropout_p, self.attention_dropout = architecture.dropout, architecture.attention_dropout
        self.layers = nn.ModuleList(EncoderLayer(architecture, index) for index in range(architecture.num_layers))

    def forward(
        self,
        input_ids_N: Tensor,
        position_ids_N: Tensor,
        layout: SequenceLayout,
        dropout_seed: Tensor | None = None,
        kept_outputs: KeptOutputs | None = None,
    ) -> Any:
        """Last hidden states (N, D), in the dtype of the weights; with `kept_outputs` a pair of them and a tuple.

        Args:
            input_ids_N: int32 or int64.
            position_ids_N: likewise. They start at 0 in each sequence and stay below max_positions.
            layout: of the N tokens.
            dropout_seed: 0-dim int64 on the same device, of this micro-batch: it decides what all layers drop. In
                training mode None draws one from torch's default generator of the device; in evaluation nothing is
                dropped. Attention backends other than fused draw from that generator themselves.
            kept_outputs: what else is handed out: the outputs of layers, in the order asked for, then queries, keys and
                values.

        With activation checkpointing a layer keeps only its input and is computed again in the backward, with the same
        dropout.
        """
        if not self.training:
            dropout_seed = None
        elif dropout_seed is None:
            dropout_seed = new_dropout_seed(input_ids_N.device)
        asked = kept_outputs or KeptOutputs()

        by_modules = self.by_modules or torch.compiler.is_compiling()
        embedded = self.embedded if by_modules else partial(functions.embeddings, self)
        hidden_ND = embedded(input_ids_N, position_ids_N, dropout_seed)

        call = functions.LayerCall(layout, dropout_seed, self._backend(hidden_ND, dropout_seed))
        outputs: dict[int, Tensor] = {}
        qkv: Sequence[Tensor] = ()
        for index, layer in enumerate(self.layers):
            with_qkv = index == asked.qkv
            arguments = (hidden_ND, layout, dropout_seed, self.attention_backend, with_qkv)
            if not by_modules:
                again = self.activation_checkpointing
                hidden_ND = functions.encoder_layer(layer, hidden_ND, call, again=again, with_qkv=with_qkv)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                hidden_ND = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_ND = layer(*arguments)
            if with_qkv:
                hidden_ND, *qkv = hidden_ND
            if index in asked.layers:
                outputs[index] = hidden_ND
        if kept_outputs is None:
            return hidden_ND
        return hidden_ND, (*(outputs[i] for i in asked.layers), *qkv)

    def _backend(self, hidden_ND: Tensor, dropout_seed: Tensor | None) -> ResolvedBackend:
        """What serves the attention of this micro-batch."""
        dropout_p = 0.0 if dropout_seed is None else self.attention_dropout
        on = {"device": hidden_ND.device, "dtype": hidden_ND.dtype}
        return resolve_backend(self.attention_backend, **on, dropout_p=dropout_p, training=self.training)

    def embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Input of the first layer, (N, D). The definition, as EncoderLayer.forward is."""
        embedded_ND = self.word_embeddings(input_ids_N) + self.position_embeddings(position_ids_N)
        if self.token_type_embeddings is not None:
            # Every token is of type 0. Looked up through the module: ZeRO-3 gathers its table only there.
            embedded_ND = embedded_ND + self.token_type_embeddings(torch.zeros_like(input_ids_N[:1]))
        return dropout(self.embedding_norm(embedded_ND), dropout_seed, stream=0, dropout_p=self.dropout_p)


class VocabHead(nn.Module):
    """The MLM head: dense, GELU, LayerNorm, then the decoder tied to the word embeddings.

    It registers the tied weight itself, because ZeRO-3 gathers a parameter only while a module that registers it runs
    its forward. For the same reason a loss that works on weights is handed in as `reduce`.
    """

    def __init__(self, architecture: Architecture, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.vocab_size = architecture.vocab_size
        self.by_modules = False  # as the encoder's
        self.dense = LinearGelu(architecture.hidden_size, architecture.hidden_size)
        self.norm = LayerNorm(architecture)
        self.weight = word_embeddings.weight
        self.bias = nn.Parameter(torch.empty(architecture.padded_vocab_size))

    def forward(self, hidden_ND: Tensor, reduce: Callable[[Tensor, Tensor, Tensor], Any] | None = None) -> Any:
        """Logits (N, vocab_size), or whatever `reduce(transformed_ND, weight_VD, bias_V)` returns.

        The weight and the bias that `reduce` gets have padding rows from vocab_size on, all zero. It has to leave them
        out of every softmax and to give them no gradient.
        """
        if self.by_modules or torch.compiler.is_compiling():
            transformed_ND = self.norm(self.dense(hidden_ND))
        else:
            transformed_ND = functions.head_transform(self, hidden_ND)
        if reduce is not None:
            return reduce(transformed_ND, self.weight, self.bias)
        return functions.linear_map(transformed_ND, self.weight, self.bias)[:, : self.vocab_size]


class Projection(nn.Linear):
    """Hidden states (N, D) in the width of others, (N, E): x @ W.T."""

    by_modules = False  # as the encoder's

    def forward(self, input: Tensor) -> Tensor:
        if self.by_modules or torch.compiler.is_compiling():
            return super().forward(input)
        return functions.linear_map(input, self.weight)


class MaskedLM(nn.Module):
    """Encoder, and MLM head and projection where the architecture has them, with fresh weights.

    They are drawn from `generator` alone (without one: seed 0).

    Its state_dict holds the tied weight once, as `encoder.word_embeddings.weight`, so that its keys are those of
    named_parameters(); load_state_dict wants the same keys.
    """

    def __init__(self, architecture: Architecture, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = Encoder(architecture)
        # VocabHead or None. Any, since whoever runs it knows that there is one.
        self.head: Any = VocabHead(architecture, self.encoder.word_embeddings) if architecture.mlm_head else None
        width, embedding_size = architecture.hidden_size, architecture.embedding_size
        self.projection = Projection(width, embedding_size, bias=False) if embedding_size else None
        self.register_state_dict_post_hook(_drop_tied_weight)
        self.register_load_state_dict_pre_hook(_restore_tied_weight)
        self._initialise(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, INITIALIZER_RANGE, generator=generator)
        self.encoder.word_embeddings.weight[self.architecture.vocab_size :] = 0.0
        self.encoder.word_embeddings.weight[self.architecture.pad_id] = 0.0

    def run_by_modules(self) -> None:
        """From now on, as its modules are written, instead of by functions.py."""
        for part in (self.encoder, self.head, self.projection):
            if part is not None:
                part.by_modules = True

    def forward(
        self, input_ids_N: Tensor, position_ids_N: Tensor, layout: SequenceLayout, dropout_seed: Tensor | None = None
    ) -> Tensor:
        """Logits (N, vocab_size) of every token; arguments as in `Encoder.forward`."""
        return self.head(self.encoder(input_ids_N, position_ids_N, layout, dropout_seed))


def _drop_tied_weight(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state.pop(f"{prefix}head.weight", None)


def _restore_tied_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.head is not None and f"{prefix}encoder.word_embeddings.weight" in state:
        state[f"{prefix}head.weight"] = state[f"{prefix}encoder.word_embeddings.weight"]
