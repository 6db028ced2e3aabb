"""Compare the speed of ftclip's loader and step with timm's, in one process, in alternation.

    python benchmarks/speed.py loader --data photos   # images/s on one core, then with workers
    python benchmarks/speed.py step                   # images/s of a step of ViT-B/16 at 224
    python benchmarks/speed.py step --old before.py   # and those of another ftclip.py
    python benchmarks/speed.py startup                # what comes before the first step
    python benchmarks/speed.py memory --model ViT-L-14 --image-size 336   # of a step, counted

`photos` is a folder with train/<class>/*. ftclip's loader gives cropped and augmented bytes and
leaves normalization and erasing to the device; timm's transform does both itself. One line has
JPEGs decoded by Pillow, as when torchvision has no decoder. Each figure is the median of several
rounds, with the slowest and the fastest.

`step` also times the model's matrix products alone, forward and backward, in float32 on a CPU and
in bf16 on a GPU. That is the device's matrix rate at these shapes, and a step is compared with it,
each in its fastest round. On a GPU it tells the peak memory.

`startup` lists empty image files, and builds ViT-L/14 from a best.pt of 1.2 GB, both made in a
temporary folder and in the page cache. Each line is a process of its own: its seconds without the
imports, and its peak memory with them. It reads /proc, so it needs Linux.

`memory` counts, without a GPU, the bytes of a step in bf16: weights, EMA, gradients and AdamW's
state, and what the forward pass keeps for the backward pass, for each image and in all (bf16 copies
of the weights). Buffers of kernels and of CUDA are not in it.

--old takes a file whose FolderDataset, train_transform and RandAugment (`loader`) or build_model
(`step`) are called as here.
"""

import argparse
import functools
import importlib.util
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from timm.optim import param_groups_layer_decay
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftclip

IMAGE_SIZE = 224
# FLOP per image and step at 224 pixels: those of the forward pass, and twice as many backward.
GFLOP = {"ViT-B-16": 105.6, "ViT-L-14": 488.7}
TIMM = {
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224",
    "ViT-L-14": "vit_large_patch14_clip_quickgelu_224",
}


def load_module(file: str) -> ModuleType:
    """Another ftclip.py as a module."""
    spec = importlib.util.spec_from_file_location("old_ftclip", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compare(runs: dict[str, Callable[[], None]], rounds: int, images: int) -> dict[str, float]:
    """Call each in turn, in `rounds` rounds after one to warm up, and print images/s.

    Args:
        runs: a function for each name.
        images: number of images in one call.

    Returns the images/s of each in its fastest round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        speed = images / medians[name]
        slowest = images / max(times)
        fastest = images / min(times)
        text = f"{name:<28} {speed:8.1f} images/s  ({slowest:.1f} to {fastest:.1f})"
        print(f"{text}  {1000 / speed:8.2f} ms each")
    *names, last = medians
    for name in names:
        print(f"{name} is {medians[last] / medians[name]:.3f} times as fast as {last}")
    return {name: images / min(times) for name, times in seconds.items()}


def timm_transform() -> Callable[[Image.Image], torch.Tensor]:
    """timm's transform with the paper's settings."""

    def posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
        # timm's own raises an error with Pillow 13 at 0 bits.
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)

    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    return timm.data.create_transform(
        IMAGE_SIZE,
        is_training=True,
        color_jitter=None,
        interpolation="bicubic",
        mean=ftclip.CLIP_MEAN,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )


def no_decoder(*args) -> None:
    raise RuntimeError("as if torchvision had no JPEG decoder")


def loader(args: argparse.Namespace, modules: dict[str, ModuleType]) -> None:
    """From bytes on the disk to a sample on one core, which is the work of a loader worker."""
    torch.set_num_threads(1)
    root = Path(args.data) / "train"
    datasets = {}
    for name, module in modules.items():
        transform = module.train_transform(IMAGE_SIZE, 0.08, module.RandAugment(9.0))
        datasets[name] = module.FolderDataset(root, transform)
    theirs = timm_transform()
    paths = [path for path, _ in datasets["ftclip"].samples]
    chosen = random.Random(0).sample(range(len(paths)), min(args.count, len(paths)))

    def decode() -> None:
        for i in chosen:
            ftclip.read_image(paths[i])

    def load_ours(dataset: Dataset, epochs: itertools.count) -> None:
        epoch = next(epochs)
        for i in chosen:
            dataset[epoch, i]

    def load_with_pillow() -> None:
        with mock.patch.object(torchvision.io, "decode_jpeg", no_decoder):
            load_ours(datasets["ftclip"], pillow_epochs)

    def load_theirs() -> None:
        for i in chosen:
            with Image.open(paths[i]) as file:
                theirs(file.convert("RGB"))

    pillow_epochs = itertools.count()
    runs = {"decode alone": decode, "ftclip, JPEGs by Pillow": load_with_pillow}
    for name, dataset in datasets.items():
        runs[name] = functools.partial(load_ours, dataset, itertools.count())
    runs["timm"] = load_theirs
    compare(runs, args.rounds, len(chosen))

    batch_size = min(32, len(paths))
    steps = max(1, args.count // batch_size)
    keys = [divmod(i, len(paths)) for i in range(batch_size * steps)]  # epoch, index
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]

    def run_loader(dataset: Dataset, **options) -> None:
        for _ in DataLoader(dataset, num_workers=args.workers, **options):
            pass

    runs = {}
    for name, dataset in datasets.items():
        runs[f"{name}, DataLoader"] = functools.partial(run_loader, dataset, batch_sampler=batches)
    images = Subset(ImageFolder(root, theirs), [index for _, index in keys])
    runs["timm, DataLoader"] = functools.partial(run_loader, images, batch_size=batch_size)
    print(f"with the start of {args.workers} workers, in batches of {batch_size}:")
    compare(runs, args.rounds, len(keys))


def matrix_products(
    model: torch.nn.Module, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], float]:
    """The matrix products of all blocks of ftclip's model, forward and backward, and nothing else.

    Returns a function that computes them on random numbers, and their GFLOP.
    """
    trunk = model.trunk
    blocks = trunk.transformer["resblocks"]
    heads = blocks[0].attn.heads
    tokens, width = trunk.positional_embedding.shape
    hidden = blocks[0].mlp.c_fc.out_features

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    pairs = []  # of matrices, or of batches of matrices, to be multiplied
    for inputs, outputs in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        x = random(batch * tokens, inputs)
        weight = random(outputs, inputs)
        gradient = random(batch * tokens, outputs)
        pairs += [(x, weight.T), (gradient, weight), (gradient.T, x)]
    q, k, v, gradient = random(4, batch * heads, tokens, width // heads)
    scores = random(batch * heads, tokens, tokens)
    pairs += [(q, k.mT), (scores, v)]  # forward
    pairs += [(gradient, v.mT), (scores.mT, gradient), (scores, k), (scores.mT, q)]  # backward
    flop = sum(2 * left.numel() * right.shape[-1] for left, right in pairs)

    def run() -> None:
        for _ in blocks:
            for left, right in pairs:
                left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, len(blocks) * flop / 1e9


def step(args: argparse.Namespace, modules: dict[str, ModuleType]) -> None:
    """Forward and backward pass of one batch; then the whole step with AdamW and EMA."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    amp_dtype = torch.bfloat16 if device.type == "cuda" else None
    torch.manual_seed(0)
    images = torch.randn(args.count, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(0, 1000, (args.count,), device=device)
    model = args.model
    depth = {}
    if args.blocks:
        model = ftclip.model_config(args.model)
        model["vision_cfg"]["layers"] = args.blocks
        depth = {"depth": args.blocks}
    models = {}
    for name, module in modules.items():
        models[name] = module.build_model(model, 1000, quick_gelu=True)
    models["timm"] = timm.create_model(TIMM[args.model], num_classes=1000, **depth)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward_backward(model: torch.nn.Module) -> None:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()
        synchronize()

    dtype = amp_dtype or torch.float32
    products, gflop = matrix_products(models["ftclip"], args.count, dtype, device)
    runs = {"matrix products alone": products}
    for name, model in models.items():
        model.to(device).train()
        runs[name] = functools.partial(forward_backward, model)
    speeds = compare(runs, args.rounds, args.count)
    rate = gflop * speeds.pop("matrix products alone") / args.count  # GFLOP/s

    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def whole_step(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: ftclip.EMA
    ) -> None:
        batches = iter([(images, labels)])
        ftclip.train_step(model, batches, 1, optimizer, scaler, amp_dtype, 0.1)
        ema.update(model)
        synchronize()

    runs = {}
    for name in ("ftclip", "timm"):
        model = models[name]
        if name == "ftclip":
            num_layers = len(model.trunk.transformer["resblocks"])
            groups = ftclip.param_groups(model, num_layers, 6e-4, 0.6, 0.05)
        else:
            groups = param_groups_layer_decay(model, 0.05, layer_decay=0.6)
        optimizer = torch.optim.AdamW(groups, lr=6e-4, fused=True)
        ema = ftclip.EMA(model, 0.9998)
        name += " with AdamW and EMA"
        runs[name] = functools.partial(whole_step, model, optimizer, ema)
    speeds |= compare(runs, args.rounds, args.count)

    print(f"matrix rate: {rate:.0f} GFLOP/s in {dtype}, {GFLOP[args.model]} GFLOP per image")
    for name, speed in speeds.items():
        print(f"{name}: {GFLOP[args.model] * speed / rate:.0%} of the matrix rate")
    if device.type == "cuda":
        print(
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; {torch.cuda.get_device_name()}"
        )


def list_with_folder_dataset(folder: str) -> None:
    ftclip.FolderDataset(f"{folder}/train")


def list_with_os_walk(folder: str) -> None:
    """Nothing but the names."""
    files = []
    for parent, _, names in os.walk(f"{folder}/train"):
        files += [os.path.join(parent, name) for name in sorted(names)]


def build_from_file(folder: str) -> None:
    """--pretrained FILE."""
    ftclip.build_model("ViT-L-14", 1000, f"{folder}/best.pt")


def load_classifier(folder: str) -> None:
    ftclip.load_classifier(f"{folder}/best.pt")


def measure(function: Callable[[str], None], folder: str) -> None:
    """Print the seconds of a function and the peak memory of this process."""
    ftclip.model_config("ViT-L-14")  # imports open_clip
    began = time.perf_counter()
    function(folder)
    seconds = time.perf_counter() - began
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # KiB
    print(f"{function.__name__:<28} {seconds:8.2f} s {int(peak) / 1024:8.0f} MiB")


def nothing(folder: str) -> None:
    """The memory of the imports."""


def startup(count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="startup_") as folder:
        classes = [f"n{10_000_000 + 7_919 * label}" for label in range(1000)]  # as ImageNet's
        for label, name in enumerate(classes):
            os.makedirs(f"{folder}/train/{name}")
            for i in range(label, count, 1000):
                Path(folder, "train", name, f"{name}_{i}.JPEG").touch()
        model = ftclip.build_model("ViT-L-14", 1000)
        state = {"ema": model.state_dict(), "model_config": model.config, "classes": classes}
        ftclip.save_checkpoint(f"{folder}/best.pt", state)
        print(f"{count:,} files in 1,000 folders, ViT-L-14:", flush=True)
        functions = (nothing, list_with_folder_dataset, list_with_os_walk)
        for function in (*functions, build_from_file, load_classifier):
            context = multiprocessing.get_context("spawn")  # a forked process has this one's memory
            process = context.Process(target=measure, args=(function, folder))
            process.start()
            process.join()
            if process.exitcode != 0:
                sys.exit(f"{function.__name__} failed")


def memory(model_name: str, image_size: int) -> None:
    model = ftclip.build_model(model_name, 1000, "none", image_size, freeze_patch_embed=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept_bytes(images: int) -> int:
        """Bytes of the tensors that a forward pass keeps, each storage once."""
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so addresses differ
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(images, 3, image_size, image_size))
        return sum(nbytes for nbytes, _ in kept.values())

    one, three = kept_bytes(1), kept_bytes(3)
    each = (three - one) / 2
    numbers = [p.numel() * (5 if p.requires_grad else 2) for p in model.parameters()]
    print(f"{model_name} at {image_size}: {(4 * sum(numbers) + one - each) / 2**30:.1f} GiB")
    print(f"and {each / 2**20:.0f} MiB for each image of a micro-batch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("loader", "step", "startup", "memory"))
    parser.add_argument("--data", default="imagenet", help="folder with train/<class>/*")
    parser.add_argument("--old", help="another ftclip.py to compare with")
    parser.add_argument("--model", choices=tuple(TIMM), default="ViT-B-16")
    count = "images per round (default: 128, for step 8), or files (128,000)"
    parser.add_argument("--count", type=int, help=count)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="for memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, help="a model of fewer blocks, only to try step")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    modules = {"ftclip": ftclip}
    if args.old:
        modules["old"] = load_module(args.old)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads")
    if args.what == "loader":
        args.count = args.count or 128
        loader(args, modules)
    elif args.what == "step":
        args.count = args.count or 8
        step(args, modules)
    elif args.what == "startup":
        startup(args.count or 128_000)
    else:
        memory(args.model, args.image_size)


if __name__ == "__main__":
    main()
