"""The frozen teacher: hidden states for a micro-batch, never logits, never a gradient, never in an engine."""

import torch

from fastdistil import ops
from fastdistil.bert import MaskedLM
from fastdistil.data import MicroBatch
from fastdistil.losses import TeacherOutput


class Teacher:
    """A masked LM in evaluation mode. Not a Module, so that no `.train()`, optimiser or ZeRO partition can reach it."""

    def __init__(self, model: MaskedLM, *, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward
    def __call__(self, batch: MicroBatch) -> TeacherOutput:
        """The teacher's view of the same masked ids; tensors in its dtype. Consumes no random numbers."""
        assert not self.model.training, "the teacher was switched to training mode"
        layout = ops.sequence_layout(batch.lengths, batch.input_ids.device)
        hidden_NE = self.model.encoder(batch.input_ids, batch.position_ids, layout)
        return self.model.head(
            hidden_NE,
            lambda transformed, weight, bias: TeacherOutput(hidden_NE, transformed, weight, bias),
        )
