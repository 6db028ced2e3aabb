"""Figures 1 and 3 of the paper in miniature: your model and weights, and few images of a folder.

    python benchmarks/figure1.py --model ViT-B-16 --pretrained openai --data DIR
    python benchmarks/figure1.py ... --seeds 2      # fewer draws of images
    python benchmarks/figure1.py ... --dry-run      # only check that ftclip.py accepts each command

DIR/train/<class>/* and DIR/val/<class>/* hold the images. Each seed draws --per-class training
images of each class. On them the model is fine-tuned by the seven steps of Figure 1, by partial
tuning, and by other usual ways. Learning rates are chosen on seed 0: the smallest within a point of
the best. Results are of seeds 1 and up: top-1 of the last epoch on DIR/val, on which nothing but
these learning rates is chosen.

Everything is a command line of ftclip.py. Its files lie in --output, and the same command goes on
after an interruption. Draws figure1.png if matplotlib is installed. The row of logistic regression
needs scikit-learn.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 50

MIXED = "--mixup 0.8 --cutmix 1"
LONG = f"--epochs {2 * EPOCHS} {MIXED}"
PLAIN = "--layer-decay 1 --ema-decay 0 --randaug 0 --random-erasing 0"
# Learning rates of the head, tried on seed 0 in EPOCHS epochs. name: (flags, rates)
SWEEPS = {
    "one lr": (f"--layer-decay 1 {MIXED}", (3e-5, 1e-4, 3e-4)),
    "layer decay": ("", (2e-4, 6e-4, 1.2e-3)),
    "plain AdamW": (PLAIN, (3e-5, 1e-4, 3e-4)),
}
# name: (flags, the sweep that chose the learning rate, its factor, which weights count).
# Without a sweep, neither the learning rate nor the epochs are given.
STEPS = {
    "the usual setting": (f"--layer-decay 1 {LONG}", "one lr", 3.0, "raw"),
    "reduce lr": (f"--layer-decay 1 {LONG}", "one lr", 1.0, "raw"),
    "EMA": (f"--layer-decay 1 {LONG}", "one lr", 1.0, "ema"),
    "layer-wise lr decay": (LONG, "layer decay", 1.0, "ema"),
    "fewer epochs": (MIXED, "layer decay", 1.0, "ema"),
    "weaken augmentations": ("", "layer decay", 1.0, "ema"),
    "resolution × 1.5": ("--no-freeze-patch-embed", "layer decay", 1.0, "ema"),
}
OTHERS = {
    "the bare default": ("", None, 1.0, "ema"),
    "the recipe, raw weights": ("", "layer decay", 1.0, "raw"),
    "the recipe, crop and flip only": (
        "--randaug 0 --random-erasing 0",
        "layer decay",
        1.0,
        "ema",
    ),
    "plain AdamW: one lr, no EMA, crop and flip only": (PLAIN, "plain AdamW", 1.0, "raw"),
}


def few_images(data: Path, few: Path, per_class: int, seed: int) -> None:
    """Link per_class training images of each class, and all of val, in few."""
    for folder in sorted((data / "train").iterdir()):
        (few / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        for file in random.Random(f"{seed}/{folder.name}").sample(files, per_class):
            link = few / "train" / folder.name / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
    if not (few / "val").exists():
        (few / "val").symlink_to((data / "val").resolve())


def run(output: Path, flags: str, dry_run: bool) -> dict:
    """Last record of a run, which is trained if it is not finished, and its "seconds"."""
    command = [sys.executable, ROOT / "ftclip.py", *flags.split(), "--output", output]
    if dry_run:
        subprocess.run([*command, "--dry-run"], stdout=subprocess.DEVNULL, check=True)
        return {"ema_top1": 0.0, "raw_top1": 0.0, "seconds": 0.0}
    output.mkdir(parents=True, exist_ok=True)
    result = output / "result.json"
    if not result.exists():
        began = time.perf_counter()
        with open(output / "log.txt", "a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
        record = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        record["seconds"] = time.perf_counter() - began
        result.write_text(json.dumps(record))
        for weights in output.glob("*.pt"):  # gigabytes
            weights.unlink()
    return json.loads(result.read_text())


def logistic_regression(args: argparse.Namespace, data: Path) -> float:
    """Top-1 of scikit-learn's LogisticRegression on frozen features, at the best of four C."""
    import torch
    from sklearn.linear_model import LogisticRegression

    sys.path.insert(0, str(ROOT))
    import ftclip

    given, _ = ftclip.parse_flags(args.flags.split())
    quick_gelu = given.get("quick_gelu")
    model = ftclip.build_model(args.model, 2, args.pretrained, args.image_size, quick_gelu).eval()
    features = {}
    for split in ("train", "val"):
        images = ftclip.FolderDataset(
            data / split, functools.partial(ftclip.eval_transform, image_size=args.image_size)
        )
        with torch.no_grad():
            rows = [model.norm(model.trunk(image[None]))[0, 1:].mean(0) for image, _ in images]
        features[split] = (torch.stack(rows).numpy(), [label for _, label in images.samples])
    scores = []
    for c in (0.1, 1, 10, 100):
        classifier = LogisticRegression(C=c, max_iter=5000).fit(*features["train"])
        scores.append(100 * classifier.score(*features["val"]))
    return max(scores)


def draw(file: Path, title: str, steps: dict, partial: dict, others: dict) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"{file.name} is drawn if matplotlib is installed (pip install matplotlib)")
        return
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.4), sharey=True, layout="constrained")
    titles = ("steps, each with those before it", "tuned blocks, the recipe", "other ways")
    figure.suptitle(f"{title}. Small dots: one seed each. Large dots: their mean", fontsize=10)
    for axes, name, results in zip(panels, titles, (steps, partial, others)):
        for i, scores in enumerate(results.values()):
            axes.plot([i] * len(scores), scores, ".", color="0.7")
        means = [statistics.mean(scores) for scores in results.values()]
        axes.plot(range(len(means)), means, "o" if results is others else "o-")
        turned = {} if results is partial else {"rotation": 35, "ha": "right"}
        axes.set_xticks(range(len(results)), list(results), fontsize=8, **turned)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(name, fontsize=9)
    panels[0].set_ylabel("top-1 after the last epoch, %", fontsize=9)
    figure.savefig(file, dpi=80)


def print_row(name: str, scores: list[float], above: list[float] | None, seconds: float) -> None:
    """A row of the table; differences to `above` are paired, seed by seed."""
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    gain = ""
    if above:
        gains = [score - other for score, other in zip(scores, above)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        gain = f"{statistics.mean(gains):+.1f} ± {error:.1f}"
    print(f"| {name} | {statistics.mean(scores):.1f} ± {spread:.1f} | {gain} | {seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--pretrained", default="openai")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=12, help="of the model")
    parser.add_argument("--flags", default="", help="more flags of ftclip.py, for every run")
    parser.add_argument("--per-class", type=int, default=10, help="training images per class")
    parser.add_argument("--output", type=Path, default=Path("runs/figure1"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; one per GPU or core")
    parser.add_argument("--dry-run", action="store_true", help="check the commands, train nothing")
    args = parser.parse_args()
    root = args.output.resolve()
    for seed in range(args.seeds + 1):
        few_images(args.data, root / f"data-{seed}", args.per_class, seed)
    if args.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
    pool = ThreadPoolExecutor(args.jobs)
    runs: dict[tuple[str, int], Future] = {}  # rows with the same flags share a run

    def submit(flags: str, lr: float | None, seed: int) -> Future:
        if lr and "--epochs" not in flags:
            flags = f"--epochs {EPOCHS} {flags}"
        if lr:
            flags = f"{flags} --lr {lr:g}"
        size = args.image_size * 3 // 2 if "--no-freeze" in flags else args.image_size
        flags = f"{' '.join(flags.split())} --image-size {size}"
        if (flags, seed) not in runs:
            name = "".join(letter if letter.isalnum() else "-" for letter in flags)
            every = f"--model {args.model} --pretrained {args.pretrained} {args.flags}"
            every += f" --data {root}/data-{seed} --seed {seed} --eval-every 0 {flags}"
            runs[flags, seed] = pool.submit(run, root / f"run{name}-{seed}", every, args.dry_run)
        return runs[flags, seed]

    chosen = {}
    tried = {
        name: {lr: submit(flags, lr, 0) for lr in rates} for name, (flags, rates) in SWEEPS.items()
    }
    for name, futures in tried.items():
        weights = "raw" if name == "plain AdamW" else "ema"
        scores = {lr: future.result()[f"{weights}_top1"] for lr, future in futures.items()}
        best = max(scores.values())
        chosen[name] = min(lr for lr in scores if scores[lr] >= best - 1)  # small ones are safer
        text = ", ".join(f"{lr:g} {score:.1f} %" for lr, score in scores.items())
        print(f"lr, {name}: {text}: {chosen[name]:g} is taken", flush=True)

    counts = [k for k in (0, 1, 3, 6, 9, 12, 18) if k < args.blocks]
    partial = {k: (f"--train-blocks {k}", "layer decay", 1.0, "ema") for k in counts}
    partial[args.blocks] = STEPS["weaken augmentations"]
    futures = {}
    for seed in range(1, args.seeds + 1):
        for table in (STEPS, OTHERS, partial):
            for name, (flags, sweep, factor, weights) in table.items():
                lr = factor * chosen[sweep] if sweep else None
                future = submit(flags, lr, seed)
                futures.setdefault(name, []).append((future, weights))
    results = {}
    seconds = {}
    for name, members in futures.items():
        records = [(future.result(), weights) for future, weights in members]
        results[name] = [record[f"{weights}_top1"] for record, weights in records]
        seconds[name] = statistics.mean(record["seconds"] for record, _ in records)
    steps, others, tuned = [{n: results[n] for n in t} for t in (STEPS, OTHERS, partial)]
    if not args.dry_run:
        name = "logistic regression on the frozen features"
        seeds = range(1, args.seeds + 1)
        others[name] = [logistic_regression(args, root / f"data-{seed}") for seed in seeds]

    print("\n| step | top-1 ± deviation | against the row above ± error | seconds |")
    print("|---|---|---|---|")
    above = None
    for name, scores in steps.items():
        print_row(name, scores, above, seconds[name])
        above = scores
    print("\n| tuned blocks, or another way | top-1 | against the recipe ± error | seconds |")
    print("|---|---|---|---|")
    for name, scores in (tuned | others).items():
        print_row(name, scores, steps["weaken augmentations"], seconds.get(name, 0.0))
    if not args.dry_run:
        title = f"{Path(args.model).stem}, {args.data.name}, {args.per_class} images of each class"
        draw(root / "figure1.png", title, steps, tuned, others)


if __name__ == "__main__":
    main()
