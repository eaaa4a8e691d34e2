"""Optimiser, accumulation, ZeRO: everything between a loss and new weights. The only importer of deepspeed.

Two engines with the same four verbs (`forward_backward`, `step`, `state`, `load`):

    PlainEngine      one process; PyTorch's AdamW
    DeepSpeedEngine  torchrun; ZeRO stage 0, 1, 2 or 3

Both keep fp32 master weights and add gradients up in fp32, also where the arithmetic is bf16. Their state is the same set
of full tensors, whatever the stage and the number of ranks: a checkpoint of one is resumed by any other.
"""

import logging
import math
import os
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdistil.data.batches import MicroBatch, one_token
from fastdistil.run import ranks
from fastdistil.run.config import Config
from fastdistil.run.profile import span
from fastdistil.training.objective import Objective, TeacherOutput

log = logging.getLogger("fastdistil")

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]  # "weight.<name>", "exp_avg.<name>", "exp_avg_sq.<name>", fp32 on the CPU


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What the arithmetic runs in: bf16 on CUDA, fp32 on CPU, unless the configuration says."""
    if config.engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.engine.precision]


def teacher_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What the teacher's tensors are in, which are bf16 around FP8 products; as the engine, unless the configuration says."""
    if config.teacher.precision == "auto":
        return compute_dtype(config, device)
    return torch.float32 if config.teacher.precision == "fp32" else torch.bfloat16


def learning_rate(config: Config, update: int, num_updates: int) -> float:
    """Linear from 0 over the warm-up, then linear to 0, for update `update` counted from 0.

    The first update's rate is 0, as with transformers' schedule in the authors' code.
    """
    warmup = math.ceil(config.optim.warmup * num_updates)
    if update < warmup:
        return config.optim.lr * update / warmup
    return config.optim.lr * (num_updates - update) / max(1, num_updates - warmup)


def make_optimizer(module: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases and LayerNorm (all one-dimensional) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, eps=config.optim.eps, fused=True)


class Bf16Compute(nn.Module):
    """Runs a module of fp32 parameters on bf16 copies of them.

    The copies are made anew in each forward (6 bytes a parameter, under 1 % of a micro-batch); autograd carries their gradients
    back through the cast, so they accumulate in fp32.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        copies = {name: p.to(torch.bfloat16) for name, p in self.module.named_parameters()}
        return functional_call(self.module, copies, args)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _clip(module: nn.Module, clip_norm: float) -> Tensor:
    """The gradients' global norm before they are scaled down to `clip_norm`; 0 scales nothing."""
    return torch.nn.utils.clip_grad_norm_(_trained(module).values(), clip_norm or float("inf"))


def _skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Have the next step of a fused AdamW change neither weights, moments nor step counts if the gradient's norm is not finite.

    By GradScaler's protocol, on the device: no sync. ZeRO stages 1 to 3 skip such a step by themselves.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step


class PlainEngine:
    """One process, no DeepSpeed."""

    def __init__(self, objective: Objective, config: Config, *, device: torch.device) -> None:
        self.objective = objective.to(device)
        self.optimizer = make_optimizer(objective, config)
        self.clip_norm = config.optim.clip_norm
        self.description, self.num_shards = "plain engine", 1
        self.forward_ended = 0.0  # the host's clock: from here on ranks wait for each other
        self.compute: nn.Module = (
            objective if compute_dtype(config, device) == torch.float32 else Bf16Compute(objective)
        )

    def forward_backward(
        self, batch: MicroBatch, teacher: TeacherOutput | None, num_tokens: int, num_masked: int
    ) -> Tensor:
        """Add one micro-batch's gradient; returns its (7,) loss sums (losses.SUMS)."""
        loss, sums = self.compute(batch, teacher, num_tokens, num_masked)
        self.forward_ended = time.perf_counter()
        with span("backward"):
            loss.backward()
        return sums

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping, 0-dim on the device (no sync).

        Where it is not finite nothing is updated."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimiser"):
            norm = _clip(self.objective.student, self.clip_norm)
            _skip_unless_finite(self.optimizer, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self, batch: MicroBatch, teacher: TeacherOutput | None) -> Tensor:
        """(7,) loss sums of a validation micro-batch; no gradient, no dropout."""
        self.objective.eval()
        with torch.no_grad():
            _, sums = self.compute(batch, teacher, 1, 1)
        self.objective.train()
        return sums

    def state(self) -> State:
        """Full fp32 weights and moments on the CPU. Before the first step the moments are zero."""
        return _replicated_state(self.objective.student, self.optimizer)

    def load(self, state: State, step: int) -> None:
        """Set weights, moments and the number of steps taken."""
        _load_replicated(self.objective.student, self.optimizer, state, step)


def _replicated_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    # copies, since the next step writes into the live ones; a sync, once a checkpoint
    result: State = {}
    for name, p in module.named_parameters():
        result[f"weight.{name}"] = p.detach().to("cpu", torch.float32, copy=True)
        if p.requires_grad:
            for moment in MOMENTS:
                value = optimizer.state[p][moment] if p in optimizer.state else torch.zeros_like(p)
                result[f"{moment}.{name}"] = value.detach().to("cpu", copy=True)
    return result


def _load_replicated(module: nn.Module, optimizer: torch.optim.Optimizer, state: State, step: int) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(state[f"weight.{name}"])
            if p.requires_grad and step:
                optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device if p.is_cuda else "cpu")} | {
                    moment: state[f"{moment}.{name}"].to(p.device).clone() for moment in MOMENTS
                }
    _set_step(optimizer, step)


class DeepSpeedEngine:
    """ZeRO under torchrun. Stage 0 replicates, 1 shards the moments, 2 the gradients, 3 the parameters."""

    def __init__(
        self, objective: Objective, config: Config, *, stage: int, accumulation: int, place: ranks.Place
    ) -> None:
        assert place.host_group is not None, "ZeRO wants a process group; preflight refuses it without torchrun"
        deepspeed = _import_deepspeed(place.device)
        self.place, self.stage, self.clip_norm = place, stage, config.optim.clip_norm
        self.objective, self.forward_ended = objective.to(place.device), 0.0
        masters: State = {f"weight.{n}": p.detach().float().clone() for n, p in objective.student.named_parameters()}
        bf16 = compute_dtype(config, place.device) == torch.bfloat16
        # DeepSpeed has no stage 0 with bf16 arithmetic and fp32 accumulation: there it gets the fp32 module that casts itself
        module = Bf16Compute(objective) if bf16 and stage == 0 else objective
        self.optimizer = make_optimizer(module, config)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=_deepspeed_config(config, stage=stage, accumulation=accumulation, bf16=bf16 and stage > 0),
        )
        ranks.bound_every_group(config.engine.timeout_s)
        self.description = f"DeepSpeed {deepspeed.__version__} ZeRO stage {stage}"
        self.num_shards = place.world_size if stage else 1  # of the moments
        if stage and bf16:
            self._set_masters(masters)  # DeepSpeed made its own from the weights rounded to bf16

    def forward_backward(
        self, batch: MicroBatch, teacher: TeacherOutput | None, num_tokens: int, num_masked: int
    ) -> Tensor:
        """Add one micro-batch's gradient; returns its (7,) loss sums (losses.SUMS). Communicates as the stage needs."""
        loss, sums = self.engine(batch, teacher, num_tokens, num_masked)
        self.forward_ended = time.perf_counter()
        # DeepSpeed averages over ranks and we want the sum; denominators are counted over the update, so no division by steps either
        with span("backward"):
            self.engine.backward(loss * self.place.world_size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch
        return sums

    def step(self, lr: float) -> Tensor:
        """As PlainEngine.step, after the last micro-batch of the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimiser"):
            norm = None
            if self.stage == 0:
                norm = _clip(self.objective.student, self.clip_norm)
                _skip_unless_finite(self.optimizer, norm)
            self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.place.device)

    def evaluate(self, batch: MicroBatch, teacher: TeacherOutput | None) -> Tensor:
        """As PlainEngine.evaluate; every rank must call it equally often (stage 3 gathers parameters)."""
        self.engine.eval()
        with torch.no_grad():
            _, sums = self.engine(batch, teacher, 1, 1)
        self.engine.train()
        return sums

    def state(self) -> State:
        """As PlainEngine.state. Every rank must call it; only rank 0 gets tensors, the others an empty dict."""
        if self.stage == 0:
            return _replicated_state(self.objective.student, self.optimizer) if self.place.is_main else {}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        stepped = self._link_moments()
        result: State = {}
        for name, p in self.objective.student.named_parameters():
            full = {"weight": safe_get_full_fp32_param(p) if p.requires_grad else _gathered(p)}
            for moment in MOMENTS if p.requires_grad else ():
                full[moment] = safe_get_full_optimizer_state(p, moment) if stepped else None
            if self.place.is_main:
                for kind, value in full.items():
                    value = torch.zeros_like(result[f"weight.{name}"]) if value is None else value
                    result[f"{kind}.{name}"] = value.to("cpu", torch.float32, copy=True)  # a sync
        return result

    def load(self, state: State, step: int) -> None:
        """As PlainEngine.load; `state` must be the full one on every rank."""
        if self.stage == 0:
            _load_replicated(self.objective.student, self.optimizer, state, step)
            return
        if step:
            self._materialise_moments()
            self._link_moments()
        self._set_masters(state)
        for name, p in _trained(self.objective.student).items():
            for moment in MOMENTS if step else ():
                self._set_full(p, state[f"{moment}.{name}"], moment)
        if step:
            _set_step(self.optimizer, step)

    def _set_masters(self, state: State) -> None:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, p in self.objective.student.named_parameters():
            value = state[f"weight.{name}"].to(self.place.device)
            with torch.no_grad(), GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(value)  # what the forward reads
            if p.requires_grad:
                self._set_full(p, value, None)

    def _set_full(self, p: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Write one full tensor into the partition that this rank keeps of it."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.place.device)
        if self.stage == 3:
            # safe_set_full_* reads beyond the end where the ranks do not divide the parameter (0.19.8): pad and cut here
            size, rank = p.ds_tensor.numel(), self.place.rank  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(value.flatten(), (0, size * self.place.world_size - value.numel()))
            part = padded[size * rank : size * (rank + 1)]
            safe_set_local_optimizer_state(p, part, moment) if moment else safe_set_local_fp32_param(p, part)
        else:
            safe_set_full_optimizer_state(p, value, moment) if moment else safe_set_full_fp32_param(p, value)

    def _link_moments(self) -> bool:
        """Whether the optimiser has moments yet; then `safe_get_full_optimizer_state` finds them.

        Stages 1 and 2 link parameters and moments once, after stepping the first of our two parameter groups, and
        never find those of the second (0.19.8): link again.
        """
        stepped = any("exp_avg" in s for s in self.optimizer.state.values())
        if stepped and self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        return stepped

    def _materialise_moments(self) -> None:
        """One optimiser step of gradient zero at rate zero: DeepSpeed allocates its moments at the first step only."""
        for _ in range(self.engine.gradient_accumulation_steps()):
            loss, _ = self.engine(one_token(self.place.device), None, 1, 1)
            self.engine.backward(0.0 * loss)
            self.engine.step()


def _gathered(p: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        return p.detach().clone()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # a planted pickle must not run even where DeepSpeed itself asks for unsafe loading
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 calls old, several times a second
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute and changes no number
    return deepspeed


def _deepspeed_config(config: Config, *, stage: int, accumulation: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours; users never write one."""
    size = config.engine.bucket_elements
    clip_norm = config.optim.clip_norm if stage else 0  # there `step` clips, and knows the norm
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,  # ours is torch's AdamW; DeepSpeed's own would be compiled at first use
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": size,
            "allgather_bucket_size": size,
            "stage3_prefetch_bucket_size": size // 10,
            "stage3_param_persistence_threshold": min(100_000, size // 10),
        },
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # sums over ranks are not rounded to bf16 either
        "steps_per_print": 10**9,
    }


Engine = PlainEngine | DeepSpeedEngine


def make_engine(objective: Objective, config: Config, *, accumulation: int, place: ranks.Place) -> Engine:
    """The engine the configuration asks for: plain for one process, ZeRO stage 1 for several, unless it says."""
    stage = config.engine.zero_stage
    if stage is None and place.world_size == 1:
        return PlainEngine(objective, config, device=place.device)
    return DeepSpeedEngine(
        objective, config, stage=1 if stage is None else stage, accumulation=accumulation, place=place
    )
