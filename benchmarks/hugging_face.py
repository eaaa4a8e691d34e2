"""The peer of benchmarks/step.py: the same models in transformers, with PyTorch's losses or Liger's, compiled or not.

It gets the same sequences with the same masks, sorted by length and padded to the longest of each batch,
scaled_dot_product_attention, fused AdamW and, in bf16, autocast over fp32 weights with a bf16 teacher.
"""

import argparse
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import DEVICE
from benchmarks.workload import make_batches, models
from fastdistil.data.batches import NO_LABEL, MicroBatch
from fastdistil.model import weights
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.run.ranks import keep_freed_memory


class HuggingFace:
    """transformers' models and PyTorch's losses, under torch.compile or not, or with Liger's fused linear losses."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        compiled: Literal["", "whole", "by layer"] = "",
        liger: bool = False,
        keep_memory: bool = False,
        restrict_ce_to_mask: bool = False,
    ) -> None:
        self.restrict_ce_to_mask = restrict_ce_to_mask
        if keep_memory:
            keep_freed_memory()
        teacher, student = models(args.size)
        self.bf16, self.liger = args.precision == "bf16", liger
        self.teacher = _hugging_face(teacher).eval().requires_grad_(False)
        if self.bf16:
            self.teacher = self.teacher.bfloat16()
        self.student = _hugging_face(student).train()
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.compute: Callable[..., Tensor] = self._loss
        if compiled == "whole":
            self.compute = torch.compile(self._loss, dynamic=True)
        if compiled == "by layer":
            layers = (m for model in (self.teacher, self.student) for m in model.modules() if _is_layer(m))
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=True)
            self._losses = torch.compile(self._losses, dynamic=True)
        if liger:
            from liger_kernel import transformers as fused  # pyright: ignore[reportMissingImports]

            # sums in fp32, as ours
            self.fused_kl = fused.LigerFusedLinearKLDivLoss(reduction="sum", temperature=2.0, accum_dtype=torch.float32)
            self.fused_mlm = fused.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
            self.compute = self._liger_loss
        self._load(make_batches(args))

    def _load(self, batches: list[MicroBatch]) -> None:
        """Cuts the packed rows into sequences again, sorts them by length and pads batches of about the same size."""
        sequences = []
        for b in batches:
            lengths = list(b.real_lengths)
            ids, labels = b.input_ids[: b.num_tokens], b.labels[: b.num_tokens]
            sequences += zip(ids.split(lengths), labels.split(lengths), strict=True)
        sequences.sort(key=lambda s: len(s[0]))
        budget, groups, group = len(batches[0].input_ids), [], []
        for sequence in sequences:
            if group and len(sequence[0]) * (len(group) + 1) > budget:
                groups.append(group)
                group = []
            group.append(sequence)
        groups.append(group)
        pad = torch.nn.utils.rnn.pad_sequence
        self.batches = []
        for group in groups:
            ids = pad([s[0] for s in group], batch_first=True, padding_value=0)
            labels = pad([s[1] for s in group], batch_first=True, padding_value=NO_LABEL)
            lengths = torch.tensor([len(s[0]) for s in group])
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            mask = None if real.all() else real
            tensors = [ids, labels, *([] if mask is None else [mask])]
            self.batches.append([x.to(DEVICE) for x in tensors] + ([None] if mask is None else []))
        self.num_tokens = sum(b.num_tokens for b in batches)
        self.num_masked = sum(b.num_masked for b in batches)
        self.padding = 1 - self.num_tokens / sum(b[0].numel() for b in self.batches)

    def _loss(self, ids: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        with torch.no_grad():
            t_hidden, t_logits = _outputs(self.teacher, ids, real)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            s_hidden, s_logits = _outputs(self.student, ids, real)
        s_logits, t_logits, s_hidden, t_hidden, labels = (
            x.flatten(0, 1) for x in (s_logits, t_logits, s_hidden, t_hidden, labels)
        )
        return self._losses(s_logits, t_logits, s_hidden, t_hidden, labels, real)

    def _losses(
        self,
        s_logits: Tensor,
        t_logits: Tensor,
        s_hidden: Tensor,
        t_hidden: Tensor,
        labels: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        # Padding is weighted away, not cut out: neither a copy of the logits nor a break of the compiled graph.
        def real_sum(x: Tensor) -> Tensor:
            return x.sum() if real is None else (x * real.flatten()).sum()

        s_hidden, t_hidden = s_hidden.float(), t_hidden.float()
        kd = F.kl_div(
            F.log_softmax(s_logits.float() / 2, dim=-1), F.softmax(t_logits.float() / 2, dim=-1), reduction="none"
        ).sum(-1)
        mlm = F.cross_entropy(s_logits.float(), labels, reduction="sum")
        if self.restrict_ce_to_mask:  # as the authors' code does it: of logits of all rows
            masked = ((5 * 4 * kd)[labels >= 0].sum() + 2 * mlm) / self.num_masked
            return masked + real_sum(_cosine(s_hidden, t_hidden)) / self.num_tokens
        return real_sum(5 * 4 * kd + _cosine(s_hidden, t_hidden)) / self.num_tokens + 2 * mlm / self.num_masked

    def _liger_loss(self, ids: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Both losses on hidden states: the student's logits are made a chunk at a time.

        The KL wants the teacher's probabilities whole, and knows no bias: the loss is ours while the student's bias is
        what it starts with, 0.
        """
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            t_hidden = self.teacher.base_model(input_ids=ids, attention_mask=real).last_hidden_state
            t = _transformed(self.teacher, t_hidden)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            s_hidden = self.student.base_model(input_ids=ids, attention_mask=real).last_hidden_state
            s = _transformed(self.student, s_hidden)
        kind = torch.bfloat16 if self.bf16 else torch.float32
        of_tokens = (x.flatten(0, 1) if real is None else x[real] for x in (s, t, s_hidden, t_hidden, labels))
        s, t, s_hidden, t_hidden, labels = of_tokens
        head, decoder = self.student.get_output_embeddings(), self.teacher.get_output_embeddings()
        s, weight = s.to(kind), head.weight.to(kind)
        with torch.no_grad():
            target = (F.linear(t.to(kind), decoder.weight, decoder.bias) / 2).softmax(-1)
        kd = self.fused_kl(s, weight, target)
        masked = labels >= 0  # the others have no part in this loss: a sixth of the product
        mlm = self.fused_mlm(weight, s[masked], labels[masked], head.bias.to(kind))
        cosine = _cosine(s_hidden.float(), t_hidden.float()).sum()
        return (5 * 4 * kd + cosine) / self.num_tokens + 2 * mlm / self.num_masked

    def evaluate(self) -> float:
        self.student.eval()
        # Not compiled, or a second time without dropout and gradients.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            compute = self._liger_loss if self.liger else self._loss
            total = sum(float(compute(*b)) for b in self.batches)
        self.student.train()
        return total

    def run(self) -> None:
        for b in self.batches:
            self.compute(*b).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _is_layer(module: torch.nn.Module) -> bool:
    """Of an encoder of transformers, as its repeated part is called there."""
    return type(module).__name__ in ("BertLayer", "TransformerBlock", "ModernBertEncoderLayer")


def _outputs(model: Any, ids_BL: Tensor, real_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """(last hidden states, logits). Hidden states that transformers itself gives back it keeps by hooks, which break
    what torch.compile compiles."""
    hidden = model.base_model(input_ids=ids_BL, attention_mask=real_BL).last_hidden_state
    return hidden, model.get_output_embeddings()(_transformed(model, hidden))


def _transformed(model: Any, hidden_BLD: Tensor) -> Tensor:
    """What the vocabulary matrix of a model of transformers multiplies."""
    if model.config.model_type == "distilbert":
        return model.vocab_layer_norm(F.gelu(model.vocab_transform(hidden_BLD)))
    head = model.head if model.config.model_type == "modernbert" else model.cls.predictions.transform
    return head(hidden_BLD)


def _cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """(N,) distances of the cosine loss."""
    ones = torch.ones(len(student_ND), device=student_ND.device)
    return F.cosine_embedding_loss(student_ND, teacher_ND, ones, reduction="none")


def _hugging_face(model: MaskedLM) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(**weights.hugging_face_config(model.architecture))
    theirs = getattr(transformers, model.architecture.family.masked_lm)(config)
    state = weights.hugging_face_state(model.state_dict(), model.architecture)
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    theirs.tie_weights()
    assert all("decoder" in k or "projector" in k or "position_ids" in k for k in missing), missing
    return theirs.to(DEVICE)
