"""A run is known by the contents of what it reads: moved, exchanged, prolonged, finished, as a user sees it."""

import json
import logging
import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fastdistil.model.masked_lm import MaskedLM
from fastdistil.model.weights import load_masked_lm
from fastdistil.run import checkpoint
from fastdistil.run.config import Config, LossConfig, TeacherConfig
from fastdistil.run.ranks import Ranks
from fastdistil.training import teacher as teachers
from fastdistil.training.inputs import digest
from tests.support import authors, forked, toy
from tests.support.runs import arguments, exact_metrics, metrics_of, same_ends, status
from tests.support.updates import DEVICE, make_batches, make_teacher
from tests.workers import together_worker

SIX = {"optim__duration": 6, "log__every": 1, "engine__threads": 1}


@pytest.fixture(scope="module")
def six(root, tmp_path_factory):
    """A run of 6 updates with checkpoints of 5 and 6; read only."""
    run = tmp_path_factory.mktemp("six") / "run"
    forked.run(*arguments(root, run, **SIX))
    return run


def copy(run, folder, *, back_to=None):
    """A copy of a run; with `back_to` as it was when only the checkpoint of that update was there."""
    new = shutil.copytree(run, folder / "run")
    if back_to is not None:
        for path in (new / "checkpoints").iterdir():
            if path != checkpoint.folder_of(new, back_to):
                shutil.rmtree(path)
        (new / "status.json").write_text('{"state": "running"}')
    return new


def record_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_digest_is_of_the_numbers_and_not_of_the_file(root, tmp_path):
    """Half precision is other numbers, unless they are read back from it."""
    model = load_masked_lm(root / "teacher", need_head=True)
    known = digest(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
            assert digest(model) != known, name
            parameter.view(-1)[-1] -= 1e-3
        model.load_state_dict(load_masked_lm(root / "teacher", need_head=True).state_dict())
    assert digest(model) == known
    half = shutil.copytree(root / "teacher", tmp_path / "half")
    tensors = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    in_half = digest(load_masked_lm(half, need_head=True))
    save_file({n: t.float() for n, t in tensors.items()}, half / "model.safetensors", metadata={"format": "pt"})
    assert digest(load_masked_lm(half, need_head=True)) == in_half != known


def test_a_digest_is_of_what_layers_see_and_how_they_rotate():
    changes = ({}, {"local_attention": 18}, {"global_every": 2}, {"global_theta": 1e4}, {"local_theta": 1e5})
    models = [MaskedLM(toy.architecture(**toy.MODERNBERT | change)) for change in changes]
    assert len({digest(model) for model in models}) == len(changes)


class TestElsewhere:
    def test_moved_and_in_another_format_it_is_bitwise_the_same_run(self, root, six, tmp_path):
        """Its own configuration counts for all that is not given, in one process and on its ranks alike."""
        run = copy(six, tmp_path, back_to=5)
        shards = shutil.copytree(root / "shards", tmp_path / "data/wiki")
        teacher = shutil.copytree(root / "teacher", tmp_path / "random")  # a word of --student.init, but a folder here
        torch.save(load_file(teacher / "model.safetensors"), teacher / "pytorch_model.bin")
        (teacher / "model.safetensors").unlink()
        moved = ["--data.shards", shards, "--teacher.path", teacher]
        done = forked.run("fastdistil.pretrain", "--resume", "auto", "--out", run, *moved)
        assert "resuming after update 5 of 6" in done.stdout
        assert exact_metrics(run) == exact_metrics(six)
        same_ends(run, six)
        assert record_of(run)["config"]["teacher"]["path"] == str(teacher)  # for the next time

    def test_what_is_not_here_is_asked_for(self, six, tmp_path):
        run = copy(six, tmp_path, back_to=5)
        record = record_of(run)
        record["config"]["data"]["shards"] = "gone/shards"
        (run / "config.json").write_text(json.dumps(record))
        done = forked.run("fastdistil.pretrain", "mlm", "--resume", "auto", "--out", run, ok=False)
        assert done.returncode == 2
        assert "whose recipe is distilbert, not mlm" in done.stdout
        assert "--data.shards gone/shards is not here" in done.stderr
        done = forked.run("fastdistil.pretrain", "mlm", "--resume", "auto", "--out", tmp_path / "new", ok=False)
        assert f"there is no run in {tmp_path / 'new'} to go on with" in done.stderr

    def test_on_ranks(self, root, six, tmp_path):
        run = copy(six, tmp_path, back_to=5)
        done = forked.run("fastdistil.pretrain", "distilbert", "--resume", "auto", "--out", run, ranks=2)
        assert "resuming after update 5 of 6" in done.stdout
        assert status(run)["state"] == "finished"


class TestExchanged:
    def refused(self, root, run, **changes):
        before = record_of(run)
        done = forked.run(*arguments(root, run, **SIX, resume="auto", **changes), ok=False)
        assert done.returncode == 2
        assert record_of(run) == before
        return done.stderr

    @pytest.mark.parametrize("how", ["another", "one number", "heads"])
    def test_a_teacher(self, root, six, tmp_path, how):
        run, other = copy(six, tmp_path, back_to=5), tmp_path / "teacher"
        if how == "another":
            toy.make_teacher(other, root / "shards", seed=2)
        else:
            shutil.copytree(root / "teacher", other)
        if how == "one number":
            tensors = load_file(other / "model.safetensors")
            tensors["bert.encoder.layer.3.output.dense.bias"][31] += 1e-3
            save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        if how == "heads":
            config = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
        error = self.refused(root, run, teacher__path=other)
        wanted = record_of(run)["inputs"]["teacher.path"]
        assert f"--teacher.path {other} is not the model that the run in {run} was started with (SHA-256 " in error
        assert f"wanted {wanted[:12]}): give the old one" in error

    def test_text(self, root, six, tmp_path):
        run, other = copy(six, tmp_path, back_to=5), toy.make_shards(tmp_path / "shards", seed=9)
        assert f"--data.shards {other} is not the text that the run" in self.refused(root, run, data__shards=other)
        error = self.refused(root, run, data__validation=other)
        assert "--data.validation: was None, now" in error

    def test_validation_text(self, root, tmp_path):
        one, other = (toy.make_shards(tmp_path / name, num_sequences=50, seed=i) for i, name in enumerate("ab"))
        given = {"optim__duration": 2, "log__checkpoint_every": 1}
        forked.run(*arguments(root, tmp_path / "run", **given, data__validation=one))
        words = arguments(
            root, tmp_path / "run", **given | {"optim__duration": 3}, data__validation=other, resume="auto"
        )
        done = forked.run(*words, ok=False)
        assert f"--data.validation {other} is not the text that the run" in done.stderr

    def test_a_replay_does_not_take_another_teacher_for_the_runs(self, root, six, tmp_path):
        other = toy.make_teacher(tmp_path / "other", root / "shards", seed=2)
        done = forked.run("fastdistil.replay", six, "--update", 6, "--teacher", other, ok=False)
        assert done.returncode == 2
        assert "is not the model that the run" in done.stderr
        moved = shutil.copytree(root / "teacher", tmp_path / "moved")
        forked.run("fastdistil.replay", six, "--update", 6, "--checkpoint", 5, "--teacher", moved)

    def test_on_one_of_the_hosts(self):
        first, second = forked.call(together_worker.other_files, ranks=2)
        assert first == second
        assert first.startswith(
            "--teacher.path is not the same on rank 0 and rank 1 (SHA-256 000000000000 and 111111111111)"
        )

    def test_a_run_of_an_older_version_goes_on_and_is_known_from_then_on(self, root, six, tmp_path):
        run, other = copy(six, tmp_path, back_to=5), toy.make_teacher(tmp_path / "other", root / "shards", seed=2)
        record = record_of(run)
        inputs_of = record.pop("inputs")
        (run / "config.json").write_text(json.dumps(record))
        done = forked.run(*arguments(root, run, **SIX, resume="auto"))
        assert done.stdout.count("was started by an older version, which kept no digests") == 1
        assert record_of(run)["inputs"] == inputs_of
        same_ends(run, six)
        shutil.rmtree(checkpoint.folder_of(run, 6))
        assert "is not the model that the run" in self.refused(root, run, teacher__path=other)


def test_the_model_that_a_student_started_from_is_not_needed_any_more(root, tmp_path):
    run, source = tmp_path / "run", shutil.copytree(root / "teacher", tmp_path / "source")
    given = SIX | {"student__init": source, "student__num_layers": 2, "log__checkpoint_every": 3}
    forked.run(*arguments(root, run, **given))
    straight = shutil.copytree(run, tmp_path / "straight")
    shutil.rmtree(source)
    copied = copy(run, tmp_path / "again", back_to=3)
    done = forked.run("fastdistil.pretrain", "--resume", "auto", "--out", copied)
    assert "(2 layers, 32 wide) from its checkpoint" in done.stdout
    same_ends(copied, straight)
    # Before there is a checkpoint it is needed, and the same as ever.
    shutil.rmtree(copied / "checkpoints")
    done = forked.run("fastdistil.pretrain", "--resume", "auto", "--out", copied, ok=False)
    assert f"there is no folder {source}" in done.stderr
    toy.make_teacher(source, root / "shards", seed=3)
    done = forked.run("fastdistil.pretrain", "--resume", "auto", "--out", copied, ok=False)
    assert f"--student.init {source} is not the model that the run" in done.stderr


class TestLonger:
    def test_a_finished_run_is_prolonged_and_the_longer_one_resumed(self, root, six, quiet, tmp_path):
        """From update 7 on at the rates of 12 updates, over the sequences that 12 updates meet in one go."""
        run = copy(six, tmp_path)
        words = ["fastdistil.pretrain", "--resume", "auto", "--out", run]
        done = forked.run(*words, "--optim.duration", 12)
        assert "resuming after update 6 of 12" in done.stdout
        assert (
            "prolonged from 6 to 12 updates: from update 7 on the learning rate follows the schedule of 12"
            in done.stdout
        )
        lines = [line for line in metrics_of(run) if line["split"] == "train"]
        whole = [line for line in metrics_of(quiet.run) if line["split"] == "train"]
        assert exact_metrics(run)[: len(metrics_of(six))] == exact_metrics(six)
        for name in ("update", "epoch", "tokens", "masked"):
            assert [line[name] for line in lines] == [line[name] for line in whole], name
        assert [line["lr"] for line in lines[6:]] == [line["lr"] for line in whole[6:]]
        assert [line["lr"] for line in lines[1:6]] != [line["lr"] for line in whole[1:6]]
        assert record_of(run)["config"]["optim"]["duration"] == 12

        again = copy(run, tmp_path / "again", back_to=10)
        done = forked.run(*words[:-1], again)
        assert "prolonged" not in done.stdout
        assert exact_metrics(again) == exact_metrics(run)
        same_ends(again, run)

    def test_not_shorter(self, six, tmp_path):
        run = copy(six, tmp_path)
        words = ["fastdistil.pretrain", "--resume", "auto", "--out", run, "--optim.duration", 5]
        done = forked.run(*words, ok=False)
        assert done.returncode == 2
        assert "--optim.duration: was 6.0, now 5.0 (a run can be made longer, not shorter)" in done.stderr

    def test_a_finished_run_whose_last_checkpoint_is_gone_is_not_finished(self, six, tmp_path):
        run = copy(six, tmp_path)
        shutil.rmtree(checkpoint.folder_of(run, 6))
        forked.run("fastdistil.pretrain", "--resume", "auto", "--out", run)
        same_ends(run, six)


class TestWhatTheTeacherKnows:
    """Its own masked-LM loss on the validation text, before anything is written."""

    def test_it_is_that_of_transformers(self, folder, caplog):
        """Over the masked tokens of the first two micro-batches, and no others."""
        _, batches = make_batches(folder, 3)
        load: Any = transformers.AutoModelForMaskedLM.from_pretrained
        model = load(folder / "teacher", attn_implementation="eager").double().eval()
        losses, right = [], []
        for ids, labels in authors.sequences(batches[:2]):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            masked = labels >= 0
            losses.append(cross_entropy(logits[masked], labels[masked], reduction="none"))
            right.append(logits[masked].argmax(-1) == labels[masked])
        with caplog.at_level(logging.INFO, "fastdistil"):
            teachers.require_knowledge(make_teacher(folder), self.config(folder), batches, Ranks(0, 1, DEVICE))
        loss, share, number = torch.cat(losses).mean(), torch.cat(right).double().mean(), len(torch.cat(losses))
        assert number > 50
        assert caplog.messages[0] == (
            f"teacher: masked LM loss {loss:.4g}, accuracy {share:.1%} on {number} masked tokens of the validation "
            "text; to know nothing is ln(101) = 4.615"
        )

    def config(self, folder, **loss):
        return Config(teacher=TeacherConfig(path=folder / "teacher"), loss=LossConfig(**loss))

    def test_random_weights_are_refused_but_for_toys_and_for_students_of_hidden_states(
        self, folder, caplog, monkeypatch
    ):
        given = make_teacher(folder), self.config(folder), make_batches(folder, 2)[1], Ranks(0, 1, DEVICE)
        teachers.require_knowledge(*given)
        assert "knows nothing of this text" in caplog.messages[-1]
        monkeypatch.setattr(teachers, "TOY_VOCABULARY", 101)
        with pytest.raises(
            ValueError, match=r"knows nothing of this text: .* wanted below 4.384.* or --teacher.check warn"
        ):
            teachers.require_knowledge(*given)
        caplog.clear()
        teachers.require_knowledge(given[0], self.config(folder, kd=0.0), *given[2:])
        assert "knows nothing of this text" in caplog.messages[-1]

    def test_a_teacher_that_knows_the_text_passes(self, folder, caplog, monkeypatch):
        """One whose head has learnt which words there are: the labels of this micro-batch."""
        monkeypatch.setattr(teachers, "TOY_VOCABULARY", 0)
        _, (batch,) = make_batches(folder, 1)
        teacher = make_teacher(folder)
        with torch.no_grad():
            counts = torch.bincount(batch.labels[batch.labels >= 0], minlength=len(teacher.head.bias))
            teacher.head.norm.weight.zero_()
            teacher.head.norm.bias.zero_()
            teacher.head.bias.copy_((counts + 0.01).log())
        teachers.require_knowledge(teacher, self.config(folder), [batch], Ranks(0, 1, DEVICE))
        assert "knows nothing" not in caplog.text

    @pytest.mark.parametrize(("spoilt", "loss"), [("zeros", "4.615"), ("nan", "nan")])
    def test_zeros_and_nan_are_refused_unless_told_otherwise(self, root, tmp_path, spoilt, loss):
        broken = shutil.copytree(root / "teacher", tmp_path / "broken")
        tensors = load_file(broken / "model.safetensors")
        if spoilt == "zeros":
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        else:
            tensors["bert.encoder.layer.1.output.LayerNorm.weight"][3] = float("nan")
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        words = arguments(root, tmp_path / "run", teacher__path=broken, optim__duration=1)
        done = forked.run(*words, ok=False)
        assert done.returncode == 2
        assert f"--teacher.path {broken} knows nothing of this text: its own masked-LM loss is {loss}" in done.stderr
        assert not (tmp_path / "run").exists()
        done = forked.run(*words, "--teacher.check", "warn", ok=False)
        assert "knows nothing of this text" in done.stdout
        assert "update 1" in done.stdout

    def test_on_ranks_with_a_teacher_of_its_own_they_agree(self, root, tmp_path):
        """Students of one teacher rank say what two ranks with their own teachers say."""
        few = {"optim__duration": 1, "engine__zero_stage": 0, "engine__threads": 1}
        said = []
        for name, ranks, more in (("a", 2, {}), ("b", 3, {"teacher__ranks": 1})):
            done = forked.run(*arguments(root, tmp_path / name, **few, **more), ranks=ranks)
            said += [line.partition(" ")[2] for line in done.stdout.splitlines() if "teacher: masked LM loss" in line]
        assert len(said) == 2
        assert said[0] == said[1]
