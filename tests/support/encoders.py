"""Encoders of one layer with a tokenizer of whole words, as an export is, for fine-tuning in seconds."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60))]


def make_encoder(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """A Hugging Face folder of a BertForMaskedLM that reads WORDS, and further words where `sizes` asks for more."""
    import transformers

    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    config = transformers.BertConfig(**given | sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    words = WORDS + [f"x{i}" for i in range(config.vocab_size - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder
