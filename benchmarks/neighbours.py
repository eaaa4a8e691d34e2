"""A small BERT to start `mlm` from, whose first two layers already look at the word before and the word after.

    python -m benchmarks.neighbours --tokenizer runs/wiki/tokenizer --out runs/neighbours

A masked LM of 4 layers, 128 wide, that starts from random weights long predicts words without their neighbours: on
Wikipedia it was at 6.0 nats after 6.6 million tokens, the longest that was tried. From these weights it was at 5.3
after 1.5 million, and docs/study.md needs a teacher within minutes of two CPU cores. Positions are sines and cosines of
32 frequencies; one head turns its queries by one position back, the other by one forward, so that q . k is largest at
the neighbour. Everything else is random.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from fastdistil.data.tokenizer import read_vocabulary
from fastdistil.export import write_hugging_face_folder
from fastdistil.model.architecture import Architecture
from fastdistil.model.masked_lm import MaskedLM

NUM_LAYERS, NUM_HEADS, WIDTH, POSITIONS = 4, 2, 128, 128
LOOKING_LAYERS = 2
LINEAR_SCALE, POSITION_SCALE, SHARPNESS = 2.0, 0.08, 0.9


def looking(vocab_size: int) -> MaskedLM:
    """The model, the same at every call."""
    model = MaskedLM(
        Architecture(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            num_layers=NUM_LAYERS,
            num_heads=NUM_HEADS,
            ffn_size=4 * WIDTH,
            max_positions=POSITIONS,
            token_types=2,
        )
    )
    head = WIDTH // NUM_HEADS
    frequency = 2.0 / 20 ** (torch.arange(head // 2) / (head // 2))
    angle = torch.arange(POSITIONS)[:, None].float() * frequency
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embedding" not in name and "head" not in name:
                p.mul_(LINEAR_SCALE)
        positions = torch.zeros(POSITIONS, WIDTH)
        positions[:, 0:head:2], positions[:, 1:head:2] = angle.sin(), angle.cos()
        model.encoder.position_embeddings.weight.copy_(positions * POSITION_SCALE)
        for layer in list(model.encoder.layers)[:LOOKING_LAYERS]:
            for i, shift in enumerate((-1.0, 1.0)):
                turn = torch.zeros(head, head)
                for f, w in enumerate(frequency.tolist()):
                    cos, sin = math.cos(shift * w), math.sin(shift * w)
                    turn[2 * f : 2 * f + 2, 2 * f : 2 * f + 2] = torch.tensor([[cos, sin], [-sin, cos]])
                rows = slice(i * head, (i + 1) * head)
                query, key = layer.qkv.weight[:WIDTH][rows], layer.qkv.weight[WIDTH:][rows]  # type: ignore[index]
                query[:, :head] += SHARPNESS * turn
                key[:, :head] += SHARPNESS * torch.eye(head)
    return model


def main() -> None:
    """Write the folder."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cli.add_argument("--tokenizer", type=Path, required=True)
    cli.add_argument("--out", type=Path, required=True)
    given = cli.parse_args()
    model = looking(len(read_vocabulary(given.tokenizer)))
    given.out.mkdir(parents=True)
    write_hugging_face_folder(model.state_dict(), model.architecture, given.tokenizer, given.out)
    print(json.dumps({"out": str(given.out), "parameters": model.architecture.num_parameters}))


if __name__ == "__main__":
    main()
