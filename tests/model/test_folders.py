"""Folders of other people's making: the same model in every shape that one meets, and what is refused, by the headers.

What the headers say must be what loading says: each folder goes through both.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastdistil.model import headers
from fastdistil.model.architecture import read_architecture
from fastdistil.model.weights import load_masked_lm
from tests.support import forked, runs
from tests.support.models import one_by_one, packed, random_model

State = dict[str, torch.Tensor]
Change = Callable[[Path], object]
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 32}
LENGTHS = [5, 1, 9]


def check(folder: Path, *, need_head: bool = True) -> headers.Contents:
    """What preflight does with a model: its sizes and its headers, and no weight."""
    return headers.match(folder, read_architecture(folder), headers.read_headers(folder), need_head=need_head)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("BertForMaskedLM", **SMALL)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A BERT as transformers writes it today; a test may spoil it."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, state: State, *, metadata: dict[str, str] | None = None) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata=metadata)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(rename: Callable[[str], str]) -> Change:
    return lambda folder: rewrite(folder, {rename(k): v for k, v in state_of(folder).items()})


def as_bin(folder: Path, state: Any = None, **options: Any) -> None:
    state = state_of(folder) if state is None else state
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", **options)


def as_bin_of_parameters(folder: Path) -> None:
    as_bin(folder, {k: torch.nn.Parameter(v) for k, v in state_of(folder).items()})


def as_bin_of_tied_tensors(folder: Path) -> None:
    """As transformers wrote them before safetensors: the decoder and its bias once more, in the same memory."""
    state = state_of(folder)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    big = state["bert.embeddings.word_embeddings.weight"].repeat(40, 1)  # or the pickle's own bytes hide a wrong sum
    state["bert.embeddings.word_embeddings.weight"] = state["cls.predictions.decoder.weight"] = big[:101]
    as_bin(folder, state, _use_new_zipfile_serialization=False)


def as_bin_shards(folder: Path) -> None:
    state = state_of(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({k: v for k, v in state.items() if files[k] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def with_an_equal_decoder(folder: Path) -> None:
    state = state_of(folder)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    rewrite(folder, state)
    configure(folder, tie_word_embeddings=False)


def with_the_decoders_bias_alone(folder: Path) -> None:
    state = state_of(folder)
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    rewrite(folder, state)


def with_buffers(folder: Path) -> None:
    ids = torch.arange(32)[None]
    buffers = {"bert.embeddings.position_ids": ids, "bert.embeddings.token_type_ids": torch.zeros_like(ids)}
    rewrite(folder, state_of(folder) | buffers)


def as_the_hubs_cache(folder: Path) -> None:
    """Links into a folder of blobs, which are named by their hash."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


GOOD: dict[str, Change] = {
    "as it was": lambda folder: None,
    "DistributedDataParallel": renamed("module.{}".format),
    "torch.compile": renamed("_orig_mod.{}".format),
    "both": renamed("_orig_mod.module.{}".format),
    "Lightning": renamed("model.{}".format),
    "layers compiled": renamed(lambda key: key.replace("layer.1.", "layer.1._orig_mod.")),
    "pickle": as_bin,
    "pickle before torch 1.6": lambda folder: as_bin(folder, _use_new_zipfile_serialization=False),
    "pickle of parameters": as_bin_of_parameters,
    "pickle of tied tensors": as_bin_of_tied_tensors,
    "pickle in bf16": lambda folder: as_bin(folder, {k: v.bfloat16() for k, v in state_of(folder).items()}),
    "pickles with an index": as_bin_shards,
    "no metadata": lambda folder: rewrite(folder, state_of(folder)),
    "fp16": lambda folder: rewrite(folder, {k: v.half() for k, v in state_of(folder).items()}),
    "fp64": lambda folder: rewrite(folder, {k: v.double() for k, v in state_of(folder).items()}),
    "gelu_python": lambda folder: configure(folder, hidden_act="gelu_python"),
    "buffers": with_buffers,
    "an equal decoder": with_an_equal_decoder,
    "the decoder's bias alone": with_the_decoders_bias_alone,
    "the hub's cache": as_the_hubs_cache,
    "sentence-transformers": lambda folder: (folder / "modules.json").write_text("[]"),
}


@pytest.mark.parametrize("shape", GOOD)
def test_every_shape_is_the_same_model(model, folder, shape):
    GOOD[shape](folder)
    assert check(folder).left_out == ()
    ours = load_masked_lm(folder, need_head=True).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ids, positions, layout = packed(LENGTHS, 101)
    _, logits = one_by_one(model, ids, LENGTHS)
    assert logits is not None
    half = any(word in shape for word in ("bf16", "fp16"))  # the weights themselves are rounded
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, positions, layout), logits, rtol=0, atol=0.3 if half else 2e-5)


TASKS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "XLMRoberta", "Camembert", "ModernBert"])
@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_another_task_is_left_out_by_name(family, task, tmp_path):
    theirs = random_model(f"{family}For{task}", **({} if family == "DistilBert" else SMALL))
    theirs.save_pretrained(tmp_path)
    contents = check(tmp_path, need_head=False)
    assert not contents.has_head
    assert contents.left_out
    assert {name.split(".")[0] for name in contents.left_out} <= {
        *("classifier", "pre_classifier", "qa_outputs"),
        theirs.base_model_prefix,  # its pooler
        *(["head"] if family == "ModernBert" else []),  # under the names of the MLM head's, and the classifier's
    }
    ours = load_masked_lm(tmp_path, need_head=False).eval()
    ids, positions, layout = packed(LENGTHS, 101)
    hidden, _ = one_by_one(theirs.base_model, torch.where(ids == 1, 7, ids), LENGTHS)  # 1 is padding for some
    with torch.no_grad():
        got = ours.encoder(torch.where(ids == 1, 7, ids), positions, layout)
    torch.testing.assert_close(got, hidden, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=rf"masked-LM head in .*For{task}'\] without one: train a head with the mlm"):
        check(tmp_path)


def test_heads_beside_that_of_masked_lm_are_left_out_by_name(folder):
    rewrite(
        folder, state_of(folder) | {"cls.seq_relationship.weight": torch.ones(2, 60), "linear.weight": torch.ones(2)}
    )
    assert check(folder).left_out == ("cls.seq_relationship", "linear")
    load_masked_lm(folder, need_head=True)


def test_a_vocabulary_is_cut_to_its_tokenizers(model, folder):
    """Rows that no token has are not read; the others are what they were."""
    cut = load_masked_lm(folder, need_head=True, vocab_size=77).eval()
    assert (cut.architecture.vocab_size, len(cut.head.weight)) == (77, 128)
    assert not cut.head.weight[77:].any()
    assert not cut.head.bias[77:].any()
    ids, positions, layout = packed(LENGTHS, 77)
    _, logits = one_by_one(model, ids, LENGTHS)
    assert logits is not None
    with torch.no_grad():
        torch.testing.assert_close(cut(ids, positions, layout), logits[:, :77], rtol=0, atol=2e-5)
    configure(folder, pad_token_id=100)
    assert load_masked_lm(folder, need_head=True, vocab_size=77).architecture.pad_id == 0


def cut(name: str, count: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-count])

    return change


def instead_of_the_weights(**files: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return change


def one_after_the_other(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def with_another_decoder(folder: Path) -> None:
    rewrite(folder, state_of(folder) | {"cls.predictions.decoder.weight": torch.ones(101, 60)})


def without(prefix: str) -> Change:
    return lambda folder: rewrite(folder, {k: v for k, v in state_of(folder).items() if not k.startswith(prefix)})


def changed(key: str, tensor: torch.Tensor) -> Change:
    return lambda folder: rewrite(folder, state_of(folder) | {key: tensor})


def as_a_dangling_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0")


def moved(to: str) -> Change:
    def change(folder: Path) -> None:
        target = folder / to
        target.mkdir(parents=True)
        for path in [p for p in folder.iterdir() if p.is_file()]:
            path.rename(target / path.name)

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440473133\n"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
BAD: dict[str, tuple[Change, str]] = {
    "no head": (without("cls."), r"masked-LM head in .*\['BertForMaskedLM'\] without one: train a head with the mlm"),
    "half a head": (without("cls.predictions.transform"), r"4 missing \(cls\.predictions\.transform\.LayerNorm\.bias"),
    "no weights": (instead_of_the_weights(), r"no weights in .*wanted model.safetensors or .*, got none of them"),
    "TensorFlow's": (instead_of_the_weights(tf_model__h5=b"x"), r"got tf_model.h5: convert them by transformers 4"),
    "Flax's": (instead_of_the_weights(flax_model__msgpack=b"x"), r"got flax_model.msgpack: convert them"),
    "others": (instead_of_the_weights(model__onnx=b"x"), r"got model.onnx: save the model there by save_pretrained"),
    "a link to nothing": (as_a_dangling_link, "is a link to a file that is not there: download the model again"),
    "an LFS pointer": (
        instead_of_the_weights(model__safetensors=POINTER),
        r"model.safetensors is a Git LFS pointer .*: fetch what it stands for by `git lfs pull`",
    ),
    "an LFS pointer for a pickle": (instead_of_the_weights(pytorch_model__bin=POINTER), r"bin is a Git LFS pointer"),
    "an LFS pointer for config.json": (
        lambda folder: (folder / "config.json").write_bytes(POINTER),
        r"config.json is not readable as JSON \(it is a Git LFS pointer: fetch",
    ),
    "cut short": (cut("model.safetensors", 100), "is not a readable safetensors file: "),
    "cut in its header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20), "readable"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a readable safet"),
    "a pickle cut short": (one_after_the_other(as_bin, cut("pytorch_model.bin", 3000)), "than tensors or is damaged"),
    "a shard too few": (
        one_after_the_other(as_bin_shards, lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink()),
        r"00002-of-00002.bin is missing, and pytorch_model.bin.index.json names it: download",
    ),
    "a state dict in another": (
        lambda folder: as_bin(folder, {"epoch": 3, "state_dict": state_of(folder)}),
        r"must hold a state dict, names to tensors, got int as 'epoch': save the model's state_dict\(\) alone",
    ),
    "another width": (
        changed(QUERY, torch.ones(60, 61)),
        r"query.weight must be floats of shape \(60, 60\) according to config.json, got float32 of shape \(60, 61\)",
    ),
    "fewer words": (changed(WORDS, torch.ones(90, 60)), r"shape \(101, 60\) .* got float32 of shape \(90, 60\)"),
    "integers": (changed(QUERY, torch.ones(60, 60, dtype=torch.int8)), r"must be floats of shape .*, got (I8|int8)"),
    "FP8": (
        changed(QUERY, torch.ones(60, 60).to(torch.float8_e4m3fn)),
        r"must be floats of shape .*, got (F8_E4M3|float8_e4m3fn)",
    ),
    "more layers in the file": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"16 unexpected \(bert.encoder.*: save it without",
    ),
    "more layers in config.json": (
        lambda folder: configure(folder, num_hidden_layers=3),
        r"16 missing \(bert.*: download or",
    ),
    "many layers": (lambda folder: configure(folder, num_hidden_layers=10**12), r"describes 1,000,000,000,000 layers"),
    "many positions": (lambda f: configure(f, max_position_embeddings=10**12), r"must be floats of shape \(10000"),
    "a decoder of its own": (with_another_decoder, "whose decoder is tied to the word embeddings is supported"),
    "a decoder that is missing": (
        lambda folder: configure(folder, tie_word_embeddings=False),
        r"says that tie_word_embeddings is false, and has no cls.predictions.decoder.weight",
    ),
    "in another model": (renamed("question_encoder.{}".format), "without one"),
    "twice": (
        lambda folder: rewrite(folder, state_of(folder) | {f"module.{WORDS}": torch.ones(101, 60)}),
        rf"holds {WORDS} twice, as .* and .*: keep one of them",
    ),
    "gelu_new": (lambda folder: configure(folder, hidden_act="gelu_new"), r"hidden_act must be 'gelu' \(exact erf"),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"got a PEFT adapter: merge it into its model \(merge_and_unload",
    ),
    "old sentence-transformers": (
        moved("0_Transformer"),
        r"wanted config.json in .*model: give .*model/0_Transformer$",
    ),
    "a checkpoint of the Trainer": (moved("checkpoint-500"), r"give .*model/checkpoint-500$"),
    "the hub's cache from above": (moved("snapshots/1a2b"), r"give .*model/snapshots/1a2b$"),
    "a run": (
        lambda folder: (folder / "config.json").write_text('{"config": {}, "student": {}}'),
        r"model is a run: give its export, `python -m fastdistil.export .*model --out DIR`",
    ),
    "nowhere": (shutil.rmtree, r"model, which does not exist: a model on the hub is fetched by `hf download NAME"),
}
BY_VALUE = {"a decoder of its own"}
"""What the headers cannot see."""


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused_by_headers_alone(folder, what):
    change, message = BAD[what]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_masked_lm(folder, need_head=True)
    if what in BY_VALUE:
        check(folder)
        return
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_a_pickle_before_torch_1_6_that_was_cut_short(folder):
    as_bin(folder, _use_new_zipfile_serialization=False)
    cut("pytorch_model.bin", 5000)(folder)
    with pytest.raises(ValueError, match=r"was cut short: it has [\d,]+ bytes and names [\d,]+ of tensors"):
        check(folder)


@pytest.mark.parametrize("kind", ["Electra", "Albert", "MPNet", "ModernBertDecoder", "GPT2"])
def test_other_encoders_are_refused_by_name(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"bert, .*modernbert, got '{config.model_type}': only these encoders"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_what_a_deberta_adds_to_its_scores_is_the_reason(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adds two products with relative positions to every score, which the kernels"):
        read_architecture(tmp_path)


def test_from_such_a_folder_to_an_export(root, tmp_path):
    """All at once: padded rows, one token type, shards of pickles from DistributedDataParallel, another head; in bf16,
    whose drift is measured from the same weights.
    """
    sizes = SMALL | {"max_position_embeddings": 64, "vocab_size": 128, "type_vocab_size": 1, "pad_token_id": 120}
    theirs, teacher = random_model("BertForMaskedLM", **sizes), tmp_path / "teacher"
    with torch.no_grad():  # whoever reads a padded row sees it
        theirs.get_input_embeddings().weight[101:] = 1e4
        theirs.cls.predictions.bias[101:] = 1e4
    theirs.save_pretrained(teacher)
    shutil.copy(root / "shards" / "tokenizer" / "vocab.txt", teacher)
    renamed("module.{}".format)(teacher)
    rewrite(teacher, state_of(teacher) | {"module.classifier.weight": torch.ones(2, 60)})
    as_bin_shards(teacher)
    changes = {"teacher__path": teacher, "student__token_types": 2, "engine__precision": "bf16", "optim__duration": 2}
    words = runs.arguments(root, tmp_path / "run", **changes)
    dry = forked.run(*words, "--dry-run").stdout
    printed = forked.run(*words).stdout
    notes = (
        "has 128 rows for the 101 tokens of its tokenizer: the rows after them are left out",
        "has the pad_token_id 120 in config.json: 0 is used",
        f"{teacher}: left out classifier",
        "--student.token-types 2, of a model with 1",
    )
    assert [printed.count(note) for note in notes] == [1] * 4
    assert [dry.count(note) for note in notes] == [1] * 4
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert all(0 < loss < 100 for loss in losses)
    forked.run("fastdistil.export", tmp_path / "run", "--out", tmp_path / "out")
    student, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in info), info
    config = student.config
    assert (config.vocab_size, config.type_vocab_size, config.pad_token_id) == (101, 2, 0)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 101


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_file_in_place_of_its_folder(folder, path):
    with pytest.raises(ValueError, match=rf"{path}, which is a file: give the folder .*model$"):
        read_architecture(folder / path)


def test_headers_need_no_torch(folder):
    import subprocess

    as_bin(folder)
    code = (
        "import sys; from pathlib import Path; from fastdistil.model import headers;"
        f"print(len(headers.read_headers(Path({str(folder)!r}))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["42", "False"]
