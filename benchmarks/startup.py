"""Measure how long the start of a run takes and how much memory it needs.

    python benchmarks/startup.py                    # 1.28 million images and ViT-L/14
    python benchmarks/startup.py --files 128000     # fewer images

It makes the image files, which are empty, and the weights in a temporary folder (1.2 GB; with
1.28 million files this takes a minute or two) and removes them afterwards. Each line is a process
of its own: its seconds, without the imports unless they are what is measured, and its peak resident
memory in MiB, all included. All files are in the page cache. It reads /proc, so it needs Linux.
"""

import argparse
import glob
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODEL = "ViT-L-14"
CLASSES = 1000


def make_files(root: Path, count: int) -> None:
    """Empty files with the names of ImageNet's, in 1000 class folders."""
    for label in range(CLASSES):
        folder = root / f"n{10_000_000 + 7_919 * label}"
        folder.mkdir(parents=True)
        for i in range(label, count, CLASSES):
            os.close(os.open(f"{folder}/{folder.name}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))


# What is measured. Each function imports what it needs, calls `start` and does its work.

began = 0.0


def start() -> None:
    global began
    began = time.perf_counter()


def import_torch(folder: Path) -> None:
    start()
    import torch  # noqa: F401


def import_ftclip(folder: Path) -> None:
    start()
    import ftclip  # noqa: F401


def import_ftclip_and_open_clip(folder: Path) -> None:
    start()
    import open_clip  # noqa: F401

    import ftclip  # noqa: F401


def list_with_folder_dataset(folder: Path) -> None:
    import ftclip

    start()
    ftclip.FolderDataset(folder / "train")


def list_with_glob(folder: Path) -> None:
    """The listing of each class folder alone, as FolderDataset did it at first."""
    start()
    for entry in os.scandir(folder / "train"):
        sorted(glob.glob("**", root_dir=entry.path, recursive=True))


def list_with_os_walk(folder: Path) -> None:
    start()
    for entry in os.scandir(folder / "train"):
        files = []
        for parent, _, names in os.walk(entry.path):
            files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        files.sort()


def list_with_image_folder(folder: Path) -> None:
    """torchvision's ImageFolder, to compare with."""
    from torchvision.datasets import ImageFolder

    start()
    ImageFolder(folder / "train")


def shuffle_an_epoch(folder: Path) -> None:
    """Until the first micro-batch of keys."""
    import ftclip

    start()
    next(iter(ftclip.MicroBatches(1_281_167, 2048, 64, range(1))))


def build_random(folder: Path) -> None:
    import ftclip

    ftclip.model_config(MODEL)  # imports open_clip
    start()
    ftclip.build_model(MODEL, CLASSES)


def save_best(folder: Path) -> None:
    """best.pt, which the lines below it read."""
    import ftclip

    model = ftclip.build_model(MODEL, CLASSES)
    state = {"ema": model.state_dict(), "model_config": model.config}
    start()
    ftclip.save_checkpoint(folder / "best.pt", state | {"classes": [str(i) for i in range(1000)]})


def build_from_file(folder: Path) -> None:
    """--pretrained FILE, where the file tells the activation."""
    import ftclip

    ftclip.model_config(MODEL)
    start()
    ftclip.build_model(MODEL, CLASSES, str(folder / "best.pt"))


def build_from_file_with_quick_gelu(folder: Path) -> None:
    """--pretrained FILE --no-quick-gelu."""
    import ftclip

    ftclip.model_config(MODEL)
    start()
    ftclip.build_model(MODEL, CLASSES, str(folder / "best.pt"), quick_gelu=False)


def load_classifier(folder: Path) -> None:
    import ftclip

    ftclip.model_config(MODEL)
    start()
    ftclip.load_classifier(folder / "best.pt")


def load_with_torch(folder: Path) -> None:
    """torch.load into a model without random weights, to compare with."""
    import torch

    import ftclip

    ftclip.model_config(MODEL)
    start()
    weights = torch.load(folder / "best.pt", weights_only=True, mmap=True)["ema"]
    with torch.device("meta"):
        model = ftclip.build_model(MODEL, CLASSES)
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)


MEASURES = (
    import_torch,
    import_ftclip,
    import_ftclip_and_open_clip,
    list_with_folder_dataset,
    list_with_glob,
    list_with_os_walk,
    list_with_image_folder,
    shuffle_an_epoch,
    build_random,
    save_best,
    build_from_file,
    build_from_file_with_quick_gelu,
    load_classifier,
    load_with_torch,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_281_167, help="default: %(default)s")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # function and folder
    args = parser.parse_args()
    if args.measure:
        name, folder = args.measure
        globals()[name](Path(folder))
        seconds = time.perf_counter() - began
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # KiB
        print(f"{name:<34} {seconds:8.2f} s {int(peak) / 1024:8.0f} MiB")
        return

    with tempfile.TemporaryDirectory(prefix="startup_") as folder:
        start()
        make_files(Path(folder, "train"), args.files)
        print(f"{args.files:,} files made in {time.perf_counter() - began:.0f} s", flush=True)
        for measure in MEASURES:
            command = [sys.executable, __file__, "--measure", measure.__name__, folder]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
