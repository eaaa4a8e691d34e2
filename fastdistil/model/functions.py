"""The encoder's parts as one autograd function each: a layer, the head's transform, the vocabulary.

They compute what the modules of encoder.py and of the families say, where each part is written as it is read; tests
hold the two to each other. What they add is known only to whoever sees a whole layer:

    the gradient at a residual      is what the product that flows back into it is added to (beta = 1)
    the gradients of biases         are column sums inside the kernels of LayerNorm, GELU and attention
    the gradients of weights        are written by the products where the optimiser reads them (flat.py)
    a backward                      makes no zero tensor for what has no gradient, and costs the host one call a layer
    activation checkpointing        keeps a layer's input alone, and begins its backward by running it again

They take modules for their parameters and call the raw functions of kernels/, which check nothing: shapes and dtypes
are those of the architecture. What a layer of a family computes in this way stands beside its modules, in the family's
file: `raw_forward` and `raw_backward`.

Shapes: N tokens of the micro-batch, D hidden width, F width of the feed-forward layer, H heads, V padded vocabulary.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import embedding_bag
from torch.utils import _pytree as pytree

from fastdistil.kernels import cosine, gelu, layernorm, linear, linear_distill
from fastdistil.kernels._backend import times_gradient
from fastdistil.kernels.layout import SequenceLayout
from fastdistil.model.flat import destination, is_flat, operand, optional, to_autograd

# Of encoder.py and the families, which import this file.
EncoderLayer = Any
LayerNorm = Any
VocabHead = Any


def weight_gradient(weight: Tensor, dout_NF: Tensor, x_ND: Tensor) -> Tensor | None:
    """A weight's gradient dout.T @ x, put where it belongs; what autograd gets of it."""
    (dweight,), accumulate = destination(weight)
    linear.add_product(dweight, dout_NF.t(), x_ND, accumulate)
    return to_autograd(weight, dweight)


def table_gradient(table: Tensor, dout_ND: Tensor, index_N: Tensor, padding: int | None) -> Tensor | None:
    """The gradient of an embedding table, whose padding row gets none."""
    if not table.requires_grad:
        return None
    (dtable,), accumulate = destination(table)
    linear.add_rows(dtable, dout_ND, index_N, padding, accumulate)
    return to_autograd(table, dtable)


class LayerCall(NamedTuple):
    """What the layers of a micro-batch are called with beside their input."""

    layout: SequenceLayout
    seed: Tensor | None
    backend: Any
    """A ResolvedBackend, for raw functions; modules take any AttentionBackend, and resolve it themselves."""
    rotations: tuple[Tensor, ...] = ()
    """What queries and keys are rotated by in layers that attend to everything, and in those with a window."""


def raw_linear(module: nn.Linear, x_ND: Tensor) -> Tensor:
    """A linear layer, (N, F), without a gradient."""
    return linear.linear_forward(x_ND, operand(module.weight), optional(module.bias))


def raw_norm(norm: LayerNorm, x_ND: Tensor, residual_ND: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Any]:
    """(LayerNorm(residual + dropout(x)), what its backward needs)."""
    weight, bias = operand(norm.weight), optional(norm.bias)
    return layernorm.forward(x_ND, residual_ND, weight, bias, norm.eps, *norm.dropout(seed))


class _Layer(Function):
    @staticmethod
    def forward(
        ctx: Any, layer: EncoderLayer, call: LayerCall, again: bool, with_qkv: bool, hidden_ND: Tensor, *_: Tensor
    ) -> Any:
        output_ND, qkv_N3D, kept = layer.raw_forward(hidden_ND, call, keep=not again, with_qkv=with_qkv)
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
            _, _, kept = ctx.layer.raw_forward(hidden_ND, call, keep=True, with_qkv=False)
        del tensors, leaves
        return None, None, None, None, *ctx.layer.raw_backward(hidden_ND, call, kept, doutput_ND, dhanded_N3D)


def encoder_layer(
    layer: EncoderLayer, hidden_ND: Tensor, call: LayerCall, *, again: bool = False, with_qkv: bool = False
) -> Any:
    """`EncoderLayer.forward` as one function.

    Args:
        again: keep the input alone and run the forward again in the backward, with the same dropout.
        with_qkv: return the queries, keys and values (N, 3D) of its attention, too.
    """
    if not torch.is_grad_enabled():
        output_ND, qkv_N3D, _ = layer.raw_forward(hidden_ND, call, keep=False, with_qkv=with_qkv)
        return (output_ND, qkv_N3D) if with_qkv else output_ND
    return _Layer.apply(layer, call, again, with_qkv, hidden_ND, *layer.parameters())


class _Transform(Function):
    """LayerNorm(gelu(dense(hidden))), (N, D)."""

    @staticmethod
    def forward(ctx: Any, head: VocabHead, hidden_ND: Tensor, *_: Tensor) -> Tensor:
        dense = head.dense
        weight, bias = operand(dense.weight), optional(dense.bias)
        activated_ND, of_gelu = gelu.linear_gelu_forward(hidden_ND, weight, bias, True)
        out_ND, kept = raw_norm(head.norm, activated_ND, None, None)
        ctx.head = head
        ctx.save_for_backward(hidden_ND, of_gelu, *kept)
        ctx.set_materialize_grads(False)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        dense, norm = ctx.head.dense, ctx.head.norm
        hidden_ND, of_gelu, *kept = ctx.saved_tensors
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
        dz_ND = gelu.gelu_backward_rows(dactivated_ND, of_gelu, dbias=dense_bias, accumulate=accumulate)
        of_dense = weight_gradient(dense.weight, dz_ND, hidden_ND), to_autograd(dense.bias, dense_bias)
        dhidden_ND = linear.linear_dx(dz_ND, operand(dense.weight))
        return None, dhidden_ND, *of_dense, to_autograd(norm.weight, dweight), to_autograd(norm.bias, dbias)


def head_transform(head: VocabHead, hidden_ND: Tensor) -> Tensor:
    """The head before its vocabulary matrix as one function: (N, D)."""
    dense, norm = head.dense, head.norm
    if not torch.is_grad_enabled():
        activated_ND, _ = gelu.linear_gelu_forward(hidden_ND, operand(dense.weight), optional(dense.bias), False)
        return raw_norm(norm, activated_ND, None, None)[0]
    found: Any = _Transform.apply(head, hidden_ND, dense.weight, dense.bias, norm.weight, norm.bias)
    return found


class _LinearMap(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND)
        ctx.parameters = weight_FD, bias_F
        return linear.linear_forward(x_ND, operand(weight_FD), optional(bias_F))

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
        of_weight = weight_gradient(weight_FD, dout_NF, x_ND)
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
