"""The packed encoder and its MLM head: equal to transformers, tied, seeded, and right about its padding."""

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdistil.kernels.dropout import keep_reference, new_dropout_seed
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.architecture import Architecture
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.functions import LayerCall
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import hugging_face_state, load_masked_lm
from tests.support import toy
from tests.support.models import MINILM, one_by_one, packed, random_model, save_random

SMALL = Architecture(
    vocab_size=101, hidden_size=60, num_layers=2, num_heads=3, ffn_size=77, max_positions=64, token_types=2
)
HEADS = ["BertForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"]
MODERN = replace(SMALL, **toy.MODERNBERT | {"dropout": 0.1, "attention_dropout": 0.1, "local_attention": 4})
DISTIL = replace(SMALL, model_type="distilbert", token_types=0)


def _model(architecture=SMALL, **options):
    """A model whose parameters are all random, biases and LayerNorms too."""
    model = MaskedLM(architecture, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            if name in ("encoder.word_embeddings.weight", "head.bias"):
                parameter[architecture.vocab_size :] = 0
    return model


@pytest.mark.parametrize(
    ("class_name", "sizes"),
    [
        ("BertForMaskedLM", {}),
        ("BertForMaskedLM", {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
        ("BertForMaskedLM", {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}),
        ("BertForPreTraining", {"vocab_size": 128}),
        ("DistilBertForMaskedLM", {}),
        ("DistilBertForMaskedLM", {"dim": 36, "n_heads": 12, "n_layers": 3, "vocab_size": 64}),
        ("ModernBertForMaskedLM", {"local_attention": 128}),
        ("ModernBertForMaskedLM", {"local_attention": 2, "num_hidden_layers": 4, "norm_eps": 1e-6}),
        ("ModernBertForMaskedLM", {"hidden_size": 66, "num_attention_heads": 11, "vocab_size": 128}),
        ("ModernBertForMaskedLM", {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}),
        ("ModernBertForMaskedLM", {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]}),
    ],
    ids=str,
)
def test_equals_transformers(class_name, sizes, tmp_path):
    """Traps 6 (eps, erf), 7 (order of the head) and 8 (token type 0) of the recipe; sequences of 1 to 512 tokens.

    By functions and by modules, with either attention that a CPU has.
    """
    theirs = save_random(class_name, tmp_path, **sizes)
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    lengths = [1, 512, 2, 17, 17, 128, 3, 64]
    ids, positions, layout = packed(lengths, theirs.config.vocab_size)
    hidden, logits = one_by_one(theirs, ids, lengths)
    for backend, by_modules in product(("fused", "sdpa"), (False, True)):
        ours.encoder.attention_backend, ours.encoder.by_modules, ours.head.by_modules = backend, by_modules, by_modules
        with torch.no_grad():
            got = ours.encoder(ids, positions, layout)
            torch.testing.assert_close(got, hidden, rtol=0, atol=2e-5)
            torch.testing.assert_close(ours.head(got), logits, rtol=0, atol=2e-5)
            assert torch.equal(ours(ids, positions, layout), ours.head(got))


def test_equals_transformers_on_minilm():
    import transformers

    theirs = transformers.AutoModel.from_pretrained(MINILM).eval()
    ours = load_masked_lm(MINILM, need_head=False).eval()
    lengths = [1, 300, 12, 12, 128, 512, 3]
    ids, positions, layout = packed(lengths, 30522)
    hidden, _ = one_by_one(theirs, ids, lengths)
    with torch.no_grad():
        got = ours.encoder(ids, positions, layout)
    torch.testing.assert_close(got, hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize("class_name", HEADS)
def test_every_gradient_equals_transformers(class_name, tmp_path):
    theirs = save_random(class_name, tmp_path)
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    lengths = [40, 3]
    ids, positions, layout = packed(lengths, 101)
    ids[7] = ours.architecture.pad_id  # [PAD], whose row gets no gradient as an input
    labels = ids.roll(1)
    F.cross_entropy(ours(ids, positions, layout), labels).backward()
    for x, y in zip(ids.split(lengths), labels.split(lengths), strict=True):
        (F.cross_entropy(theirs(input_ids=x[None]).logits[0], y, reduction="sum") / 43).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    got = hugging_face_state(gradients, ours.architecture)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", ["fused", "sdpa"])
@pytest.mark.parametrize("class_name", HEADS)
def test_equals_transformers_with_each_attention_backend(class_name, backend, tmp_path):
    theirs = save_random(class_name, tmp_path)
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    ours.encoder.attention_backend = backend
    lengths = [1, 33, 2, 17, 17]
    ids, positions, layout = packed(lengths, 101)
    _, logits = one_by_one(theirs, ids, lengths)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, positions, layout), logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("class_name", HEADS)
def test_dropout_is_where_transformers_has_it(class_name, tmp_path, monkeypatch):
    """Their model with our masks in the order of its dropouts gives our logits and gradients in training mode."""
    dropped = ("embedding_dropout", "attention_dropout", "mlp_dropout")  # 0 in a ModernBERT that says nothing
    sizes = dict.fromkeys(dropped, 0.1) if class_name.startswith("Modern") else {}
    theirs = save_random(class_name, tmp_path, attn_implementation="eager", **sizes).train()
    ours = load_masked_lm(tmp_path, need_head=True).train()
    ours.encoder.attention_backend = "fused"
    is_distil = class_name == "DistilBertForMaskedLM"
    # Streams as encoder.py numbers them; a DistilBERT has no dropout after the attention's projection.
    streams = [0] + [s for i in range(5) for s in range(3 * i + 1, 3 * i + 4) if not is_distil or s % 3 != 2]
    ids, positions, layout = packed([24], 101)
    torch.manual_seed(0)
    seed = new_dropout_seed("cpu")
    calls = iter(streams)

    def dropout(x, p=0.5, training=True, inplace=False):
        stream, four = next(calls), x if x.ndim == 4 else x[None]
        index = torch.arange(four.shape[2])
        columns = torch.arange(four.shape[3])
        heads = torch.arange(four.shape[1])
        assert p == 0.1
        assert training
        kept = keep_reference(seed, stream, p, heads, index, columns)
        return x * kept.view(x.shape) / (1 - p)

    with monkeypatch.context() as patched:
        patched.setattr(F, "dropout", dropout)
        wanted = theirs(input_ids=ids[None]).logits[0]
    assert next(calls, None) is None
    F.cross_entropy(wanted, ids).backward()
    torch.manual_seed(0)
    got = ours(ids, positions, layout)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    F.cross_entropy(got, ids).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, gradient in hugging_face_state(gradients, ours.architecture).items():
        exact = dict(theirs.named_parameters())[name].grad
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=2e-6, msg=name)


def test_layer_norm_eps_and_its_statistics():
    """Trap 6: an eps of 1e-12 shows on small values, and bf16 statistics would lose it."""
    model = _model()
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    norm = model.encoder.embedding_norm
    x = 1e-6 * torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) + 1e-5
    exact = F.layer_norm(x.bfloat16().double(), (60,), norm.weight.double(), norm.bias.double(), 1e-12)
    got = copy.deepcopy(norm).bfloat16()(x.bfloat16())
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)


def test_bf16_is_near_fp32():
    model = _model().eval()
    ids, positions, layout = packed([20, 5], 101)
    with torch.no_grad():
        exact = model.encoder(ids, positions, layout)
        got = copy.deepcopy(model).bfloat16().encoder(ids, positions, layout)
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float(), exact).min() > 0.999


def test_token_type_zero_is_added():
    """Trap 8: to every position of a BERT; row 1 is never used, and a DistilBERT has no table."""
    model = _model().eval()
    ids, positions, layout = packed([6, 3], 101)
    before = model.encoder(ids, positions, layout)
    table = model.encoder.token_type_embeddings
    assert table is not None
    with torch.no_grad():
        table.weight[1] += torch.arange(60)
    assert torch.equal(model.encoder(ids, positions, layout), before)
    with torch.no_grad():
        table.weight[0] += torch.arange(60)  # not one constant: LayerNorm would take that away again
    assert ((model.encoder(ids, positions, layout) - before).abs().amax(1) > 0.1).all()
    assert not any("token_type" in name for name in MaskedLM(DISTIL).state_dict())


def test_padded_vocabulary():
    """Trap 9: rows beyond the vocabulary are zero, appear in no logits and get no gradient."""
    model = _model()
    weight, bias = model.head.weight, model.head.bias
    assert len(weight) == len(bias) == 128
    ids, positions, layout = packed([6, 3], 101)
    logits = model(ids, positions, layout)
    assert logits.shape == (9, 101)
    F.cross_entropy(logits, ids).backward()
    for parameter in (weight, bias):
        assert parameter.grad is not None
        assert not parameter[101:].any()
        assert not parameter.grad[101:].any()
        assert parameter.grad[:101].any()


def test_tied_decoder():
    """Trap 10: one parameter for the optimiser, its gradient the sum of both uses, one key in the state dict."""
    model = _model().eval()
    model.encoder.attention_backend = "fused"  # PyTorch's own goes back once
    words = model.encoder.word_embeddings.weight
    assert model.head.weight is words
    assert sum(p is words for p in model.parameters()) == 1
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]

    ids, positions, layout = packed([6, 3], 101)
    hidden = model.encoder(ids, positions, layout)
    loss = model.head(hidden).square().sum()
    (whole,) = torch.autograd.grad(loss, words, retain_graph=True)
    (as_decoder,) = torch.autograd.grad(model.head(hidden.detach()).square().sum(), words)
    (dhidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (as_input,) = torch.autograd.grad(hidden, words, dhidden)
    torch.testing.assert_close(whole, as_decoder + as_input, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_state_dict_goes_round_also_inside_another_module(architecture):
    model, other = _model(architecture), MaskedLM(architecture)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    outer = nn.ModuleDict({"student": model})
    assert "student.head.weight" not in outer.state_dict()
    outer.load_state_dict(outer.state_dict())
    incomplete = {k: v for k, v in model.state_dict().items() if "word_embeddings" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.word_embeddings\.weight"):
        other.load_state_dict(incomplete)


def test_reduce_runs_inside_the_head():
    model = _model().eval()
    hidden = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))

    def logits_of(transformed, weight, bias):
        assert (tuple(weight.shape), tuple(bias.shape)) == ((128, 60), (128,))
        return (transformed @ weight.T + bias)[:, :101]

    torch.testing.assert_close(model.head(hidden, logits_of), model.head(hidden))


def test_initial_weights():
    """Drawn from the generator alone; BERT's standard deviation, zero biases, unit LayerNorms."""
    torch.manual_seed(1)
    first = MaskedLM(SMALL, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    again = MaskedLM(SMALL, generator=torch.Generator().manual_seed(5))
    other = MaskedLM(SMALL, generator=torch.Generator().manual_seed(6))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if name.endswith("bias"):
            assert not a.any()
        elif "norm" in name:
            assert (a == 1).all()
        else:
            real = a[:101] if "word" in name else a
            assert not torch.equal(a, c)
            assert real.std().item() == pytest.approx(0.02, rel=0.25)  # 120 numbers in the smallest
    assert first.training


def test_parameter_count_is_the_architectures():
    for architecture in (SMALL, MODERN, replace(DISTIL, vocab_size=128, num_layers=3)):
        model = MaskedLM(architecture)
        padding = (architecture.padded_vocab_size - architecture.vocab_size) * (architecture.hidden_size + 1)
        assert sum(p.numel() for p in model.parameters()) - padding == architecture.num_parameters


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_activation_checkpointing_changes_nothing(architecture, training):
    plain, saving = _model(architecture).train(training), _model(architecture).train(training)
    saving.encoder.activation_checkpointing = True
    ids, positions, layout = packed([6, 3], 101)
    results = []
    for model in (plain, saving):
        torch.manual_seed(0)
        logits = model(ids, positions, layout)
        F.cross_entropy(logits, ids).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_random_numbers_are_drawn_in_training_only(architecture):
    model = _model(architecture).eval()
    batch = packed([6, 3], 101)
    before = torch.get_rng_state()
    first = model(*batch)
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    torch.manual_seed(0)
    dropped = model(*batch)
    torch.manual_seed(0)
    assert torch.equal(model(*batch), dropped)
    assert not torch.allclose(dropped, first)


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_a_seed_given_is_the_one_used(architecture):
    """It gives what the same number drawn would, and no generator is touched; in evaluation it drops nothing."""
    model, batch = _model(architecture).train(), packed([6, 3], 101)
    model.encoder.attention_backend = "fused"
    torch.manual_seed(0)
    drawn = model(*batch)
    torch.manual_seed(0)
    seed = new_dropout_seed("cpu")
    before = torch.get_rng_state()
    assert torch.equal(model(*batch, seed), drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model(*batch, seed + 1), drawn)
    model.eval()
    assert torch.equal(model(*batch, seed), model(*batch))


@pytest.mark.parametrize("by_modules", [False, True])
def test_kept_outputs_are_layers_in_the_order_asked_for_then_queries_keys_and_values(by_modules):
    model, batch = _model().eval(), packed([6, 3], 101)
    with torch.no_grad():
        model.encoder.by_modules = by_modules
        hidden, (last, first, qkv) = model.encoder(*batch, kept_outputs=KeptOutputs((1, 0), qkv=1))
        assert torch.equal(hidden, model.encoder(*batch))
        assert torch.equal(last, hidden)
        final: Any = model.encoder.layers[1]
        assert torch.equal(final(first, LayerCall(batch[2], None, "auto")), hidden)
        assert torch.equal(final.qkv(first), qkv)
        _, (earlier,) = model.encoder(*batch, kept_outputs=KeptOutputs(qkv=0))
        beginning: Any = model.encoder.layers[0]
        assert torch.equal(beginning.qkv(model.encoder.embedded(*batch[:2], None)), earlier)


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_trailing_pad_changes_nothing(architecture):
    """What packing leaves over is one more sequence, of no effect on the others or on any gradient they give."""
    model = _model(architecture).eval()
    ids, positions, layout = packed([6, 3], 101)
    padded_ids = torch.cat([ids, torch.zeros(5, dtype=ids.dtype)])
    padded_positions = torch.cat([positions, torch.arange(5)])
    padded_layout = sequence_layout([6, 3, 5], "cpu")
    grads = []
    for batch in ((ids, positions, layout), (padded_ids, padded_positions, padded_layout)):
        model.zero_grad()
        F.cross_entropy(model(*batch)[:9], ids).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_positions():
    model = _model()
    model.encoder.position_embeddings.requires_grad_(False)
    ids, positions, layout = packed([6, 3], 101)
    model(ids, positions, layout).sum().backward()
    assert model.encoder.position_embeddings.weight.grad is None
    assert model.encoder.word_embeddings.weight.grad is not None


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_training_with_fused_attention_is_one_graph(architecture):
    model = _model(architecture).train()
    model.encoder.attention_backend = "fused"
    compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
    batch = packed([5, 5, 7, 3], 101)
    results = []
    for encoder in (model.encoder, compiled):
        model.zero_grad()
        torch.manual_seed(0)
        hidden = encoder(*batch)
        hidden.square().sum().backward()
        results.append([hidden, *(p.grad for p in model.encoder.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("architecture", [SMALL, MODERN], ids=lambda x: x.model_type)
def test_compiles_once_for_all_layouts(architecture):
    """A token budget has one shape, so that no layout of it may compile the encoder again."""
    graphs = []
    graphs_of_first = 0

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = _model(architecture).eval()
    compiled = torch.compile(model.encoder, backend=backend)
    for i, lengths in enumerate(([5, 5, 7, 3], [20], [1, 19], [4] * 5)):
        ids, positions, layout = packed(lengths, 101, seed=i)
        torch.testing.assert_close(compiled(ids, positions, layout), model.encoder(ids, positions, layout))
        if i == 0:
            graphs_of_first = len(graphs)
    assert len(graphs) == graphs_of_first > 0


def test_swapped_head_would_be_noticed(tmp_path):
    """The comparison of the head is sharp enough: LayerNorm before GELU gives other logits (trap 7)."""
    ours = load_masked_lm(_saved(tmp_path), need_head=True).eval()
    hidden = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    swapped = F.gelu(ours.head.norm(ours.head.dense(hidden)))
    tanh = ours.head.norm(F.gelu(ours.head.dense(hidden), approximate="tanh"))
    for wrong in (swapped, tanh):
        logits = F.linear(wrong, ours.head.weight, ours.head.bias)[:, :101]
        assert (logits - ours.head(hidden)).abs().max() > 4e-5


def _saved(folder):
    random_model("DistilBertForMaskedLM").save_pretrained(folder)
    return folder
