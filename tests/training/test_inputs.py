"""What a run reads; the rest of it is tested by test_pretrain.py as a user sees it."""

from functools import partialmethod

import torch

from fastdistil.kernels.layout import sequence_layout
from fastdistil.model.encoder import Encoder
from fastdistil.model.masked_lm import MaskedLM
from fastdistil.training import inputs
from tests.support import toy


@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_a_compiled_encoder_computes_the_same_in_every_layer_and_mode(monkeypatch):
    """Attention cuts the graph up in evaluation, so every layer is compiled anew: more often than Dynamo here does."""
    monkeypatch.setattr(Encoder, "compile", partialmethod(Encoder.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    encoder = MaskedLM(toy.architecture(num_layers=4)).encoder
    names = list(encoder.state_dict())
    ids = torch.randint(5, 101, (40,), generator=torch.Generator().manual_seed(0))

    def outputs() -> list[torch.Tensor]:
        found = []
        for lengths in ([20, 20], [10, 25, 5]):
            positions = torch.cat([torch.arange(n) for n in lengths])
            batch = ids, positions, sequence_layout(lengths)
            for training in (True, False):
                torch.manual_seed(0)
                with torch.set_grad_enabled(training):
                    found.append(encoder.train(training)(*batch))
        return found

    wanted = outputs()
    inputs.compile_encoder(encoder)
    for got, eager in zip(outputs(), wanted, strict=True):
        torch.testing.assert_close(got, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 4
    assert list(encoder.state_dict()) == names
