"""How fast ftclip's loader and step are beside timm's, in one process, in alternation.

    python benchmarks/speed.py loader --data photos   # images/s on one core: ours and timm's pipeline
    python benchmarks/speed.py step                   # ms of a step of ViT-B/16 at 224: ours and timm's model

`photos` is any folder in ImageNet's layout; figures in the notes are of 500x375 JPEGs. Medians of several rounds,
with the fastest and the slowest. On a GPU the step also tells peak memory, images/s and utilisation.
"""

import argparse
import functools
import random
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftclip

GFLOP = {"ViT-B-16": 105.6, "ViT-L-14": 488.7}  # per trained image at 224: forward, and twice that backward
TIMM = {"ViT-B-16": "vit_base_patch16_clip_quickgelu_224", "ViT-L-14": "vit_large_patch14_clip_quickgelu_224"}


def compare(runs: dict, rounds: int, count: int, unit: str) -> None:
    """Run each in turn, `rounds` times after one to warm up; print per round what `count` / seconds is."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - began] if i else []
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, high = count / max(times), count / min(times)
        text = f"{name:<28} {count / medians[name]:8.1f} {unit}  ({low:.1f} to {high:.1f})"
        print(f"{text}  {1000 * medians[name] / count:8.2f} ms each")
    names = list(medians)
    for name in names[:-1]:
        print(f"{name} is {medians[names[-1]] / medians[name]:.3f} times as fast as {names[-1]}")


def loader(args: argparse.Namespace) -> None:
    """Bytes on the disk → sample, on one core: what a loader's worker does."""
    torch.set_num_threads(1)
    one_core = ftclip.System(0, 1, torch.device("cpu"), None, 0, False)
    _, (ours, _), _ = ftclip.plan_of(ftclip.parse_args(["--data", args.data]), one_core)

    def posterize(
        image: Image.Image, bits: int, **_
    ) -> Image.Image:  # timm's crashes with Pillow 13 at 0 bits
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)

    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    theirs = timm.data.create_transform(
        224, is_training=True, color_jitter=None, interpolation="bicubic", mean=ftclip.CLIP_MEAN, **options
    )
    keys = random.Random(0).sample(range(len(ours)), min(args.count, len(ours)))

    def decode() -> None:
        for i in keys:
            ftclip.read_image(ours.samples[i][0])

    def sample() -> None:
        for i in keys:
            ours[0, i]

    def timms() -> None:
        for i in keys:
            with Image.open(ours.samples[i][0]) as file:
                theirs(file.convert("RGB"))

    runs = {"decode alone": decode, "ftclip": sample, "timm": timms}
    compare(runs, args.rounds, len(keys), "images/s")

    batch = min(32, len(ours))
    steps = range(max(1, args.count // batch))

    def end_to_end(dataset: Dataset, **options) -> None:
        for _ in DataLoader(dataset, num_workers=args.workers, **options):
            pass

    index = Subset(
        ImageFolder(f"{args.data}/train", theirs), [i % len(ours) for i in range(batch * len(steps))]
    )
    runs = {
        "ftclip, DataLoader": lambda: end_to_end(
            ours, batch_sampler=ftclip.MicroBatches(len(ours), batch, batch, steps)
        ),
        "timm, DataLoader": lambda: end_to_end(index, batch_size=batch),
    }
    print(f"with the start of {args.workers} workers, in batches of {batch}:")
    compare(runs, args.rounds, batch * len(steps), "images/s")


def step(args: argparse.Namespace) -> None:
    """Forward and backward of one batch, without and with the optimizer's step and the EMA."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp = torch.bfloat16 if device.type == "cuda" else None
    torch.manual_seed(0)
    images = torch.randn(args.count, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (args.count,), device=device)
    models = {"ftclip": ftclip.build_model(args.model, 1000, quick_gelu=True)}
    models["timm"] = timm.create_model(TIMM[args.model], num_classes=1000)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def run(model: torch.nn.Module, whole: tuple | None = None) -> None:
        if whole:
            optimizer, ema = whole
            ftclip.train_step(model, iter([(images, labels)]), 1, optimizer, scaler, amp, 0.1)
            ema.update(model)
        else:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = {}
    for name, model in models.items():
        model.to(device).train()
        runs[name] = functools.partial(run, model)
    compare(runs, args.rounds, args.count, "images/s")
    ours = models["ftclip"]
    groups = ftclip.param_groups(ours, ftclip.layer_id, 6e-4, 0.6, 0.05)
    whole = (torch.optim.AdamW(groups, fused=True), ftclip.EMA(ours, 0.9998))
    compare(
        {"ftclip with AdamW and EMA": functools.partial(run, ours, whole)},
        args.rounds,
        args.count,
        "images/s",
    )
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; {torch.cuda.get_device_name()}")
        print(
            f"one image is {GFLOP[args.model]} GFLOP: times images/s, over the GPU's FLOP/s, is the utilisation"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("loader", "step"))
    parser.add_argument("--data", help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--model", choices=tuple(TIMM), default="ViT-B-16")
    parser.add_argument("--count", type=int, default=0, help="images a round (default 128, of a step 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.count = args.count or {"loader": 128, "step": 8}[args.what]
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads")
    {"loader": loader, "step": step}[args.what](args)


if __name__ == "__main__":
    main()
