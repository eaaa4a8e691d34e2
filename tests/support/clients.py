"""What people do with an export, in whichever release of transformers is on the path: no file of the package is used.

`python -m tests.support.clients FOLDER...` prints what `ask` says of each folder as JSON, for the release that
`make setup` keeps in a folder of its own.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support import models
from tests.support.vocabularies import PAIRS, TEXTS

OLD = Path(sys.prefix) / "transformers-4.57"
"""Where `make setup` puts transformers 4.57."""
LONG_TEXTS = [*TEXTS[:4], "the river " * 200]
"""The last is longer than any model here reads."""
LENGTHS = [1, 90, 2, 17, 33]
"""Of the sequences that a model of the other release is asked about."""


def ask(folder: Path) -> dict[str, Any]:
    """Ids, the answers of the model card's pipeline, and logits of the model on what the tokenizer makes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    fill = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    with torch.no_grad():
        logits = model.eval()(**tokenizer(["Anna", "the old river"], return_tensors="pt", padding=True)).logits
        masked = model(**tokenizer(f"the old {tokenizer.mask_token} quiet", return_tensors="pt")).logits[0]
    answers: Any = fill(f"the old {tokenizer.mask_token} quiet")
    first, second = zip(*PAIRS, strict=True)
    return {
        "release": transformers.__version__,
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "pairs": tokenizer(list(first), list(second))["input_ids"],
        "inputs": list(tokenizer("Anna", "the river")),
        "max_length": tokenizer.model_max_length,
        "truncated": len(tokenizer("the river " * 200, truncation=True)["input_ids"]),
        "size": len(tokenizer),
        "special": tokenizer.special_tokens_map,
        "answer": answers[0]["token"],
        "logits": masked.tolist(),
        "other_keys": {key: sorted(map(str, names)) for key, names in info.items() if names},
        "finite": bool(logits.isfinite().all()),
    }


def embed(folder: Path) -> list[list[float]]:
    """Embeddings by sentence-transformers: the mean of the encoder's last hidden states."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS[:3]).tolist()


def embeddings(folder: Path) -> dict[str, Any]:
    """What an export of embeddings is to sentence-transformers, and whether AutoModel wants other tensors."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    _, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    return {
        "embeddings": model.encode(LONG_TEXTS).tolist(),
        "max_length": model.max_seq_length,
        "modules": [type(module).__name__ for module in model],
        "similarity": model.similarity_fn_name,
        "other_keys": {key: sorted(map(str, names)) for key, names in info.items() if names},
        "class": type(model[0].auto_model).__name__,
    }


def onnx_error(folder: Path, out: Path) -> float:
    """The largest difference between the logits of optimum's ONNX export and the model's own."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from optimum.exporters.onnx import main_export  # pyright: ignore[reportMissingImports]

    main_export(str(folder), str(out), task="fill-mask", device="cpu", do_validation=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(["Anna crosses the river", "quiet"], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()(**inputs).logits.numpy()
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return float(abs(got - wanted).max())


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    folders = [Path(name) for name in sys.argv[2:]]
    embedders = {folder.name: embeddings(folder) for folder in folders if (folder / "modules.json").is_file()}
    folders = [folder for folder in folders if folder.name not in embedders]
    exported = {folder.name: onnx_error(folder, Path(sys.argv[1], folder.name)) for folder in folders[:2]}
    embedded = {folder.name: embed(folder) for folder in folders[:2]}
    told = {folder.name: ask(folder) for folder in folders}
    theirs = models.save_random("ModernBertForMaskedLM", Path(sys.argv[1], "modernbert"), global_attn_every_n_layers=2)
    _, logits = models.one_by_one(theirs, models.packed(LENGTHS, 101)[0], LENGTHS)
    torch.save(logits, Path(sys.argv[1], "logits"))
    record = {"told": told, "onnx": exported, "embedded": embedded, "embedders": embedders}
    Path(sys.argv[1], "told.json").write_text(json.dumps(record))
