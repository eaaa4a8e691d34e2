"""Files of options: recipes, a user's own, a run's config.json; what goes on top of what, and mistakes in them."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistil.run import config, recipes
from fastdistil.run.recipes import parse
from tests.support import launch


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.yaml into an empty folder, where the test then is."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("run.yaml").write_text(text, encoding="utf-8")


def printed(capsys, *words):
    """What --print-config says, and the end that it makes."""
    with pytest.raises(SystemExit) as ended:
        parse([*words, "--print-config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_file_is_on_top_of_its_recipe_and_words_are_on_top_of_it(write):
    write("""
recipe: quickstart
data:
  shards: [wiki:0.7, "/data/2024:0.3"]
  verify: no
optim: {lr: 5e-4, betas: [0.9, 0.95]}
teacher.normalise: true
student:
  layers: null
  num_layers: 3
  fold_token_types: yes
loss: # all as the recipe has it
""")
    c = parse(["--config", "run.yaml", "--optim.eps", "1e-5", "--data.validation-sequences=7"])
    assert (c.recipe, c.batch.size, c.log.every, str(c.out)) == ("quickstart", 8192, 10, "runs/quickstart")
    assert (c.data.shards, c.data.verify, c.data.validation_sequences) == (("wiki:0.7", "/data/2024:0.3"), False, 7)
    assert (c.optim.lr, c.optim.betas, c.optim.eps) == (5e-4, (0.9, 0.95), 1e-5)
    assert (c.teacher.normalise, c.student.layers, c.student.num_layers) == (True, None, 3)
    assert c.student.fold_token_types
    assert parse(["--config=run.yaml", "--optim.lr", "1e-3"]).optim.lr == 1e-3
    assert parse(["quickstart", "--config", "run.yaml"]) == parse(["--config", "run.yaml"])


def test_a_file_may_say_nothing_of_a_recipe(write):
    write("optim:\n  lr: 1e-4\n")
    assert parse(["--config", "run.yaml"]).recipe == "distilbert"
    assert parse(["mlm", "--config", "run.yaml"]).loss.kd == 0
    write("")
    assert parse(["--config", "run.yaml"]) == config.Config()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_what_is_printed_is_read_again(name, write, capsys):
    text = printed(capsys, name, "--data.shards", "a b:1", "null:3", "--loss.nested-layers", "--student.init", "2")
    assert "# Highest learning rate, reached at the end of the warm-up.\n  lr: " in text
    write(text)
    again = parse(["--config", "run.yaml"])
    assert again.data.shards == ("a b:1", "null:3")
    assert config.to_json(again) == config.to_json(recipes.named(name)) | {
        "data": config.to_json(again)["data"],
        "student": config.to_json(recipes.named(name))["student"] | {"init": "2"},
    }
    assert printed(capsys, "--config", "run.yaml") == text


@given(
    st.floats(1e-9, 0.9),
    st.integers(0, 2**32 - 1),
    st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=4)),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12),
)
def test_any_value_is_printed_as_it_is_read(tmp_path_factory, lr, seed, layers, name):
    changed = config.to_json(config.Config())
    changed["optim"]["lr"], changed["seed"], changed["student"]["layers"] = lr, seed, layers
    changed["data"]["shards"] = [f"x{name}x"]
    wanted = config.from_json(changed)
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_text(recipes.to_yaml(wanted), encoding="utf-8")
    assert recipes.read(path).onto(config.Config(), "pretrain") == wanted


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("optim:\n  lrr: 1\n", [], "run.yaml, line 2: there is no --optim.lrr: did you mean --optim.lr?"),
        ("lr: 1\n", [], "run.yaml, line 1: there is no --lr: use --optim.lr"),
        ("\noptim: 5\n", [], "run.yaml, line 2: there is no --optim: did you mean --optim.lr?"),
        ("optim:\n  lr: x\n", [], "run.yaml, line 2: wanted --optim.lr FLOAT, got x."),
        ("optim:\n  lr: null\n", [], "run.yaml, line 2: wanted --optim.lr FLOAT, got None."),
        ("optim:\n  lr: true\n", [], "run.yaml, line 2: wanted --optim.lr FLOAT, got True."),
        ("seed: 1\noptim:\n  lr: 5\n", [], "run.yaml, line 3: --optim.lr must be in (0, 1), got 5.0"),
        ("optim:\n  lr: [1, 2]\n", [], "run.yaml, line 2: --optim.lr wants one value, got a list"),
        ("optim:\n  lr: {a: 1}\n", [], "run.yaml, line 2: --optim.lr wants a value, got a section"),
        ("student:\n  layers: [[1]]\n", [], "line 2: --student.layers wants a value, got a list of lists"),
        ("data:\n  verify: maybe\n", [], "run.yaml, line 2: --data.verify wants true or false, got maybe"),
        ("optim:\n  lr: 0.1\noptim.lr: 1\n", [], "run.yaml, line 3: optim.lr is also in line 2: leave one out"),
        ("- a\n", [], "run.yaml, line 1: wanted options as `section:` and below it `option: value`"),
        ("a: [1\nb: 2\n", [], "run.yaml, line 2 is no YAML: expected ',' or ']', but got ':'"),
        ("optim:\n\tlr: 1\n", [], "run.yaml, line 2 is no YAML: found character '\\t' that cannot start any token"),
        ("\0", [], "run.yaml is no YAML: unacceptable character"),
        ("a: !!python/object/apply:os.system [ls]\n", [], "run.yaml, line 1: there is no --a"),
        ("a: &a [*a]\n", [], "run.yaml, line 1: --a wants a value, got a list of lists"),
        ("recipe: mlmm\n", [], "run.yaml, line 1: there is no recipe mlmm: did you mean mlm?"),
        ("recipe: mlm\n", ["embed"], "run.yaml starts from recipe mlm, the command line from embed: leave one out"),
        ("out: s3://bucket/run\n", [], "run.yaml: s3://bucket/run is not on this machine"),
        ("seed: 1\n", ["--seeed", "2"], "there is no --seeed: did you mean --seed?"),
        ("seed: 1\n", ["run.yaml"], "there is no recipe run.yaml: use --config run.yaml"),
        ("", ["--config", "b.yaml"], "--config wants one file, got b.yaml run.yaml"),
    ],
)
def test_a_mistake_says_file_and_line(text, words, said, write):
    write(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        parse([*words, "--config", "run.yaml"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "--config wants a file, got none"),
        (["--config", "--seed", "3"], "--config wants a file, got none"),
        (["--config", "gone.yaml"], "--config gone.yaml does not exist: give a YAML file"),
        (["--config", "folder"], "--config folder is a folder: give a file"),
        (["--config", "run"], "--config run is a folder: give run/config.json"),
    ],
)
def test_what_is_no_file(words, said, write):
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    with pytest.raises(ValueError, match=said):
        parse(words)


class TestARunsOwn:
    """config.json of a run as --config."""

    @pytest.fixture
    def record(self, write):
        made = parse(
            ["quickstart", *launch.options(optim__lr=1e-4, data__shards="wiki", out="runs/one", optim__eps=1e-7)]
        )
        Path("config.json").write_text(
            json.dumps({"config": config.to_json(made), "student": {}, "teacher": None}, indent=1)
        )
        return made

    def test_it_repeats_the_run_elsewhere(self, record):
        with pytest.raises(ValueError, match=r"config.json is of the run in runs/one: give another --out to repeat"):
            parse(["--config", "config.json"])
        again = parse(["--config", "config.json", "--out=runs/two", "--seed", "7"])
        assert config.flatten(config.to_json(again)) == config.flatten(config.to_json(record)) | {
            "out": "runs/two",
            "seed": 7,
        }

    def test_of_before_there_were_mixes(self, record):
        saved = json.loads(Path("config.json").read_text())
        saved["config"]["data"]["shards"] = "wiki"
        Path("config.json").write_text(json.dumps(saved))
        assert parse(["--config", "config.json", "--out", "runs/two"]).data.shards == ("wiki",)
        assert config.from_json(saved["config"]).data.shards == ("wiki",)
        assert config.resume_differences(saved["config"], config.to_json(record)) == []


def test_going_on_with_a_run_that_a_file_began(write, caplog):
    """What neither file nor words say is as the run has it."""
    caplog.set_level("WARNING", "fastdistil")
    write("recipe: quickstart\nout: runs/mine\nresume: auto\noptim:\n  duration: 300\n")
    assert parse(["--config", "run.yaml"]).batch.size == 8192
    begun = parse(["quickstart", *launch.options(out="runs/mine", batch__token_budget=128, profile="2:3")])
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.json").write_text(json.dumps({"config": config.to_json(begun), "student": {}}))
    c = parse(["--config", "run.yaml"])
    assert (c.batch.token_budget, c.optim.duration, c.resume, c.profile) == (128, 300, "auto", None)
    assert not caplog.messages
    parse(["mlm", "--out", "runs/mine", "--resume", "auto"])
    assert "whose recipe is quickstart, not mlm" in caplog.text


def test_recipes_travel_with_the_package():
    """As data of the package that pyproject.toml names; each says in its first line what it is."""
    import tomllib

    root = Path(recipes.__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.yaml" in data["*"]
    for name in recipes.NAMES:
        assert recipes._about(name).endswith((".", ":"))
        # What it says is not what holds anyway.
        file = recipes.read(Path(recipes.__file__).with_suffix("") / f"{name}.yaml")
        defaults = config.flatten(config.to_json(config.Config()))
        values = config.flatten(config.to_json(recipes.named(name)))
        for option in file.lines:
            key = option.removeprefix("--").replace("-", "_")
            assert values[key] != defaults[key] or key == "loss.mlm", (name, key)
