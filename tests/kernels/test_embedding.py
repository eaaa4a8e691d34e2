"""Embeddings with LayerNorm and dropout against their definition; on a CPU as test_layernorm.py."""

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastdistil.kernels import embedding
from fastdistil.kernels.dropout import dropout
from fastdistil.kernels.layernorm import layernorm
from tests.support.norms import assert_as_right, destinations, each_destination, judged
from tests.support.precision import DEVICE, each_dtype, fp64, results

pytestmark = pytest.mark.triton

OPTIONS = {"plain": {}, "dropout": {"dropout_p": 0.3, "seed": torch.tensor(2**62 + 12345, device=DEVICE)}}


def make_embeddings(num_rows, width, dtype, without) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    sizes = {"word_VD": (20, width), "position_PD": (9, width), "type_D": (width,)}
    sizes |= {"weight_D": (width,), "bias_D": (width,)}
    leaves: dict[str, Any] = {
        name: torch.randn(size, generator=gen).to(DEVICE, dtype).requires_grad_() for name, size in sizes.items()
    }
    leaves["dout_ND"] = torch.randn((num_rows, width), generator=gen).to(DEVICE, dtype)
    for name, high, kind in (("ids_N", 20, torch.int32), ("position_ids_N", 9, torch.int64)):
        leaves[name] = torch.randint(high, (num_rows,), generator=gen).to(DEVICE, kind)
    return leaves | dict.fromkeys(without)


def eager(ids_N, position_ids_N, word_VD, position_PD, type_D, weight_D, bias_D, *, dropout_p=0.0, seed=None):
    """As a model puts it together from the public operators."""
    embedded = F.embedding(ids_N, word_VD)
    if position_PD is not None:
        embedded = embedded + F.embedding(position_ids_N, position_PD)
    out = layernorm(embedded if type_D is None else embedded + type_D, weight_D, bias_D)
    return dropout(out, seed, stream=0, dropout_p=dropout_p)


MODERNBERT = ["position_ids_N", "position_PD", "type_D", "bias_D"]
"""What its embeddings have not."""


@pytest.mark.parametrize("without", [[], ["type_D"], MODERNBERT], ids=["types", "no types", "words alone"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_destination
@each_dtype
@pytest.mark.parametrize("shape", [(3, 17), (67, 96)], ids=str)
def test_embeddings(shape, dtype, sums, accumulate, options, without):
    """Sums of rows of tables, against the operators' gradients, and the same elements dropped."""
    num_rows, width = shape
    leaves = make_embeddings(num_rows, width, dtype, without)
    given: dict[str, Any] = {name: None if leaf is None else leaf.detach() for name, leaf in leaves.items()}
    dout, weight = given.pop("dout_ND"), given["weight_D"]
    order = ("ids_N", "position_ids_N", "word_VD", "position_PD", "type_D", "weight_D", "bias_D")
    tables: list[Any] = [given[name] for name in order]
    seed, dropout_p = options.get("seed"), options.get("dropout_p", 0.0)

    out, saved = embedding.forward(*tables, eps=1e-12, seed=seed, dropout_p=dropout_p)
    into: dict[str, Any] = destinations(("dweight", "dbias"), width, sums or dtype, accumulate)
    into |= {"dbias": None} if "bias_D" in without else {}
    dembedded = embedding.backward(dout, saved, weight, seed, dropout_p, **into, accumulate=accumulate)
    of = {"dweight_D": into["dweight"], "dbias_D": into["dbias"]}
    mine = {"value 1": out} | {name: total - 0.5 * accumulate for name, total in of.items() if total is not None}
    for name, ids in (("word_VD", "ids_N"), ("position_PD", "position_ids_N")):
        if name in without:
            continue
        total = torch.zeros(given[name].shape, dtype=torch.float64, device=DEVICE)
        mine[f"d{name}"] = total.index_add_(0, given[ids], dembedded.double())
    if "type_D" not in without:
        mine["dtype_D"] = dembedded.double().sum(0)

    absent = {name: leaves.pop(name) for name in without}
    truth, theirs = (
        results(judged(functools.partial(operator, **absent, **options)), tensors)
        for operator, tensors in ((embedding.embedding_reference, fp64(leaves)), (eager, leaves))
    )
    assert torch.equal(out == 0, theirs["value 1"] == 0)
    for found in (truth, theirs):
        del found["value 0"]
    assert_as_right(truth, mine, theirs, dtype)
