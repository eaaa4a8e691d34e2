"""The teacher's encoder in FP8: e4m3 weights and activations, one scale a row of each, bf16 results (torch._scaled_mm).

The four products of a layer, nearly all of the encoder's arithmetic. Embeddings, attention, LayerNorms, residual sums and the
masked-LM head stay bf16. Weights are quantised once, a token's activations when they are made, so nothing has to be calibrated.
What that does to the teacher's distribution is measured at the start of a run (drift.py).

Rows and not tensors: one token's outlier costs only that token its precision. PyTorch's row-wise product is cuBLAS's on compute
capability 9.0 with CUDA 12.9 and newer and CUTLASS's otherwise; both want operands whose rows are whole 16-byte words.
"""

from typing import cast

import torch
from torch import Tensor, nn

from fastdistil.kernels.fp8_rows import quantise_rows, quantise_rows_reference
from fastdistil.model.encoder import Encoder, EncoderLayer


class Fp8Linear(nn.Module):
    """x @ W.T + b for a frozen W, bf16 in and out; with `gelu_bias`, gelu(x + gelu_bias) @ W.T + b."""

    weight_FD: Tensor
    scale_1F: Tensor
    bias_F: Tensor | None
    gelu_bias_D: Tensor | None

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None, gelu_bias_D: Tensor | None = None) -> None:
        super().__init__()
        # the definition, once: no Triton, which would want the weight's device to be the current one
        quantised_FD, scale_F1 = quantise_rows_reference(weight_FD.detach())
        self.register_buffer("weight_FD", quantised_FD)
        self.register_buffer("scale_1F", scale_F1.t())
        self.register_buffer("bias_F", None if bias_F is None else bias_F.detach())
        self.register_buffer("gelu_bias_D", None if gelu_bias_D is None else gelu_bias_D.detach())

    def forward(self, input: Tensor) -> Tensor:
        quantised_ND, scale_N1 = quantise_rows(input, self.gelu_bias_D)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            quantised_ND,
            self.weight_FD.t(),
            scale_a=scale_N1,
            scale_b=self.scale_1F,
            bias=self.bias_F,
            out_dtype=torch.bfloat16,
            # On Hopper, sums of 14 bits for the whole row and not for 128 products: faster, and e4m3 itself has 4
            use_fast_accum=True,
        )


def require_device(device: torch.device) -> None:
    """Raises ValueError where a device has no FP8 arithmetic."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    raise ValueError(
        f"--teacher.precision fp8 wants a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), got {name}: "
        "use --teacher.precision bf16"
    )


@torch.no_grad()
def quantise(encoder: Encoder) -> None:
    """Replace the linear layers of a frozen bf16 encoder, where it is. Not to be converted afterwards: `.to(dtype)` would undo it.

    Raises ValueError where a width is not divisible by 16.
    """
    for layer in map(_layer, encoder.layers):
        weights = (layer.qkv.weight, layer.attention_out.weight, layer.ffn_out.weight)
        if any(size % 16 for weight in weights for size in weight.shape):
            raise ValueError(
                f"--teacher.precision fp8 wants widths divisible by 16, got {layer.ffn_out.weight.shape[0]} and "
                f"{layer.ffn_out.weight.shape[1]} (feed-forward layer): use --teacher.precision bf16"
            )
        qkv, attention_out = layer.qkv, layer.attention_out
        ffn_in, ffn_out = layer.ffn_in, layer.ffn_out
        replacements = {
            "qkv": Fp8Linear(qkv.weight, qkv.bias),
            "attention_out": Fp8Linear(attention_out.weight, attention_out.bias),
            # GELU is part of what quantises its result
            "ffn_in": Fp8Linear(ffn_in.weight, None),
            "ffn_out": Fp8Linear(ffn_out.weight, ffn_out.bias, ffn_in.bias),
        }
        for name, module in replacements.items():
            setattr(layer, name, module)


def _layer(module: nn.Module) -> EncoderLayer:
    return cast(EncoderLayer, module)
