"""ModernBERT: transformers' numbers at every length and window, under both of its releases; its folders and configs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdistil.model import headers
from fastdistil.model.architecture import Architecture, read_architecture
from fastdistil.model.encoder import KeptOutputs
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import (
    hugging_face_config,
    hugging_face_state,
    load_masked_lm,
    student_from_teacher,
    write_model,
)
from tests.support.models import MODERNBERT, one_by_one, packed, save_random

LENGTHS = [1, 90, 2, 17, 33]
HUB: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
"""A config.json of ModernBERT-base's shape, in the words of the release that it was published with."""


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({name: value for name, value in (said | changes).items() if value is not ...}))
    return folder


def largest_error(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted.double()).abs().max().item()


# --- the same numbers


@pytest.mark.parametrize("window", [2, 16, 128])
def test_sequences_of_1_to_8192_tokens_packed_together(window, tmp_path, one_thread):
    """All at once here, each alone in transformers; at the far end angles are at their largest."""
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 20}
    theirs = save_random(
        "ModernBertForMaskedLM", tmp_path, **sizes, max_position_embeddings=8192, local_attention=window
    )
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    lengths = [1, 129, 8192, 2, 1000, 64]
    ids, positions, layout = packed(lengths, 101)
    hidden, logits = one_by_one(theirs, ids, lengths)
    for backend in ("fused", "sdpa"):
        ours.encoder.attention_backend = backend
        with torch.no_grad():
            got = ours.encoder(ids, positions, layout)
            torch.testing.assert_close(got, hidden, rtol=0, atol=2e-5)
            torch.testing.assert_close(ours.head(got), logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        *({"local_attention": 18}, {"local_attention": 14}, {"global_every": 2}, {"global_every": 6}),
        *({"global_theta": 170000.0}, {"local_theta": 10500.0}, {"layer_norm_eps": 1e-3}),
    ],
    ids=str,
)
def test_every_field_of_its_own_shows_in_its_numbers(change, tmp_path):
    """Else parity would say nothing of them: a window of one token more on either side is another model."""
    save_random("ModernBertForMaskedLM", tmp_path)
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    other = MaskedLM(replace(ours.architecture, **change)).eval()
    theirs = ours.state_dict()
    other.load_state_dict({name: theirs.get(name, value) for name, value in other.state_dict().items()})
    inputs = packed(LENGTHS, 101)
    with torch.no_grad():
        assert largest_error(other(*inputs), ours(*inputs)) > 1e-4


def test_bf16_is_no_worse_than_transformers(tmp_path):
    theirs = save_random("ModernBertForMaskedLM", tmp_path)
    ours = load_masked_lm(tmp_path, need_head=True).eval()
    ids, positions, layout = packed(LENGTHS, 101)
    _, exact = one_by_one(theirs.double(), ids, LENGTHS)
    _, own = one_by_one(theirs.bfloat16(), ids, LENGTHS)
    assert exact is not None
    assert own is not None
    for by_modules in (False, True):
        ours.encoder.by_modules = ours.head.by_modules = by_modules
        with torch.no_grad():
            got = ours.bfloat16()(ids, positions, layout)
        assert largest_error(got, exact) <= 2 * largest_error(own, exact)


@pytest.mark.parametrize("by_modules", [False, True])
def test_layers_are_handed_out_normalised_and_queries_and_keys_rotated(by_modules, tmp_path):
    theirs = save_random("ModernBertModel", tmp_path, attn_implementation="eager")
    ours = load_masked_lm(tmp_path, need_head=False).eval()
    ours.encoder.by_modules = by_modules
    ids, positions, layout = packed([40], 101)
    with torch.no_grad():
        wanted = theirs(input_ids=ids[None], output_hidden_states=True, output_attentions=True)
        for layer in range(5):
            asked = KeptOutputs((4, layer), qkv=layer)
            hidden, (last, kept, qkv) = ours.encoder(ids, positions, layout, kept_outputs=asked)
            assert torch.equal(last, hidden)
            stream = wanted.hidden_states[layer + 1][0]
            normed = stream if layer == 4 else theirs.final_norm(stream)
            torch.testing.assert_close(kept, normed, rtol=0, atol=2e-5)
            query, key, _ = qkv.view(40, 3, 3, 20).permute(1, 2, 0, 3)
            index = torch.arange(40)
            outside = (index - index[:, None]).abs() > (8 if layer % 3 else 40)
            scores = (query @ key.mT / math.sqrt(20)).masked_fill(outside, -math.inf)
            torch.testing.assert_close(scores.softmax(-1), wanted.attentions[layer][0], rtol=0, atol=1e-5)


def test_fresh_weights_are_spread_as_transformers_spreads_them(tmp_path):
    """Less where a matrix adds to the stream. Theirs are cut off at two standard deviations: 0.88 of one is left."""
    sizes: dict[str, Any] = MODERNBERT | {"hidden_size": 240}
    transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes)).save_pretrained(tmp_path)
    ours = MaskedLM(read_architecture(tmp_path), generator=torch.Generator().manual_seed(0))
    fresh, told = hugging_face_state(ours.state_dict(), ours.architecture), load_file(tmp_path / "model.safetensors")
    matrices = [name for name, value in told.items() if value.ndim > 1 and name != WORDS]
    assert len(matrices) == 4 * 5 + 1
    for name in matrices:
        assert told[name].std() / fresh[name].std() == pytest.approx(0.88, rel=0.03), name
    assert fresh[WORDS].std() == pytest.approx(0.02, rel=0.03)


# --- folders


def test_the_hubs_config(tmp_path):
    """As it was published, as transformers 5 writes it again, and as we do: one architecture, of transformers' size."""
    folders = [tmp_path / name for name in ("hub", "today", "ours")]
    for folder in folders:
        folder.mkdir()
    configure(folders[0], **HUB)
    config = transformers.ModernBertConfig.from_pretrained(folders[0])
    config.save_pretrained(folders[1])
    configure(folders[1], global_attn_every_n_layers=...)  # which stays beside the list that stands for it
    configure(folders[2], **hugging_face_config(read_architecture(folders[0])))
    first, *others = map(read_architecture, folders)
    assert others == [first] * 2
    with torch.device("meta"):
        model = transformers.ModernBertForMaskedLM(config)
    assert first.num_parameters == sum(p.numel() for p in model.parameters())
    kinds = ["sliding_attention" if first.window(i) else "full_attention" for i in range(22)]
    assert kinds == config.layer_types
    again = transformers.ModernBertConfig.from_pretrained(folders[2])
    assert (again.layer_types, again.rope_parameters) == (config.layer_types, config.rope_parameters)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"layer_types": ["full_attention"] * 4}, 1),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 3]}, 4),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, 2),
        ({"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}, 3),
    ],
    ids=str,
)
def test_the_distance_between_global_layers_is_read_off_their_list(said, wanted, tmp_path):
    assert read_architecture(configure(tmp_path, **HUB | said | {"num_hidden_layers": 4})).global_every == wanted


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"local_rope_theta": None}, (160000.0, 160000.0)),
        ({"local_rope_theta": ..., "global_rope_theta": ...}, (160000.0, 10000.0)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, (7.0, 10000.0)),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 7.0, "rope_type": "default"}}}, (160000.0, 7.0)),
    ],
    ids=str,
)
def test_thetas(said, wanted, tmp_path):
    found = read_architecture(configure(tmp_path, **HUB | said))
    assert (found.global_theta, found.local_theta) == wanted


def test_a_student_of_half_its_layers_is_a_modernbert(tmp_path):
    save_random("ModernBertForMaskedLM", tmp_path, num_hidden_layers=8)
    teacher = load_masked_lm(tmp_path, need_head=True)
    half = replace(teacher.architecture, num_layers=4)
    student = student_from_teacher(teacher, (0, 2, 4, 6), half, copy_transform=True).eval()
    bare = MaskedLM(replace(half, mlm_head=False)).eval()
    bare.encoder.load_state_dict(student.encoder.state_dict())
    inputs = packed(LENGTHS, 101)
    for model, kind in ((student, "ModernBertForMaskedLM"), (bare, "ModernBertModel")):
        out = tmp_path / kind
        out.mkdir()
        write_model(model.state_dict(), model.architecture, out)
        theirs, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        hidden, logits = one_by_one(theirs.eval(), inputs[0], LENGTHS)
        with torch.no_grad():
            torch.testing.assert_close(model.encoder(*inputs), hidden, rtol=0, atol=2e-5)
            if logits is not None:
                torch.testing.assert_close(model(*inputs), logits, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="must have the teacher's widths, heads, vocabulary, positions and windows"):
        student_from_teacher(teacher, (0, 3, 4, 6), half, copy_transform=True)  # layer 3 sees everything


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
WORDS = "model.embeddings.tok_embeddings.weight"


def prefixed(prefix: str) -> Change:
    return lambda state: {prefix + name: value for name, value in state.items()}


SHAPES: dict[str, Change] = {
    "DistributedDataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "Lightning": prefixed("model."),
    "layers compiled": lambda s: {name.replace("layers.1.", "layers.1._orig_mod."): v for name, v in s.items()},
    "an equal decoder": lambda s: s | {"decoder.weight": s[WORDS].clone()},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_every_shape_is_the_same_model(shape, pickled, tmp_path):
    theirs = save_random("ModernBertForMaskedLM", tmp_path)
    file = tmp_path / "model.safetensors"
    state = SHAPES[shape](load_file(file))
    if pickled:
        file.unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, file)
    found = headers.match(tmp_path, read_architecture(tmp_path), headers.read_headers(tmp_path), need_head=True)
    assert found.left_out == ()
    ids, positions, layout = packed(LENGTHS, 101)
    _, logits = one_by_one(theirs, ids, LENGTHS)
    with torch.no_grad():
        got = load_masked_lm(tmp_path, need_head=True).eval()(ids, positions, layout)
    torch.testing.assert_close(got, logits, rtol=0, atol=2e-5)


def without(name: str) -> Change:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"decoder.weight": s[WORDS] + 1}, "whose decoder is tied to the word embeddings is supported"),
        (without("head.norm"), r"1 missing \(head.norm.weight\)"),
        (without("model.final_norm"), r"1 missing \(model.final_norm.weight\)"),
        (lambda s: s | {"model.layers.0.attn_norm.weight": torch.ones(60)}, r"1 unexpected \(model.layers.0.attn_no"),
        (lambda s: s | {"model.layers.1.attn.Wqkv.bias": torch.ones(180)}, r"1 unexpected \(model.layers.1.attn.Wq"),
        (lambda s: s | {"model.layers.1.mlp.Wi.weight": torch.ones(77, 60)}, r"floats of shape \(154, 60\) according"),
        (without("decoder"), r"masked-LM head in .*\['ModernBertForMaskedLM'\] without one: train a head with the mlm"),
    ],
)
def test_other_tensors_are_refused_by_name(change, message, tmp_path):
    save_random("ModernBertForMaskedLM", tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_masked_lm(tmp_path, need_head=True)


def test_a_decoder_of_its_own_that_is_missing(tmp_path):
    save_random("ModernBertForMaskedLM", tmp_path)
    configure(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"says that tie_word_embeddings is false, and has no decoder\.weight"):
        load_masked_lm(tmp_path, need_head=True)


EXACTLY = "such a model cannot be computed exactly here, use another checkpoint"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_attention": 127}, "local_attention must be even, half of it on either side of a token, got 127"),
        ({"local_attention": 0}, "local_attention must be an integer of 1 or more, got 0"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be an integer of 1 or more, got 0"),
        ({"global_rope_theta": -1.0}, "global_rope_theta must be a number of at least 1 and below inf, got -1.0"),
        ({"local_rope_theta": "many"}, "local_rope_theta must be a number of at least 1 and below inf, got 'many'"),
        ({"hidden_activation": "silu"}, rf"hidden_activation must be 'gelu' \(exact erf\), got 'silu': {EXACTLY}"),
        ({"classifier_activation": "relu"}, rf"classifier_activation must be 'gelu' .*, got 'relu': {EXACTLY}"),
        ({"attention_bias": True}, f"attention_bias must be false, got True: {EXACTLY}"),
        ({"mlp_bias": True}, f"mlp_bias must be false, got True: {EXACTLY}"),
        ({"norm_bias": True}, f"norm_bias must be false, got True: {EXACTLY}"),
        ({"classifier_bias": True}, f"classifier_bias must be false, got True: {EXACTLY}"),
        ({"decoder_bias": False}, f"decoder_bias must be true, got False: {EXACTLY}"),
        ({"layer_types": ["sliding_attention"] * 22}, f"layer_types must name num_hidden_layers .*: {EXACTLY}"),
        (
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 20},
            f"those of full_attention at one distance from the first on, got .*: {EXACTLY}",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, f"rope_type 'default', got .*'yarn'.*: {EXACTLY}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, f"rope_type 'default', got .*'linear'.*: {EXACTLY}"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            f"rope_type 'default', got .*'linear'.*: {EXACTLY}",
        ),
        ({"hidden_size": 60}, "num_attention_heads must leave heads of an even width, .* got 12 heads for a width"),
        ({"num_attention_heads": 11}, "num_attention_heads must divide hidden_size, got 11 heads for a width of 768"),
        ({"layer_types": ["full_attention"]}, "layer_types must name num_hidden_layers layers, those of full_atten"),
        ({"rope_parameters": ["linear"]}, r"must have the rope_type 'default', got \['linear'\]"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_architecture(configure(tmp_path, **HUB | change))


def test_sizes_of_another_family():
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "ffn_size": 4}
    sizes |= {"max_positions": 4, "token_types": 2}
    with pytest.raises(ValueError, match="this is a BERT, whose global_every is 0, got 3: its config"):
        Architecture(**sizes, global_every=3)
    sizes |= {"global_every": 1, "local_attention": 2, "global_theta": 1.0, "local_theta": 1.0}
    with pytest.raises(ValueError, match="this is a ModernBERT, whose token_types is 0, got 2"):
        Architecture(**sizes, model_type="modernbert")
