"""Folders of sentence-transformers: the pooling of what it writes, old and new, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch.nn import functional

from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.architecture import Architecture
from fastdistil.model.sentence import Pooling, read_max_length, read_pooling, write_modules
from fastdistil.model.weights import load_masked_lm
from tests.support import vocabularies
from tests.support.models import MINILM, save_random

MEAN = Pooling(mode="mean", normalise=True, max_length=256)


@pytest.fixture
def folder(tmp_path) -> Path:
    """all-MiniLM-L6-v2 without its weights, as sentence-transformers 2 wrote it."""
    return Path(shutil.copytree(MINILM, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "onnx")))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def set_modules(folder: Path, *kinds: str) -> None:
    record = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(record))


def test_a_model_of_the_first_releases(folder):
    assert read_pooling(folder) == MEAN


def test_a_model_of_todays_release(tmp_path):
    """Other module paths, a string for the mode, and the length in the tokenizer's file."""
    model = SentenceTransformer(str(MINILM), device="cpu")
    model[1].pooling_mode = "cls"  # pyright: ignore[reportArgumentType]
    model.save(str(tmp_path))
    assert "pooling_mode_mean_tokens" not in (tmp_path / "1_Pooling" / "config.json").read_text()
    assert read_pooling(tmp_path) == Pooling(mode="cls", normalise=True, max_length=model.max_seq_length)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_embeddings_of_a_real_teacher(mode):
    """sentence-transformers' and ours of the same folder: our encoder on one packed micro-batch, pooled, normalised."""
    texts = ["A river runs through the old town.", "Ein Fluss.", "the quiet river " * 200]
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    theirs[1].pooling_mode = mode
    pooling, model = read_pooling(MINILM), load_masked_lm(MINILM, need_head=False, with_head=False).eval()
    assert pooling == MEAN
    tokens = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokens.no_padding()
    tokens.enable_truncation(256)
    ids = [encoding.ids for encoding in tokens.encode_batch(texts)]
    lengths = [len(sequence) for sequence in ids]
    assert lengths[-1] == 256
    flat = torch.tensor([token for sequence in ids for token in sequence])
    with torch.no_grad():
        positions = torch.cat([torch.arange(n) for n in lengths])
        hidden = model.encoder(flat, positions, sequence_layout(lengths, "cpu")).split(lengths)
    ours = torch.stack([states.mean(0) if mode == "mean" else states[0] for states in hidden])
    wanted = theirs.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(functional.normalize(ours), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_embeddings_of_a_modernbert(mode, tmp_path):
    """A folder as those of Granite R2, gte-modernbert and nomic: byte-level BPE, long texts."""
    encoder = vocabularies.modernbert(tmp_path / "encoder")
    tokens = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    save_random("ModernBertModel", encoder, vocab_size=tokens.get_vocab_size() + 3, pad_token_id=4)
    theirs = SentenceTransformer(str(encoder), device="cpu")
    theirs[1].pooling_mode = mode
    theirs.save(str(tmp_path / "model"))
    pooling = read_pooling(tmp_path / "model")
    assert pooling == Pooling(mode=mode, normalise=False, max_length=512)
    model = load_masked_lm(tmp_path / "model", need_head=False, with_head=False).eval()
    texts = ["A river runs\n\n    through the old town.", "Ein Fluss.", "the quiet river " * 200]
    ids = [torch.tensor(tokens.encode(text).ids) for text in texts]
    assert len(ids[-1]) > 512
    ids[-1] = torch.cat([ids[-1][:511], ids[-1][-1:]])
    lengths = [len(sequence) for sequence in ids]
    with torch.no_grad():
        positions = torch.cat([torch.arange(n) for n in lengths])
        hidden = model.encoder(torch.cat(ids), positions, sequence_layout(lengths, "cpu")).split(lengths)
    ours = torch.stack([states.mean(0) if mode == "mean" else states[0] for states in hidden])
    wanted = theirs.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_a_folder_that_says_nothing(folder):
    (folder / "modules.json").unlink()
    assert read_pooling(folder) is None
    assert read_max_length(folder) is None


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_what_is_written_is_read(tmp_path, mode, normalise):
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "ffn_size": 8}
    architecture = Architecture(**sizes, max_positions=128, token_types=2, mlm_head=False)
    pooling = Pooling(mode=mode, normalise=normalise, max_length=100)
    write_modules(tmp_path, pooling, architecture)
    assert read_pooling(tmp_path) == pooling
    write_modules(tmp_path, replace(pooling, max_length=None), architecture)
    assert read_pooling(tmp_path) == replace(pooling, max_length=128)


def test_cls_without_normalisation_or_length(folder):
    set_modules(folder, "Transformer", "Pooling")
    change(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    change(folder / "tokenizer_config.json", model_max_length=int(1e30))
    assert read_pooling(folder) == Pooling(mode="cls", normalise=False, max_length=None)


def test_an_encoder_in_a_folder_of_its_own(folder, monkeypatch):
    inside = folder / "0_Transformer"
    inside.mkdir()
    for name in ("config.json", "sentence_bert_config.json", "tokenizer_config.json"):
        (folder / name).rename(inside / name)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0] | {"path": "0_Transformer"}, *modules[1:]]))
    assert read_pooling(inside) == MEAN
    monkeypatch.chdir(inside)
    assert read_pooling(Path()) == MEAN
    with pytest.raises(ValueError, match=r"keeps its encoder in a folder of its own: give .*/model/0_Transformer$"):
        read_pooling(folder)


def flags(*modes: str) -> Callable[[Path], None]:
    off = {"pooling_mode_mean_tokens": False}
    return lambda f: change(f / "1_Pooling" / "config.json", **off, **{f"pooling_mode_{m}": True for m in modes})


def pooling(**values: Any) -> Callable[[Path], None]:
    return lambda f: change(f / "1_Pooling" / "config.json", **values)


def modules(*kinds: str) -> Callable[[Path], None]:
    return lambda f: set_modules(f, *kinds)


def other(name: str, **values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        change(folder / name, **values)

    return write


WANTED_MODE = "wanted the pooling mode mean or cls, one of them, got "


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (flags("max_tokens"), WANTED_MODE + "max: "),
        (flags("mean_sqrt_len_tokens"), WANTED_MODE + "mean_sqrt_len_tokens: "),
        (flags("weightedmean_tokens"), WANTED_MODE + "weightedmean: "),
        (flags("lasttoken"), WANTED_MODE + "lasttoken: it is not computed here, use another model"),
        (flags("cls_token", "max_tokens"), WANTED_MODE + "cls and max: "),
        (pooling(pooling_mode=["cls", "mean"]), WANTED_MODE + "cls and mean: "),
        (pooling(pooling_mode=7), WANTED_MODE + "7: "),
        (pooling(include_prompt=False), "wanted include_prompt true, got False: set it where your texts have no"),
        (modules("Transformer", "Pooling", "Dense"), "got Transformer, Pooling, Dense: leave the others out"),
        (modules("Transformer", "LSTM", "Pooling"), "got Transformer, LSTM, Pooling"),
        (modules("Transformer"), "wanted the modules Transformer, Pooling and perhaps Normalize, got Transformer: "),
        (modules(), "got none: "),
        (other("2_Normalize/config.json", module_input_name="token_embeddings"), "got module_input_name 'token_emb"),
        (other("config_sentence_transformers.json", truncate_dim=64), "wanted truncate_dim None, got truncate_dim 64"),
        (other("config_sentence_transformers.json", default_prompt_name="query"), "got default_prompt_name 'query'"),
        (other("sentence_bert_config.json", transformer_task="fill-mask"), "wanted transformer_task 'feature-extr"),
        (other("sentence_bert_config.json", max_seq_length="long"), "wanted max_seq_length of 3 tokens or more, got"),
        (other("sentence_bert_config.json", max_seq_length=2), "or more, got 2: set it to what the model reads"),
        (lambda f: (f / "modules.json").write_text("[{"), "modules.json is not readable as JSON"),
        (lambda f: (f / "modules.json").write_text("{}"), "modules.json must hold a JSON array, got dict"),
        (lambda f: (f / "modules.json").write_text('["x"]'), "wanted a list of modules with type and path, got 'x'"),
        (lambda f: (f / "1_Pooling" / "config.json").write_text("7"), "must hold a JSON object, got int"),
        (lambda f: shutil.rmtree(f / "1_Pooling"), r"1_Pooling/config\.json does not exist: download the model again"),
    ],
)
def test_what_is_refused(folder, breakage, message):
    breakage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_pooling(folder)


def test_a_module_of_somebody_else(folder):
    record = json.loads((folder / "modules.json").read_text())
    record[1]["type"] = "custom_code.Pooling"
    (folder / "modules.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"got Transformer, custom_code\.Pooling, Normalize"):
        read_pooling(folder)
