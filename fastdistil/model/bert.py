"""BERT: the packed encoder of BERT, DistilBERT and RoBERTa, its layer as modules and as one function.

Post-LN as in Devlin et al. 2018: LayerNorm after each residual sum (eps 1e-12), exact-erf GELU. A DistilBERT is the
same encoder without a token-type table and with one dropout less a layer.

To freeze the positions as DistilBERT's authors did: `model.encoder.position_embeddings.requires_grad_(False)`.

Shapes: N tokens of the micro-batch, D hidden width, F width of the feed-forward layer, H heads.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from fastdistil.kernels import attention, embedding, gelu, layernorm, linear
from fastdistil.kernels.dropout import dropout
from fastdistil.model.architecture import Architecture
from fastdistil.model.encoder import Encoder, LayerNorm, Linear, LinearGelu
from fastdistil.model.flat import destination, operand, to_autograd
from fastdistil.model.functions import LayerCall, raw_linear, raw_norm, table_gradient, weight_gradient


class _Kept(NamedTuple):
    """What a layer keeps for its backward beside its input; tuples are the operators' own."""

    qkv_N3HD: Tensor
    attended_ND: Tensor
    attention: Any
    attention_norm: tuple[Tensor, ...]
    between_ND: Tensor
    gelu: Any
    activated_NF: Tensor
    ffn_norm: tuple[Tensor, ...]


class BertLayer(nn.Module):
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

    def forward(self, hidden_ND: Tensor, call: LayerCall, with_qkv: bool = False) -> Any:
        """The layer's output (N, D); `with_qkv` a pair of it and its queries, keys and values (N, 3D).

        This is the definition. `functions.encoder_layer` computes the same by `raw_forward`, for less.
        """
        qkv_N3D = self.qkv(hidden_ND)
        attended_ND = attention.attention(
            qkv_N3D.unflatten(1, (3, self.num_heads, -1)),
            call.layout,
            dropout_p=self.attention_dropout,
            seed=call.seed,
            stream=self.stream,
            backend=call.backend,
        ).flatten(1)
        kept_N3D = qkv_N3D if with_qkv else None
        del qkv_N3D  # a teacher, which has no backward, needs the memory now
        hidden_ND = self.attention_norm(self.attention_out(attended_ND), hidden_ND, call.seed)
        output_ND = self.ffn_norm(self.ffn_out(self.ffn_in(hidden_ND)), hidden_ND, call.seed)
        return output_ND if kept_N3D is None else (output_ND, kept_N3D)

    def raw_forward(
        self, hidden_ND: Tensor, call: LayerCall, *, keep: bool, with_qkv: bool
    ) -> tuple[Tensor, Tensor | None, _Kept | None]:
        """`forward` by raw functions: output (N, D), qkv (N, 3D) if asked for, what `raw_backward` needs."""
        qkv_N3HD = raw_linear(self.qkv, hidden_ND).view(len(hidden_ND), 3, self.num_heads, -1)
        qkv_N3D = qkv_N3HD.flatten(1) if with_qkv else None
        attended, of_attention = attention.forward(
            qkv_N3HD, call.layout, *self.dropout(call.seed), backend=call.backend, keep=keep
        )
        attended_ND = attended.flatten(1)
        kept_qkv = qkv_N3HD if keep else attended
        del qkv_N3HD  # a teacher, which has no backward, needs the memory now
        between_ND, of_norm = raw_norm(
            self.attention_norm, raw_linear(self.attention_out, attended_ND), hidden_ND, call.seed
        )
        weight, bias = operand(self.ffn_in.weight), operand(self.ffn_in.bias)
        activated_NF, of_gelu = gelu.linear_gelu_forward(between_ND, weight, bias, keep)
        output_ND, of_last = raw_norm(self.ffn_norm, raw_linear(self.ffn_out, activated_NF), between_ND, call.seed)
        if not keep:
            return output_ND, qkv_N3D, None
        kept = _Kept(kept_qkv, attended_ND, of_attention, of_norm, between_ND, of_gelu, activated_NF, of_last)
        return output_ND, qkv_N3D, kept

    def raw_backward(
        self, hidden_ND: Tensor, call: LayerCall, kept: _Kept, doutput_ND: Tensor, dhanded_N3D: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of the layer's input and, where autograd gets them, of its parameters in their order."""
        seed = call.seed
        qkv, attention_out, ffn_in, ffn_out = self.qkv, self.attention_out, self.ffn_in, self.ffn_out

        # The feed-forward half. What flows into the residual is overwritten by its sum with what flows through the
        # layers.
        dbetween_ND, dx_ND, last = _norm_backward(self.ffn_norm, ffn_out, kept.ffn_norm, doutput_ND, seed)
        of_ffn_out = weight_gradient(ffn_out.weight, dx_ND, kept.activated_NF)
        (dbias,), accumulate = destination(ffn_in.bias)
        weight = operand(ffn_out.weight)
        dz_NF = gelu.gelu_backward_product(dx_ND, weight, kept.gelu, dbias=dbias, accumulate=accumulate)
        of_ffn_in = weight_gradient(ffn_in.weight, dz_NF, kept.between_ND), to_autograd(ffn_in.bias, dbias)
        dbetween_ND = linear.linear_dx(dz_NF, operand(ffn_in.weight), dbetween_ND)
        del dx_ND, dz_NF

        # The attention half.
        dhidden_ND, dx_ND, first = _norm_backward(
            self.attention_norm, attention_out, kept.attention_norm, dbetween_ND, seed
        )
        del dbetween_ND
        of_attention_out = weight_gradient(attention_out.weight, dx_ND, kept.attended_ND)
        dattended_ND = linear.linear_dx(dx_ND, operand(attention_out.weight))
        (dbias,), accumulate = destination(qkv.bias)
        dqkv_N3HD = attention.backward(
            dattended_ND.view(kept.qkv_N3HD[:, 0].shape),
            kept.qkv_N3HD,
            kept.attended_ND.view(kept.qkv_N3HD[:, 0].shape),
            kept.attention,
            call.layout,
            *self.dropout(seed),
            backend=call.backend,
            dbias=dbias,
            accumulate=accumulate,
        )
        del dx_ND, dattended_ND
        if dhanded_N3D is not None:
            dqkv_N3HD.add_(dhanded_N3D.view(dqkv_N3HD.shape))
            linear.add_column_sum(dbias, dhanded_N3D, True)
        dqkv_ND = dqkv_N3HD.flatten(1)
        of_qkv = weight_gradient(qkv.weight, dqkv_ND, hidden_ND), to_autograd(qkv.bias, dbias)
        dhidden_ND = linear.linear_dx(dqkv_ND, operand(qkv.weight), dhidden_ND)
        return [
            dhidden_ND,
            *of_qkv,
            *(of_attention_out, first[2], *first[:2]),
            *of_ffn_in,
            *(of_ffn_out, last[2], *last[:2]),
        ]


def _norm_backward(
    norm: LayerNorm, before: nn.Linear, kept: Any, dout_ND: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of the residual and of the output of the linear layer `before`, and of weight, bias and its bias.

    The two are one tensor where nothing was dropped.
    """
    parameters = norm.weight, norm.bias, before.bias
    (dweight, dbias, dx_sum), accumulate = destination(*parameters)
    dresidual_ND, dx_ND = layernorm.backward(
        dout_ND.contiguous(),
        kept,
        operand(norm.weight),
        *norm.dropout(seed),
        dweight=dweight,
        dbias=dbias,
        dx_sum=dx_sum,
        accumulate=accumulate,
    )
    return dresidual_ND, dx_ND, [*map(to_autograd, parameters, (dweight, dbias, dx_sum))]


class _Embeddings(Function):
    """dropout(LayerNorm(word + position + token type 0)), (N, D)."""

    @staticmethod
    def forward(ctx: Any, encoder: Any, ids: Tensor, positions: Tensor, seed: Tensor | None, *_: Tensor) -> Tensor:
        norm, types = encoder.embedding_norm, encoder.token_type_embeddings
        out_ND, saved = embedding.forward(
            ids,
            positions,
            operand(encoder.word_embeddings.weight),
            operand(encoder.position_embeddings.weight),
            None if types is None else operand(types.weight)[0],
            operand(norm.weight),
            operand(norm.bias),
            norm.eps,
            seed,
            encoder.dropout_p,
        )
        ctx.encoder = encoder
        ctx.save_for_backward(*saved, ids, positions, seed)
        ctx.set_materialize_grads(False)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dout: Tensor) -> tuple[Tensor | None, ...]:
        encoder = ctx.encoder
        *saved, ids, positions, seed = ctx.saved_tensors
        norm = encoder.embedding_norm
        (dweight, dbias), accumulate = destination(norm.weight, norm.bias)
        dsum_ND = embedding.backward(
            dout[0].contiguous(),
            tuple(saved),
            operand(norm.weight),
            seed,
            encoder.dropout_p,
            dweight=dweight,
            dbias=dbias,
            accumulate=accumulate,
        )
        found = [to_autograd(norm.weight, dweight), to_autograd(norm.bias, dbias)]
        word, position, types = encoder.word_embeddings, encoder.position_embeddings, encoder.token_type_embeddings
        found.append(table_gradient(word.weight, dsum_ND, ids, word.padding_idx))
        found.append(table_gradient(position.weight, dsum_ND, positions, None))
        if types is not None:  # every token is of type 0
            (dtypes,), accumulate = destination(types.weight)
            linear.add_column_sum(dtypes[0], dsum_ND, accumulate)
            if not accumulate:
                dtypes[1:].zero_()
            found.append(to_autograd(types.weight, dtypes))
        return None, None, None, None, *found


class BertEncoder(Encoder):
    """Word, position and token-type embeddings, then post-LN layers."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        width = architecture.hidden_size
        self.position_embeddings = nn.Embedding(architecture.max_positions, width)
        self.token_type_embeddings = nn.Embedding(architecture.token_types, width) if architecture.token_types else None
        self.embedding_norm = LayerNorm(architecture)
        self.layers = nn.ModuleList(BertLayer(architecture, index) for index in range(architecture.num_layers))

    def embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Input of the first layer, (N, D). The definition, as BertLayer.forward is."""
        embedded_ND = self.word_embeddings(input_ids_N) + self.position_embeddings(position_ids_N)
        if self.token_type_embeddings is not None:
            # Every token is of type 0. Looked up through the module: ZeRO-3 gathers its table only there.
            embedded_ND = embedded_ND + self.token_type_embeddings(torch.zeros_like(input_ids_N[:1]))
        return dropout(self.embedding_norm(embedded_ND), dropout_seed, stream=0, dropout_p=self.dropout_p)

    def raw_embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """`embedded` as one function."""
        norm, types = self.embedding_norm, self.token_type_embeddings
        tables = [self.word_embeddings.weight, self.position_embeddings.weight]
        tables += [] if types is None else [types.weight]
        found: Any = _Embeddings.apply(self, input_ids_N, position_ids_N, dropout_seed, norm.weight, norm.bias, *tables)
        return found
