"""Teachers of RoBERTa's shape and multilingual BERT: read, distilled, exported, and the same numbers in transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastdistil.data import tokenizer
from fastdistil.kernels.layout import sequence_layout
from fastdistil.kernels.linear_distill import linear_distill_loss, linear_distill_loss_reference
from fastdistil.model.architecture import Architecture, read_architecture
from fastdistil.model.encoder import MaskedLM
from fastdistil.model.weights import load_masked_lm, student_from_teacher, write_hugging_face_folder
from tests.support import launch
from tests.support.launch import options
from tests.support.models import one_by_one, random_model, save_random

TEXT = [
    "Naïve café, déjà vu: 42 % of 7,000 people said no.",
    "😀 emoji, 漢字 and кириллица\twith tabs\nand lines.",
    "It's a test; isn't it? \x00 NUL and a soft\u00adhyphen.",
]


def batch(lengths: list[int], vocab_size: int):
    """Random ids above the special ones, positions, layout."""
    ids = torch.randint(5, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return ids, positions, sequence_layout(lengths, "cpu")


@pytest.mark.parametrize("class_name", ["RobertaModel", "RobertaForMaskedLM"])
def test_hidden_states_and_logits_are_transformers(class_name, tmp_path):
    model = save_random(class_name, tmp_path)
    ours = load_masked_lm(tmp_path, need_head=class_name != "RobertaModel").eval()
    assert ours.architecture.max_positions == 512  # of 514 rows: positions begin at pad_id + 1
    lengths = [5, 1, 512]
    inputs = batch(lengths, 101)
    hidden, logits = one_by_one(model, inputs[0], lengths)
    with torch.no_grad():
        torch.testing.assert_close(ours.encoder(*inputs), hidden, rtol=0, atol=2e-5)
        if logits is not None:
            torch.testing.assert_close(ours(*inputs), logits, rtol=0, atol=2e-5)


def test_what_was_read_is_written(tmp_path):
    """Every tensor but the two rows of positions that no token has, which come back as zeros."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_random("RobertaForMaskedLM", source)
    (source / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(101)) + "\n")
    ours = load_masked_lm(source, need_head=True)
    out.mkdir()
    write_hugging_face_folder(ours.state_dict(), ours.architecture, source, out)
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert before.keys() - after.keys() <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    for name, value in after.items():
        if name.endswith("position_embeddings.weight"):
            assert torch.equal(value[2:], before[name][2:])
            assert not value[:2].any()
        else:
            assert torch.equal(value, before[name]), name
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("roberta", 514)
    assert (config["type_vocab_size"], config["pad_token_id"]) == (1, 1)
    assert config["layer_norm_eps"] == 1e-5


def test_a_student_of_its_layers_loads_whole(tmp_path):
    save_random("RobertaForMaskedLM", tmp_path / "teacher")
    teacher = load_masked_lm(tmp_path / "teacher", need_head=True)
    student = student_from_teacher(
        teacher, (0, 4), replace(teacher.architecture, num_layers=2), copy_transform=True
    ).eval()
    out = tmp_path / "student"
    out.mkdir()
    (tmp_path / "vocab.txt").write_text("a\n")
    write_hugging_face_folder(student.state_dict(), student.architecture, tmp_path, out)
    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    theirs, loading = load(out, output_loading_info=True)
    assert type(theirs) is transformers.RobertaForMaskedLM
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lengths = [9, 30]
    inputs = batch(lengths, 101)
    _, logits = one_by_one(theirs.eval(), inputs[0], lengths)
    with torch.no_grad():
        torch.testing.assert_close(student(*inputs), logits, rtol=0, atol=2e-5)


def test_run_folders_of_older_versions_still_say_what_they_were():
    old: dict[str, Any] = {"vocab_size": 9, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "ffn_size": 4, "max_positions": 4}  # fmt: skip
    assert Architecture(**old, token_types=0).model_type == "distilbert"
    assert Architecture(**old, token_types=2).model_type == "bert"
    with pytest.raises(ValueError, match="true wants token types"):
        Architecture(**old, token_types=0, roberta=True)


def test_a_config_without_room_for_a_position_is_refused(tmp_path):
    model = random_model("RobertaForMaskedLM", max_position_embeddings=16)
    record = model.config.to_dict() | {"max_position_embeddings": 2}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="max_positions must be an integer of 1 or more, got 0"):
        read_architecture(tmp_path)


# --- the whole way, with the tokenizers that such teachers have


def byte_level_tokenizer(folder: Path) -> Path:
    """<s> <pad> </s> <unk> first and <mask> last, as RoBERTa's; trained on little text, saved by transformers."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    made.train_from_iterator(TEXT * 20, vocab_size=400, special_tokens=specials)
    made.add_special_tokens(["<mask>"])
    raw = tokenizers.Tokenizer.from_str(made.to_str())
    raw.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))  # type: ignore[assignment]
    names = {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", **names
    )
    fast.save_pretrained(folder)
    return folder


def cased_word_pieces(folder: Path, size: int) -> Path:
    """A vocab.txt of `size` pieces, cased and with accents, as multilingual BERT's; most of them are never used."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("".join(TEXT)) - set(" \n\t\x00\u00ad"))
    words += [*letters, *(f"##{c}" for c in letters)]
    words += [f"Wort{i}" for i in range(size - len(words))]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_teacher(folder: Path, words: Path, **sizes: Any) -> Path:
    """A tiny masked LM with the tokenizer of the folder `words`."""
    ids = tokenizer.special_ids(words)
    architecture = Architecture(
        vocab_size=len(tokenizer.read_vocabulary(words)),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        ffn_size=32,
        max_positions=64,
        pad_id=ids["pad"],
        **sizes,
    )
    state = MaskedLM(architecture).state_dict()
    folder.mkdir()
    write_hugging_face_folder(state, architecture, words, folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "lines.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in TEXT * 60))
    return file


@pytest.mark.parametrize(
    ("recipe", "class_name", "vocab_size"),
    [("distilroberta", "RobertaForMaskedLM", None), ("multilingual", "DistilBertForMaskedLM", 119_547)],
)
def test_from_text_to_transformers(tmp_path, texts, recipe, class_name, vocab_size):
    teacher, shards, run, out = (tmp_path / n for n in ("teacher", "shards", "run", "export"))
    if recipe == "distilroberta":
        words = byte_level_tokenizer(tmp_path / "words")
        make_teacher(teacher, words, token_types=1, roberta=True)
    else:
        make_teacher(teacher, cased_word_pieces(tmp_path / "words", vocab_size), token_types=2)
    prepared = options(tokenizer=teacher, max_length=64, out=shards)
    launch.run("fastdistil.prepare", texts, *prepared)
    given = options(
        data__shards=shards,
        teacher__path=teacher,
        out=run,
        batch__size=256,
        batch__unit="tokens",
        batch__token_budget=128,
        optim__duration=3,
        optim__unit="updates",
        data__num_workers=0,
        log__every=1,
    )
    launch.run("fastdistil.pretrain", recipe, *given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 100 for line in lines)
    launch.run("fastdistil.export", run, "--out", out)

    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    theirs, loading = load(out, output_loading_info=True)
    assert type(theirs).__name__ == class_name
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.vocab_size == (vocab_size or len(tokenizer.read_vocabulary(teacher)))
    encode, original = (transformers.AutoTokenizer.from_pretrained(f) for f in (out, teacher))
    raw = tokenizer.load(out)
    for line in TEXT:
        ids = encode(line)["input_ids"]
        assert ids == original(line)["input_ids"]
        assert ids[1:-1] == raw.encode(line, add_special_tokens=False).ids
        if recipe == "distilroberta":  # nothing of the text is lost
            assert encode.decode(ids, skip_special_tokens=True) == line
        ours = load_masked_lm(out, need_head=True).eval()
        inputs = torch.tensor(ids), torch.arange(len(ids)), sequence_layout([len(ids)], "cpu")
        _, logits = one_by_one(theirs.eval(), inputs[0], [len(ids)])
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), logits, rtol=0, atol=2e-5)


def test_the_loss_at_a_multilingual_vocabulary_equals_its_definition():
    """119,547 columns of which 119,552 are in memory: neither a softmax nor a gradient sees the last five."""
    torch.manual_seed(0)
    vocab_size, padded, width, rows = 119_547, 119_552, 8, 6
    hidden = torch.randn(rows, width, requires_grad=True)
    teacher_hidden = torch.randn(rows, width)
    weight = torch.randn(padded, width, requires_grad=True)
    teacher_weight, bias = torch.randn(padded, width), torch.zeros(padded, requires_grad=True)
    labels = torch.tensor([0, -100, vocab_size - 1, -100, 7, 119_546])
    arguments = (hidden, weight, bias, teacher_hidden, teacher_weight, torch.zeros(padded), labels)
    scales: dict[str, Any] = {"temperature": 2.0, "kd_scale": 0.5, "mlm_scale": 0.25, "vocab_size": vocab_size}  # fmt: skip
    ours = linear_distill_loss(*arguments, **scales)
    ours.loss.backward()
    got = [t.grad.clone() for t in (hidden, weight, bias) if t.grad is not None]
    for t in (hidden, weight, bias):
        t.grad = None
    exact = linear_distill_loss_reference(*arguments, **scales)
    exact.loss.backward()
    assert ours.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    for t, gradient in zip((hidden, weight, bias), got, strict=True):
        assert t.grad is not None
        torch.testing.assert_close(gradient, t.grad, rtol=1e-4, atol=1e-6)
    assert not got[1][vocab_size:].any()


def test_a_roberta_has_no_distilbert_for_a_student(tmp_path, texts):
    words = byte_level_tokenizer(tmp_path / "words")
    teacher = make_teacher(tmp_path / "teacher", words, token_types=1, roberta=True)
    shards = tmp_path / "shards"
    launch.run("fastdistil.prepare", texts, *options(tokenizer=teacher, max_length=64, out=shards))
    given = options(data__shards=shards, teacher__path=teacher, out=tmp_path / "run")
    done = launch.run("fastdistil.pretrain", "distilbert", *given, "--student.token-types", 2, ok=False)  # fmt: skip
    assert done.returncode == 2
    assert "those of a RoBERTa are RoBERTas" in done.stderr
