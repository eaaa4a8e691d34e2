"""Training on a mix of folders: in pieces, on other ranks, with other weights, as a user sees it."""

import json
import shutil

import pytest

from fastdistil.run import checkpoint
from tests.support import forked, toy
from tests.support.runs import arguments, exact_metrics, metrics_of, same_ends

SIX = {
    "batch__size": 16,
    "optim__duration": 6,
    "log__every": 1,
    "log__validate_every": 3,
    "log__checkpoint_every": 3,
    "engine__threads": 1,
}
"""Two micro-batches an update, whose gradients are the same sum on one rank and on two."""


@pytest.fixture(scope="module")
def mix(root, tmp_path_factory):
    """`root` with a second folder of shards, and the words of a mix of both."""
    folder = shutil.copytree(root, tmp_path_factory.mktemp("mix"), dirs_exist_ok=True)
    toy.make_shards(folder / "med", num_sequences=60, seed=3)
    return folder, f"{folder / 'shards'}:0.7", f"{folder / 'med'}:0.3"


def words(mix, out, *texts, **changes):
    folder, *both = mix
    return [*arguments(folder, out, **SIX | changes), "--data.shards", *(texts or both)]


@pytest.fixture(scope="module")
def straight(mix, tmp_path_factory):
    """A run of six updates on it; read only."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, forked.run(*words(mix, run)).stdout


def test_what_a_mix_says_and_leaves(straight):
    run, printed = straight
    for line in (
        "text: 14,035 tokens in 460 sequences, 34 held out",
        "mix of tokens: 70.0% shards (read 0.798 times an epoch), 30.0% med (read 2.45 times an epoch)",
        "validation/med after update 6  loss",
    ):
        assert line in printed
    assert json.loads((run / "config.json").read_text())["data"]["mix"].startswith("70.0% shards (read ")
    last = {line["split"]: line for line in metrics_of(run)}
    whole, *parts = (last[f"validation{of}"] for of in ("", "/shards", "/med"))
    low, high = sorted(part["mlm"] for part in parts)
    assert low < whole["mlm"] < high


@pytest.mark.parametrize("ranks", [None, 2])
def test_six_updates_are_three_and_three(mix, straight, tmp_path, ranks):
    """Bit for bit on one process; on two ranks the same sequences and masks, losses within 1e-5."""
    run = shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(run, 6))
    (run / "status.json").write_text('{"state": "running"}')
    ended = forked.run(*words(mix, run, resume="auto", engine__zero_stage=0), ranks=ranks)
    assert "resuming after update 3 of 6" in ended.stdout
    if ranks is None:
        assert exact_metrics(run) == exact_metrics(straight[0])
        same_ends(run, straight[0])
    got, wanted = metrics_of(run), metrics_of(straight[0])
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        for name in ("split", "update", "epoch", "tokens", "masked", "sequences"):
            assert one.get(name) == other.get(name)
        for name in ("loss", "kd", "mlm", "cosine"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "said"),
    [((0.7, 0.4), "--data.shards: was ["), ((None, None), "--data.shards: was ["), ((0.7,), "--data.shards: was [")],
)
def test_other_weights_are_another_run(mix, straight, weights, said):
    texts = [word.rpartition(":")[0] + (f":{w}" if w else "") for word, w in zip(mix[1:], weights, strict=False)]
    refused = forked.run(*words(mix, straight[0], *texts, resume="auto"), ok=False)
    assert (refused.returncode, said in refused.stderr) == (2, True)


def test_another_folder_is_another_text_and_the_same_may_lie_elsewhere(mix, straight, tmp_path):
    other = toy.make_shards(tmp_path / "med", num_sequences=60, seed=4)
    given = {"resume": "auto", "optim__duration": 7}
    refused = forked.run(*words(mix, straight[0], mix[1], f"{other}:0.3", **given), ok=False)
    assert f"{other}:0.3 is not the text that the run in" in refused.stderr
    moved = shutil.copytree(mix[0] / "med", tmp_path / "elsewhere")
    ended = forked.run(*words(mix, straight[0], mix[1], f"{moved}:0.3", **given), "--dry-run")
    assert "mix of tokens  70.0% shards (read 0.798 times an epoch), 30.0% elsewhere" in ended.stdout
    gone = forked.run(*words(mix, straight[0], mix[1], "gone:0.3", **given), ok=False)
    assert "--data.shards gone is not here" in gone.stderr


def test_one_tokenizer_made_them_all(mix, tmp_path):
    other = shutil.copytree(mix[0] / "med", tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}))
    refused = forked.run(*words(mix, tmp_path / "run", mix[1], f"{other}:1"), ok=False)
    assert f"--data.shards {other} was made with tokenizer 000000000000, --data.shards {mix[0] / 'shards'}" in (
        refused.stderr
    )


def test_a_dry_run_and_the_model_card_name_the_mix(mix, straight, tmp_path):
    plain = [word.rpartition(":")[0] for word in mix[1:]]
    said = forked.run(*words(mix, tmp_path / "run", *plain), "--dry-run").stdout
    assert "87.4% shards (read 1 times an epoch), 12.6% med (read 1 times an epoch)" in said
    forked.run("fastdistil.export", straight[0], "--out", tmp_path / "model")
    assert "tokens mixed as 70.0% shards (read" in (tmp_path / "model/README.md").read_text()
