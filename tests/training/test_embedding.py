"""Terms of embeddings against transformers in fp64, and what a run without a head builds, runs, keeps and refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fastdistil.model.sentence import Pooling
from fastdistil.run.config import LossConfig
from tests.support import authors, forked
from tests.support.updates import CPU, LAYERS, make_batches, make_student, one_update
from tests.workers import engine_worker

MEAN = Pooling(mode="mean", normalise=True, max_length=None)
LONG = replace(MEAN, normalise=False)
CLS = Pooling(mode="cls", normalise=True, max_length=None)
EMBEDDING = LossConfig(kd=0.0, mlm=0.0, cosine=0.0, embedding=3.0)
SIMILARITY = replace(EMBEDDING, embedding=0.0, similarity=3.0)
ALL = replace(EMBEDDING, cosine=0.5, hidden=2.0, similarity=1.5)
TERMS = ("cosine", "hidden", "embedding", "similarity", "mlm")


def reference(root, name: str, micro_batches: int, config: LossConfig, pooling: Pooling):
    """(unweighted terms, their weighted sum and its gradient), sequence by sequence in fp64."""
    _, batches = make_batches(root, micro_batches, CPU)
    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    teacher = load(root / "teacher", attn_implementation="eager").double().eval()
    student = load(root / name, attn_implementation="eager").double().eval()
    projection = make_student(root, name, CPU, loss=config).projection
    matrix = None if projection is None else projection.weight.detach().double().requires_grad_()
    sums: dict[str, list[torch.Tensor]] = {term: [] for term in TERMS}
    real = masked = num_sequences = 0

    def embedding(states_LD: torch.Tensor) -> torch.Tensor:
        return states_LD.mean(0) if pooling.mode == "mean" else states_LD[0]

    def distance(pairs) -> torch.Tensor:
        return torch.stack([1 - F.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean(0).sum()

    for batch in batches:
        embeddings = []
        for ids, labels in authors.sequences([batch]):
            with torch.no_grad():
                examples = teacher(input_ids=ids, output_hidden_states=True).hidden_states
            output = student(input_ids=ids, output_hidden_states=True)
            mine = [h[0] if matrix is None else h[0] @ matrix.T for h in output.hidden_states]
            pairs = [(mine[1 + i], examples[1 + layer][0]) for i, layer in enumerate(LAYERS)]
            sums["mlm"].append(F.cross_entropy(output.logits[0], labels, ignore_index=-100, reduction="sum"))
            if config.cosine or config.hidden:  # else the widths may differ
                sums["cosine"].append(distance(pairs[-1:]))
                sums["hidden"].append(distance(pairs))
            embeddings.append([embedding(states) for states in pairs[-1]])
            real, masked = real + len(labels), masked + int((labels >= 0).sum())
        for pair in embeddings if config.embedding else ():
            if config.embedding_distance == "l2":
                e, f = (x / x.norm() if pooling.normalise else x for x in pair)
                sums["embedding"].append((e - f).square().sum())
            else:
                sums["embedding"].append(1 - F.cosine_similarity(*pair, dim=0))
        for i, (e, f) in enumerate(embeddings):
            others = embeddings[:i] + embeddings[i + 1 :]
            errors = [(F.cosine_similarity(e, x, dim=0) - F.cosine_similarity(f, y, dim=0)) ** 2 for x, y in others]
            sums["similarity"].append(torch.stack(errors).mean())
        num_sequences += len(embeddings)
    number = {"mlm": masked, "embedding": num_sequences, "similarity": num_sequences}
    terms = {term: torch.stack(parts).sum() / number.get(term, real) for term, parts in sums.items() if parts}
    loss = torch.stack([getattr(config, term) * value for term, value in terms.items()]).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    if matrix is not None and matrix.grad is not None:
        gradients["projection.weight"] = matrix.grad
    return {term: value.item() for term, value in terms.items()}, loss.item(), gradients


CASES = {
    "embedding": ("same", EMBEDDING, MEAN),
    "embedding by cls": ("same", EMBEDDING, CLS),
    "embedding, l2": ("same", replace(EMBEDDING, embedding_distance="l2"), LONG),
    "embedding, l2 of length 1": ("same", replace(EMBEDDING, embedding_distance="l2"), CLS),
    "similarity": ("same", SIMILARITY, MEAN),
    "similarity of another width": ("narrow", replace(SIMILARITY, mlm=1.0), MEAN),
    "projected hidden": ("narrow", replace(EMBEDDING, embedding=0.0, hidden=3.0), MEAN),
    "projected cosine": ("narrow", replace(EMBEDDING, embedding=0.0, cosine=3.0, mlm=1.0), MEAN),
    "projected, l2": ("narrow", replace(EMBEDDING, embedding_distance="l2"), LONG),
    "projected, all there is": ("narrow", replace(ALL, mlm=1.0), MEAN),
}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("name", "config", "pooling"), CASES.values(), ids=list(CASES))
def test_terms_and_gradients_equal_the_reference(folder, name, config, pooling, micro_batches):
    losses, gradients = one_update(folder, name, micro_batches, config, pooling=pooling)
    terms, loss, exact = reference(folder, name, micro_batches, config, pooling)
    assert losses["loss"] == pytest.approx(loss, rel=1e-5)
    for term in TERMS:
        assert (term in losses) == bool(getattr(config, term))
        if term in losses:
            assert losses[term] == pytest.approx(terms[term], rel=1e-5)
            assert losses[term] > 1e-3
    assert ("projection.weight" in exact) == (name == "narrow" and config.similarity != 3.0)
    error, where = authors.worst_relative_error(gradients, exact)
    assert error < 1e-4, where


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_engine_gives_the_gradient_of_one_process(folder, ranks):
    """Three micro-batches, so that one of two ranks has an empty one."""
    stages = (0, 1, 2, 3)
    losses, exact = one_update(folder, "narrow", 3, ALL, pooling=MEAN)
    results, *_ = forked.call(engine_worker.gradients, folder, "narrow", "fp32", stages, 3, ALL, MEAN, ranks=ranks)
    for stage in stages:
        found, gradients = results[stage]
        assert found.keys() == losses.keys() == {"loss", *TERMS} - {"mlm"}
        assert found == pytest.approx(losses, rel=1e-5), stage
        assert exact["projection.weight"].any()
        error, where = authors.worst_relative_error(gradients, {n: g for n, g in exact.items() if g.any()})
        assert error < 1e-4, (stage, where)
