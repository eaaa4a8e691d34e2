"""Bad input is refused before torch is imported, with what was wanted, what was got and what to do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastdistil.model.architecture import Architecture, read_architecture
from fastdistil.run import config as c
from fastdistil.run import recipes
from fastdistil.run.ranks import Ranks
from fastdistil.training import inputs, preflight
from fastdistil.training.models import spread
from fastdistil.training.preflight import resolve
from tests.support import runs
from tests.support.updates import CPU


@pytest.fixture
def root(root, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(root, tmp_path / "copy")


def config(root: Path, **parts) -> c.Config:
    """A good configuration with the fields of some parts replaced: student={"layers": (0, 1)}."""
    good = replace(
        recipes.named("distilbert"),
        out=root / "run",
        data=c.DataConfig(shards=(str(root / "shards"),)),
        batch=c.BatchConfig(size=20, token_budget=256),
        teacher=c.TeacherConfig(path=root / "teacher"),
    )
    plain = {k: v for k, v in parts.items() if not isinstance(v, dict)}
    nested = {k: replace(getattr(good, k), **v) for k, v in parts.items() if isinstance(v, dict)}
    return replace(good, **plain, **nested)


def edit(path: Path, **changes) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not None}))


def test_one_sequence_cannot_be_trained_on_and_held_out(root):
    few = {"num_sequences": 1, "num_tokens": 12}
    shard = json.loads((root / "shards/meta.json").read_text())["shards"][0]
    edit(root / "shards/meta.json", shards=[shard | few], **few)
    with pytest.raises(ValueError, match=r"holds 1 sequence\(s\), too few to train on and validate with"):
        resolve(config(root), world_size=1)


def test_a_folder_of_ours_that_is_no_model_is_called_what_it_is(root):
    with pytest.raises(ValueError, match=r"--teacher.path: .*shards is a folder of shards, wanted a model"):
        resolve(config(root, teacher={"path": root / "shards"}), world_size=1)


def test_a_good_configuration_is_resolved(root):
    r = resolve(config(root), world_size=2)
    assert r.student == replace(
        read_architecture(root / "teacher"), model_type="distilbert", num_layers=2, token_types=0
    )
    assert r.layers == (0, 3)
    assert r.micro_batches_per_update == 2


@pytest.mark.parametrize(
    ("world_size", "asked", "stage", "rounds"), [(1, None, 0, 3), (2, None, 1, 2), (2, 0, 0, 2), (3, 3, 3, 1)]
)
def test_what_follows_from_the_ranks(root, world_size, asked, stage, rounds):
    """The plain engine is ZeRO stage 0, which several ranks have to ask for; the last round may have empty places."""
    given = config(root, engine={"zero_stage": asked}, batch={"size": 24})
    resolved = resolve(given, world_size=world_size)
    assert (resolved.world_size, resolved.micro_batches_per_update) == (world_size, 3)
    assert (resolved.zero_stage, resolved.micro_batches_per_rank) == (stage, rounds)


def test_the_plain_engine_wants_no_process_group(root):
    assert resolve(config(root, engine={"zero_stage": 0}), world_size=1, by_torchrun=False).zero_stage == 0
    with pytest.raises(ValueError, match=r"--engine.zero-stage 1 wants a process group: start with `torchrun"):
        resolve(config(root, engine={"zero_stage": 1}), world_size=1, by_torchrun=False)


@pytest.mark.parametrize(
    ("num", "source", "layers"),
    [(6, 12, (0, 2, 4, 7, 9, 11)), (3, 6, (0, 3, 5)), (1, 4, (0,)), (4, 4, (0, 1, 2, 3)), (2, 4, (0, 3))],
)
def test_layers_are_spread_as_the_authors_spread_them(num, source, layers):
    assert spread(num, source) == layers


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"shards": None}}, r"--data.shards is missing: give a folder written by"),
        ({"data": {"shards": ("nowhere",)}}, r"nowhere.meta.json does not exist"),
        ({"data": {"shards": (__file__,)}}, r"meta.json does not exist"),
        ({"teacher": {"path": None}}, r"imitates a teacher .*--loss.kd 5, .*and --teacher.path is missing"),
        (
            {"teacher": {"path": Path("nowhere")}},
            r"^--teacher.path nowhere: there is no such folder, and the hub does not give a model of",
        ),
        (
            {"teacher": {"path": Path("/no/where")}},
            r"^--teacher.path: not a Hugging Face folder: wanted config.json in /no/where, which does not exist",
        ),
        ({"loss": {"kd": 0.0, "cosine": 0.0}}, r"--teacher.path has no effect in recipe .* with --loss.mlm 2 alone"),
        (
            {"teacher": {"path": None, "precision": "bf16"}, "loss": {"kd": 0.0, "cosine": 0.0}},
            r"--teacher.precision bf16 has no effect",
        ),
        (
            {"student": {"layers": (0, 4)}},
            r"--student.layers 0 4 must be some of 0 to 3, the model it starts from has 4",
        ),
        (
            {"student": {"num_layers": 99}},
            r"^--student.num-layers 99 is too many, the model it starts from has 4: use 4 or less, or --student.init",
        ),
        (
            {"student": {"init": "random", "num_heads": 5}},
            r"--student.num-heads 5 must divide the student's width 32: use one of 1, 2, 4, 8, 16, 32, or another",
        ),
        ({"student": {"hidden_size": 16}}, r"--student.hidden-size 16 differs from the 32 of the model it starts from"),
        ({"student": {"init": "random", "hidden_size": 16}}, r"give --student.num-heads too"),
        (
            {"student": {"init": "random", "hidden_size": 16, "num_heads": 2}},
            r"cosine loss compares hidden states of one width, the teacher's is 32 and the student's 16",
        ),
        ({"loss": {"nested_layers": (1,)}}, r"--loss.nested-layers has no effect without --loss.embedding"),
        (
            {"loss": {"similarity": 1.0, "nested_layers": (2,)}, "teacher": {"pooling": "mean"}},
            r"--loss.nested-layers must be fewer than the student's 2, and 1 or more, got 2",
        ),
        (
            {"loss": {"embedding": 1.0, "nested_dimensions": (8,)}, "teacher": {"pooling": "mean"}},
            r"--loss.nested-dimensions has no effect without --loss.similarity",
        ),
        ({"student": {"init": "random", "layers": (0,)}}, r"--student.layers has no effect with --student.init random"),
        (
            {"student": {"init": "random", "max_positions": 20}},
            r"up to 48 tokens, the student reads 20: prepare with --max-length 20",
        ),
        (
            {"student": {"init": "techer"}},
            "^--student.init techer: there is no such folder, and the hub does not give a model of that name",
        ),
        ({"student": {"init": "."}}, r"^--student.init: not a Hugging Face folder: wanted config.json in \.$"),
        ({"student": {"token_types": 0, "max_positions": 32}}, r"--student.max-positions 32 differs from the 64 of"),
        (
            {"engine": {"compile": True, "zero_stage": 3}},
            r"--engine.compile does not go with --engine.zero-stage 3.*use stage 2 or lower",
        ),
        (
            {"batch": {"size": 3}},
            r"--batch.size 3 sequences is .* 1 micro-batch\(es\) of 256, which 2 ranks .*: use a larger --batch",
        ),
        (
            {"batch": {"size": 6}},
            r"--batch.size 6 sequences is .*2 ranks cannot divide: use --batch.token-budget 64 or less, a larger",
        ),
    ],
)
def test_what_is_refused(root, parts, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve(config(root, **parts), world_size=2)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            {"layers": (0, 3)},
            r"--student.layers 0 3: layer 1 of a ModernBERT of this pattern wants one that sees a window, from 1 on, "
            r"got 3: use e.g. 0 2, or leave it out",
        ),
        ({"layers": (1, 2)}, r"layer 0 of a ModernBERT .* wants layer 0, which has no LayerNorm before its attention"),
        ({"layers": (0, 4)}, r"--student.layers 0 4 must be some of 0 to 3"),
        ({"num_layers": 5}, r"--student.num-layers 5 is too many, the model it starts from has 4"),
        ({"token_types": 2}, r"--student.token-types 2 is for students of BERT and DistilBERT: .* are ModernBERTs"),
        ({"family": "bert"}, r"--student.family bert is for a student with random weights, and this one starts from a"),
        ({"init": "random", "family": "bret"}, r"--student.family: model_type must be one of bert, .*, got 'bret'"),
        (
            {"init": "random", "token_types": 2, "family": "modernbert"},
            r"--student.token-types 2 wants a table that a ModernBERT has not: leave it out, or use another",
        ),
        (
            {"init": "random", "num_heads": 32},
            r"--student.num-heads 32 leaves heads of an odd width, 1, and a ModernBERT rotates theirs in pairs",
        ),
        (
            {"init": "random", "max_positions": 20},
            r"up to 48 tokens, the student reads 20: prepare with --max-length 20",
        ),
    ],
)
def test_what_is_refused_of_students_of_a_modernbert(modern, tmp_path, student, message):
    with pytest.raises(ValueError, match=message):
        resolve(config(modern, out=tmp_path / "run", student=student), world_size=1)


def test_students_of_a_modernbert(modern, tmp_path):
    """Which layers they begin as and imitate: of the same pattern, or where there are too few, evenly spread ones."""

    def of(**student) -> preflight.Resolved:
        return resolve(config(modern, out=tmp_path / "run", student=student), world_size=1)

    teacher = read_architecture(modern / "teacher")
    assert of().student == replace(teacher, num_layers=2, dropout=0.1, attention_dropout=0.1)
    assert (of().layers, of(num_layers=3).layers, of(num_layers=4).layers) == ((0, 2), (0, 1, 2), (0, 1, 2, 3))
    assert of(init="random", num_layers=2).imitated_layers == (0, 2)
    assert of(init="random", num_layers=6).imitated_layers == spread(6, 4)
    other = of(init="random", family="bert", num_layers=3)
    assert (other.student.model_type, other.student.global_every, other.imitated_layers) == ("bert", 0, spread(3, 4))
    # A teacher's feed-forward layer with gates is no measure for one without, and likewise.
    assert (other.student.ffn_size, teacher.ffn_size) == (4 * 32, 64)


def test_lengths_are_read_once_for_each_window(modern, tmp_path):
    """Not for every layer and every question: of 20 million sequences it takes a second."""
    r = resolve(config(modern, out=tmp_path / "run"), world_size=1)
    corpus = inputs.load_corpus(r, rank=0, world_size=1)
    flops = [r.flops_per_token(corpus.attended) for _ in range(2)]
    assert flops[0] == flops[1]
    cached: Any = corpus.attended
    assert cached.cache_info().misses == 2  # everything, and 8 tokens on either side


def test_a_modernbert_taught_by_a_bert_has_the_windows_that_its_family_has(root):
    r = resolve(config(root, student={"init": "random", "family": "modernbert"}), world_size=1)
    assert (r.student.num_layers, r.student.hidden_size, r.student.max_positions) == (2, 32, 64)
    assert [r.student.window(layer) for layer in range(4)] == [0, 64, 64, 0]
    assert r.imitated_layers == (0, 3)
    assert r.student.ffn_size == 48


def test_positions_that_are_not_there_cannot_be_frozen(modern, tmp_path):
    given = config(modern, out=tmp_path / "run", student={"freeze_positions": True})
    r = resolve(given, world_size=1, by_torchrun=False)
    assert any("--student.freeze-positions has no effect: the student has no table" in note for note in r.notes)
    models = inputs.load_models(r, Ranks(0, 1, CPU), inputs.load_corpus(r, rank=0, world_size=1))
    assert all(p.requires_grad for p in models.student.parameters())


def test_a_token_budget_below_one_sequence(root):
    edit(root / "shards/meta.json", max_length=65)
    alone = config(root, teacher={"path": None}, loss={"kd": 0.0, "cosine": 0.0}, batch={"token_budget": 64})
    sizes = c.StudentConfig(init="random", num_layers=1, hidden_size=8, num_heads=1)
    with pytest.raises(
        ValueError, match=r"--batch.token-budget 64 cannot hold a sequence of 65 tokens, as .*: use at least 128"
    ):
        resolve(replace(alone, student=sizes), world_size=1)


BASE = Architecture(
    vocab_size=30522, hidden_size=768, num_layers=6, num_heads=12, ffn_size=3072, max_positions=512,
    model_type="distilbert", token_types=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("gb", "device", "update_tokens", "ranks", "student", "budget"),
    [
        (None, "auto", 520_000, 1, BASE, 16384),  # no GPU
        (80, "cpu", 520_000, 1, BASE, 16384),  # not asked for
        (80, "auto", 520_000, 1, BASE, 65536),
        (24, "auto", 520_000, 1, BASE, 32768),  # 4.8 GB of activations
        (80, "auto", 520_000, 1, replace(BASE, hidden_size=1024, num_heads=16, num_layers=24, ffn_size=4096), 16384),
        (80, "auto", 20_000, 1, BASE, 16384),  # an update that is one and a quarter
        (80, "auto", 65_000, 1, BASE, 65536),
        (80, "auto", 520_000, 8, BASE, 65536),
        (80, "auto", 520_000, 16, BASE, 32768),
        (80, "auto", 520_000, 3, BASE, 16384),  # 8 or 16 for 3 ranks leave some without work
        (80, "auto", 520_000, 64, BASE, 16384),  # refused afterwards, with what would fit
    ],
)
def test_a_token_budget_that_nobody_gives(monkeypatch, gb, device, update_tokens, ranks, student, budget):
    """Large where a GPU has the memory, and never so large that an update misses its size or ranks their work."""
    monkeypatch.setattr(preflight, "gpu_bytes", lambda: gb and int(gb * 1e9))
    asked = c.Config(engine=c.EngineConfig(device=device))
    assert preflight.token_budget(asked, student, update_tokens, ranks) == budget


def test_a_dry_run_for_gpus_that_are_not_here_assumes_them(monkeypatch):
    monkeypatch.setattr(preflight, "gpu_bytes", lambda: None)
    meant = c.Config(dry_run=True, world_size=8)
    assert preflight.token_budget(meant, BASE, 520_000, 8) == 65536


def test_a_token_budget_is_kept_with_the_run(root):
    """What was chosen on one machine holds where the run goes on."""
    resolved = resolve(config(root, batch={"token_budget": None, "size": 2000}), world_size=1)
    assert resolved.token_budget == 16384
    assert c.to_json(resolved.config)["batch"]["token_budget"] == 16384


def test_mlm_from_nothing_needs_sizes(root):
    mlm = replace(recipes.named("mlm"), out=root / "run", data=c.DataConfig(shards=(str(root / "shards"),)))
    with pytest.raises(ValueError, match=r"--student.num-layers, --student.hidden-size and --student.num-heads"):
        resolve(mlm, world_size=1)
    sized = replace(
        mlm,
        student=c.StudentConfig(init="random", num_layers=2, hidden_size=32, num_heads=2),
        batch=c.BatchConfig(size=20, token_budget=256),
    )
    student = resolve(sized, world_size=1).student
    assert (student.ffn_size, student.max_positions, student.token_types) == (128, 48, 0)
    with pytest.raises(ValueError, match=r"--student.init teacher wants a --teacher.path"):
        resolve(replace(mlm, student=c.StudentConfig()), world_size=1)


def test_mlm_goes_on_from_a_folder_with_all_its_layers_and_token_types(root):
    mlm = replace(
        recipes.named("mlm"),
        out=root / "run",
        data=c.DataConfig(shards=(str(root / "shards"),)),
        batch=c.BatchConfig(size=20, token_budget=256),
    )
    r = resolve(replace(mlm, student=c.StudentConfig(init=str(root / "teacher"))), world_size=1)
    assert r.layers == (0, 1, 2, 3)
    assert r.student == read_architecture(root / "teacher")
    assert not r.fresh_head
    assert r.config.optim.encoder_lr is None


def test_an_encoder_whose_head_is_fresh_trains_at_a_share_of_the_rate(root):
    """By mlm, unless a rate was given; where there is a teacher to learn from, everything has one rate."""
    runs.take_head_away(root / "teacher")
    init = {"student": c.StudentConfig(init=str(root / "teacher")), "batch": c.BatchConfig(size=20, token_budget=256)}
    mlm = replace(recipes.named("mlm"), out=root / "run", data=c.DataConfig(shards=(str(root / "shards"),)), **init)
    r = resolve(mlm, world_size=1)
    assert r.fresh_head
    assert r.config.optim.encoder_lr == preflight.ENCODER_SHARE * mlm.optim.lr
    assert any("--optim.encoder-lr" in note for note in r.notes)
    assert resolve(replace(mlm, optim=c.OptimConfig(encoder_lr=0.5)), world_size=1).config.optim.encoder_lr == 0.5
    hidden = {"loss": {"kd": 0.0, "hidden": 1.0}, "student": {"init": str(root / "teacher"), "num_layers": 4}}
    r = resolve(config(root, **hidden), world_size=1)
    assert r.fresh_head
    assert r.config.optim.encoder_lr is None


class TestVocabularies:
    """Trap 16: refuse, with both values in the message."""

    @pytest.fixture(autouse=True)
    def of_a_list(self, root):
        """The teacher's tokenizer is its vocab.txt, which is simple to edit."""
        for path in (root / "teacher").glob("*token*"):
            path.unlink()

    def test_another_size(self, root):
        """Of another model, of which nothing but the size is known; of its own tokenizer; of its own weights."""
        words = root / "teacher/vocab.txt"
        text = words.read_text()
        words.unlink()
        edit(root / "teacher/config.json", vocab_size=120)
        with pytest.raises(ValueError, match=r"vocabulary of 120, the shards have 101, and nothing says what its ids"):
            resolve(config(root), world_size=1)
        words.write_text(text)
        with pytest.raises(ValueError, match=r"must be floats of shape \(120, 32\) according to config.json"):
            resolve(config(root), world_size=1)
        edit(root / "teacher/config.json", vocab_size=100)
        with pytest.raises(
            ValueError,
            match=r"a vocabulary of 100 in config.json, its tokenizer has 101 tokens: the ids from 100 on have no",
        ):
            resolve(config(root), world_size=1)
        words.write_text(text + "one\ntwo\n")
        with pytest.raises(
            ValueError, match=r"\(103 tokens\), the shards were made with .* \(101 tokens\): prepare the"
        ):
            resolve(config(root), world_size=1)

    def test_padded_in_the_model(self, root):
        """The rows after the tokenizer's last token are left out, and it is said."""
        path = root / "teacher/model.safetensors"
        tensors = load_file(path)
        for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            tensors[name] = F.pad(tensors[name], (0,) * (2 * tensors[name].ndim - 1) + (11,), value=9.0)
        save_file(tensors, path)
        edit(root / "teacher/config.json", vocab_size=112, pad_token_id=111)
        r = resolve(config(root), world_size=1)
        assert r.teacher is not None
        assert (r.teacher.vocab_size, r.teacher.pad_id, r.student.vocab_size, r.student.pad_id) == (101, 0, 101, 0)
        rows, pad = r.notes
        assert "has 112 rows for the 101 tokens of its tokenizer: the rows after them are left out" in rows
        assert "has the pad_token_id 111 in config.json: 0 is used, as in the shards" in pad

    def test_another_word(self, root):
        words = (root / "teacher/vocab.txt").read_text().replace("w17\n", "v17\n")
        (root / "teacher/vocab.txt").write_text(words)
        with pytest.raises(
            ValueError,
            match=r"has a tokenizer with hash [0-9a-f]{12} \(101 tokens\), the shards were made with [0-9a-f]{12}",
        ):
            resolve(config(root), world_size=1)

    def test_other_special_ids(self, root):
        names = {"sep_token": "[MASK]", "mask_token": "[SEP]"}
        (root / "teacher/tokenizer_config.json").write_text(json.dumps(names))
        with pytest.raises(
            ValueError, match=r"special ids \{.*'sep': 4, 'mask': 3\}, the shards \{.*'sep': 3, 'mask': 4\}"
        ):
            resolve(config(root), world_size=1)

    def test_another_padding_id(self, root):
        """A BERT only gives that row no gradient. A RoBERTa begins its positions there."""
        edit(root / "teacher/config.json", pad_token_id=7)
        (note,) = resolve(config(root), world_size=1).notes
        assert "pad_token_id 7 in config.json: 0 is used" in note
        edit(root / "teacher/config.json", model_type="roberta")
        with pytest.raises(
            ValueError, match=r"pad_token_id 7 in config.json, the shards pad with 0: a RoBERTa counts its"
        ):
            resolve(config(root), world_size=1)

    def test_of_the_validation_text(self, root):
        shutil.copytree(root / "shards", root / "validation")
        edit(root / "validation/meta.json", tokenizer_sha256="0" * 64)
        with pytest.raises(
            ValueError, match=r"--data.validation .* was made with tokenizer 000000000000, --data.shards"
        ):
            resolve(config(root, data={"validation": root / "validation"}), world_size=1)


def test_what_has_no_effect_is_said(root):
    idle = {
        "teacher": {"pooling": "cls", "normalise": False},
        "loss": {"embedding_distance": "l2"},
        "student": {"token_types": 2, "fold_token_types": True},
    }
    assert resolve(config(root), world_size=1).notes == ()
    assert [note.partition(" has no effect: ")[0] for note in resolve(config(root, **idle), world_size=1).notes] == [
        "--teacher.pooling",
        "--teacher.normalise",
        "--loss.embedding-distance",
        "--student.fold-token-types",
    ]
    wanted = {"teacher": idle["teacher"], "loss": {"embedding": 1.0, "embedding_distance": "l2"}}
    assert resolve(config(root, **wanted, student={"fold_token_types": True}), world_size=1).notes == ()


class TestRunFolder:
    def test_a_file(self, root):
        (root / "run").write_text("")
        with pytest.raises(ValueError, match="is a file: give a folder"):
            resolve(config(root), world_size=1)

    def test_something_else(self, root):
        (root / "run").mkdir()
        (root / "run/thesis.tex").write_text("")
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            resolve(config(root), world_size=1)

    def test_one_that_ended_before_it_had_a_configuration(self, root):
        """Killed, or on a full disk: the same command begins again, and what is somebody else's stays refused."""
        run = root / "run"
        for name in ("tokenizer", "stacks", "checkpoints/update-00000005.part"):
            (run / name).mkdir(parents=True)
        (run / "config.json.part").write_text("{")
        with pytest.raises(ValueError, match="is not empty and holds no run"):  # a tokenizer of the user's
            resolve(config(root), world_size=1)
        for name in (".lock", "status.json", "console.log"):
            (run / name).write_text("")
        resolve(config(root), world_size=1)
        (run / "checkpoints/update-00000005").mkdir()
        (run / "checkpoints/update-00000005/manifest.json").write_text("{}")
        with pytest.raises(ValueError, match="is not empty and holds no run"):  # its configuration was lost
            resolve(config(root), world_size=1)

    @pytest.mark.parametrize(("folder", "kind"), [("teacher", "a model"), ("shards", "a folder of shards")])
    def test_what_a_run_is_made_of(self, root, folder, kind):
        with pytest.raises(ValueError, match=rf"--out .*/{folder} is {kind}: give a new folder$"):
            resolve(config(root, out=root / folder), world_size=1)

    def test_another_run(self, root):
        self.start(root, config(root))
        with pytest.raises(ValueError, match="already holds a run: use --resume auto"):
            resolve(config(root), world_size=1)

    def test_a_run_with_another_configuration(self, root):
        self.start(root, config(root))
        with pytest.raises(ValueError, match=r"started with another configuration; --loss.kd: was 5.0, now 3.0"):
            resolve(config(root, resume="auto", loss={"kd": 3.0}), world_size=1)
        resolve(config(root, resume="auto", log={"every": 1}), world_size=1)

    def test_a_run_whose_configuration_is_broken(self, root):
        self.start(root, config(root))
        (root / "run/config.json").write_text("{")
        with pytest.raises(ValueError, match="is not a run's configuration"):
            resolve(config(root, resume="auto"), world_size=1)

    def test_a_run_that_has_begun_keeps_its_layers(self, root):
        """Whatever an older version chose between two that are equally far."""
        self.start(root, config(root))
        edit(root / "run/config.json", layers=[1, 2])
        assert resolve(config(root, resume="auto"), world_size=1).imitated_layers == (0, 3)
        (root / "run/checkpoints/update-00000001").mkdir(parents=True)
        (root / "run/checkpoints/update-00000001/manifest.json").write_text("{}")
        assert resolve(config(root, resume="auto"), world_size=1).imitated_layers == (1, 2)

    def start(self, root, cfg):
        (root / "run").mkdir()
        (root / "run/config.json").write_text(json.dumps({"config": c.to_json(cfg), "student": {}}))
