"""The fused operators over any shape, stride and dtype. A file of its own: the GPU machines have no hypothesis."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import test_attention, test_cosine, test_distill, test_layernorm, test_linear_distill
from tests.support.precision import DTYPES, INTERPRETED


@settings(max_examples=15 if INTERPRETED else 60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 2100)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["padded rows", "misaligned", "transposed"]),
    seed=st.integers(0, 10),
)
def test_distill_of_any_layout(shape, dtype, layout, seed):
    N, V = shape
    leaves = test_distill.make_leaves(shape, dtype, seed=seed)
    for name in ("student_NV", "teacher_NV"):
        contiguous = leaves[name].detach()
        if layout == "padded rows":
            strided = contiguous.new_zeros(N, V + 5)[:, :V]
        elif layout == "misaligned":
            strided = contiguous.new_zeros(N * V + 1)[1:].view(N, V)
        else:
            strided = contiguous.new_zeros(V, N).t()
        leaves[name] = strided.copy_(contiguous).requires_grad_(leaves[name].requires_grad)
    test_distill.check(leaves)


@settings(max_examples=15 if INTERPRETED else 60, deadline=None)
@given(
    shape=st.tuples(st.integers(8, 40), st.integers(8, 300)),
    dtype=st.sampled_from(DTYPES),
    contiguous=st.booleans(),
    seed=st.integers(0, 10),
)
def test_cosine_of_any_shape_and_layout(shape, dtype, contiguous, seed):
    leaves = test_cosine.make_leaves(shape if contiguous else shape[::-1], dtype, seed)
    if not contiguous:
        leaves = {k: x.detach().t().requires_grad_(x.requires_grad) for k, x in leaves.items()}
    test_cosine.check(leaves)


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(
    num_tokens=st.integers(1, 30),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    num_columns=st.integers(1, 200),
    chunk_tokens=st.integers(1, 40),
    data=st.data(),
)
def test_linear_distill_of_any_shape(num_tokens, widths, num_columns, chunk_tokens, data):
    leaves = test_linear_distill.make_leaves(num_tokens, widths=widths, num_columns=num_columns)
    vocab_size = data.draw(st.integers(1, num_columns))
    leaves["labels_N"].clamp_(max=vocab_size - 1)
    test_linear_distill.check(leaves, chunk_tokens=chunk_tokens, vocab_size=vocab_size)


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=2 if INTERPRETED else 6),
    heads=st.integers(1, 3),
    width=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    dropout=st.booleans(),
)
def test_attention_of_any_lengths_and_heads(lengths, heads, width, dtype, dropout):
    leaves = test_attention.make_leaves(lengths, dtype, heads=heads, width=width)
    test_attention.check(lengths, leaves, **(test_attention.dropout() if dropout else {}))


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(16, 300)),  # three values may be nearly equal
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(list(test_layernorm.OPTIONS.values())),
    seed=st.integers(0, 10),
)
def test_layernorm_of_any_shape(shape, dtype, options, seed):
    test_layernorm.check(test_layernorm.make_leaves(shape, dtype, seed), **options)
