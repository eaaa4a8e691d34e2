"""The encoder's parts as one autograd function each: embeddings, a layer, the head's transform, the vocabulary.

They compute what the modules of encoder.py say, where each part is written as it is read; tests hold the two to each
other. What they add is known only to whoever sees a whole layer:

    the gradient at a residual      is what the product that flows back into it is added to (beta = 1)
    the gradients of biases         are column sums inside the kernels of LayerNorm, GELU and attention
    the gradients of weights        are written by the products where the optimiser reads them (flat.py)
    a backward                      makes no zero tensor for what has no gradient, and costs the host one call a layer
    activation checkpointing        keeps a layer's input alone, and begins its backward by running it again

They take modules for their parameters and call the raw functions of kernels/, which check nothing: shapes and dtypes
are those of the architecture.

Shapes: N tokens of the micro-batch, D hidden width, F width of the feed-forward layer, H heads, V padded vocabulary.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import embedding_bag
from torch.utils import _pytree as pytree

from fastdistil.kernels import attention, cosine, gelu, layernorm, linear, linear_distill
from fastdistil.kernels._backend import times_gradient
from fastdistil.kernels.attention_backends import ResolvedBackend
from fastdistil.kernels.layout import SequenceLayout
from fastdistil.model.flat import destination, is_flat, operand, to_autograd

# Of encoder.py, which imports this file.
Encoder = EncoderLayer = LayerNorm = VocabHead = Any


def _product(weight: Tensor, dout_NF: Tensor, x_ND: Tensor) -> Tensor | None:
    """A weight's gradient dout.T @ x, put where it belongs; what autograd gets of it."""
    (dweight,), accumulate = destination(weight)
    linear.add_product(dweight, dout_NF.t(), x_ND, accumulate)
    return to_autograd(weight, dweight)


class _Embeddings(Function):
    """dropout(LayerNorm(word + position + token type 0)), (N, D)."""

    @staticmethod
    def forward(ctx: Any, encoder: Encoder, ids: Tensor, positions: Tensor, seed: Tensor | None, *_: Tensor) -> Tensor:
        norm, types = encoder.embedding_norm, encoder.token_type_embeddings
        out_ND, saved = layernorm.embedding_forward(
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
        encoder: Encoder = ctx.encoder
        *saved, ids, positions, seed = ctx.saved_tensors
        norm = encoder.embedding_norm
        (dweight, dbias), accumulate = destination(norm.weight, norm.bias)
        dsum_ND = layernorm.embedding_backward(
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
        found.append(_rows(word.weight, dsum_ND, ids, word.padding_idx))
        found.append(_rows(position.weight, dsum_ND, positions, None))
        if types is not None:  # every token is of type 0
            (dtypes,), accumulate = destination(types.weight)
            linear.add_column_sum(dtypes[0], dsum_ND, accumulate)
            if not accumulate:
                dtypes[1:].zero_()
            found.append(to_autograd(types.weight, dtypes))
        return None, None, None, None, *found


def _rows(table: Tensor, dout_ND: Tensor, index_N: Tensor, padding: int | None) -> Tensor | None:
    """The gradient of an embedding table, whose padding row gets none."""
    if not table.requires_grad:
        return None
    (dtable,), accumulate = destination(table)
    linear.add_rows(dtable, dout_ND, index_N, padding, accumulate)
    return to_autograd(table, dtable)


def embeddings(encoder: Encoder, ids_N: Tensor, positions_N: Tensor, seed: Tensor | None) -> Tensor:
    """`Encoder.embedded` as one function: (N, D)."""
    norm, types = encoder.embedding_norm, encoder.token_type_embeddings
    tables = [encoder.word_embeddings.weight, encoder.position_embeddings.weight]
    tables += [] if types is None else [types.weight]
    found: Any = _Embeddings.apply(encoder, ids_N, positions_N, seed, norm.weight, norm.bias, *tables)
    return found


class LayerCall(NamedTuple):
    """What the layers of a micro-batch are called with beside their input."""

    layout: SequenceLayout
    seed: Tensor | None
    backend: ResolvedBackend


class _Kept(NamedTuple):
    """What a layer keeps for its backward beside its input; tuples are the operators' own."""

    qkv_N3HD: Tensor
    attended_ND: Tensor
    attention: Any
    attention_norm: tuple[Tensor, ...]
    between_ND: Tensor
    z_NF: Any
    activated_NF: Tensor
    ffn_norm: tuple[Tensor, ...]


def _linear(module: nn.Linear, x_ND: Tensor) -> Tensor:
    return linear.linear_forward(x_ND, operand(module.weight), operand(module.bias))


def _norm(norm: LayerNorm, x_ND: Tensor, residual_ND: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Any]:
    weight, bias = operand(norm.weight), operand(norm.bias)
    return layernorm.forward(x_ND, residual_ND, weight, bias, norm.eps, *norm.dropout(seed))


def _forward(
    layer: EncoderLayer, call: LayerCall, hidden_ND: Tensor, *, keep: bool, with_qkv: bool
) -> tuple[Tensor, Tensor | None, _Kept | None]:
    """EncoderLayer.forward by raw functions: output (N, D), qkv (N, 3D) if asked for, what the backward needs."""
    qkv_N3HD = _linear(layer.qkv, hidden_ND).view(len(hidden_ND), 3, layer.num_heads, -1)
    qkv_N3D = qkv_N3HD.flatten(1) if with_qkv else None
    attended, of_attention = attention.forward(
        qkv_N3HD, call.layout, *layer.dropout(call.seed), backend=call.backend, keep=keep
    )
    attended_ND = attended.flatten(1)
    kept_qkv = qkv_N3HD if keep else attended
    del qkv_N3HD  # a teacher, which has no backward, needs the memory now
    between_ND, of_norm = _norm(layer.attention_norm, _linear(layer.attention_out, attended_ND), hidden_ND, call.seed)
    weight, bias = operand(layer.ffn_in.weight), operand(layer.ffn_in.bias)
    activated_NF, z_NF = gelu.linear_gelu_forward(between_ND, weight, bias, keep)
    output_ND, of_last = _norm(layer.ffn_norm, _linear(layer.ffn_out, activated_NF), between_ND, call.seed)
    if not keep:
        return output_ND, qkv_N3D, None
    kept = _Kept(kept_qkv, attended_ND, of_attention, of_norm, between_ND, z_NF, activated_NF, of_last)
    return output_ND, qkv_N3D, kept


class _Layer(Function):
    @staticmethod
    def forward(
        ctx: Any, layer: EncoderLayer, call: LayerCall, again: bool, with_qkv: bool, hidden_ND: Tensor, *_: Tensor
    ) -> Any:
        output_ND, qkv_N3D, kept = _forward(layer, call, hidden_ND, keep=not again, with_qkv=with_qkv)
        ctx.layer, ctx.call = layer, call._replace(seed=None)
        leaves, ctx.skeleton = pytree.tree_flatten(kept)
        # Tensors are saved with autograd, which frees them; a graph of PyTorch's own attention is none.
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = (leaf if isinstance(leaf, Tensor) else None for leaf in leaves)
        ctx.save_for_backward(hidden_ND, call.seed, *tensors)
        ctx.set_materialize_grads(False)
        return (output_ND, qkv_N3D) if with_qkv else output_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput_ND: Tensor | None, dhanded_N3D: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden_ND, seed, *tensors = ctx.saved_tensors
        if doutput_ND is None:  # terms that read queries, keys or values of the last layer alone
            doutput_ND = torch.zeros_like(hidden_ND)
        call = ctx.call._replace(seed=seed)
        leaves = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        kept: Any = pytree.tree_unflatten(leaves, ctx.skeleton)
        if kept is None:
            _, _, kept = _forward(ctx.layer, call, hidden_ND, keep=True, with_qkv=False)
        del tensors, leaves
        return None, None, None, None, *_backward(ctx.layer, call, hidden_ND, kept, doutput_ND, dhanded_N3D)


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


def _backward(
    layer: EncoderLayer, call: LayerCall, hidden_ND: Tensor, kept: _Kept, doutput_ND: Tensor, dhanded_N3D: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the layer's input and, where autograd gets them, of its parameters in their order."""
    seed = call.seed
    qkv, attention_out, ffn_in, ffn_out = layer.qkv, layer.attention_out, layer.ffn_in, layer.ffn_out

    # The feed-forward half. What flows into the residual is overwritten by its sum with what flows through the layers.
    dbetween_ND, dx_ND, last = _norm_backward(layer.ffn_norm, ffn_out, kept.ffn_norm, doutput_ND, seed)
    of_ffn_out = _product(ffn_out.weight, dx_ND, kept.activated_NF)
    (dbias,), accumulate = destination(ffn_in.bias)
    weight, bias = operand(ffn_out.weight), operand(ffn_in.bias)
    dz_NF = gelu.gelu_backward_product(dx_ND, weight, kept.z_NF, bias, dbias=dbias, accumulate=accumulate)
    of_ffn_in = _product(ffn_in.weight, dz_NF, kept.between_ND), to_autograd(ffn_in.bias, dbias)
    dbetween_ND = linear.linear_dx(dz_NF, operand(ffn_in.weight), dbetween_ND)
    del dx_ND, dz_NF

    # The attention half.
    dhidden_ND, dx_ND, first = _norm_backward(
        layer.attention_norm, attention_out, kept.attention_norm, dbetween_ND, seed
    )
    del dbetween_ND
    of_attention_out = _product(attention_out.weight, dx_ND, kept.attended_ND)
    dattended_ND = linear.linear_dx(dx_ND, operand(attention_out.weight))
    (dbias,), accumulate = destination(qkv.bias)
    dqkv_N3HD = attention.backward(
        dattended_ND.view(kept.qkv_N3HD[:, 0].shape),
        kept.qkv_N3HD,
        kept.attended_ND.view(kept.qkv_N3HD[:, 0].shape),
        kept.attention,
        call.layout,
        *layer.dropout(seed),
        backend=call.backend,
        dbias=dbias,
        accumulate=accumulate,
    )
    del dx_ND, dattended_ND
    if dhanded_N3D is not None:
        dqkv_N3HD.add_(dhanded_N3D.view(dqkv_N3HD.shape))
        linear.add_column_sum(dbias, dhanded_N3D, True)
    dqkv_ND = dqkv_N3HD.flatten(1)
    of_qkv = _product(qkv.weight, dqkv_ND, hidden_ND), to_autograd(qkv.bias, dbias)
    dhidden_ND = linear.linear_dx(dqkv_ND, operand(qkv.weight), dhidden_ND)
    return [
        dhidden_ND,
        *of_qkv,
        *(of_attention_out, first[2], *first[:2]),
        *of_ffn_in,
        *(of_ffn_out, last[2], *last[:2]),
    ]


def encoder_layer(
    layer: EncoderLayer, hidden_ND: Tensor, call: LayerCall, *, again: bool = False, with_qkv: bool = False
) -> Any:
    """`EncoderLayer.forward` as one function.

    Args:
        again: keep the input alone and run the forward again in the backward, with the same dropout.
        with_qkv: return the queries, keys and values (N, 3D) of its attention, too.
    """
    if not torch.is_grad_enabled():
        output_ND, qkv_N3D, _ = _forward(layer, call, hidden_ND, keep=False, with_qkv=with_qkv)
        return (output_ND, qkv_N3D) if with_qkv else output_ND
    return _Layer.apply(layer, call, again, with_qkv, hidden_ND, *layer.parameters())


class _Transform(Function):
    """LayerNorm(gelu(dense(hidden))), (N, D)."""

    @staticmethod
    def forward(ctx: Any, head: VocabHead, hidden_ND: Tensor, *_: Tensor) -> Tensor:
        dense = head.dense
        weight, bias = operand(dense.weight), operand(dense.bias)
        activated_ND, z_ND = gelu.linear_gelu_forward(hidden_ND, weight, bias, True)
        out_ND, kept = _norm(head.norm, activated_ND, None, None)
        ctx.head = head
        ctx.save_for_backward(hidden_ND, z_ND, *kept)
        ctx.set_materialize_grads(False)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        dense, norm = ctx.head.dense, ctx.head.norm
        hidden_ND, z_ND, *kept = ctx.saved_tensors
        (dweight, dbias), accumulate = destination(norm.weight, norm.bias)
        _, dactivated_ND = layernorm.backward(
            dout_ND.contiguous(),
            tuple(kept),
            operand(norm.weight),
            *norm.dropout(None),
            dweight=dweight,
            dbias=dbias,
            dx_sum=None,
            accumulate=accumulate,
        )
        (dense_bias,), accumulate = destination(dense.bias)
        bias = operand(dense.bias)
        dz_ND = gelu.gelu_backward_rows(dactivated_ND, z_ND, bias, dbias=dense_bias, accumulate=accumulate)
        of_dense = _product(dense.weight, dz_ND, hidden_ND), to_autograd(dense.bias, dense_bias)
        dhidden_ND = linear.linear_dx(dz_ND, operand(dense.weight))
        return None, dhidden_ND, *of_dense, to_autograd(norm.weight, dweight), to_autograd(norm.bias, dbias)


def head_transform(head: VocabHead, hidden_ND: Tensor) -> Tensor:
    """The head before its vocabulary matrix as one function: (N, D)."""
    dense, norm = head.dense, head.norm
    if not torch.is_grad_enabled():
        activated_ND, _ = gelu.linear_gelu_forward(hidden_ND, operand(dense.weight), operand(dense.bias), False)
        return _norm(norm, activated_ND, None, None)[0]
    found: Any = _Transform.apply(head, hidden_ND, dense.weight, dense.bias, norm.weight, norm.bias)
    return found


class _LinearMap(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND)
        ctx.parameters = weight_FD, bias_F
        return linear.linear_forward(x_ND, operand(weight_FD), None if bias_F is None else operand(bias_F))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NF: Tensor) -> tuple[Tensor | None, ...]:
        (x_ND,) = ctx.saved_tensors
        weight_FD, bias_F = ctx.parameters
        dout_NF, of_bias = dout_NF.contiguous(), None
        if bias_F is not None:
            (dbias_F,), accumulate = destination(bias_F)
            linear.add_column_sum(dbias_F, dout_NF, accumulate)
            of_bias = to_autograd(bias_F, dbias_F)
        of_weight = _product(weight_FD, dout_NF, x_ND)
        return linear.linear_dx(dout_NF, operand(weight_FD)), of_weight, of_bias


def linear_map(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """(N, F) x @ weight.T + bias: logits of a vocabulary head, hidden states in another width."""
    return _LinearMap.apply(x_ND, weight_FD, bias_F)  # type: ignore[return-value]


class _Pool(Function):
    """Weighted sums over sequences. Shapes depend on the layout's alone, and nothing is added by atomics."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weights_N: Tensor, sequence_N: Tensor, bounds_S1: Tensor) -> Tensor:
        ctx.save_for_backward(weights_N, sequence_N)
        ctx.dtype = hidden_ND.dtype
        rows_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
        # An empty sequence at the end begins behind the last row.
        return embedding_bag(
            rows_N,
            hidden_ND.float(),
            bounds_S1.long(),
            mode="sum",
            per_sample_weights=weights_N,
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled_SD: Tensor) -> tuple[Tensor | None, ...]:
        weights_N, sequence_N = ctx.saved_tensors
        dhidden_ND = dpooled_SD.index_select(0, sequence_N) * weights_N[:, None]
        return dhidden_ND.to(ctx.dtype), None, None, None


def pooled(hidden_ND: Tensor, layout: SequenceLayout, mode: str) -> Tensor:
    """(S, D) fp32: the mean of the hidden states of each of the layout's sequences, or its first; 0 of an empty one.

    Args:
        mode: mean or cls.
    """
    bounds_S1 = layout.cu_seqlens
    rows_N = torch.arange(len(hidden_ND), device=hidden_ND.device, dtype=bounds_S1.dtype)
    sequence_N = torch.searchsorted(bounds_S1[1:], rows_N, right=True)
    if mode == "mean":
        weights_N = 1.0 / bounds_S1.diff().index_select(0, sequence_N)
    else:
        weights_N = (rows_N == bounds_S1.index_select(0, sequence_N)).float()
    return _Pool.apply(hidden_ND, weights_N, sequence_N, bounds_S1)  # type: ignore[return-value]


class _Distill(Function):
    """(loss, sums of kd, mlm and agreement) of the vocabulary heads; gradients are made with it (linear_distill.py)."""

    @staticmethod
    def forward(
        ctx: Any, keep: bool, options: dict[str, Any], x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor
    ) -> tuple[Tensor, Tensor]:
        (dweight_VD, dbias_V), accumulate = destination(weight_VD, bias_V) if keep else ([None, None], False)
        loss, sums, dx_ND = linear_distill.forward(
            x_ND,
            operand(weight_VD),
            operand(bias_V),
            **options,
            dweight=dweight_VD,
            dbias=dbias_V,
            accumulate=accumulate,
        )
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.written = is_flat(weight_VD)
        ctx.save_for_backward(*((dx_ND,) if ctx.written else (dx_ND, dweight_VD, dbias_V)))
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dsums: None) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        if ctx.written:
            return None, None, found[0], None, None
        return None, None, *times_gradient(dloss, found)


def distillation(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, 0-dim fp32; (3,) fp32 sums) by `linear_distill.forward`, whose options it takes.

    Where the weight is a slice of a flat buffer its gradient is written at once, so that the loss has to be a summand
    of what backward() is called on.
    """
    found: Any = _Distill.apply(torch.is_grad_enabled(), options, x_ND, weight_VD, bias_V)
    return found


class _Cosine(Function):
    """(scale * sum, sum) of 1 - cos over real tokens."""

    @staticmethod
    def forward(
        ctx: Any, at_end: bool, student_ND: Tensor, teacher_ND: Tensor, num_rows: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, dstudent_ND = cosine.forward(student_ND, teacher_ND, num_rows, scale)
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        ctx.at_end = at_end
        ctx.save_for_backward(dstudent_ND)
        return scale * total, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dtotal: None) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        (dstudent_ND,) = found if ctx.at_end else times_gradient(dloss, found)
        return None, dstudent_ND, None, None, None


def cosine_distance(
    student_ND: Tensor, teacher_ND: Tensor, num_rows: Tensor, scale: Tensor, *, at_end: bool
) -> tuple[Tensor, Tensor]:
    """(scale * sum, with a gradient for the student; sum) over real tokens of 1 - cos, 0-dim fp32.

    Args:
        scale: 0-dim fp32.
        at_end: whether the loss is a summand of what backward() is called on, so that the gradient is ready.
    """
    teacher_ND = teacher_ND.to(student_ND.dtype).contiguous()
    found: Any = _Cosine.apply(at_end, student_ND.contiguous(), teacher_ND, num_rows, scale)
    return found
