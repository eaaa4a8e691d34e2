"""Teacher and student: an encoder of its family, and where the architecture has them an MLM head and a projection."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.kernels.layout import SequenceLayout
from fastdistil.model.architecture import Architecture
from fastdistil.model.bert import BertEncoder
from fastdistil.model.encoder import Encoder, Projection, VocabHead
from fastdistil.model.modernbert import ModernBertEncoder

ENCODERS: dict[str, type[Encoder]] = {"modernbert": ModernBertEncoder}
"""By model_type; of the others BERT's."""


class MaskedLM(nn.Module):
    """Encoder, and MLM head and projection where the architecture has them, with fresh weights.

    They are drawn from `generator` alone (without one: seed 0).

    Its state_dict holds the tied weight once, as `encoder.word_embeddings.weight`, so that its keys are those of
    named_parameters(); load_state_dict wants the same keys.
    """

    def __init__(self, architecture: Architecture, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        # Any, since whoever asks for a part that one family has knows that it has it.
        self.encoder: Any = ENCODERS.get(architecture.model_type, BertEncoder)(architecture)
        # VocabHead or None. Any, since whoever runs it knows that there is one.
        self.head: Any = VocabHead(architecture, self.encoder.word_embeddings) if architecture.mlm_head else None
        width, embedding_size = architecture.hidden_size, architecture.embedding_size
        self.projection = Projection(width, embedding_size, bias=False) if embedding_size else None
        self.register_state_dict_post_hook(_drop_tied_weight)
        self.register_load_state_dict_pre_hook(_restore_tied_weight)
        self._initialise(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.encoder.initial_deviation(name), generator=generator)
        self.encoder.word_embeddings.weight[self.architecture.vocab_size :] = 0.0
        self.encoder.word_embeddings.weight[self.architecture.pad_id] = 0.0

    def run_by_modules(self) -> None:
        """From now on, as its modules are written, instead of by functions.py."""
        for part in (self.encoder, self.head, self.projection):
            if part is not None:
                part.by_modules = True

    def forward(
        self, input_ids_N: Tensor, position_ids_N: Tensor, layout: SequenceLayout, dropout_seed: Tensor | None = None
    ) -> Tensor:
        """Logits (N, vocab_size) of every token; arguments as in `Encoder.forward`."""
        return self.head(self.encoder(input_ids_N, position_ids_N, layout, dropout_seed))


def _drop_tied_weight(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state.pop(f"{prefix}head.weight", None)


def _restore_tied_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if module.head is not None and f"{prefix}encoder.word_embeddings.weight" in state:
        state[f"{prefix}head.weight"] = state[f"{prefix}encoder.word_embeddings.weight"]
