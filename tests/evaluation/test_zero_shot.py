"""zero_shot.py: scores against sentence-transformers' own evaluators, their intervals, tables of every kind."""

import random
from typing import Any, Literal

import numpy as np
import pytest

from fastdistil.evaluation import zero_shot
from fastdistil.evaluation.zero_shot import Score, Table
from tests.support.encoders import make_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_PAIRS = 60


def words(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(60)}" for _ in range(rng.randrange(2, 12)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_encoder(tmp_path_factory.mktemp("zero-shot") / "model", initializer_range=0.3))


@pytest.fixture(scope="module")
def encoder(model):
    return zero_shot.load_encoder(model, None, None, "cpu")


@pytest.fixture(scope="module")
def pairs():
    """Two texts, of which the second has twice as many words of the first as the score says."""
    rng = random.Random(0)
    scores = [rng.randrange(6) for _ in range(NUM_PAIRS)]
    left = [" ".join(f"w{rng.randrange(60)}" for _ in range(10)) for _ in scores]
    right = [" ".join([*text.split()[: 2 * score], words(rng)]) for text, score in zip(left, scores, strict=True)]
    return left, right, np.array(scores, dtype=float)


def score(kind, encoder, table, **changes):
    return zero_shot.score(kind, encoder, table, **({"shots": 4, "draws": 5} | changes))


def test_similarity_is_that_of_sentence_transformers(encoder, pairs):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    theirs = EmbeddingSimilarityEvaluator(*pairs, main_similarity="cosine")(encoder.model)
    ours = score("sts", encoder, Table(pairs[:2], pairs[2], "all")).metrics
    assert ours == {
        "spearman": pytest.approx(theirs["spearman_cosine"], abs=1e-4),
        "pearson": pytest.approx(theirs["pearson_cosine"], abs=1e-4),
    }
    assert ours["spearman"] > 0.2  # or it would say nothing


def test_pairs_are_scored_as_sentence_transformers_does(encoder, pairs):
    from sentence_transformers.sentence_transformer.evaluation import BinaryClassificationEvaluator

    labels = (pairs[2] > 2).astype(float)
    theirs = BinaryClassificationEvaluator(
        pairs[0], pairs[1], labels.astype(int).tolist(), similarity_fn_names=["cosine"]
    )(encoder.model)
    ours = score("pairs", encoder, Table(pairs[:2], labels, "all")).metrics
    assert ours == {
        "ap": pytest.approx(theirs["cosine_ap"], abs=1e-4),
        "best f1": pytest.approx(theirs["cosine_f1"], abs=1e-4),
        "best accuracy": pytest.approx(theirs["cosine_accuracy"], abs=1e-4),
    }


@pytest.mark.parametrize("several", [False, True], ids=["one text a query", "several"])
def test_retrieval_is_that_of_sentence_transformers(encoder, pairs, several, monkeypatch):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    monkeypatch.setattr(zero_shot, "NUM_QUERIES", 7)  # the matrix in parts
    queries = [pairs[0][i // 3 if several else i] for i in range(NUM_PAIRS)]
    table = Table((queries, pairs[1]), np.array([]), "all")
    relevant: dict[str, set[str]] = {}
    for query, text in zip(*table.texts, strict=True):
        relevant.setdefault(query, set()).add(text)
    theirs = InformationRetrievalEvaluator(
        {query: query for query in relevant},
        {text: text for text in pairs[1]},
        relevant,
        mrr_at_k=[NUM_PAIRS],
        precision_recall_at_k=[1, 10],
        score_functions={"cosine": encoder.model.similarity},
    )(encoder.model)
    assert score("retrieval", encoder, table).metrics == {
        "mrr": pytest.approx(theirs[f"cosine_mrr@{NUM_PAIRS}"], abs=1e-4),
        "recall@1": pytest.approx(theirs["cosine_recall@1"], abs=1e-4),
        "recall@10": pytest.approx(theirs["cosine_recall@10"], abs=1e-4),
    }


def test_a_model_of_one_embedding_finds_nothing(encoder, pairs, monkeypatch):
    monkeypatch.setattr(zero_shot.Encoder, "embed", lambda _, texts, role="": np.ones((len(texts), 4)))
    found = score("retrieval", encoder, Table(pairs[:2], np.array([]), "all")).metrics
    assert found == {"mrr": pytest.approx(1 / NUM_PAIRS), "recall@1": 0, "recall@10": 0}
    assert score("sts", encoder, Table(pairs[:2], pairs[2], "all")).metrics == {"spearman": 0, "pearson": 0}


@pytest.mark.parametrize("own", [False, True], ids=["a split of its own", "the same"])
def test_few_shots_learn_what_the_embeddings_know(encoder, own):
    """The class is the text's first word; against scikit-learn on sentence-transformers' embeddings."""
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(1)
    texts = [f"w{i % 2} w{i % 2} {words(rng)}" for i in range(40)]
    labels = np.array(["b", "a"] * 20)
    train = Table((texts[::-1],), labels[::-1], "train")
    table = Table((texts,), labels, "validation", None if own else train)
    found = score("few-shot", encoder, table, shots=5, draws=4)
    source = table if own else train
    draw = np.random.default_rng(0)
    wanted = []
    for _ in range(4):
        rows = np.concatenate([draw.choice(np.flatnonzero(source.labels == c), 5, replace=False) for c in ("a", "b")])
        embeddings = encoder.model.encode([source.texts[0][i] for i in rows], normalize_embeddings=True)
        tested = [i for i in range(40) if not (own and i in rows)]
        learnt = LogisticRegression(max_iter=1000).fit(embeddings, source.labels[rows])
        of_table = encoder.model.encode([texts[i] for i in tested], normalize_embeddings=True)
        wanted.append((learnt.predict(of_table) == labels[tested]).mean())
    assert found.rows == pytest.approx(wanted)
    assert found.metrics == {
        "accuracy": pytest.approx(np.mean(wanted)),
        "deviation": pytest.approx(np.std(wanted, ddof=1)),
    }
    assert found.metrics["accuracy"] > 0.6
    with pytest.raises(ValueError, match="--shots 30 wants two classes of"):
        score("few-shot", encoder, table, shots=30)


def test_an_embedding_is_that_of_the_folder_with_its_dense_layer_and_prompts(model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    transformer = Transformer(model)
    modules = [transformer, Pooling(32, "cls"), Dense(32, 8), Normalize()]
    folder = str(tmp_path / "dense")
    SentenceTransformer(modules=modules, prompts={"query": "w1 w2 ", "document": ""}).save(folder)
    encoder = zero_shot.load_encoder(folder, "mean", 10, "cpu")
    assert encoder.pooling == "cls + Dense + Normalize (the folder's)"
    assert encoder.model.max_seq_length == 10
    texts = ["w3 w4", " ".join(["w5"] * 40), "w3 w4", "w1 w2 w3 w4"]
    theirs = SentenceTransformer(folder)
    theirs.max_seq_length = 10
    np.testing.assert_allclose(encoder.embed(texts), theirs.encode(texts), atol=1e-6)
    query = encoder.embed(texts[:1], "query")
    np.testing.assert_allclose(query, encoder.embed(texts[3:]), atol=1e-6)
    assert np.abs(query - encoder.embed(texts[:1])).max() > 1e-3


def test_a_plain_encoder_is_pooled_as_asked(model):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        bare = transformers.AutoModel.from_pretrained(model).eval()
        hidden = bare(**tokenizer("w3 w4 w5", return_tensors="pt")).last_hidden_state[0].numpy()
    cases: list[tuple[Literal["mean", "cls"] | None, str, np.ndarray]] = [
        (None, "mean (the folder says nothing)", hidden.mean(0)),
        ("mean", "mean (--pooling)", hidden.mean(0)),
        ("cls", "cls (--pooling)", hidden[0]),
    ]
    for pooling, said, wanted in cases:
        encoder = zero_shot.load_encoder(model, pooling, None, "cpu")
        assert encoder.pooling == said
        assert encoder.model.max_seq_length == 64  # the positions, where the tokenizer knows no limit
        np.testing.assert_allclose(encoder.embed(["w3 w4 w5"])[0], wanted, atol=1e-5)


def test_models_that_cannot_be_used_say_so(model, tmp_path):
    with pytest.raises(ValueError, match="--max-length 65 is more than the 64 tokens"):
        zero_shot.load_encoder(model, None, 65, "cpu")
    with pytest.raises(ValueError, match="cannot be loaded by"):
        zero_shot.load_encoder(str(tmp_path), None, None, "cpu")


# -------------------------------------------------------------------------------------------------------- the intervals
def test_intervals_cover_what_theory_says():
    """Of a mean of 400 and of a correlation of 400 by Fisher's z; the ratio of a model to itself is 1."""
    rng = np.random.default_rng(3)
    rows = rng.normal(2, 1, 400)
    of_mean = Score({"x": rows.mean()}, rows, np.zeros(400), zero_shot._mean)
    assert of_mean.interval() == pytest.approx(rows.mean() + rows.std() / 20 * np.array([-1.96, 1.96]), abs=0.015)
    labels = rng.normal(size=400)
    rows = 0.8 * labels + 0.6 * rng.normal(size=400)
    similarity = zero_shot._similarity(rows, labels)
    z = np.arctanh(similarity.metrics["spearman"]) + 1.03 * np.array([-1.96, 1.96]) / np.sqrt(397)
    assert similarity.interval() == pytest.approx(np.tanh(z), abs=0.02)
    assert similarity.interval(similarity) == (1.0, 1.0)


def test_the_share_of_a_reference_is_paired():
    """Two models that err together: their ratio is known far better than either score."""
    rng = np.random.default_rng(4)
    labels = rng.normal(size=500)
    theirs = labels + rng.normal(size=500)
    ours = theirs + 0.1 * rng.normal(size=500)
    student, teacher = (zero_shot._similarity(rows, labels) for rows in (ours, theirs))
    record = student.record(teacher)
    share = student.metrics["spearman"] / teacher.metrics["spearman"]
    assert record["of_reference"] == pytest.approx(100 * share)
    low, high = record["of_reference_interval"]
    assert low < 100 * share < high
    assert high - low < 0.3 * (record["interval"][1] - record["interval"][0])


def test_a_share_of_little_is_undefined_and_the_reason_is_said():
    """Of a reference that scores 0 or less on all rows, or on some that are drawn; by JSON, table and line."""
    labels = np.array([1.0, 0, 0, 0])  # of four pairs: one draw in three has no paraphrase, and scores 0
    good, poor = (zero_shot._pairs(cosine, labels) for cosine in (np.array([0.9, 0.1, 0.2, 0.3]), np.arange(4.0)))
    score = {"task": "pairs", "model": "student"} | poor.record(good)
    assert (score["of_reference"], score["of_reference_interval"]) == (25, None)
    similar = zero_shot._similarity(np.arange(9.0), np.arange(9.0))
    nothing = [zero_shot._similarity(rows, np.arange(9.0)) for rows in (np.zeros(9), -np.arange(9.0))]
    none = [{"task": "sts", "model": "student"} | similar.record(reference) for reference in nothing]
    assert [(n["of_reference"], n["of_reference_interval"]) for n in none] == [(None, None)] * 2
    assert zero_shot.share_of(score, "–") == ("25.0 %", "undefined")
    teacher = {"task": "sts", "model": "teacher"} | nothing[0].record(None)
    cells = [[str(cell) for cell in column.cells] for column in zero_shot.drawn([teacher, none[0]]).columns]
    assert cells[-2:] == [["-", "undefined"], ["-", "undefined"]]
    assert [len(zero_shot.why_undefined(of)) for of in ([score], none, [teacher], [similar.record(similar)])] == [
        1,
        1,
        0,
        0,
    ]


# ----------------------------------------------------------------------------------------------------------- the tables
def test_the_split_is_said_or_the_first_that_there_is(tmp_path):
    folder = tmp_path / "stsb"
    folder.mkdir()
    for split, score in (("train", 1), ("test", 2), ("validation", 3)):
        rows = f"sentence1\tsentence2\tscore\na\tb\t{score}\nc\td\t0\ne\tf\t5\n"
        (folder / f"{split}.tsv").write_text(rows)
    assert zero_shot.load("sts", "stsb", str(tmp_path)).labels.tolist() == [3, 0, 5]
    assert zero_shot.load("sts", "stsb", str(tmp_path), split="train").labels.tolist() == [1, 0, 5]
    (folder / "validation.tsv").unlink()
    found = zero_shot.load("sts", "", str(folder), max_examples=2)  # the folder itself
    assert (found.labels.tolist(), found.texts, found.split) == ([2, 0], (["a", "c"], ["b", "d"]), "test")
    with pytest.raises(ValueError, match="no split validation of stsb: give one of train test"):
        zero_shot.load("sts", "stsb", str(tmp_path), split="validation")


def test_any_file_with_columns_of_any_name(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("left,right,same\na,b,1\nc,d,0\ne,f,\n")
    given: Any = {"text_columns": ("left", "right"), "label_column": "same"}
    for source in (file, tmp_path):
        found = zero_shot.load("pairs", "", str(source), **given)
        assert (found.texts, found.labels.tolist(), found.split) == ((["a", "c"], ["b", "d"]), [1, 0], "all")
    found = zero_shot.load("retrieval", "", str(file), text_columns=("left", "right"))
    assert found.texts == (["a", "c", "e"], ["b", "d", "f"])
    with pytest.raises(ValueError, match="wanted the columns sentence1, sentence2, label or"):
        zero_shot.load("pairs", "", str(file))


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("pairs", "a,b,0\nc,d,1\ne,f,2", "wanted the labels 0 and 1, both of them, got 0 1 2"),
        ("pairs", "a,b,1\nc,d,1", "both of them, got 1"),
        ("sts", "a,b,3\nc,d,3", "every row has the score 3"),
        ("sts", "a,b,low\nc,d,high", "got the label 'low': wanted a number"),
        ("sts", "a,b,-1\nc,d,-1", "no labelled row"),
        ("retrieval", "a,b,0", "the same query or the same text"),
        ("retrieval", "a,b,0\na,c,0", "the same query or the same text"),
        ("retrieval", "a,b,0\nc,b,0", "the same query or the same text"),
    ],
)
def test_labels_that_cannot_be_scored(tmp_path, kind, rows, message):
    file = tmp_path / "table.csv"
    file.write_text("sentence1,sentence2,label\n" + rows + "\n")
    columns: Any = {"text_columns": ("sentence1", "sentence2")} if kind == "retrieval" else {}
    with pytest.raises(ValueError, match=message):
        zero_shot.load(kind, "", str(file), **columns)


def test_labels_are_looked_at_in_the_rows_that_are_scored(tmp_path):
    """A file sorted by its labels: an average precision of 100 % of pairs that are all paraphrases says nothing."""
    file = tmp_path / "table.csv"
    file.write_text("sentence1,sentence2,label\na,b,1\nc,d,1\ne,f,0\n")
    for kind, message in (("sts", "every row has the score 1"), ("pairs", "both of them, got 1")):
        assert len(zero_shot.load(kind, "", str(file))) == 3
        with pytest.raises(ValueError, match=message):
            zero_shot.load(kind, "", str(file), max_examples=2)


def test_few_shots_of_classes_without_examples_are_refused(tmp_path):
    """They could only be wrong."""
    (tmp_path / "train.csv").write_text("sentence,label\na,x\nb,y\n")
    (tmp_path / "validation.csv").write_text("sentence,label\na,x\nb,z\n")
    with pytest.raises(ValueError, match="train has no examples of z"):
        zero_shot.load("few-shot", "", str(tmp_path))


def test_embeddings_that_are_not_finite_are_refused(model, encoder, monkeypatch):
    """They would be a score of nan; of one text among several, and it is named."""
    real = encoder.model.encode

    def overflowing(texts, **options):
        found = real(texts, **options)
        found[texts.index("w3 w4"), 5] = np.inf
        return found

    monkeypatch.setattr(encoder.model, "encode", overflowing)
    with pytest.raises(ValueError, match=r"not finite of 1 of 2 texts, .* of 'w3 w4'"):
        encoder.embed(["w3 w4", "w5", "w3 w4"])


def test_pairs_are_made_of_documents():
    """The first sentence and the rest; documents of one sentence and repeated ones are left out."""
    documents = [
        "Sum of x. It adds\nthem all. Yes.",
        "No more",
        "A title\n\nIts text. End.",
        "Sum of x. It adds\nthem all. Yes.",
    ]
    found = zero_shot.made_pairs(documents, "here")
    assert found.texts == (["Sum of x.", "A title"], ["It adds\nthem all. Yes.", "Its text. End."])
    assert len(zero_shot.made_pairs(iter(documents * 9), "here", 2)) == 2
    with pytest.raises(ValueError, match="here: 1 documents have a second sentence"):
        zero_shot.made_pairs(documents[:2], "here")


def test_columns_of_classes_with_names(tmp_path):
    """Parquet of the hub, whose classes are numbers with names; pairs want 0 and 1."""
    import datasets

    names = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": names}
    )
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    assert zero_shot.load("pairs", "", str(tmp_path)).labels.tolist() == [1, 0]
