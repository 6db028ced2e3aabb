"""Draw a sheet of 24 training images as the model gets them, with their class names.

    python benchmarks/preview.py --sheet preview.png --data imagenet
    python benchmarks/preview.py --sheet preview.png --data flowers --randaug 5 --mixup 0.8
    python benchmarks/preview.py --sheet preview.png --demo    # after ftclip.py --demo

Takes all flags of ftclip.py, of which those for the augmentation matter: --image-size,
--crop-scale, --randaug, --random-erasing, --mixup, --cutmix and --seed. The images are those of
the first epoch. Small ones are enlarged to at least 128 pixels.
"""

import argparse
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
    given, options = ftclip.parse_flags([*flags, "--workers", "0", "--device", "cpu"])
    ftclip.start_process(options)
    vision = ftclip.model_config(given.get("model", ftclip.B16.model))["vision_cfg"]
    given.setdefault("image_size", vision["image_size"])
    dataset = ftclip.FolderDataset(f"{options.data}/train", seed=given.get("seed", 0))
    given |= {"num_images": len(dataset), "num_classes": len(dataset.classes)}
    options.micro_batch_size = min(COUNT, len(dataset))
    given["batch_size"] = options.micro_batch_size
    recipe = ftclip.resolve(ftclip.B16, given)
    randaug = ftclip.RandAugment(recipe.randaug) if recipe.randaug > 0 else None
    dataset.transform = ftclip.train_transform(recipe.image_size, recipe.crop_scale, randaug)

    samples = ftclip.load_samples(recipe, options, dataset, first_step=0)
    images, labels = next(ftclip.device_batches(recipe, options, samples, first_step=0))
    tiles = []
    for image, label in zip(images, labels):
        tiles.append(draw_tile(image, label, dataset.classes))
    grid = torchvision.utils.make_grid(tiles, nrow=8)
    v2.functional.to_pil_image(grid).save(args.sheet, "PNG")
    print(f"{args.sheet} has {len(tiles)} training images as the model gets them")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"preview: {error}")
