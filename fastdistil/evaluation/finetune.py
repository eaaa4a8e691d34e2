"""Fine-tunes an encoder of Hugging Face on a task and predicts with it: AdamW, linear warm-up and decay.

With a teacher it is the paper's second distillation, "DistilBERT (D)": half cross-entropy, half temperature-KL to the
logits of a teacher that was fine-tuned on the task, both by the operator that pre-training uses (kernels/distill.py).

Shapes: B examples of a batch, L tokens of its longest, C classes.
"""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdistil.evaluation import tasks
from fastdistil.evaluation.tasks import Settings
from fastdistil.kernels.distill import distill_loss
from fastdistil.remote import hub
from fastdistil.run import console
from fastdistil.run.command import Failed


def quiet() -> None:
    """No progress bars of others, and no report that a classifier has no masked-LM head."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Encoded:
    """The examples of a split as token ids, by one tokenizer; made once for all seeds.

    Args:
        table: what the tokenizer gave for them.
        labels: (N,), or (N, 2) for the ends of a span.
    """

    def __init__(self, tokenizer: Any, table: Any, labels: Tensor) -> None:
        self.columns = {name: table[name] for name in ("input_ids", "token_type_ids") if name in table}
        self.lengths = np.array([len(ids) for ids in table["input_ids"]])
        self.labels, self.tokenizer = labels, tokenizer

    @classmethod
    def texts(cls, tokenizer: Any, examples: tasks.Examples, max_length: int) -> "Encoded":
        """Labelled texts or pairs; what is longer than max_length tokens is cut."""
        table = tokenizer(*map(list, examples.texts), truncation=True, max_length=max_length)
        return cls(tokenizer, table, torch.tensor(examples.labels))

    def __len__(self) -> int:
        return len(self.lengths)

    def longest(self) -> dict[str, Tensor]:
        """The inputs of the longest example, and of the one with the highest id."""
        highest = np.argmax([max(ids, default=0) for ids in self.columns["input_ids"]])
        return self.batch(np.array([self.lengths.argmax(), highest]), torch.device("cpu"))[0]

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """((B, L) inputs of a model, (B,) labels or (2B,) ends of spans, starts first) on the device."""
        parts = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        inputs = self.tokenizer.pad(parts, return_attention_mask=True, return_tensors="pt")
        on_cuda = device.type == "cuda"
        moved = {k: (v.pin_memory() if on_cuda else v).to(device, non_blocking=True) for k, v in inputs.items()}
        return moved, self.labels[rows].movedim(0, -1).flatten().to(device)


def shuffled(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The rows of each batch of an epoch, in random order.

    Each stretch of 50 batches is sorted by length before it is cut into them, so that little is padded.
    """
    order = rng.permutation(len(lengths))
    stretch = 50 * batch_size
    batches = []
    for begin in range(0, len(order), stretch):
        part = order[begin : begin + stretch]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def pretrained(auto_class: Any, path: str | Path, **changes: Any) -> Any:
    """What an auto class of transformers makes of a folder or hub name; code that comes with it is not run.

    Raises ValueError where it cannot be loaded.
    """
    folder = hub.folder_of("model", path)
    try:
        return auto_class.from_pretrained(folder, trust_remote_code=False, **changes)
    except Exception as error:  # transformers raises whatever a file leads to
        raise ValueError(f"{path} cannot be loaded by transformers ({type(error).__name__}: {error})") from error


def configuration(path: str | Path) -> Any:
    """The configuration of a folder or hub name, to be looked at before a model is made of it.

    Raises ValueError as `pretrained` does, and where it asks for an attention that transformers may fetch from the hub
    and run.
    """
    import transformers

    config = pretrained(transformers.AutoConfig, path)
    if config._attn_implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"{path}: config.json asks for the attention {config._attn_implementation!r}, which may be code from the "
            "hub: remove attn_implementation from it"
        )
    return config


def longest_input(model: Any) -> float:
    """Tokens that a model of transformers reads at most; infinity where nothing limits it (XLNet, T5, some DeBERTas).

    config.json may count the rows of the position table: RoBERTa-like models, whose table has a row for padding, use
    only those behind it, 512 of 514. A model without a table or rotary positions knows distances alone.
    """
    figure = getattr(model.config, "max_position_embeddings", None)
    limits = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if "position" in name or "rotary" in name:
            limits.append(figure)
            if getattr(module, "padding_idx", None) is not None:
                limits.append(len(module.weight) - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None and limit > 0), default=math.inf)


def skeleton(path: str | Path) -> Any:
    """The encoder in a folder or of a hub name without its weights. Raises ValueError as `configuration` does."""
    import transformers

    config = configuration(path)
    try:
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a class of transformers makes of a wrong configuration
        raise ValueError(f"{path} cannot be loaded by transformers ({type(error).__name__}: {error})") from error


def require_readable(model: Any, path: str | Path, inputs: dict[str, Tensor]) -> None:
    """Raises ValueError where a model cannot compute these inputs, which on a GPU would take the device down."""
    model.eval()
    try:
        with torch.no_grad():
            output_of(model, {name: x.to(model.device) for name, x in inputs.items()})
    except Exception as error:  # of any kind, by any model's own code
        shape = tuple(inputs["input_ids"].shape)
        raise ValueError(
            f"{path} cannot read {shape[-1]} tokens of ids up to {int(inputs['input_ids'].max())} "
            f"({type(error).__name__}: {error}): give fewer tokens, or the tokenizer of this model"
        ) from error


def load_model(path: str, data: tasks.TaskData, settings: Settings, *, seed: int) -> Any:
    """A classifier, regression or question answerer on the encoder in a Hugging Face folder.

    Its head is drawn from the seed unless the folder has one. Raises ValueError as `configuration` does.
    """
    import transformers

    torch.manual_seed(seed)
    config = configuration(path)
    changes: dict[str, Any] = {"dtype": torch.float32}  # not as it was saved: 16 bits round updates away
    if settings.dropout is not None:
        rates = [k for k, v in config.to_dict().items() if "dropout" in k and isinstance(v, float)]
        changes |= dict.fromkeys(rates, settings.dropout)
    if data.task.spans:
        return pretrained(transformers.AutoModelForQuestionAnswering, path, **changes)
    names = dict(enumerate(data.label_names or ("score",)))
    changes |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    kind = "regression" if data.task.regression else "single_label_classification"
    return pretrained(transformers.AutoModelForSequenceClassification, path, problem_type=kind, **changes)


def task_teacher(
    path: str, tokenizer: Any, data: tasks.TaskData, train: Encoded, settings: Settings, seed: int, device: torch.device
) -> Any:
    """The teacher of a task: the model in a folder, fine-tuned first if it was saved without a head for it.

    Raises ValueError where it does not read the student's ids or has other classes.
    """
    import transformers

    if data.task.regression:
        raise ValueError("--teacher wants a task with classes: a regression has no distribution to imitate")
    theirs = pretrained(transformers.AutoTokenizer, path)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher {path} has another vocabulary than the model: both must read the same ids")
    config = configuration(path)
    kind = "ForQuestionAnswering" if data.task.spans else "ForSequenceClassification"
    fine_tuned = any(a.endswith(kind) for a in config.architectures or ())
    if fine_tuned and not data.task.spans and config.num_labels != len(data.label_names):
        raise ValueError(
            f"--teacher {path} has {config.num_labels} classes, the task {len(data.label_names)}: "
            "give a model of this task"
        )
    # Logits are compared class by class. In config.json class 10 may stand before class 2.
    named = [name for _, name in sorted(config.id2label.items())]
    theirs, ours = ([str(name).casefold() for name in names] for names in (named, data.label_names))
    if fine_tuned and theirs != ours and sorted(theirs) == sorted(ours):
        raise ValueError(
            f"--teacher {path} numbers its classes {', '.join(theirs)}, the task {', '.join(ours)}: "
            "give a model that was fine-tuned on these files (evaluate --save)"
        )
    teacher = load_model(path, data, settings, seed=seed)
    if not fine_tuned:
        fine_tune(teacher, train, settings, seed=seed, device=device, title=f"teacher, seed {seed}")
    return teacher


def loss_of(logits_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None, settings: Settings) -> Tensor:
    """Mean over the batch: cross-entropy, or mean squared error for a single column.

    With a teacher (1 - kd) * cross-entropy + kd * T^2 KL(teacher || student).
    """
    if logits_BC.shape[1] == 1:
        return F.mse_loss(logits_BC[:, 0].float(), labels_B)
    if teacher_BC is None:
        return F.cross_entropy(logits_BC.float(), labels_B.long())
    return distill_loss(
        logits_BC.contiguous(),
        teacher_BC.contiguous(),
        labels_B.long(),
        temperature=settings.temperature,
        kd_scale=settings.kd / len(labels_B),
        mlm_scale=(1 - settings.kd) / len(labels_B),
    ).loss


def learning_rate(model: Any, settings: Settings) -> float:
    """--lr, else by the size of the model: 5e-5 for BERT-base, more where it is smaller.

    5e-5 x (12 x 768 / (layers x width))^0.5, to one digit: 1e-4 for 6 or 3 layers of 384. Measured on 2,000 pairs of
    STS-B, 1,000 held out, three epochs, one seed, with 5e-5, 1e-4, 2e-4 and 3e-4: all-MiniLM-L6-v2 scored 75.4, 79.8,
    76.8 and 71.8, three layers of it, distilled by `embed`, 31.7, 50.5, 42.5 and 33.3.
    """
    config = model.config
    size = (getattr(config, "num_hidden_layers", None) or 12) * (getattr(config, "hidden_size", None) or 768)
    return settings.lr or float(f"{5e-5 * (12 * 768 / size) ** 0.5:.0e}")


def fine_tune(
    model: Any,
    train: Encoded,
    settings: Settings,
    *,
    seed: int,
    device: torch.device,
    teacher: Any = None,
    title: str = "",
) -> None:
    """Train `model` in place. The same seed gives the same weights on the same machine.

    Raises Failed where the loss became infinite or NaN.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model.to(device).train()
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)

    # AdamW decays matrices only; its rate rises over the first `warmup` updates and then falls to zero, linearly.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate(model, settings), fused=True)
    updates = settings.epochs * math.ceil(len(train.lengths) / settings.batch_size)
    warmup = math.ceil(settings.warmup * updates)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min((u + 1) / max(1, warmup), (updates - u) / max(1, updates - warmup))
    )

    # An epoch takes every example once. The losses are added up on the device, so that no update waits for the host.
    total = torch.zeros((), device=device)
    epochs = (rows for _ in range(settings.epochs) for rows in shuffled(train.lengths, settings.batch_size, rng))
    for rows in console.progress(epochs, updates, title):
        inputs, labels_B = train.batch(rows, device)
        with autocast(device):
            logits_BC = forward(model, inputs)
            teacher_BC = None if teacher is None else infer(teacher, inputs)
        loss = loss_of(logits_BC, labels_B, teacher_BC, settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
    if not math.isfinite(total.item()):  # the one sync of a fine-tuning
        raise Failed(f"the loss was not finite with seed {seed}: lower --lr")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products on CUDA, nothing else anywhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def readable(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that a model of transformers takes."""
    # A DistilBERT takes no token types and a RoBERTa knows one, whatever its tokenizer makes.
    accepted = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 2) < 2:
        accepted.discard("token_type_ids")
    return {k: v for k, v in inputs.items() if k in accepted}


def output_of(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What a model of transformers returns for those of the inputs that it takes."""
    return model(**readable(model, inputs))


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, C) logits; of a question answerer (2B, L), the starts first, so that a span is learnt as two classes."""
    output = output_of(model, inputs)
    if "start_logits" in output:
        return torch.cat((output.start_logits, output.end_logits))
    return output.logits


infer = torch.no_grad()(forward)
"""As `forward`, without gradients."""


def outputs(
    model: Any, examples: Encoded, batch_size: int, device: torch.device
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, their logits in fp32) of every batch; short examples come first, so that little is padded."""
    model.to(device).eval()
    order = np.argsort(examples.lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        inputs, _ = examples.batch(rows, device)
        with autocast(device):
            logits = infer(model, inputs).float()
        yield rows, logits


def predict(model: Any, examples: Encoded, batch_size: int, device: torch.device) -> np.ndarray:
    """(N,) predicted classes, or the numbers of a regression, in the order of the examples."""
    predicted = np.empty(len(examples.lengths))
    for rows, logits_BC in outputs(model, examples, batch_size, device):
        best_B = logits_BC[:, 0] if logits_BC.shape[1] == 1 else logits_BC.argmax(-1)
        predicted[rows] = best_B.cpu().numpy()  # a sync a batch: short beside the fine-tuning
    return predicted
