"""A model and a loop of one's own on the operators of fastdistil, and torch.compile: no Trainer, no run folder.

    python examples/plain_loop.py

A student of two layers learns the distribution of a fixed teacher of four, on random padded batches. On a GPU the same
lines run the Triton kernels, on a CPU the C++ ones.
"""

import torch
from torch import Tensor, nn

import fastdistil

VOCABULARY, WIDTH, HEADS, BATCH, LENGTH, STEPS = 2000, 64, 4, 8, 32, 60
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Layer(nn.Module):
    """Attention and feed-forward of a BERT, each followed by residual + dropout + LayerNorm in one operator."""

    def __init__(self, stream: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.stream = stream  # each place of dropout draws masks of its own

    def forward(self, x: Tensor, layout: fastdistil.SequenceLayout, seed: Tensor | None) -> Tensor:
        """(B, L, WIDTH) in and out."""
        qkv = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS))
        x = self.norm(0, self.out(fastdistil.attention(qkv, layout).flatten(2)), x, seed)
        return self.norm(1, self.down(fastdistil.linear_gelu(x, self.up.weight, self.up.bias)), x, seed)

    def norm(self, place: int, x: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
        """LayerNorm(residual + dropout(x))."""
        norm = self.norms[place]
        return fastdistil.dropout_add_layernorm(
            x, residual, norm.weight, norm.bias, dropout_p=0.1, seed=seed, stream=2 * self.stream + place
        )


class Model(nn.Module):
    """An encoder whose vocabulary matrix is its word embeddings."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.words.weight, std=0.25)  # logits of 2 or so
        self.layers = nn.ModuleList(Layer(i) for i in range(num_layers))

    def forward(self, ids: Tensor, layout: fastdistil.SequenceLayout, seed: Tensor | None) -> Tensor:
        """(B, L, WIDTH) last hidden states of (B, L) ids."""
        x = self.words(ids) + self.positions.weight
        for layer in self.layers:
            x = layer(x, layout, seed)
        return x


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L) ids, which are tokens and no padding, and labels: -100 but for every sixth token."""
    lengths = torch.randint(8, LENGTH + 1, (BATCH, 1), generator=generator)
    ids = (VOCABULARY * torch.rand(BATCH, LENGTH, generator=generator) ** 2).long()  # small ids are frequent words
    real = torch.arange(LENGTH) < lengths
    labels = ids.masked_fill(~real | (torch.arange(LENGTH) % 6 != 0), -100)
    return ids.to(DEVICE), real.to(DEVICE), labels.to(DEVICE)


def loss_of(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, real: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """5 KL + 2 masked LM + 1 cosine, each a mean, and the KL a token. Compiled once, whatever the numbers are."""
    num_tokens, num_masked = real.sum(), (labels >= 0).sum()
    found = fastdistil.linear_distill_loss(
        hidden, weight, None, teacher_hidden, teacher_weight, None, labels,
        temperature=temperature, kd_scale=5 / num_tokens, mlm_scale=2 / num_masked, mask=real,
    )  # fmt: skip
    cosine = fastdistil.cosine_loss(hidden, teacher_hidden, scale=1 / num_tokens, mask=real)
    return found.loss + cosine.loss, found.kd_sum / num_tokens


torch.manual_seed(0)
teacher, student = (Model(num_layers).to(DEVICE) for num_layers in (4, 2))
# On a CPU the compilation takes longer than the loop.
compiled = torch.compile(loss_of, fullgraph=True, disable=DEVICE == "cpu")
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(1)
for step in range(STEPS):
    ids, real, labels = batch(generator)
    layout = fastdistil.padded_layout(real)
    with torch.no_grad():
        teacher_hidden = teacher(ids, layout, None)
    hidden = student(ids.where(labels < 0, 1), layout, fastdistil.new_dropout_seed(DEVICE))
    temperature = torch.tensor(4 - 2 * step / STEPS)  # a tensor: it may change
    loss, kl = compiled(hidden, student.words.weight, teacher_hidden, teacher.words.weight, labels, real, temperature)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3}  loss {loss:.3f}  KL {kl:.4f} nats a token at T = {temperature:.2f}")
