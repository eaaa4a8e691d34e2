"""What all packed encoders share: their modules, the walk through their layers, and the head. For teacher and student.

Knows no ranks and no masks. What an encoder computes stands in a file of its family: bert.py, modernbert.py. A
micro-batch is a flat row of N tokens; the sequence layout says where its sequences begin and end, and only the
attention needs to know.

Inside, the operators compute in fp32 whatever the dtype: in bf16 an eps of 1e-12 would vanish.

Shapes: N tokens of the micro-batch, D hidden width, H heads, V padded vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistil.kernels.attention_backends import AttentionBackend, ResolvedBackend, resolve_backend
from fastdistil.kernels.dropout import new_dropout_seed
from fastdistil.kernels.gelu import linear_gelu
from fastdistil.kernels.layernorm import dropout_add_layernorm, layernorm
from fastdistil.kernels.layout import SequenceLayout
from fastdistil.kernels.linear import linear
from fastdistil.model import functions
from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture
from fastdistil.model.functions import LayerCall


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
        super().__init__(architecture.hidden_size, eps=architecture.layer_norm_eps, bias=architecture.family.biases)
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


class KeptOutputs(NamedTuple):
    """What an encoder hands out beside its last hidden states."""

    layers: tuple[int, ...] = ()
    """The outputs of these layers, counted from 0, each (N, D)."""
    qkv: int | None = None
    """The queries, keys and values of this layer's attention: (N, 3D), of each all heads side by side."""


class Encoder(nn.Module):
    """Embeddings and layers: token ids to last hidden states. A family has its own, which says what these are."""

    embedding_norm: LayerNorm
    layers: nn.ModuleList

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        # Set by whoever runs the model; neither changes a weight.
        self.activation_checkpointing = False
        self.attention_backend: AttentionBackend = "auto"
        self.by_modules = False  # module by module, as ZeRO-3, torch.compile and FP8 need it, instead of functions.py
        # As in transformers, [PAD] gets no gradient as an input; it does occur in one, as a random replacement.
        self.word_embeddings = nn.Embedding(
            architecture.padded_vocab_size, architecture.hidden_size, padding_idx=architecture.pad_id
        )
        self.dropout_p, self.attention_dropout = architecture.dropout, architecture.attention_dropout
        self.widest_window = architecture.widest_window

    def embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Input of the first layer, (N, D). The definition, as the layers' forward is."""
        raise AssertionError("every family has its own")

    def raw_embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """`embedded` as one function."""
        raise AssertionError("every family has its own")

    def rotations(self, position_ids_N: Tensor) -> tuple[Tensor, ...]:
        """What the layers rotate queries and keys by."""
        return ()

    def ended(self, hidden_ND: Tensor, *, by_modules: bool) -> Tensor:
        """The output of a layer as it is handed out, as if that layer were the last: (N, D)."""
        return hidden_ND

    def initial_deviation(self, name: str) -> float:
        """Standard deviation of a fresh weight, by its name in the state dict of a MaskedLM."""
        return INITIALIZER_RANGE

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
        embedded = self.embedded if by_modules else self.raw_embedded
        hidden_ND = embedded(input_ids_N, position_ids_N, dropout_seed)

        backend = self.attention_backend if by_modules else self._backend(hidden_ND, dropout_seed)
        call = LayerCall(layout, dropout_seed, backend, self.rotations(position_ids_N))
        outputs: dict[int, Tensor] = {}
        qkv: Sequence[Tensor] = ()
        for index, layer in enumerate(self.layers):
            with_qkv = index == asked.qkv
            if not by_modules:
                again = self.activation_checkpointing
                hidden_ND = functions.encoder_layer(layer, hidden_ND, call, again=again, with_qkv=with_qkv)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                hidden_ND = checkpoint(layer, hidden_ND, call, with_qkv, use_reentrant=False)
            else:
                hidden_ND = layer(hidden_ND, call, with_qkv)
            if with_qkv:
                hidden_ND, *qkv = hidden_ND
            if index in asked.layers:
                outputs[index] = self.ended(hidden_ND, by_modules=by_modules)
        last = outputs.get(len(self.layers) - 1)
        hidden_ND = self.ended(hidden_ND, by_modules=by_modules) if last is None else last
        if kept_outputs is None:
            return hidden_ND
        return hidden_ND, (*(outputs[i] for i in asked.layers), *qkv)

    def _backend(self, hidden_ND: Tensor, dropout_seed: Tensor | None) -> ResolvedBackend:
        """What serves the attention of this micro-batch."""
        dropout_p = 0.0 if dropout_seed is None else self.attention_dropout
        on = {"device": hidden_ND.device, "dtype": hidden_ND.dtype}
        how = {"dropout_p": dropout_p, "training": self.training, "window": self.widest_window}
        return resolve_backend(self.attention_backend, **on, **how)


class VocabHead(nn.Module):
    """The MLM head: dense, GELU, LayerNorm, then the decoder tied to the word embeddings.

    It registers the tied weight itself, because ZeRO-3 gathers a parameter only while a module that registers it runs
    its forward. For the same reason a loss that works on weights is handed in as `reduce`.
    """

    def __init__(self, architecture: Architecture, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.vocab_size = architecture.vocab_size
        self.by_modules = False  # as the encoder's
        width = architecture.hidden_size
        self.dense = LinearGelu(width, width, bias=architecture.family.biases)
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
