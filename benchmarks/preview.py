"""Draw a sheet of 24 training images as the model gets them, with their class names.

    python benchmarks/preview.py --sheet preview.png --data imagenet
    python benchmarks/preview.py --sheet preview.png --data flowers --randaug 5 --mixup 0.8
    python benchmarks/preview.py --sheet preview.png --data runs/demo/data --demo

Takes all flags of ftclip.py, of which those for the augmentation matter: --image-size,
--crop-scale, --randaug, --random-erasing, --mixup, --cutmix and --seed. The images are those of
the first epoch. Small ones are enlarged to at least 128 pixels.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftclip

COUNT = 24


def denormalize(image: torch.Tensor) -> Image.Image:
    """A normalized image (3, H, W) as a Pillow image."""
    mean = torch.tensor(ftclip.CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(ftclip.CLIP_STD).view(3, 1, 1)
    pixels = (image * std + mean).clamp(0, 1)
    return v2.functional.to_pil_image(pixels)


def draw_tile(image: torch.Tensor, label: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """One image with its class beneath, or its classes if it is mixed, as uint8 (3, H, W)."""
    tile = denormalize(image)
    tile = ImageOps.scale(tile, math.ceil(128 / tile.width), Image.Resampling.NEAREST)
    tile = ImageOps.expand(tile, (0, 0, 0, 14))  # a black border below, for the text
    indices = label.nonzero().flatten().tolist() if label.ndim else [label.item()]
    text = " + ".join(classes[index] for index in indices)
    ImageDraw.Draw(tile).text((2, tile.height - 13), text)
    return v2.functional.pil_to_tensor(tile)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sheet", type=Path, default=Path("preview.png"), help="PNG to write")
    args, flags = parser.parse_known_args()
    config = ftclip.parse_flags([*flags, "--workers", "0", "--device", "cpu"])
    process = ftclip.start_process(config)
    model = config.model
    vision = ftclip.model_config(model)["vision_cfg"]
    config.image_size = config.image_size or vision["image_size"]

    randaug = ftclip.RandAugment(config.randaug) if config.randaug > 0 else None
    transform = ftclip.train_transform(config.image_size, config.crop_scale, randaug)
    folder = Path(config.data or "imagenet") / "train"
    dataset = ftclip.FolderDataset(folder, transform, config.seed)
    plan = ftclip.resolve(config, vision["layers"], len(dataset))

    batches = ftclip.DeviceBatches(dataset, plan, process, first=0)
    samples = itertools.chain.from_iterable(zip(images, labels) for images, labels in batches)
    tiles = []
    for image, label in itertools.islice(samples, COUNT):
        tiles.append(draw_tile(image, label, dataset.classes))
    grid = torchvision.utils.make_grid(tiles, nrow=8)
    v2.functional.to_pil_image(grid).save(args.sheet, "PNG")
    print(f"{args.sheet} has {len(tiles)} training images as the model gets them")


if __name__ == "__main__":
    try:
        main()
    except ftclip.UserError as error:
        sys.exit(f"preview: {error}")
