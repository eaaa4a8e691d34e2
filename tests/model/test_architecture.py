"""Sizes, parameters and FLOPs, and what config.json may say."""

import json
import subprocess
import sys

import pytest
import transformers

from fastdistil.model.architecture import Architecture, flops_per_token, read_architecture
from fastdistil.model.families import FAMILIES
from tests.support.models import MINILM
from tests.support.toy import student_of

BERT_BASE = Architecture(
    vocab_size=30522, hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, max_positions=512, token_types=2
)


def _folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def _bert(**changes):
    return transformers.BertConfig().to_dict() | changes


def test_known_parameter_counts():
    # what transformers counts for bert-base-uncased and distilbert-base-uncased with their MLM heads
    assert BERT_BASE.num_parameters == 109_514_298
    assert student_of(BERT_BASE, num_layers=6).num_parameters == 66_985_530
    assert BERT_BASE.padded_vocab_size == 30528


def test_cost_model_of_performance_md():
    flops = flops_per_token(BERT_BASE, student_of(BERT_BASE, num_layers=6), lambda _window: 512)
    without_scores = flops_per_token(BERT_BASE, student_of(BERT_BASE, num_layers=6), lambda _window: 0)
    without_heads = flops_per_token(
        BERT_BASE, student_of(BERT_BASE, num_layers=6), lambda _window: 512, head_fraction=0
    )
    transforms = 4 * 2 * 768 * 768  # of the teacher's head and three times of the student's, in front of the vocabulary
    heads = flops.total - without_heads.total - transforms
    scores = flops.total - without_scores.total
    got = [round(x / 1e6) for x in (*flops, heads, scores, flops.total)]
    assert got == [237, 427, 188, 47, 664]


def test_flops_without_teacher_and_with_a_part_of_the_head():
    whole = flops_per_token(None, BERT_BASE, lambda _window: 512)
    part = flops_per_token(None, BERT_BASE, lambda _window: 512, head_fraction=0.15)
    assert whole.teacher == 0
    assert whole.total == whole.student == 3 * flops_per_token(BERT_BASE, BERT_BASE, lambda _window: 512).teacher
    head = 6 * 768 * (30522 + 768)
    assert whole.total - part.total == pytest.approx(0.85 * head)


@pytest.mark.parametrize("default", [transformers.BertConfig(), transformers.DistilBertConfig()])
def test_reads_what_transformers_writes(default, tmp_path):
    default.save_pretrained(tmp_path)
    got = read_architecture(tmp_path)
    is_bert = default.model_type == "bert"
    assert got == (BERT_BASE if is_bert else student_of(BERT_BASE, num_layers=6))


def test_reads_minilm():
    got = read_architecture(MINILM)
    assert (got.hidden_size, got.num_layers, got.num_heads, got.token_types) == (384, 6, 12, 2)


def test_every_field_is_read(tmp_path):
    bert = {
        "vocab_size": 101,
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 77,
        "max_position_embeddings": 50,
        "type_vocab_size": 4,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 7,
    }
    values = ("bert", 101, 60, 2, 3, 77, 50, 4, 0.2, 0.3, 1e-5, 7, True, 0, 0, 0, 0, 0)
    got = read_architecture(_folder(tmp_path, model_type="bert", **bert))
    assert tuple(getattr(got, name) for name in Architecture.__slots__) == values
    got = read_architecture(_folder(tmp_path, model_type="roberta", **bert))
    assert (got.max_positions, got.model_type) == (50 - 8, "roberta")  # positions begin at pad_id + 1
    # sinusoidal positions are stored as weights: nothing to compute
    distilbert = {"dim": 60, "n_layers": 2, "n_heads": 3, "hidden_dim": 77, "vocab_size": 101}
    more = {"max_position_embeddings": 50, "sinusoidal_pos_embds": True, "dropout": 0.2}
    got = read_architecture(_folder(tmp_path, model_type="distilbert", **distilbert, **more))
    assert (got.token_types, got.layer_norm_eps, got.dropout) == (0, 1e-12, 0.2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_bert(model_type="gpt2"), f"model_type must be one of {', '.join(FAMILIES)}, got 'gpt2': only these"),
        (_bert(hidden_act="gelu_new"), r"hidden_act must be 'gelu' \(exact erf.*'gelu_new'"),
        ({"model_type": "distilbert", "activation": "relu"}, "activation must be 'gelu'.*'relu'"),
        (_bert(position_embedding_type="relative_key"), "must be 'absolute', got 'relative_key'"),
        (_bert(is_decoder=True), "is_decoder must be false"),
        (_bert(add_cross_attention=True), "add_cross_attention must be false"),
        (_bert(num_attention_heads=7), "7 heads for a width of 768"),
        (_bert(hidden_size="768"), "hidden_size must be an integer of 1 or more, got '768'"),
        (_bert(num_hidden_layers=0), "num_hidden_layers must be an integer of 1 or more, got 0"),
        (_bert(vocab_size=True), "vocab_size must be an integer"),
        (_bert(type_vocab_size=0), "type_vocab_size must be an integer of 1 or more, got 0"),
        (_bert(hidden_dropout_prob=1), "hidden_dropout_prob must be a number of at least 0 and below 1"),
        (_bert(layer_norm_eps=float("nan")), "layer_norm_eps must be a number.*nan"),
        (_bert(pad_token_id=40000), "pad_token_id must lie below vocab_size 30522, got 40000"),
        ({"model_type": "bert"}, "has no 'vocab_size': a bert config.json must give it"),
        (_bert(max_position_embeddings=None), "has no 'max_position_embeddings': a bert config.json must give it"),
        (_bert(max_position_embeddings="512"), "max_position_embeddings must be an integer of 1 or more, got '512'"),
        (_bert(num_attention_heads=None), "has no 'num_attention_heads'"),
        (_bert(num_attention_heads=12.0), "num_attention_heads must be an integer of 1 or more, got 12.0"),
        (_bert(layer_norm_eps="1e-12"), "layer_norm_eps must be a number of at least 0 and below 1, got '1e-12'"),
        (_bert(model_type=None), "model_type must be one of .*, got None: add what the model is"),
        (_bert(model_type="electra"), "model_type must be one of .*, got 'electra': only these encoders"),
        (_bert(model_type="modernbert-decoder"), "one of .*, got 'modernbert-decoder': only these encoders"),
        (_bert(model_type="deberta-v2"), "got 'deberta-v2': its disentangled attention adds two products with rel"),
        *((_bert(hidden_act=name), "must be 'gelu'") for name in ("gelu_fast", "gelu_pytorch_tanh", "gelu_10", None)),
        ([1], "must hold a JSON object, got list"),
    ],
)
def test_refusals(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_architecture(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "bytes", "deep"])
def test_unreadable_config(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not readable as JSON"):
        read_architecture(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"not a Hugging Face folder: wanted config\.json in .*nowhere"):
        read_architecture(tmp_path / "nowhere")


def test_imports_nothing_but_the_standard_library():
    code = "import sys, fastdistil.model.architecture; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
