"""ModernBERT: the packed encoder of Warner et al. 2024 (arXiv 2412.13663), its layer as modules and as one function.

Pre-norm, no biases: the layers add to one stream of hidden states h, and each half of a layer reads a LayerNorm of it.

    h0 = dropout(LayerNorm(word))
    h' = h + dropout(attention(LayerNorm(h)) Wo)        of the first layer attention(h): the embeddings have theirs
    h  = h' + dropout(gelu(a) b) Wo',  [a, b] = LayerNorm(h') Wi
    last hidden states = LayerNorm(h)

Positions are angles by which queries and keys are rotated (RoPE), larger ones in the layers that see a window. Every
`global_every`-th layer, the first of them included, attends to the whole sequence; in the others a token sees
`local_attention` / 2 tokens on either side.

The outputs of layers that an encoder hands out went through the last LayerNorm, too, as if each were the last: the
stream itself grows from layer to layer. Queries and keys are handed out rotated, as attention compares them.

Attention weights and their result Wo are dropped at `attention_dropout`, everything else at `dropout`, as transformers
has it. All are 0 in the models that there are.

Shapes: N tokens of the micro-batch, D hidden width, F width of the feed-forward layer, H heads.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from fastdistil.kernels import attention, embedding, geglu, layernorm, linear, rope
from fastdistil.kernels.dropout import dropout
from fastdistil.model.architecture import INITIALIZER_RANGE, Architecture
from fastdistil.model.encoder import Encoder, LayerNorm, Linear
from fastdistil.model.flat import destination, operand, to_autograd
from fastdistil.model.functions import LayerCall, raw_linear, table_gradient, weight_gradient


class AddLayerNorm(LayerNorm):
    """(residual + dropout(x), its LayerNorm), both (N, D) in the dtype of x."""

    def forward(self, input: Tensor, residual_ND: Tensor, dropout_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return layernorm.add_layernorm(
            input,
            residual_ND,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=self.dropout_p,
            seed=dropout_seed,
            stream=self.stream,
        )


class _Kept(NamedTuple):
    """What a layer keeps for its backward beside its input; tuples are the operators' own."""

    normed_ND: Tensor
    attention_norm: tuple[Tensor, ...]
    qkv_N3HD: Tensor
    attended_ND: Tensor
    attention: Any
    ffn_norm: tuple[Tensor, ...]
    between_ND: Tensor
    gated_N2F: Tensor
    activated_NF: Tensor


class ModernBertLayer(nn.Module):
    """Attention and gated feed-forward layer, each added to the stream of hidden states: (N, D) -> (N, D)."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        width, ffn = architecture.hidden_size, architecture.ffn_size
        self.num_heads = architecture.num_heads
        self.window = architecture.window(index)
        self.dropout_p, self.attention_dropout = architecture.dropout, architecture.attention_dropout
        # Places of dropout in the model: 0 is the embeddings', then three a layer.
        self.stream = 1 + 3 * index
        self.attention_norm = LayerNorm(architecture) if index else None
        self.qkv = Linear(width, 3 * width, bias=False)  # rows: all heads' queries, then keys, then values
        self.attention_out = Linear(width, width, bias=False)
        self.ffn_norm = AddLayerNorm(architecture, dropout_p=self.attention_dropout, stream=self.stream + 1)
        self.ffn_in = Linear(width, 2 * ffn, bias=False)  # rows: what is activated, then its gates
        self.ffn_out = Linear(ffn, width, bias=False)

    def dropout(self, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
        """(seed, stream, probability) of the attention, no seed where nothing is dropped."""
        return seed if self.attention_dropout else None, self.stream, self.attention_dropout

    def _dropped(self, x_NF: Tensor, seed: Tensor | None) -> Tensor:
        """Dropout within the feed-forward layer, forward and backward alike."""
        return dropout(x_NF, seed, stream=self.stream + 2, dropout_p=self.dropout_p)

    def forward(self, hidden_ND: Tensor, call: LayerCall, with_qkv: bool = False) -> Any:
        """The layer's output (N, D); `with_qkv` a pair of it and its queries, keys and values (N, 3D).

        This is the definition. `functions.encoder_layer` computes the same by `raw_forward`, for less.
        """
        normed_ND = hidden_ND if self.attention_norm is None else self.attention_norm(hidden_ND)
        rotations_N2R = call.rotations[self.window > 0]
        qkv_N3HD = rope.rope(self.qkv(normed_ND).unflatten(1, (3, self.num_heads, -1)), rotations_N2R)
        attended_ND = attention.attention(
            qkv_N3HD,
            call.layout,
            dropout_p=self.attention_dropout,
            seed=call.seed,
            stream=self.stream,
            backend=call.backend,
            window=self.window,
        ).flatten(1)
        kept_N3D = qkv_N3HD.flatten(1) if with_qkv else None
        del qkv_N3HD  # a teacher, which has no backward, needs the memory now
        between_ND, normed_ND = self.ffn_norm(self.attention_out(attended_ND), hidden_ND, call.seed)
        activated_NF = self._dropped(geglu.geglu(self.ffn_in(normed_ND)), call.seed)
        output_ND = between_ND + self.ffn_out(activated_NF)
        return output_ND if kept_N3D is None else (output_ND, kept_N3D)

    def raw_forward(
        self, hidden_ND: Tensor, call: LayerCall, *, keep: bool, with_qkv: bool
    ) -> tuple[Tensor, Tensor | None, _Kept | None]:
        """`forward` by raw functions: output (N, D), qkv (N, 3D) if asked for, what `raw_backward` needs."""
        normed_ND, of_first = hidden_ND, ()
        if self.attention_norm is not None:
            _, normed_ND, of_first = _add_norm(self.attention_norm, hidden_ND, None, None)
        qkv_N3HD = raw_linear(self.qkv, normed_ND).view(len(hidden_ND), 3, self.num_heads, -1)
        rope.rotate_(qkv_N3HD, call.rotations[self.window > 0])
        qkv_N3D = qkv_N3HD.flatten(1) if with_qkv else None
        attended, of_attention = attention.forward(
            qkv_N3HD, call.layout, *self.dropout(call.seed), backend=call.backend, keep=keep, window=self.window
        )
        attended_ND = attended.flatten(1)
        kept_qkv = qkv_N3HD if keep else attended
        del qkv_N3HD  # a teacher, which has no backward, needs the memory now
        out_ND = raw_linear(self.attention_out, attended_ND)
        between_ND, between_normed_ND, of_last = _add_norm(self.ffn_norm, out_ND, hidden_ND, call.seed)
        gated_N2F = raw_linear(self.ffn_in, between_normed_ND)
        activated_NF = self._dropped(geglu.forward(gated_N2F), call.seed)
        # Where nobody else wants the stream the product is added to it where it lies, in one pass less.
        output_ND = linear.linear_add(activated_NF, operand(self.ffn_out.weight), between_ND, keep)
        if not keep:
            return output_ND, qkv_N3D, None
        first = (normed_ND, of_first, kept_qkv, attended_ND, of_attention)
        return output_ND, qkv_N3D, _Kept(*first, of_last, between_normed_ND, gated_N2F, activated_NF)

    def raw_backward(
        self, hidden_ND: Tensor, call: LayerCall, kept: _Kept, doutput_ND: Tensor, dhanded_N3D: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of the layer's input and, where autograd gets them, of its parameters in their order."""
        seed = call.seed
        doutput_ND = doutput_ND.contiguous()

        # The feed-forward half. What flows along the stream is added where the LayerNorm's gradient is made.
        of_ffn_out = weight_gradient(self.ffn_out.weight, doutput_ND, kept.activated_NF)
        dactivated_NF = self._dropped(linear.linear_dx(doutput_ND, operand(self.ffn_out.weight)), seed)
        dgated_N2F = geglu.backward(dactivated_NF, kept.gated_N2F)
        del dactivated_NF
        of_ffn_in = weight_gradient(self.ffn_in.weight, dgated_N2F, kept.between_ND)
        dnormed_ND = linear.linear_dx(dgated_N2F, operand(self.ffn_in.weight))
        del dgated_N2F
        dbetween_ND, dx_ND, of_ffn_norm = _add_norm_backward(self.ffn_norm, kept.ffn_norm, dnormed_ND, doutput_ND, seed)

        # The attention half.
        of_attention_out = weight_gradient(self.attention_out.weight, dx_ND, kept.attended_ND)
        dattended_ND = linear.linear_dx(dx_ND, operand(self.attention_out.weight))
        dqkv_N3HD = attention.backward(
            dattended_ND.view(kept.qkv_N3HD[:, 0].shape),
            kept.qkv_N3HD,
            kept.attended_ND.view(kept.qkv_N3HD[:, 0].shape),
            kept.attention,
            call.layout,
            *self.dropout(seed),
            backend=call.backend,
            dbias=None,
            accumulate=False,
            window=self.window,
        )
        del dx_ND, dattended_ND
        if dhanded_N3D is not None:
            dqkv_N3HD.add_(dhanded_N3D.view(dqkv_N3HD.shape))
        rope.rotate_(dqkv_N3HD, call.rotations[self.window > 0], inverse=True)
        dqkv_ND = dqkv_N3HD.flatten(1)
        of_qkv = weight_gradient(self.qkv.weight, dqkv_ND, kept.normed_ND)
        found = [of_qkv, of_attention_out, of_ffn_norm, of_ffn_in, of_ffn_out]
        if self.attention_norm is None:
            return [linear.linear_dx(dqkv_ND, operand(self.qkv.weight), dbetween_ND), *found]
        dnormed_ND = linear.linear_dx(dqkv_ND, operand(self.qkv.weight))
        first = _add_norm_backward(self.attention_norm, kept.attention_norm, dnormed_ND, dbetween_ND, None)
        return [first[0], first[2], *found]


def _add_norm(
    norm: LayerNorm, x_ND: Tensor, residual_ND: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(residual + dropout(x), its LayerNorm, what `_add_norm_backward` needs)."""
    return layernorm.add_forward(x_ND, residual_ND, operand(norm.weight), None, norm.eps, *norm.dropout(seed))


def _add_norm_backward(
    norm: LayerNorm, kept: tuple[Tensor, ...], dout_ND: Tensor, dsum_ND: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the residual, of x, which is the same tensor where nothing was dropped, and of the weight."""
    (dweight,), accumulate = destination(norm.weight)
    dresidual_ND, dx_ND = layernorm.add_backward(
        dout_ND.contiguous(),
        dsum_ND,
        kept,
        operand(norm.weight),
        *norm.dropout(seed),
        dweight=dweight,
        dbias=None,
        accumulate=accumulate,
    )
    return dresidual_ND, dx_ND, to_autograd(norm.weight, dweight)


class _Norm(Function):
    """LayerNorm(x), (N, D)."""

    @staticmethod
    def forward(ctx: Any, norm: LayerNorm, x_ND: Tensor, *_: Tensor) -> Tensor:
        _sum_ND, normed_ND, saved = _add_norm(norm, x_ND, None, None)
        ctx.norm = norm
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return normed_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dout: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, _, of_weight = _add_norm_backward(ctx.norm, ctx.saved_tensors, dout[0], None, None)
        return None, dx_ND, of_weight


class _Embeddings(Function):
    """dropout(LayerNorm(word)), (N, D)."""

    @staticmethod
    def forward(ctx: Any, encoder: Any, ids: Tensor, seed: Tensor | None, *_: Tensor) -> Tensor:
        norm = encoder.embedding_norm
        words = operand(encoder.word_embeddings.weight)
        out_ND, saved = embedding.forward(
            ids, None, words, None, None, operand(norm.weight), None, norm.eps, seed, encoder.dropout_p
        )
        ctx.encoder = encoder
        ctx.save_for_backward(*saved, ids, seed)
        ctx.set_materialize_grads(False)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dout: Tensor) -> tuple[Tensor | None, ...]:
        norm, words = ctx.encoder.embedding_norm, ctx.encoder.word_embeddings
        *saved, ids, seed = ctx.saved_tensors
        (dweight,), accumulate = destination(norm.weight)
        dword_ND = embedding.backward(
            dout[0].contiguous(),
            tuple(saved),
            operand(norm.weight),
            seed,
            ctx.encoder.dropout_p,
            dweight=dweight,
            dbias=None,
            accumulate=accumulate,
        )
        of_words = table_gradient(words.weight, dword_ND, ids, words.padding_idx)
        return None, None, None, of_words, to_autograd(norm.weight, dweight)


class ModernBertEncoder(Encoder):
    """Word embeddings, pre-norm layers that see everything or a window, and a last LayerNorm."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.embedding_norm = LayerNorm(architecture)
        self.num_layers = architecture.num_layers
        self.layers = nn.ModuleList(ModernBertLayer(architecture, index) for index in range(self.num_layers))
        self.final_norm = LayerNorm(architecture)
        self.head_dim = architecture.hidden_size // architecture.num_heads
        self.thetas = architecture.global_theta, architecture.local_theta

    def embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """Input of the first layer, (N, D). The definition, as ModernBertLayer.forward is."""
        embedded_ND = self.embedding_norm(self.word_embeddings(input_ids_N))
        return dropout(embedded_ND, dropout_seed, stream=0, dropout_p=self.dropout_p)

    def raw_embedded(self, input_ids_N: Tensor, position_ids_N: Tensor, dropout_seed: Tensor | None) -> Tensor:
        """`embedded` as one function."""
        parameters = self.word_embeddings.weight, self.embedding_norm.weight
        return _Embeddings.apply(self, input_ids_N, dropout_seed, *parameters)  # type: ignore[return-value]

    def rotations(self, position_ids_N: Tensor) -> tuple[Tensor, ...]:
        """Of the layers that see everything and of those that see a window, (N, 2, D / 2H) each."""
        return tuple(rope.rotations(position_ids_N, self.head_dim, theta) for theta in self.thetas)

    def ended(self, hidden_ND: Tensor, *, by_modules: bool) -> Tensor:
        """LayerNorm of the stream, (N, D)."""
        if by_modules:
            return self.final_norm(hidden_ND)
        return _Norm.apply(self.final_norm, hidden_ND, self.final_norm.weight)  # type: ignore[return-value]

    def initial_deviation(self, name: str) -> float:
        """Less where a matrix adds to the stream, as transformers has it: the sum of all layers stays as large."""
        adds = name.endswith(("attention_out.weight", "ffn_out.weight", "head.dense.weight"))
        return INITIALIZER_RANGE / (2 * self.num_layers) ** 0.5 if adds else INITIALIZER_RANGE
