"""An export as its users load it, its tokenizer the shards': transformers 5 and 4.57, sentence-transformers, ONNX."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch.nn import functional

from fastdistil.data import tokenizer
from fastdistil.export import write_hugging_face_folder
from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.architecture import Architecture
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.sentence import Pooling
from fastdistil.model.weights import load_masked_lm
from tests.support import clients, models, toy
from tests.support.launch import ROOT
from tests.support.vocabularies import KINDS, PAIRS, TEXTS

FAMILIES = {"distilbert": 0, "bert": 2, "bert-one-type": 1}
"""Students -> rows of their token-type table; the kinds of WordPiece take turns."""
EMBEDDERS = {
    "bert": (0, Pooling(mode="mean", normalise=True, max_length=24)),
    "bert-cased": (0, Pooling(mode="cls", normalise=False, max_length=None)),
    "bert-accents": (12, Pooling(mode="cls", normalise=True, max_length=24)),
    "roberta": (24, Pooling(mode="mean", normalise=True, max_length=512)),
    "modernbert": (0, Pooling(mode="cls", normalise=True, max_length=None)),
}
"""Kind of tokenizer -> width of a projection, and the pooling, of a student of embeddings on it."""


def student(kind: str, words: Path) -> Architecture:
    ids = tokenizer.special_ids(words)
    name = list(FAMILIES)[list(KINDS).index(kind) % len(FAMILIES)]
    roberta = ids["cls"] == 0
    architecture = Architecture(
        model_type="roberta" if roberta else name.partition("-")[0],
        vocab_size=len(tokenizer.read_vocabulary(words)),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_size=32,
        max_positions=96,
        token_types=1 if roberta else FAMILIES[name],
        pad_id=ids["pad"],
    )
    return replace(architecture, **toy.MODERNBERT, num_layers=4) if kind == "modernbert" else architecture


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """KIND/shards, as prepare writes it from such a folder, and KIND, the export of a student on it."""
    root = tmp_path_factory.mktemp("clients")
    for kind, write in KINDS.items():
        source, words, out = write(root / "sources" / kind), root / "shards" / kind, root / "exports" / kind
        made, names = tokenizer.load(source), tokenizer.special_tokens(source)
        tokenizer.save(made, words, names=names, max_length=32, source=tokenizer.settings(source))
        out.mkdir(parents=True)
        architecture = student(kind, words)
        model = MaskedLM(architecture, generator=torch.Generator().manual_seed(5))
        for parameter in model.parameters():
            parameter.data.mul_(5.0)  # so that one word answers best
        write_hugging_face_folder(model.state_dict(), architecture, words, out)
    return root


def embedder(kind: str, words: Path) -> MaskedLM:
    architecture = replace(student(kind, words), mlm_head=False, embedding_size=EMBEDDERS[kind][0])
    model = MaskedLM(architecture, generator=torch.Generator().manual_seed(6)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # so that tokens and positions show
    return model


@pytest.fixture(scope="module")
def embedders(exports) -> Path:
    """KIND, the export of a student of embeddings."""
    root = exports / "embedders"
    for kind, (_, pooling) in EMBEDDERS.items():
        words, out = exports / "shards" / kind, root / f"{kind}-embeddings"
        out.mkdir(parents=True)
        model = embedder(kind, words)
        write_hugging_face_folder(model.state_dict(), model.architecture, words, out, pooling)
    return root


@pytest.fixture(scope="module")
def old(exports, embedders) -> dict:
    """What transformers 4.57 and its clients say of all exports: one process, for importing them takes seconds."""
    if not (clients.OLD / "transformers").is_dir():
        pytest.fail(
            f"no transformers 4.57 in {clients.OLD}: run `make setup`, "
            "which installs it from tests/transformers-4.57.txt"
        )
    out = exports / "old"
    out.mkdir()
    command = [sys.executable, "-m", "tests.support.clients", str(out)]
    path = {"PYTHONPATH": f"{clients.OLD}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    folders = [str(exports / "exports" / kind) for kind in ["bert", "roberta", *(set(KINDS) - {"bert", "roberta"})]]
    folders += map(str, embedders.iterdir())
    done = subprocess.run([*command, *folders], env=os.environ | path, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "told.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("release", ["5", "4.57"])
def test_what_transformers_makes_of_an_export(exports, kind, release, request):
    folder, words = exports / "exports" / kind, exports / "shards" / kind
    told = clients.ask(folder) if release == "5" else request.getfixturevalue("old")["told"][kind]
    assert told["release"].startswith(f"{release}.")
    shards, ids = Tokenizer.from_file(str(words / "tokenizer.json")), tokenizer.special_ids(words)
    for text, found in zip(TEXTS, told["ids"], strict=True):
        assert found == shards.encode(text).ids, text
    assert told["pairs"] == [shards.encode(*pair).ids for pair in PAIRS]

    architecture = student(kind, words)
    types = ["token_type_ids"] if architecture.token_types > 1 else []
    assert told["inputs"] == ["input_ids", *types, "attention_mask"]
    assert told["max_length"] == told["truncated"] == architecture.max_positions
    assert told["size"] == architecture.vocab_size
    assert told["finite"]
    mask = tokenizer.special_tokens(words)["mask"]
    encoded = shards.encode(f"the old {mask} quiet").ids
    model, length = load_masked_lm(folder, need_head=True).eval(), len(encoded)
    with torch.no_grad():
        logits = model(torch.tensor(encoded), torch.arange(length), sequence_layout([length], "cpu"))
    torch.testing.assert_close(torch.tensor(told["logits"]), logits, rtol=0, atol=2e-5)
    assert told["answer"] == int(logits[encoded.index(ids["mask"])].argmax())
    assert told["other_keys"] == {}


def test_names_and_classes(exports, old):
    def told(kind: str) -> dict:
        return old["told"][kind]

    classes = {kind: told(kind)["class"] for kind in KINDS}
    own = ["bert", "bert-cased", "bert-accents", "bert-no-chinese", "renamed"]
    assert [kind for kind, name in classes.items() if name != "PreTrainedTokenizerFast"] == own
    assert (classes["bert"], classes["bert-cased"]) == ("DistilBertTokenizerFast", "BertTokenizerFast")
    assert told("added")["special"]["additional_special_tokens"] == ["<extra>"]
    assert "bos_token" not in told("added")["special"]  # transformers would add it, beyond the model's vocabulary
    assert told("unigram")["special"]["bos_token"] == "<s>"
    assert told("unigram")["special"]["eos_token"] == "</s>"
    assert (exports / "exports" / "bert" / "vocab.txt").is_file()
    assert not (exports / "exports" / "digits" / "vocab.txt").exists()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_sentence_transformers(exports, old, kind):
    folder = exports / "exports" / kind
    found, older = clients.embed(folder), old["embedded"][kind]
    shards = Tokenizer.from_file(str(exports / "shards" / kind / "tokenizer.json"))
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    for text, embedding, before in zip(TEXTS[:3], found, older, strict=True):
        with torch.no_grad():
            states = encoder(torch.tensor([shards.encode(text).ids])).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(embedding), states.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(before), states.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", EMBEDDERS)
@pytest.mark.parametrize("release", ["6", "5.7"])
def test_an_export_of_embeddings(exports, embedders, kind, release, request):
    """Ours, of the model that was exported: encoder, pooling, projection, length."""
    folder, words = embedders / f"{kind}-embeddings", exports / "shards" / kind
    found = clients.embeddings(folder) if release == "6" else request.getfixturevalue("old")["embedders"][folder.name]
    model, (size, pooling) = embedder(kind, words), EMBEDDERS[kind]
    read = min(pooling.max_length or 96, 96)
    tokens, sep = Tokenizer.from_file(str(words / "tokenizer.json")), tokenizer.special_ids(words)["sep"]
    for text, got in zip(clients.LONG_TEXTS, found["embeddings"], strict=True):
        ids = tokens.encode(text).ids
        ids = torch.tensor(ids if len(ids) <= read else [*ids[: read - 1], sep])
        with torch.no_grad():
            states = model.encoder(ids, torch.arange(len(ids)), sequence_layout([len(ids)], "cpu"))
        wanted = states.mean(0) if pooling.mode == "mean" else states[0]
        if size:
            assert model.projection is not None
            wanted = model.projection.weight.detach() @ wanted
        wanted = functional.normalize(wanted, dim=0) if pooling.normalise else wanted
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=1e-5, atol=1e-5)
    dense, normalize = ["Dense"] * bool(size), ["Normalize"] * pooling.normalise
    assert found["modules"] == ["Transformer", "Pooling", *dense, *normalize]
    assert (found["max_length"], found["similarity"], found["other_keys"]) == (read, "cosine", {})
    assert found["class"] == model.architecture.family.encoder
    named = json.loads((folder / "config.json").read_text())["architectures"]
    assert named == [found["class"]]


def test_a_modernbert_that_transformers_4_wrote(exports, old):
    """Other words in config.json, the same tensors and numbers."""
    folder = exports / "old" / "modernbert"
    assert "global_attn_every_n_layers" in (folder / "config.json").read_text()
    ours = load_masked_lm(folder, need_head=True).eval()
    assert ours.architecture.global_every == 2
    with torch.no_grad():
        got = ours(*models.packed(clients.LENGTHS, 101))
    torch.testing.assert_close(got, torch.load(exports / "old" / "logits"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_onnx(old, kind):
    assert old["onnx"][kind] < 1e-4
