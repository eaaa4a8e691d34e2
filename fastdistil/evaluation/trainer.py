"""DistilBERT's objective in Hugging Face's Trainer, for models, data and loops of theirs.

    trainer = DistilTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collator)
    trainer.train()

The models run as they are, padding included, up to what their vocabulary matrix would multiply; from there on it is the
fused loss of `fastdistil.pretrain`, and no (tokens, vocabulary) tensor is made. The means are over all real and all
masked tokens of an update: of every accumulated batch, on every process.

Shapes: B texts of L tokens, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from fastdistil.evaluation.finetune import readable
from fastdistil.kernels.cosine import cosine_loss
from fastdistil.kernels.linear_distill import linear_distill_loss
from fastdistil.run.config import LossConfig

TERMS = ("kd", "mlm", "cosine")


class DistilTrainer(transformers.Trainer):
    """A Trainer whose loss is 5 T^2 KL + 2 masked LM + 1 cosine to a teacher, as `loss` has it; logs each term, too.

    Batches need labels, -100 but for masked tokens, as DataCollatorForLanguageModeling makes them; where they are
    padded also an attention_mask. On several GPUs start it by torchrun, with DDP.

    Args:
        args: as of Trainer, model and TrainingArguments first.
        teacher: a masked-LM model of transformers that reads the same ids. It is frozen and moved to the device.
        loss: the weights of kd, mlm and cosine, the temperature, and kd_rows.

    Raises ValueError where the two models, or other arguments, do not fit.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole update

    def __init__(self, *args: Any, teacher: Any, loss: LossConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = LossConfig() if loss is None else loss
        self._check(teacher)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.sums = torch.zeros(len(TERMS) + 2, device=self.args.device)  # and real and masked tokens, since a log

    def _check(self, teacher: Any) -> None:
        beyond = [term.name for term in self.weights.terms if term.name not in TERMS]
        if beyond:
            raise ValueError(f"DistilTrainer has the terms {', '.join(TERMS)}, got {', '.join(beyond)}: use pretrain")
        if self.compute_metrics is not None:
            raise ValueError("DistilTrainer makes no logits, which compute_metrics wants: leave it out, see eval_loss")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DistilTrainer wants a process a GPU, this one has {self.args.n_gpu}: start it by torchrun"
            )
        models: tuple[Any, Any] = self.model, teacher
        heads: list[Any] = [model.get_output_embeddings() for model in models]
        for name, model, head in zip(("model", "teacher"), models, heads, strict=True):
            if head is None:
                raise ValueError(f"DistilTrainer wants a {name} with a vocabulary, got {type(model).__name__}: load it "
                                 "by AutoModelForMaskedLM")  # fmt: skip
        (rows, width), (teacher_rows, teacher_width) = (head.weight.shape for head in heads)
        if rows != teacher_rows:
            raise ValueError(
                f"DistilTrainer wants one vocabulary, the teacher has {teacher_rows} rows and the model {rows}: use "
                "models of one tokenizer"
            )
        if self.weights.cosine and width != teacher_width:
            raise ValueError(
                f"the cosine loss compares hidden states of one width, the teacher's is {teacher_width} and the "
                f"model's {width}: give loss=LossConfig(cosine=0)"
            )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of an update, and (2,) their real and masked tokens on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = torch.stack([_counts(batch) for batch in batches]).sum(0).to(device)
        gathered: Any = self.accelerator.gather(counts[None])
        return batches, gathered.sum(0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """0-dim loss, this batch's part of the update's; with `return_outputs` beside an empty dict."""
        training = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.ndim == 1
        counts = num_items_in_batch if training else _counts(inputs)
        num_tokens, num_masked = counts.clamp_min(1).unbind()
        labels, real = inputs["labels"], _real(inputs)
        core, weights = self.accelerator.unwrap_model(model), self.weights
        masked_only = weights.kd_rows == "masked"
        hidden, transformed = _below_vocabulary(model, core, inputs)
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden, teacher_transformed = _below_vocabulary(self.teacher, self.teacher, inputs)
            models: tuple[Any, Any] = core, self.teacher
            head, teacher_head = (model.get_output_embeddings() for model in models)
            found = linear_distill_loss(
                transformed,
                head.weight,
                head.bias,
                teacher_transformed,
                teacher_head.weight,
                teacher_head.bias,
                labels,
                temperature=weights.temperature,
                kd_scale=weights.kd / (num_masked if masked_only else num_tokens),
                mlm_scale=weights.mlm / num_masked,
                mask=labels >= 0 if masked_only else real,
            )
            loss, sums = found.loss, [found.kd_sum, found.mlm_sum]
            if weights.cosine:
                cosine = cosine_loss(hidden, teacher_hidden, scale=weights.cosine / num_tokens, mask=real)
                loss, sums = loss + cosine.loss, [*sums, cosine.cosine_sum]
        if training:
            sums += [loss.new_zeros(())] * (len(TERMS) - len(sums))
            self.sums += torch.stack([*sums, *_counts(inputs)]).detach()
            loss = loss * self.accelerator.num_processes  # whose gradients DDP averages
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the mean of each term since the last line; of this process."""
        if "loss" in logs:
            *sums, num_tokens, num_masked = self.sums.tolist()  # a sync, as that of the loss was
            counts = (num_masked if self.weights.kd_rows == "masked" else num_tokens, num_masked, num_tokens)
            logs = logs | {t: s / max(1, n) for t, s, n in zip(TERMS, sums, counts, strict=True)}
            self.sums.zero_()
        super().log(logs, *args, **kwargs)


def _real(inputs: dict[str, Any]) -> Tensor:
    """(B, L) bool, the tokens that are no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["labels"], dtype=torch.bool) if mask is None else mask.bool()


def _counts(inputs: dict[str, Any]) -> Tensor:
    """(2,) int64, real and masked tokens of a batch."""
    if "labels" not in inputs:
        raise ValueError("DistilTrainer wants batches with labels: use DataCollatorForLanguageModeling(tokenizer)")
    return torch.stack([_real(inputs).sum(), (inputs["labels"] >= 0).sum()])


def _below_vocabulary(model: Any, core: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, L, D) last hidden states, and what the vocabulary matrix would multiply.

    `core` is what `model` wraps: its output embeddings hand on what they get, for this one call.
    """
    head, states = core.get_output_embeddings(), []
    hook = core.base_model.register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    head.forward = lambda x: x
    try:
        without = {name: x for name, x in inputs.items() if name != "labels"}
        transformed = model(**readable(core, without)).logits
    finally:
        del head.forward
        hook.remove()
    return states[0], transformed
