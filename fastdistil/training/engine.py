"""Optimiser, accumulation, ZeRO: everything between a loss and new weights. The only importer of deepspeed.

Two engines with the same five verbs (`forward_backward`, `step`, `evaluate`, `state`, `load`):

    PlainEngine      PyTorch's AdamW on any number of ranks: ZeRO stage 0
    DeepSpeedEngine  ZeRO stage 1, 2 or 3, under torchrun

Both keep fp32 master weights and add gradients up in fp32, also where the arithmetic is bf16; at stages 2 and 3
DeepSpeed rounds those of a micro-batch to bf16 before. Their state is the same set of full tensors, whatever the stage
and the number of ranks: a checkpoint of one is resumed by any other.
"""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.func import functional_call

from fastdistil.data.batches import MicroBatch, one_token
from fastdistil.model.flat import FlatParameters
from fastdistil.run.config import Config
from fastdistil.run.profile import span
from fastdistil.run.ranks import Ranks, bound_every_group
from fastdistil.training.objective import Objective, TeacherOutput
from fastdistil.training.preflight import Resolved

log = logging.getLogger("fastdistil")

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, Tensor]  # "weight.<name>", "exp_avg.<name>", "exp_avg_sq.<name>", fp32 on the CPU


def learning_rate(config: Config, update: int, num_updates: int) -> float:
    """Linear from 0 over the warm-up, then linear to 0, for update `update` counted from 0.

    The first update's rate is 0, as with transformers' schedule in the authors' code.
    """
    warmup = math.ceil(config.optim.warmup * num_updates)
    if update < warmup:
        return config.optim.lr * update / warmup
    return config.optim.lr * (num_updates - update) / max(1, num_updates - warmup)


class Group(NamedTuple):
    """Trained parameters that the optimiser treats alike."""

    names: list[str]
    weight_decay: float
    rate: float
    """Their learning rate, as a multiple of the update's."""


def groups_of(student: nn.Module, config: Config) -> list[Group]:
    """The groups of the optimiser, decayed ones first: biases and LayerNorm (all one-dimensional) are not decayed.

    Where the encoder has a rate of its own, in each what lies outside of it comes second, as in model/flat.py.
    """
    optim = config.optim
    names: dict[tuple[bool, bool], list[str]] = {}
    for name, p in _trained(student).items():
        outside = optim.encoder_lr is not None and not name.startswith("encoder.")
        names.setdefault((p.ndim <= 1, outside), []).append(name)
    rate = 1.0 if optim.encoder_lr is None else optim.encoder_lr / optim.lr
    return [
        Group(found, 0.0 if flat else optim.weight_decay, 1.0 if outside else rate)
        for (flat, outside), found in sorted(names.items())
    ]


def make_optimizer(student: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the trained parameters of a student."""
    trained = _trained(student)
    return adamw([(group, [trained[name] for name in group.names]) for group in groups_of(student, config)], config)


def adamw(groups: list[tuple[Group, list[Any]]], config: Config) -> torch.optim.AdamW:
    """AdamW over groups of parameters, each with the tensors that hold them."""
    options = [{"params": tensors, "weight_decay": g.weight_decay, "rate": g.rate} for g, tensors in groups]
    return torch.optim.AdamW(options, lr=0.0, betas=config.optim.betas, eps=config.optim.eps, fused=True)


class Bf16Compute(nn.Module):
    """Runs a module of fp32 parameters on bf16 copies of them, where it does not run by model/functions.py.

    The copies are made anew in each forward; autograd carries their gradients back through the cast, so they accumulate
    in fp32.
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
    """Have the next step of a fused AdamW change nothing, not even its counts, if the gradient's norm is not finite.

    By GradScaler's protocol, on the device: no sync. ZeRO stages 1 to 3 skip such a step by themselves.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(step)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


class PlainEngine:
    """Every rank has the whole student in flat buffers (model/flat.py), and its gradient is summed over the ranks once
    an update. No DeepSpeed."""

    def __init__(self, objective: Objective, config: Config, ranks: Ranks, dtype: torch.dtype) -> None:
        self.objective, self.ranks = objective.to(ranks.device), ranks
        # torch.compile traces modules, whose gradients autograd adds up.
        by_autograd = objective.student.encoder.by_modules
        if by_autograd:
            objective.student.run_by_modules()  # the head, too
        on_cuda = ranks.device.type == "cuda"
        self.flat = FlatParameters(objective.student, dtype, zeroed=on_cuda, by_autograd=by_autograd)
        ranks.broadcast_tensor(self.flat.masters)  # equal already, unless the machines draw random weights differently
        self.flat.cast()
        self.moments = {name: torch.zeros_like(self.flat.gradient) for name in MOMENTS}
        places = [(group, self.flat.span(group.names)) for group in groups_of(objective.student, config)]
        self.optimizer = adamw([(group, [self.flat.masters[place]]) for group, place in places], config)
        count_on = ranks.device if on_cuda else "cpu"
        for (_, place), options in zip(places, self.optimizer.param_groups, strict=True):
            (part,) = options["params"]
            part.grad = self.flat.gradient[place]
            of_part = {name: moment[place] for name, moment in self.moments.items()}
            self.optimizer.state[part] = {"step": torch.tensor(0.0, device=count_on)} | of_part
        self.clip_norm = config.optim.clip_norm
        self.description = "plain engine" + (f" on {ranks.world_size} ranks" if ranks.world_size > 1 else "")
        self.num_shards = 1  # that the moments are divided into
        self.forward_ended = 0.0  # by the host's clock: from here on ranks wait for each other
        self.compute: nn.Module = Bf16Compute(objective) if by_autograd and dtype != torch.float32 else objective

    def forward_backward(
        self, batch: MicroBatch, teacher: TeacherOutput | Callable[[], TeacherOutput] | None
    ) -> Tensor:
        """Add one micro-batch's gradient; returns its (len(SUMS),) loss sums (objective.SUMS)."""
        loss, sums = self.compute(batch, teacher)
        self.forward_ended = time.perf_counter()
        with span("backward"):
            loss.backward()
        return sums

    def step(self, lr: float) -> Tensor:
        """Sum over the ranks, clip, update, clear the gradients.

        Returns the norm before clipping, 0-dim on the device (no sync).

        Where it is not finite nothing is updated."""
        _set_rate(self.optimizer, lr)
        with span("optimiser"):
            self._sum_gradients()
            norm = _clip(self.objective.student, self.clip_norm)
            _skip_unless_finite(self.optimizer, norm)
            self.optimizer.step()
            self.flat.clear()
            self.flat.cast()
        return norm

    def _sum_gradients(self) -> None:
        self.flat.complete()
        if self.ranks.world_size > 1:
            torch_dist.all_reduce(self.flat.gradient)

    def evaluate(self, batch: MicroBatch, teacher: TeacherOutput | None) -> Tensor:
        """(len(SUMS),) loss sums of a validation micro-batch; no gradient, no dropout."""
        self.objective.eval()
        with torch.no_grad():
            _, sums = self.compute(batch, teacher)
        self.objective.train()
        return sums

    def state(self) -> State:
        """Full fp32 weights and moments on the CPU, on rank 0; an empty dict on others.

        Moments are 0 before the first step.
        """
        if not self.ranks.is_main:
            return {}
        # Copies, since the next step writes into the live ones; a sync, once a checkpoint.
        result: State = {}
        for name, p in self.objective.student.named_parameters():
            result[f"weight.{name}"] = p.detach().to("cpu", torch.float32, copy=True)
            for moment in MOMENTS if p.requires_grad else ():
                result[f"{moment}.{name}"] = self.flat.part(self.moments[moment], name).to("cpu", copy=True)
        return result

    @torch.no_grad()
    def load(self, state: State, step: int) -> None:
        """Set weights, moments and the number of steps taken; `state` must be the full one on every rank."""
        for name, p in self.objective.student.named_parameters():
            p.copy_(state[f"weight.{name}"])
            for moment in MOMENTS if step and p.requires_grad else ():
                self.flat.part(self.moments[moment], name).copy_(state[f"{moment}.{name}"])
        _set_step(self.optimizer, step)
        self.flat.cast()


class DeepSpeedEngine:
    """ZeRO under torchrun. Stage 1 shards the moments, 2 the gradients too, 3 the parameters too.

    Args:
        accumulation: micro-batches of a rank in an update.
    """

    def __init__(
        self, objective: Objective, config: Config, ranks: Ranks, dtype: torch.dtype, *, stage: int, accumulation: int
    ) -> None:
        assert ranks.host_group is not None, "ZeRO wants a process group; preflight refuses it without torchrun"
        deepspeed = _import_deepspeed(ranks.device)
        self.ranks, self.stage = ranks, stage
        if stage == 3:  # it gathers the parameters of a module only while that runs
            objective.student.run_by_modules()
        self.objective, self.forward_ended = objective.to(ranks.device), 0.0
        masters: State = {f"weight.{n}": p.detach().float().clone() for n, p in objective.student.named_parameters()}
        bf16 = dtype == torch.bfloat16
        for p in objective.parameters() if bf16 else ():
            p.grad_dtype = torch.float32  # gradients are handed over as the products made them
        self.optimizer = make_optimizer(objective.student, config)
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=_deepspeed_config(config, stage=stage, accumulation=accumulation, bf16=bf16),
        )
        bound_every_group(config.engine.timeout_s)
        self.description = f"DeepSpeed {deepspeed.__version__} ZeRO stage {stage}"
        self.num_shards = ranks.world_size  # that the moments are divided into
        if bf16:
            self._set_masters(masters)  # DeepSpeed made its own from the weights rounded to bf16

    def forward_backward(self, batch: MicroBatch, teacher: TeacherOutput | None) -> Tensor:
        """As PlainEngine.forward_backward; communicates as the stage needs."""
        loss, sums = self.engine(batch, teacher)
        self.forward_ended = time.perf_counter()
        # DeepSpeed averages over the ranks and we want the sum. Denominators are counted over the whole update, so
        # there is no division by the number of micro-batches either.
        with span("backward"):
            self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch
        return sums

    def step(self, lr: float) -> Tensor:
        """As PlainEngine.step, after the last micro-batch of the update."""
        _set_rate(self.optimizer, lr)
        with span("optimiser"):
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=self.ranks.device)

    def evaluate(self, batch: MicroBatch, teacher: TeacherOutput | None) -> Tensor:
        """As PlainEngine.evaluate; every rank must call it equally often (stage 3 gathers parameters)."""
        self.engine.eval()
        with torch.no_grad():
            _, sums = self.engine(batch, teacher)
        self.engine.train()
        return sums

    def state(self) -> State:
        """As PlainEngine.state. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        stepped = self._link_moments()
        result: State = {}
        for name, p in self.objective.student.named_parameters():
            full = {"weight": safe_get_full_fp32_param(p) if p.requires_grad else _gathered(p)}
            for moment in MOMENTS if p.requires_grad else ():
                full[moment] = safe_get_full_optimizer_state(p, moment) if stepped else None
            if self.ranks.is_main:
                for kind, value in full.items():
                    value = torch.zeros_like(result[f"weight.{name}"]) if value is None else value
                    result[f"{kind}.{name}"] = value.to("cpu", torch.float32, copy=True)  # a sync
        return result

    def load(self, state: State, step: int) -> None:
        """As PlainEngine.load."""
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
            value = state[f"weight.{name}"].to(self.ranks.device)
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

        value = value.to(self.ranks.device)
        if self.stage == 3:
            # safe_set_full_* reads beyond the end where the ranks do not divide the parameter (0.19.8), so it is cut
            # here.
            size, rank = p.ds_tensor.numel(), self.ranks.rank  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(value.flatten(), (0, size * self.ranks.world_size - value.numel()))
            part = padded[size * rank : size * (rank + 1)]
            safe_set_local_optimizer_state(p, part, moment) if moment else safe_set_local_fp32_param(p, part)
        else:
            safe_set_full_optimizer_state(p, value, moment) if moment else safe_set_full_fp32_param(p, value)

    def _link_moments(self) -> bool:
        """Whether the optimiser has moments yet; then `safe_get_full_optimizer_state` finds them.

        Stages 1 and 2 link parameters and moments once, after stepping the first of our parameter groups, and never
        find those of the others (0.19.8). So they are linked again.
        """
        stepped = any("exp_avg" in s for s in self.optimizer.state.values())
        if stepped and self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        return stepped

    def _materialise_moments(self) -> None:
        """One optimiser step of gradient zero at rate zero: DeepSpeed allocates its moments at the first step only."""
        for _ in range(self.engine.gradient_accumulation_steps()):
            loss, _ = self.engine(one_token(self.ranks.device), None)
            self.engine.backward(0.0 * loss)
            self.engine.step()


def _gathered(p: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        return p.detach().clone()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A planted pickle must not run even where DeepSpeed itself asks for unsafe loading.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 warns of, several times a second.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute and changes no number
    return deepspeed


def _deepspeed_config(config: Config, *, stage: int, accumulation: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours; users never write one."""
    size = config.engine.bucket_elements
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm,
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


def make_engine(objective: Objective, resolved: Resolved, ranks: Ranks) -> Engine:
    """The engine of the run's ZeRO stage."""
    config, dtype, stage = resolved.config, resolved.dtype(ranks.device), resolved.zero_stage
    if stage == 0:
        return PlainEngine(objective, config, ranks, dtype)
    accumulation = resolved.micro_batches_per_rank
    return DeepSpeedEngine(objective, config, ranks, dtype, stage=stage, accumulation=accumulation)
