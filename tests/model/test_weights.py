"""Hugging Face folders in and out, and a student from its teacher: nothing missing, nothing guessed."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastdistil.export import write_hugging_face_folder
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import (
    hugging_face_config,
    hugging_face_state,
    load_masked_lm,
    start_head,
    student_from_teacher,
)
from tests.support import toy
from tests.support.models import MINILM, one_by_one, packed, random_model, save_random
from tests.support.toy import student_of

CLASSES = ["BertModel", "BertForMaskedLM", "BertForPreTraining", "DistilBertModel", "DistilBertForMaskedLM"]


def _hidden(model, ids, positions, layout):
    with torch.no_grad():
        return model.eval().encoder(ids, positions, layout)


def _as_bin(folder, model, rename=lambda key: key):
    """The folder as old releases of transformers wrote it: a pickled state dict with aliases and buffers."""
    (folder / "model.safetensors").unlink()
    state = {rename(k): v for k, v in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")


def _edit(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_reads_every_class(class_name, kind, tmp_path):
    model = save_random(class_name, tmp_path)
    if kind == "bin":
        _as_bin(tmp_path, model)
    elif kind == "sharded":
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = load_masked_lm(tmp_path, need_head=not class_name.endswith("Model"))
    lengths = [5, 1, 9]
    batch = packed(lengths, 101)
    hidden, logits = one_by_one(model, batch[0], lengths)
    torch.testing.assert_close(_hidden(ours, *batch), hidden, rtol=0, atol=2e-5)
    if logits is not None:
        torch.testing.assert_close(ours(*batch), logits, rtol=0, atol=2e-5)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert not ours.head.weight[101:].any()


@pytest.mark.parametrize("class_name", ["BertModel", "DistilBertModel"])
def test_encoder_saved_with_its_prefix(class_name, tmp_path):
    """Keys `bert.encoder...` in a folder without a head."""
    model = save_random(class_name, tmp_path)
    plain = load_masked_lm(tmp_path, need_head=False).state_dict()
    prefix = "bert." if class_name == "BertModel" else "distilbert."
    _as_bin(tmp_path, model, lambda key: prefix + key)
    prefixed = load_masked_lm(tmp_path, need_head=False).state_dict()
    assert all(torch.equal(plain[k], prefixed[k]) for k in plain)


def test_old_names_gamma_and_beta(tmp_path):
    model = save_random("BertForPreTraining", tmp_path)
    wanted = load_masked_lm(tmp_path, need_head=True).state_dict()

    def old(key):
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    _as_bin(tmp_path, model, old)
    got = load_masked_lm(tmp_path, need_head=True).state_dict()
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)


def test_half_precision_weights_become_fp32(tmp_path):
    random_model("BertForMaskedLM").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_masked_lm(tmp_path, need_head=True).parameters()} == {torch.float32}


def test_no_head_names_the_mlm_recipe(tmp_path):
    with pytest.raises(
        ValueError, match=r"masked-LM head in .*model, got \['BertModel'\] without one.*pretrain mlm --student\.init"
    ):
        load_masked_lm(MINILM, need_head=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    folder = tmp_path
    save_random("BertModel", folder)
    a, b, c = (load_masked_lm(folder, need_head=False, generator=g).head.dense.weight for g in generators)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_started_head_knows_the_frequencies_at_once():
    """Its loss is their entropy, as far below ln(V) as that says; what else it has is the identity."""
    model = MaskedLM(toy.architecture()).eval()
    size = model.architecture.vocab_size
    p = 1 / torch.arange(1.0, size + 1, dtype=torch.float64)
    p /= p.sum()
    start_head(model, p)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(p, 4000, replacement=True, generator=generator)
    ids = torch.randint(size, (4000,), generator=generator)
    with torch.no_grad():
        logits = model(ids, torch.arange(40).repeat(100), sequence_layout([40] * 100))
    loss, entropy = torch.nn.functional.cross_entropy(logits, labels).item(), -(p * p.log()).sum().item()
    assert loss == pytest.approx(entropy, abs=0.05)
    assert loss < math.log(size) - 0.5
    assert model.head is not None
    assert torch.equal(model.head.dense.weight, torch.eye(32))
    assert not model.head.bias[size:].any()  # the padding of the vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cls.predictions.bias"), r"1 missing \(cls\.predictions\.bias\)"),
        (
            lambda t: t.pop("bert.encoder.layer.3.attention.self.key.bias"),
            r"1 missing \(bert\.encoder\.layer\.3\.attention\.self\.key\.bias\)",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.0.adapter.weight": torch.ones(2)}),
            r"1 unexpected \(bert\.encoder\.layer\.0\.adapter\.weight\)",
        ),
        (lambda t: [t.update({f"student.{k}": t.pop(k)}) for k in list(t)], r"masked-LM head in"),
        (
            lambda t: t.update({"bert.encoder.layer.5.output.dense.bias": torch.ones(60)}),
            r"1 unexpected \(bert\.encoder\.layer\.5\.output\.dense\.bias\)",
        ),
        (
            lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.ones(100, 60)}),
            r"word_embeddings\.weight must be floats of shape \(101, 60\).*got float32 of shape \(100, 60\)",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.0.attention.self.query.weight": torch.ones(60, 61)}),
            r"query\.weight must be floats of shape \(60, 60\)",
        ),
        (
            lambda t: t.update({"cls.predictions.bias": torch.ones(101, dtype=torch.int64)}),
            r"cls\.predictions\.bias must be floats.*got int64",
        ),
        (
            lambda t: t.update({"bert.embeddings.position_embeddings.weight": torch.tensor(1.0)}),
            r"position_embeddings\.weight must be floats of shape \(512, 60\).*got float32 of shape \(\)",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(101, 60)}),
            "decoder.weight differs from .*only an MLM head whose decoder is tied",
        ),
        (
            lambda t: t.update({"bert.embeddings.LayerNorm.gamma": torch.ones(60)}),
            r"holds bert\.embeddings\.LayerNorm\.weight twice",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    save_random("BertForMaskedLM", tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_masked_lm(tmp_path, need_head=True)


def test_missing_and_damaged_files(tmp_path):
    model = save_random("BertForMaskedLM", tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_masked_lm(tmp_path, need_head=True)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights in .*: wanted model\.safetensors"):
        load_masked_lm(tmp_path, need_head=True)
    torch.save(list(model.state_dict().values()), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a state dict, names to tensors, got list"):
        load_masked_lm(tmp_path, need_head=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="holds more than tensors or is damaged"):
        load_masked_lm(tmp_path, need_head=True)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": 3}}'],
)
def test_hostile_index(content, tmp_path):
    folder = tmp_path / "model"
    save_random("BertForMaskedLM", folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"not an index of weight files|must name files beside itself"):
        load_masked_lm(folder, need_head=True)


class _Trap:
    """Its pickle makes a folder when it is loaded unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    save_random("BertForMaskedLM", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    planted = tmp_path / "executed"
    for legacy in (False, True):
        torch.save(
            {"bert.x": _Trap(str(planted))}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(ValueError, match="refused, because it holds more than tensors"):
            load_masked_lm(tmp_path, need_head=True)
        assert not planted.exists()


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    save_random("BertForMaskedLM", tmp_path)
    torch.save({"x": _Trap(str(tmp_path / "executed"))}, tmp_path / "pytorch_model.bin")
    load_masked_lm(tmp_path, need_head=True)
    assert not (tmp_path / "executed").exists()


# A student from its teacher ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_random("BertForMaskedLM", folder)
    return load_masked_lm(folder, need_head=True)


@pytest.mark.parametrize("copy_transform", [True, False])
def test_student_from_teacher(teacher, copy_transform):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    architecture = student_of(teacher.architecture, num_layers=3)
    student = student_from_teacher(
        teacher, [0, 4, 2], architecture, copy_transform=copy_transform, generator=torch.Generator().manual_seed(9)
    )
    fresh = MaskedLM(architecture, generator=torch.Generator().manual_seed(9)).state_dict()
    for name, tensor in student.state_dict().items():
        wanted = before.get(name)
        if name.startswith("encoder.layers."):
            _, _, index, rest = name.split(".", 3)
            wanted = before[f"encoder.layers.{(0, 4, 2)[int(index)]}.{rest}"]
        elif name.startswith(("head.dense", "head.norm")) and not copy_transform:
            wanted = fresh[name]
        assert wanted is not None
        assert torch.equal(tensor, wanted), name
    assert student.encoder.token_type_embeddings is None
    assert student.head.weight is student.encoder.word_embeddings.weight
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "the teacher shares memory"


def test_student_that_stays_a_bert_keeps_token_types(teacher):
    architecture = replace(teacher.architecture, dropout=0.0)
    student = student_from_teacher(teacher, range(5), architecture, copy_transform=True)
    batch = packed([4, 7], 101)
    assert torch.equal(_hidden(student, *batch), _hidden(teacher, *batch))


@pytest.mark.parametrize("of", ["toy", "MiniLM"])
def test_folded_token_types_give_the_same_hidden_states(of, tmp_path):
    """A DistilBERT with all layers of a BERT is that BERT, and without folding it is not."""
    folder = MINILM if of == "MiniLM" else tmp_path
    if of == "toy":
        save_random("BertModel", folder)
    teacher = load_masked_lm(folder, need_head=False, with_head=False)
    num_layers = teacher.architecture.num_layers
    architecture = student_of(teacher.architecture, num_layers=num_layers)
    batch = packed([2, 31, 1, 60], teacher.architecture.vocab_size)
    wanted = _hidden(teacher, *batch)
    for fold in (True, False):
        student = student_from_teacher(
            teacher, range(num_layers), architecture, copy_transform=False, fold_token_types=fold
        )
        error = (_hidden(student, *batch) - wanted).norm() / wanted.norm()
        assert (error < 2e-6) == fold, error  # another order of additions: 1.3e-6 after the six layers of MiniLM
    assert student.head is None  # as the teacher, which has none


@pytest.mark.parametrize("class_name", ["BertModel", "DistilBertForMaskedLM"])
def test_a_model_is_read_without_its_head(class_name, tmp_path):
    save_random(class_name, tmp_path)
    has_head = class_name.endswith("LM")
    whole, bare = (load_masked_lm(tmp_path, need_head=has_head and x, with_head=x) for x in (True, False))
    assert bare.head is None
    assert bare.architecture == replace(whole.architecture, mlm_head=False)
    assert {n for n in whole.state_dict() if not n.startswith("head.")} == bare.state_dict().keys()
    padding = 60 * (bare.architecture.padded_vocab_size - 101)
    assert bare.architecture.num_parameters == sum(p.numel() for p in bare.parameters()) - padding
    batch = packed([5, 1, 9], 101)
    assert torch.equal(_hidden(bare, *batch), _hidden(whole, *batch))
    bare.load_state_dict(bare.state_dict())


@pytest.mark.parametrize(("has", "wants"), [(1, 1), (1, 3), (16, 16), (16, 2)])
def test_a_table_of_token_types_of_any_size(has, wants, tmp_path):
    """Rows that the teacher has not are its row 0, so that a text whose second half is of type 1 reads as before."""
    save_random("BertForMaskedLM", tmp_path / "teacher", type_vocab_size=has, num_hidden_layers=2)
    teacher = load_masked_lm(tmp_path / "teacher", need_head=True)
    student = student_from_teacher(
        teacher, range(2), replace(teacher.architecture, token_types=wants), copy_transform=True
    )
    table = teacher.state_dict()["encoder.token_type_embeddings.weight"]
    got = student.state_dict()["encoder.token_type_embeddings.weight"]
    assert len(got) == wants
    for row in range(wants):
        assert torch.equal(got[row], table[row if row < has else 0])
    batch = packed([4, 7], 101)
    assert torch.equal(_hidden(student, *batch), _hidden(teacher, *batch))
    (tmp_path / "out").mkdir()
    write_hugging_face_folder(student.state_dict(), student.architecture, MINILM, tmp_path / "out")
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (type(theirs).__name__, theirs.config.type_vocab_size) == ("BertForMaskedLM", wants)
    assert not any(info[key] for key in info), info


@pytest.mark.parametrize("layers", [[0, 1, 5], [0, 1], [0, 1, 2, 3], [-1, 0, 1]], ids=str)
def test_layer_map_must_fit(teacher, layers):
    architecture = student_of(teacher.architecture, num_layers=3)
    with pytest.raises(
        ValueError, match="must name 3 layers, one for each of the student's, from 0 to 4 of the teacher"
    ):
        student_from_teacher(teacher, layers, architecture, copy_transform=False)


@pytest.mark.parametrize(
    "change",
    [{"ffn_size": 60}, {"num_heads": 4}, {"vocab_size": 100}, {"model_type": "roberta", "token_types": 1}],
    ids=str,
)
def test_sizes_must_fit(teacher, change):
    architecture = replace(student_of(teacher.architecture, num_layers=1), **change)
    with pytest.raises(ValueError, match="must have the teacher's widths, heads, vocabulary, positions and windows"):
        student_from_teacher(teacher, [0], architecture, copy_transform=False)


# Out again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "DistilBertForMaskedLM"])
def test_round_trip_through_transformers(class_name, tmp_path):
    """Traps 9 and 10: transformers loads the folder with nothing missing or left over, and gives our logits."""
    save_random(class_name, tmp_path / "in")
    ours = load_masked_lm(tmp_path / "in", need_head=True).eval()
    out = tmp_path / "out"
    out.mkdir()
    write_hugging_face_folder(ours.state_dict(), ours.architecture, MINILM, out)

    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == class_name
    assert not any(info[key] for key in info), info
    lengths = [5, 1, 9]
    ids, positions, layout = packed(lengths, 101)
    _, logits = one_by_one(theirs.eval(), ids, lengths)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, positions, layout), logits, rtol=0, atol=2e-5)

    again = load_masked_lm(out, need_head=True)
    assert again.architecture == ours.architecture
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Hello world")["input_ids"] == [101, 7592, 2088, 102]
    assert theirs.config.pad_token_id == 0


def test_exported_names_and_shapes():
    architecture = student_of(load_masked_lm(MINILM, need_head=False).architecture, num_layers=1)
    state = hugging_face_state(MaskedLM(architecture).state_dict(), architecture)
    assert state["vocab_projector.bias"].shape == (30522,)
    assert state["distilbert.embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert "vocab_projector.weight" not in state
    for name in ("q_lin", "k_lin", "v_lin"):
        assert state[f"distilbert.transformer.layer.0.attention.{name}.weight"].shape == (384, 384)
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    config = hugging_face_config(architecture)
    assert config["sinusoidal_pos_embds"] is False
    assert config["vocab_size"] == 30522


def test_export_refusals(teacher, tmp_path):
    architecture = teacher.architecture
    with pytest.raises(ValueError, match="a DistilBERT, whose layer_norm_eps is 1e-12, got 1e-05"):
        replace(architecture, model_type="distilbert", token_types=0, layer_norm_eps=1e-5)
    with pytest.raises(ValueError, match="a DistilBERT, whose token_types is 0, got 2"):
        replace(architecture, model_type="distilbert")
    incomplete = {k: v for k, v in teacher.state_dict().items() if k != "head.bias"}
    with pytest.raises(ValueError, match=r"not the weights of this architecture: 1 missing \(head\.bias\)"):
        hugging_face_state(incomplete, architecture)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        write_hugging_face_folder(teacher.state_dict(), architecture, tmp_path, tmp_path)


def test_old_position_ids_are_ignored(tmp_path):
    shutil.copytree(MINILM, tmp_path, dirs_exist_ok=True)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    _edit(tmp_path, lambda t: t.update({"embeddings.position_ids": torch.arange(512)[None]}))
    load_masked_lm(tmp_path, need_head=False)
