"""The whole training step against Hugging Face models with PyTorch losses, in turn, on the same real tokens.

    python -m benchmarks.step                      MiniLM size on a CPU, BERT-base size on a GPU; sequences of one length
    python -m benchmarks.step --shards wiki        the packed micro-batches of prepared text
    python -m benchmarks.step --precision bf16

A step is teacher forward, student forward, loss, backward and AdamW. The peers get the same sequences with the same masks,
sorted by length and padded to the longest of each batch, scaled_dot_product_attention, fused AdamW and, in bf16, autocast over
fp32 weights with a bf16 teacher. Before anything is timed, all providers must agree on the loss without dropout. MFU counts
real tokens, the teacher's forward included (metrics.py).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import DEVICE, OURS, RESULTS, device_name, peak_mib, stamp, time_call
from fastdistil import data, engine, metrics, recipes, shards, weights
from fastdistil.architecture import Architecture, flops_per_token
from fastdistil.bert import MaskedLM
from fastdistil.losses import Objective
from fastdistil.teacher import Teacher

PAPER_TOKENS = 13e9
VOCAB = 30522


def architecture(num_layers: int, width: int, token_types: int) -> Architecture:
    return Architecture(
        vocab_size=VOCAB,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=12,
        ffn_size=4 * width,
        max_positions=512,
        token_types=token_types,
    )


SIZES = {"minilm": (6, 3, 384), "bert-base": (12, 6, 768)}  # teacher layers, student layers, width


def synthetic_batch(num_tokens: int, length: int, seed: int) -> data.MicroBatch:
    """Sequences of one length and random ids, 15 % of them predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, VOCAB, (num_tokens,), generator=generator)
    lengths = [length] * (num_tokens // length)
    chosen = torch.randperm(num_tokens, generator=generator)[: data.num_masked(num_tokens, 0.15)]
    labels = torch.full((num_tokens,), data.NO_LABEL)
    labels[chosen] = ids[chosen]
    return data.MicroBatch(
        input_ids=ids.index_fill(0, chosen, 103),
        position_ids=torch.arange(length).repeat(len(lengths)),
        labels=labels,
        masked_rows=chosen.sort().values,
        num_rows=torch.tensor(num_tokens, dtype=torch.int32),
        lengths=tuple(lengths),
        num_tokens=num_tokens,
        num_masked=len(chosen),
        sequences=(),
    )


def packed_batches(folder: Path, num_tokens: int, count: int) -> list[data.MicroBatch]:
    """The first micro-batches that a run on these shards would see."""
    text = shards.Shards(folder)
    plan = data.Plan(
        text.lengths,
        seed=56,
        token_budget=num_tokens,
        micro_batches_per_update=1,
        mask_fraction=0.15,
    )
    masking = recipes.distilbert().masking
    collator = data.Collator(text, text.counts, token_budget=num_tokens, masking=masking)
    return [collator(plan.update(u).slots[0]) for u in range(count)]


class Ours:
    def __init__(self, teacher: MaskedLM, student: MaskedLM, precision: str) -> None:
        config = recipes.distilbert()
        config = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, precision=precision)
        )
        device = torch.device(DEVICE)
        dtype = engine.compute_dtype(config, device)
        self.teacher = Teacher(teacher, device=device, dtype=dtype)
        self.engine = engine.PlainEngine(Objective(student, config.loss), config, device=device)
        self.loss = config.loss

    def load(self, batches: list[data.MicroBatch]) -> None:
        self.batches = [b.to(torch.device(DEVICE)) for b in batches]

    def evaluate(self) -> float:
        total = 0.0
        for b in self.batches:
            kd, mlm, cosine, *_ = self.engine.evaluate(b, self.teacher(b)).tolist()
            kd, cosine = (x / b.num_tokens for x in (kd, cosine))
            total += 5 * kd + 2 * mlm / b.num_masked + cosine
        return total / len(self.batches)

    def run(self) -> None:
        for b in self.batches:
            self.engine.forward_backward(b, self.teacher(b), b.num_tokens, b.num_masked)
            self.engine.step(1e-5)


class HuggingFace:
    """transformers' models and PyTorch's losses; `wrap` is torch.compile or nothing, `liger` its chunked loss."""

    def __init__(
        self, teacher: MaskedLM, student: MaskedLM, precision: str, *, compiled: bool, liger: bool
    ) -> None:
        self.bf16, self.liger = precision == "bf16", liger
        self.teacher = _hugging_face(teacher).eval().requires_grad_(False)
        if self.bf16:
            self.teacher = self.teacher.bfloat16()
        self.student = _hugging_face(student).train()
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.compute: Callable[..., Tensor] = self._loss
        if compiled:
            self.compute = torch.compile(self._loss)
        if liger:
            from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
                LigerFusedLinearJSDLoss,
            )

            # Its distillation term is JSD(beta=0) = KL without T^2; weights stand for 5 and 2.
            self.chunked = LigerFusedLinearJSDLoss(
                weight_hard_loss=2 / 7, weight_soft_loss=5 / 7, beta=0.0, temperature=2.0
            )

    def load(self, batches: list[data.MicroBatch]) -> None:
        """Cuts the packed rows into sequences again, sorts them by length and pads batches of about the same size."""
        sequences = []
        for b in batches:
            ids, labels = b.input_ids[: b.num_tokens], b.labels[: b.num_tokens]
            lengths = []
            for length in b.lengths:  # the trailing ones are padding
                if sum(lengths) < b.num_tokens:
                    lengths.append(length)
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
            labels = pad([s[1] for s in group], batch_first=True, padding_value=data.NO_LABEL)
            lengths = torch.tensor([len(s[0]) for s in group])
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            mask = None if real.all() else real
            tensors = [ids, labels, *([] if mask is None else [mask])]
            self.batches.append([x.to(DEVICE) for x in tensors] + ([None] if mask is None else []))

    def _loss(self, ids: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        with torch.no_grad():
            t = self.teacher(input_ids=ids, attention_mask=real, output_hidden_states=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            s = self.student(input_ids=ids, attention_mask=real, output_hidden_states=True)

        def rows(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if real is None else x[real]

        s_logits, t_logits, labels = rows(s.logits), rows(t.logits), rows(labels)
        s_hidden, t_hidden = rows(s.hidden_states[-1]), rows(t.hidden_states[-1])
        num_tokens, num_masked = len(labels), (labels >= 0).sum()
        kd = F.kl_div(
            F.log_softmax(s_logits.float() / 2, dim=-1),
            F.softmax(t_logits.float() / 2, dim=-1),
            reduction="sum",
        )
        mlm = F.cross_entropy(s_logits.float(), labels, reduction="sum")
        ones = torch.ones_like(labels)
        cosine = F.cosine_embedding_loss(s_hidden.float(), t_hidden.float(), ones, reduction="sum")
        return (5 * 4 * kd + cosine) / num_tokens + 2 * mlm / num_masked

    def _liger_loss(self, ids: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        """Without cosine and T^2, which changes no cost worth naming; not compared for its value."""
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            t = self.teacher.bert(input_ids=ids, attention_mask=real).last_hidden_state
            t = self.teacher.cls.predictions.transform(t)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            s = self.student.distilbert(input_ids=ids, attention_mask=real).last_hidden_state
            s = self.student.vocab_layer_norm(F.gelu(self.student.vocab_transform(s)))
        kind = torch.bfloat16 if self.bf16 else torch.float32
        s, t, labels = (x.flatten(0, 1) if real is None else x[real] for x in (s, t, labels))
        head, decoder = self.student.vocab_projector, self.teacher.cls.predictions.decoder
        return self.chunked(
            s.to(kind), head.weight.to(kind), t.to(kind), decoder.weight, labels,
            head.bias.to(kind), decoder.bias,
        )  # fmt: skip

    def evaluate(self) -> float:
        self.student.eval()
        with torch.no_grad():
            total = sum(float(self._loss(*b)) for b in self.batches)
        self.student.train()
        return total / len(self.batches)

    def run(self) -> None:
        for b in self.batches:
            loss = self._liger_loss(*b) if self.liger else self.compute(*b)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _hugging_face(model: MaskedLM) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(**weights.hugging_face_config(model.architecture))
    theirs = getattr(transformers, weights.hugging_face_class(model.architecture))(config)
    state = weights.hugging_face_state(model.state_dict(), model.architecture)
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    theirs.tie_weights()
    assert all("decoder" in k or "projector" in k or "position_ids" in k for k in missing), missing
    return theirs.to(DEVICE)


def energy_joules() -> Callable[[], float] | None:
    """A counter of the GPU's energy in joules (NVML), or None."""
    if DEVICE != "cuda" or not importlib.util.find_spec("pynvml"):
        return None
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--size", choices=SIZES, default="bert-base" if on_gpu else "minilm")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16" if on_gpu else "fp32"
    )
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 1024)
    parser.add_argument("--length", type=int, default=512 if on_gpu else 128)
    parser.add_argument(
        "--shards", type=Path, help="prepared text, instead of sequences of one length"
    )
    parser.add_argument(
        "--batches", type=int, default=4 if on_gpu else 1, help="micro-batches a round"
    )
    parser.add_argument("--rounds", type=int, default=10 if on_gpu else 5)
    parser.add_argument("--only", help="substring of the providers to run")
    args = parser.parse_args()

    teacher_layers, student_layers, width = SIZES[args.size]
    torch.manual_seed(0)
    teacher = MaskedLM(architecture(teacher_layers, width, 2))
    layers = [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]
    student = weights.student_from_teacher(
        teacher, layers, architecture(student_layers, width, 0), copy_transform=True
    )
    if args.shards:
        batches = packed_batches(args.shards, args.tokens, args.batches)
    else:
        batches = [synthetic_batch(args.tokens, args.length, seed) for seed in range(args.batches)]
    num_tokens = sum(b.num_tokens for b in batches)

    makers: dict[str, Callable[[], Any]] = {
        OURS: lambda: Ours(copy_of(teacher), copy_of(student), args.precision),
    }
    peers = {"HF eager": (False, False), "HF torch.compile": (True, False)}
    if importlib.util.find_spec("liger_kernel") and on_gpu:
        peers["HF + Liger chunked loss"] = (False, True)
    for name, (compiled, liger) in peers.items():
        makers[name] = lambda c=compiled, li=liger: HuggingFace(
            teacher, student, args.precision, compiled=c, liger=li
        )
    providers, losses = {}, {}
    for name, make in makers.items():
        if args.only and args.only not in name:
            continue
        providers[name] = make()
        providers[name].load(batches)
        losses[name] = providers[name].evaluate()
    print("loss without dropout:", ", ".join(f"{k} {v:.5f}" for k, v in losses.items()))
    # Batches of the peers hold other sequences together, so means of means differ a little on mixed lengths.
    tolerance = 2e-2 if args.shards or args.precision == "bf16" else 1e-4
    first = next(iter(losses.values()))
    assert all(abs(v / first - 1) < tolerance for v in losses.values()), losses

    joules = energy_joules()
    times: dict[str, list[float]] = {name: [] for name in providers}
    energy: dict[str, float] = dict.fromkeys(providers, 0.0)
    peak = {}
    for name, provider in providers.items():
        provider.run()  # compiles, allocates the moments
        peak[name] = peak_mib(provider.run)
    for _ in range(args.rounds):
        for name, provider in providers.items():
            time.sleep(0.02)  # idle threads of another pool spin: not in this one's time
            before = joules() if joules else 0.0
            times[name].append(time_call(provider.run))
            energy[name] += (joules() if joules else 0.0) - before

    attended = sum(n * n for b in batches for n in b.lengths) / sum(
        len(b.input_ids) for b in batches
    )
    flops = flops_per_token(teacher.architecture, student.architecture, attended).total
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    ceiling, source = metrics.peak_flops(torch.device(DEVICE), dtype)
    what = f"{args.size} {args.precision}, {args.batches} x {args.tokens:,} tokens, " + (
        "packed text" if args.shards else f"sequences of {args.length}"
    )
    print(f"\n{what}; {device_name()}; MFU against {(ceiling or 0) / 1e9:,.0f} GFLOP/s ({source})")
    print(
        f"{'':<26}{'tokens/s':>10}{'MFU':>7}{'x ours':>8}{'peak MiB':>10}{'mJ/token':>10}{'hours for 13 B':>16}"
    )
    rows = {}
    for name, seconds in times.items():
        speed = num_tokens / statistics.median(seconds)
        base = times.get(OURS, seconds)
        ratio = statistics.median(x / y for x, y in zip(seconds, base, strict=True))
        mfu = speed * flops / ceiling if ceiling else float("nan")
        millijoules = 1e3 * energy[name] / args.rounds / num_tokens if joules else None
        rows[name] = {
            "tokens_per_s": speed, "mfu": mfu, "times_ours": ratio, "peak_mib": peak[name],
            "mj_per_token": millijoules, "hours_for_13e9_tokens": PAPER_TOKENS / speed / 3600,
            "seconds": seconds,
        }  # fmt: skip
        shown = [f"{x:.0f}" if x is not None else "" for x in (peak[name], millijoules)]
        print(
            f"{name:<26}{speed:>10,.0f}{mfu:>7.1%}{ratio:>8.2f}{shown[0]:>10}{shown[1]:>10}"
            f"{PAPER_TOKENS / speed / 3600:>16,.1f}"
        )
    path = RESULTS / f"step.{'cpu' if not on_gpu else device_name().lower().replace(' ', '-')}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[what] = stamp() | {"providers": rows, "peak_flops": ceiling}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def copy_of(model: MaskedLM) -> MaskedLM:
    other = MaskedLM(model.architecture)
    other.load_state_dict(model.state_dict())
    return other


if __name__ == "__main__":
    main()
