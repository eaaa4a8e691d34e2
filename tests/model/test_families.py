"""Every family of encoders: read, distilled, exported, and the same numbers in transformers.

Most tests are made from the entries of FAMILIES, so that they test a new entry too. The whole way, from text to an
export, is gone with a teacher of RoBERTa's shape and with multilingual BERT.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastdistil.data import tokenizer
from fastdistil.export import write_hugging_face_folder
from fastdistil.kernels.layout import sequence_layout
from fastdistil.kernels.linear_distill import linear_distill_loss, linear_distill_loss_reference
from fastdistil.model.architecture import Architecture, from_record, read_architecture
from fastdistil.model.families import FAMILIES, unused_positions
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import hugging_face_config, load_masked_lm, student_from_teacher, write_model
from tests.support import forked, toy, vocabularies
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


HEADS = [family.masked_lm for family in FAMILIES.values()]
BARE = [name.replace("ForMaskedLM", "Model") for name in HEADS]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_an_old_config_lacks_is_what_transformers_assumes(model_type):
    family, config = FAMILIES[model_type], transformers.AutoConfig.for_model(model_type)
    says = family.read(config.to_dict())
    assert {field: says[name] for field, name in family.fields.items() if field in family.defaults} == family.defaults
    assert {says[name] for name in family.activations} == {"gelu"}
    assert {name: says[name] for name in family.must_be} == family.must_be


@pytest.mark.parametrize("class_name", [*BARE, *HEADS])
def test_hidden_states_and_logits_are_transformers(class_name, tmp_path):
    model = save_random(class_name, tmp_path)
    ours = load_masked_lm(tmp_path, need_head=class_name in HEADS).eval()
    lengths = [5, 1, ours.architecture.max_positions]
    inputs = batch(lengths, 101)
    hidden, logits = one_by_one(model, inputs[0], lengths)
    with torch.no_grad():
        torch.testing.assert_close(ours.encoder(*inputs), hidden, rtol=0, atol=2e-5)
        if logits is not None:
            torch.testing.assert_close(ours(*inputs), logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("class_name", HEADS)
def test_what_was_read_is_written(class_name, tmp_path):
    """Every tensor but the rows of positions that no token has, which come back as zeros; every size in config.json."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_random(class_name, source)
    ours = load_masked_lm(source, need_head=True)
    family, unused = ours.architecture.family, ours.architecture.unused_positions
    out.mkdir()
    write_model(ours.state_dict(), ours.architecture, out)
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    assert before.keys() - after.keys() <= family.aliases.keys()
    for name, value in after.items():
        if name.endswith("position_embeddings.weight"):
            assert torch.equal(value[unused:], before[name][unused:])
            assert not value[:unused].any()
        else:
            assert torch.equal(value, before[name]), name
    told, tells = (family.read(json.loads((f / "config.json").read_text())) for f in (source, out))
    names = ["model_type", "architectures", *family.activations, *family.fields.values(), *family.constants]
    names += [*family.must_be, *family.copies]
    assert {name: tells[name] for name in names} == {name: told.get(name, tells[name]) for name in names}


def test_a_robertas_positions_begin_after_its_padding(tmp_path):
    save_random("RobertaForMaskedLM", tmp_path)
    architecture = read_architecture(tmp_path)
    assert (architecture.max_positions, architecture.unused_positions) == (512, 2)  # of 514 rows
    config = hugging_face_config(architecture)
    assert (config["model_type"], config["max_position_embeddings"]) == ("roberta", 514)
    assert (config["type_vocab_size"], config["pad_token_id"], config["layer_norm_eps"]) == (1, 1, 1e-5)
    assert [unused_positions(name, 1) for name in ("roberta", "bert", "gpt2")] == [2, 0, 0]


@pytest.mark.parametrize("class_name", HEADS)
def test_a_student_of_its_layers_loads_whole(class_name, tmp_path):
    save_random(class_name, tmp_path / "teacher")
    teacher = load_masked_lm(tmp_path / "teacher", need_head=True)
    student = student_from_teacher(
        teacher, (0, 4), replace(teacher.architecture, num_layers=2), copy_transform=True
    ).eval()
    out = tmp_path / "student"
    out.mkdir()
    write_model(student.state_dict(), student.architecture, out)
    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    theirs, loading = load(out, output_loading_info=True)
    assert type(theirs).__name__ == class_name
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lengths = [9, 30]
    inputs = batch(lengths, 101)
    _, logits = one_by_one(theirs.eval(), inputs[0], lengths)
    with torch.no_grad():
        torch.testing.assert_close(student(*inputs), logits, rtol=0, atol=2e-5)


def test_a_student_of_a_roberta_is_one(tmp_path):
    save_random("RobertaForMaskedLM", tmp_path)
    teacher = load_masked_lm(tmp_path, need_head=True)
    bert = replace(teacher.architecture, model_type="bert")
    distilbert = replace(bert, model_type="distilbert", token_types=0, layer_norm_eps=1e-12)
    for other in (bert, distilbert):
        with pytest.raises(
            ValueError, match="must have the teacher's widths, heads, vocabulary, positions and windows"
        ):
            student_from_teacher(teacher, range(5), other, copy_transform=True)


@pytest.mark.parametrize(
    ("says", "model_type"),
    [
        ({"token_types": 0}, "distilbert"),
        ({"token_types": 2}, "bert"),
        ({"token_types": 0, "roberta": False}, "distilbert"),
        ({"token_types": 2, "roberta": False}, "bert"),
        ({"token_types": 1, "roberta": True, "pad_id": 1}, "roberta"),
    ],
    ids=str,
)
def test_run_folders_of_older_versions_still_say_what_they_were(says, model_type):
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "ffn_size": 4, "max_positions": 4}
    architecture = from_record({**sizes, **says})
    assert architecture.model_type == model_type
    assert from_record(asdict(architecture)) == architecture


@pytest.mark.parametrize("record", [None, [1], "x", {}, {"vocab_size": 9}, {"colour": 1}], ids=str)
def test_a_record_that_is_no_architecture_is_refused(record):
    with pytest.raises(
        ValueError, match=r"not iterable|sequence|missing \d+ required|unexpected keyword argument 'colour'"
    ):
        from_record(record)


@pytest.mark.parametrize("model_type", ["gpt2", None, ["bert"], 3], ids=str)
def test_an_unknown_family_is_refused(model_type):
    sizes: dict[str, Any] = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_layers": 1,
        "num_heads": 1,
        "ffn_size": 4,
        "max_positions": 4,
    }
    with pytest.raises(ValueError, match=f"model_type must be one of {', '.join(FAMILIES)}, got"):
        Architecture(**sizes, token_types=2, model_type=model_type)
    with pytest.raises(ValueError, match="token_types must be an integer of 1 or more, got 0"):
        Architecture(**sizes, token_types=0, model_type="roberta")


def test_a_config_without_room_for_a_position_is_refused(tmp_path):
    model = random_model("RobertaForMaskedLM", max_position_embeddings=16)
    record = model.config.to_dict() | {"max_position_embeddings": 2}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="max_position_embeddings must be above the 2 rows that are never used, got 2"):
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
        num_layers=sizes.pop("num_layers", 2),
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
    [
        ("distilroberta", "RobertaForMaskedLM", None),
        ("modernbert", "ModernBertForMaskedLM", None),
        ("multilingual", "DistilBertForMaskedLM", 119_547),
    ],
)
def test_from_text_to_transformers(tmp_path, texts, recipe, class_name, vocab_size):
    teacher, shards, run, out = (tmp_path / n for n in ("teacher", "shards", "run", "export"))
    if recipe == "distilroberta":
        words = byte_level_tokenizer(tmp_path / "words")
        make_teacher(teacher, words, token_types=1, model_type="roberta")
    elif recipe == "modernbert":
        make_teacher(teacher, vocabularies.modernbert(tmp_path / "words"), **toy.MODERNBERT, num_layers=8)
    else:
        make_teacher(teacher, cased_word_pieces(tmp_path / "words", vocab_size), token_types=2)
    prepared = options(tokenizer=teacher, max_length=64, out=shards)
    forked.run("fastdistil.prepare", texts, *prepared)
    given = options(
        data__shards=shards,
        teacher__path=teacher,
        teacher__check="warn",  # of random weights
        out=run,
        batch__size=256,
        batch__unit="tokens",
        batch__token_budget=128,
        optim__duration=3,
        optim__unit="updates",
        data__num_workers=0,
        log__every=1,
    )
    forked.run("fastdistil.pretrain", recipe, *given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 100 for line in lines)
    forked.run("fastdistil.export", run, "--out", out)

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
        if vocab_size is None:  # of bytes: nothing of the text is lost
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
    scales: dict[str, Any] = {"temperature": 2.0, "kd_scale": 0.5, "mlm_scale": 0.25, "vocab_size": vocab_size}
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
    teacher = make_teacher(tmp_path / "teacher", words, token_types=1, model_type="roberta")
    shards = tmp_path / "shards"
    forked.run("fastdistil.prepare", texts, *options(tokenizer=teacher, max_length=64, out=shards))
    given = options(data__shards=shards, teacher__path=teacher, out=tmp_path / "run")
    done = forked.run("fastdistil.pretrain", "distilbert", *given, "--student.token-types", 2, ok=False)
    assert done.returncode == 2
    assert "those of a RoBERTa are RoBERTas" in done.stderr
