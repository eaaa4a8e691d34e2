"""The objective written from recipe.md with transformers and PyTorch alone: what ours is compared with.

No packing, no fused operator, no token counting of ours: sequence by sequence, one sum over the whole update.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.masking_utils import eager_mask

from fastdistil.data.batches import MicroBatch

ATTENDED: list[tuple[Tensor, Tensor, Tensor]] = []
"""Queries, keys and values of every layer since somebody cleared this, as its attention compares them: (L, D) each."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention by its definition in the dtype of its operands, (1, H, L, D / H) each; transformers has it in fp32."""
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    ATTENDED.append((q, k, v))
    scores = query @ key.mT * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


transformers.AttentionInterface.register("definition", _attention)
transformers.AttentionMaskInterface.register("definition", eager_mask)


def load(folder: Path) -> Any:
    """A folder's ...ForMaskedLM in fp64, in evaluation mode."""
    model: Any = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="definition")
    return model.double().eval()


def layer_outputs(model: Any, output: Any) -> list[Tensor]:
    """(L, D) outputs of every layer, each as it would be if the model ended there."""
    *states, last = (x[0] for x in output.hidden_states[1:])
    norm = getattr(model.base_model, "final_norm", None)
    return [*(states if norm is None else map(norm, states)), last]


def sequences(batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """((1, L) masked ids, (L,) labels) of every real sequence of some micro-batches, on the CPU."""
    for batch in (b.to(torch.device("cpu")) for b in batches):
        begin = 0
        for length in batch.lengths:
            if begin >= batch.num_tokens:
                break  # the trailing padding
            yield batch.input_ids[None, begin : begin + length], batch.labels[begin : begin + length]
            begin += length


def one_update(
    teacher_folder: Path,
    student_folder: Path,
    batches: Sequence[MicroBatch],
    *,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    restrict_ce_to_mask: bool = False,
    others: Sequence[tuple[Path, float]] = (),
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(unweighted kd, mlm and cosine of the update; gradient of the weighted sum by Hugging Face name), in fp64.

    restrict_ce_to_mask: the authors' flag, kd is the mean over the predicted tokens alone.
    others: more teachers, with what they weigh where `teacher_folder` weighs 1; the probabilities are averaged.
    """
    teacher, student = load(teacher_folder), load(student_folder)
    more = [(load(folder), weight) for folder, weight in others]
    kd, mlm, cosine, real, masked = [], [], [], 0, 0
    for ids, labels in sequences(batches):
        with torch.no_grad():
            t = teacher(input_ids=ids, output_hidden_states=True)
        s = student(input_ids=ids, output_hidden_states=True)
        log_q = F.log_softmax(s.logits[0] / temperature, dim=-1)
        p = F.softmax(t.logits[0] / temperature, dim=-1)
        with torch.no_grad():
            p = p + sum(w * F.softmax(model(input_ids=ids).logits[0] / temperature, dim=-1) for model, w in more)
        p = p / (1 + sum(w for _, w in more))
        rows = labels >= 0 if restrict_ce_to_mask else torch.ones_like(labels, dtype=torch.bool)
        kd.append(F.kl_div(log_q[rows], p[rows], reduction="sum") * temperature**2)
        mlm.append(F.cross_entropy(s.logits[0], labels, ignore_index=-100, reduction="sum"))
        h_s, h_t = s.hidden_states[-1][0], t.hidden_states[-1][0]
        cosine.append(F.cosine_embedding_loss(h_s, h_t, torch.ones(len(labels)), reduction="sum"))
        real += len(labels)
        masked += int((labels >= 0).sum())
    kd_rows = masked if restrict_ce_to_mask else real
    terms = [torch.stack(kd).sum() / kd_rows, torch.stack(mlm).sum() / masked, torch.stack(cosine).sum() / real]
    loss = torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return dict(zip(("kd", "mlm", "cosine"), (t.item() for t in terms), strict=True)), gradients


def worst_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """(largest |ours - theirs| of any tensor relative to that tensor's own norm, its name). Keys bias of the key
    projection are left out: softmax cancels it and its exact gradient is 0."""
    worst = (0.0, "")
    assert theirs.keys() <= ours.keys(), theirs.keys() - ours.keys()
    for name, exact in theirs.items():
        if name.endswith(("k_lin.bias", "key.bias")):
            continue
        error = (ours[name].double().cpu() - exact).norm() / exact.norm()
        worst = max(worst, (float(error), name))
    return worst
