"""ftclip: fine-tune CLIP's image tower the way FT-CLIP does, in one file.

"CLIP Itself is a Strong Fine-tuner" (Dong et al., arXiv 2212.06138) takes CLIP ViT-B/16 to 85.7 % and
ViT-L/14 to 88.0 % top-1 on ImageNet-1k. Nothing is added to the model: a small learning rate that decays from
the head down to the embeddings, a moving average of the weights (EMA), a short training and careful
augmentation do it.

    python ftclip.py --demo                                       # no data, no GPU: a minute on two cores
    torchrun --nproc_per_node 8 ftclip.py --model ViT-B-16        # the 85.7 % recipe, on ./imagenet
    python ftclip.py --model ViT-B-16                             # the same on one GPU, by accumulation
    python ftclip.py --model ViT-L-14 --image-size 336 --dry-run  # print every number of a run, touch nothing
    python ftclip.py --data flowers --batch-size 64 --epochs 20   # your own folders; lr and EMA scale to fit
    python ftclip.py --eval --checkpoint runs/ViT-B-16-224/best.pt
    # Two nodes: this line on each, with --output on a file system that both see.
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ftclip.py

Data lie as ImageNet does: DIR/train/<class>/* and DIR/val/<class>/*. A run keeps last.pt (all it needs to go
on), best.pt (the best weights, for use) and metrics.jsonl in --output; the same command again goes on.

The file reads in the order in which data meet it: recipes, model, optimization, augmentation, data, engine,
command line. "Official" is the paper's code, github.com/LightDXY/FT-CLIP at commit 3f9cefa.
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- recipes

COMMON = {
    "pretrained": "openai",
    "min_lr": 1e-6,  # of the head; that of a layer below is smaller, like its lr
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "clip_grad": 0.0,
    "randaug": 9.0,
    "random_erasing": 0.25,
    "crop_scale": 0.08,
}
B16 = COMMON | {"layer_decay": 0.6, "epochs": 50, "warmup_epochs": 10}
L14 = COMMON | {"layer_decay": 0.65, "epochs": 30, "warmup_epochs": 5}
# The patch embedding, conv1, is frozen at CLIP's own resolution; the position embeddings always learn.
LOW_RES, HIGH_RES = {"freeze_patch_embed": True}, {"freeze_patch_embed": False}
# The four published runs, from the official scripts and logs. lr is the head's, for this global batch, which
# was 8 GPUs x 256 x 1 accumulation, 8 x 64 x 4, 8 x 64 x 4 and 24 x 20 x 4. All start from weights for 224.
RECIPES = {
    ("ViT-B-16", 224): B16 | LOW_RES | {"lr": 6e-4, "batch_size": 2048, "micro_batch_size": 256},
    ("ViT-B-16", 384): B16 | HIGH_RES | {"lr": 7e-4, "batch_size": 2048, "micro_batch_size": 64},
    ("ViT-L-14", 224): L14 | LOW_RES | {"lr": 4e-4, "batch_size": 2048, "micro_batch_size": 64},
    ("ViT-L-14", 336): L14 | HIGH_RES | {"lr": 6e-4, "batch_size": 1920, "micro_batch_size": 20},
}

# A tiny ViT from scratch: nothing is pretrained, so nothing is frozen and all layers learn at the same pace.
DEMO = {
    "model": {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4}},
    "pretrained": "none",
    "lr": 1e-3,
    "layer_decay": 1.0,
    "freeze_patch_embed": False,
    "batch_size": 64,
    "epochs": 12,
    "warmup_epochs": 1,
    "crop_scale": 0.5,
    "output": "runs/demo",
}
DEMO_IMAGES = {"train": 500, "val": 100}  # per class
DEMO_PATTERNS = {
    "checkerboard": lambda x, y: torch.sin(x) * torch.sin(y),
    "diagonals": lambda x, y: torch.sin(x + y),
    "dots": lambda x, y: torch.sin(x) + torch.sin(y) - 1,
    "pillars": lambda x, y: torch.sin(x),
    "rings": lambda x, y: torch.sin(torch.hypot(x, y)),
    "stripes": lambda x, y: torch.sin(y),
}


# ---------------------------------------------------------------------------------------------- model


class CLIPClassifier(nn.Module):
    """CLIP's image tower with the FT-CLIP head: a new LayerNorm per patch token, their mean, a linear layer.

    The class token takes part in attention and is then dropped; CLIP's own last norm and projection are not
    used. The head starts 1000 times smaller than usual, so that the first predictions are uniform.
    Source: official models/finetune_clip.py:167-175, 230-231.

    Args:
        trunk: images (N, 3, S, S) → tokens (N, 1 + patches, width), class token first.
        width: size of a token.
        num_classes: size of the output.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(0.001)
            self.head.bias.mul_(0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, S, S)."""
        tokens = self.trunk(images)[:, 1:]  # (N, patches, width)
        features = self.norm(tokens).mean(dim=1)
        with torch.autocast(images.device.type, enabled=False):  # bf16 logits would tie in an evaluation
            return self.head(features.float())


def model_config(model: str | dict) -> dict:
    """open_clip's configuration of a plain ViT: by name, from a JSON file, or as given.

    Returns:
        {"embed_dim", "quick_gelu", "vision_cfg"}, a copy.

    Raises:
        ValueError: an unknown name, a file that is no configuration, or a tower other than open_clip's ViT.
    """
    import open_clip  # here, because it brings timm: a second that --help and a loader's worker need not pay

    name = model if isinstance(model, str) else "dict"
    if isinstance(model, dict):
        config = copy.deepcopy(model)
    elif os.path.isfile(model):
        try:
            config = json.loads(Path(model).read_text())
        except ValueError:
            config = None
    else:
        config = open_clip.get_model_config(model)
        if config is None:
            near = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), n=5, cutoff=0.3))
            raise ValueError(f"--model {model} is neither a file nor a model of open_clip's; near it: {near}")
    try:
        embed_dim, vision = config["embed_dim"], config["vision_cfg"]
        vision = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 768} | vision
    except (TypeError, KeyError):
        way = "give JSON with embed_dim and vision_cfg"
        raise ValueError(f"--model {name} is no model configuration: {way}") from None
    numbers = [vision[key] for key in ("image_size", "patch_size", "layers", "width")]
    plain = all(isinstance(number, int) and number > 0 for number in numbers)
    if not plain or "timm_model_name" in vision or vision.get("attentional_pool"):
        raise ValueError(f"--model {name} is not a plain ViT of open_clip's: choose one, such as ViT-B-16")
    return {"embed_dim": embed_dim, "quick_gelu": config.get("quick_gelu", False), "vision_cfg": vision}


def load_weights(model: str, pretrained: str) -> tuple[dict[str, Tensor], bool | None]:
    """The image tower's weights, by open_clip's tag or from a file, and whether they need QuickGELU.

    A file may be OpenAI's own TorchScript archive, a state dict (bare, under "state_dict", with "module."
    before each name) or safetensors; a pickle with more than tensors in it is refused. Under
    torch.device("meta") nothing is downloaded or read, and the weights are empty.

    Returns:
        Weights by the tower's parameter names, and QuickGELU or not: what open_clip knows of the tag, True
        for OpenAI's archive, None (unknown) for another file.

    Raises:
        ValueError: no such tag or file, or one that cannot be had or read, or that holds no CLIP ViT.
    """
    import open_clip

    torchscript = False
    if os.path.isfile(pretrained):
        if zipfile.is_zipfile(pretrained):
            names = zipfile.ZipFile(pretrained).namelist()
            torchscript = any(name.endswith("/constants.pkl") for name in names)
        quick_gelu = True if torchscript else None
    else:
        tag = open_clip.get_pretrained_cfg(model, pretrained)
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise ValueError(
                f"--pretrained {pretrained} is neither a file nor a tag of {model}: give a weights file, "
                f"'none' for random weights, or one of its tags: {tags}"
            )
        quick_gelu = tag.get("quick_gelu", False)
    if torch.empty(0).device.type == "meta":
        return {}, quick_gelu
    try:
        path = pretrained if os.path.isfile(pretrained) else open_clip.download_pretrained(tag)
        if torchscript:
            weights = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            weights = open_clip.factory.load_state_dict(path)  # strips "module."
    except Exception as error:  # noqa: BLE001, the first line of whatever hub, zip, pickle or safetensors say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"cannot load --pretrained {pretrained} ({reason}): give a whole file of OpenAI's, open_clip's, "
            "torch.save's or safetensors' making"
        ) from None
    if any(name.startswith("visual.") for name in weights):  # a whole CLIP: leave its text tower behind
        weights = {name[7:]: value for name, value in weights.items() if name.startswith("visual.")}
    unused = ("proj", "ln_post.weight", "ln_post.bias")
    weights = {name: value for name, value in weights.items() if name not in unused}
    if "positional_embedding" not in weights:
        raise ValueError(f"--pretrained {pretrained} holds no CLIP ViT, but {list(weights)[:3]} ...")
    return weights, quick_gelu


def build_model(
    model: str | dict,
    num_classes: int,
    pretrained: str = "none",
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    drop_path: float = 0.0,
    train_blocks: int | None = None,
    freeze_patch_embed: bool = False,
    grad_checkpointing: bool = False,
) -> CLIPClassifier:
    """open_clip's image tower with the FT-CLIP head, float32, on the CPU.

    To copy it, copy CLIPClassifier, model_config and load_weights with it.

    Args:
        model: an open_clip ViT by name, the path of a model-config JSON, or such a configuration.
        pretrained: a tag of open_clip's, a weights file, or "none".
        image_size: pixels, None for the configuration's; position embeddings are resized to fit.
        quick_gelu: None for what the weights were trained with, or else the configuration's.
        drop_path: probability of dropping a residual branch of the last block, falling to 0 at the first one.
        train_blocks: tune only so many last blocks, norm and head (0 is linear probing); None, or as many as
            there are, is full fine-tuning, embeddings included.
        freeze_patch_embed: leave conv1 as it is.
        grad_checkpointing: compute the blocks again in the backward pass, to save memory.

    Returns:
        The classifier. Its `config` is the resolved configuration, from which the same model can be built;
        `activation_guessed` tells that neither the weights nor quick_gelu said which activation is right.

    Raises:
        ValueError: an unknown model or tag, an image size that is not a multiple of the patch, more blocks
            than there are, or weights that do not fit.
    """
    import open_clip

    name = model if isinstance(model, str) else "dict"
    config = model_config(model)
    vision = config["vision_cfg"]
    patch, image_size = vision["patch_size"], image_size or vision["image_size"]
    if image_size % patch:
        near = max(patch, image_size // patch * patch)
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {name}'s patch of {patch} pixels: try {near} or "
            f"{near + patch}"
        )
    weights, needs_quick_gelu = ({}, None) if pretrained == "none" else load_weights(name, pretrained)
    guessed = quick_gelu is None and needs_quick_gelu is None and pretrained != "none"
    if quick_gelu is None:  # GELU where QuickGELU belongs would cost accuracy in silence
        quick_gelu = config["quick_gelu"] if needs_quick_gelu is None else needs_quick_gelu
    config["quick_gelu"], vision["image_size"] = quick_gelu, image_size

    # open_clip builds towers in pairs: ask for the smallest text tower, and drop it at once.
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    try:
        trunk = open_clip.CLIP(**config, text_cfg=text).visual
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"--model {name}: open_clip cannot build {vision} ({error}): correct it") from None
    # All tokens, as the last block leaves them. ln_post and proj, unused, would get no gradient and stop DDP.
    trunk.ln_post, trunk.proj, trunk.pool_type, trunk.output_tokens = nn.Identity(), None, "none", False
    classifier = CLIPClassifier(trunk, vision["width"], num_classes)
    classifier.config, classifier.activation_guessed = config, guessed

    if weights:
        positions, grid = weights["positional_embedding"].float(), image_size // patch
        old_grid = math.isqrt(len(positions) - 1)
        if old_grid != grid and old_grid**2 + 1 == len(positions):
            # Bicubic without antialias, as in the paper's runs; the class token's position stays as it is.
            # open_clip's own resize has antialias, another kernel. Official run_class_finetuning.py:360-385.
            square = positions[1:].T.reshape(1, -1, old_grid, old_grid)  # (1, width, old grid, old grid)
            square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
            weights["positional_embedding"] = torch.cat([positions[:1], square[0].flatten(1).T])
        found = {key: tuple(value.shape) for key, value in weights.items()}
        wanted = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
        for key in wanted | found:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"--pretrained {pretrained} does not fit {name}: {key} is {found.get(key, 'none')} there "
                    f"and {wanted.get(key, 'none')} in the model; give the --model that it was made for"
                )
        trunk.load_state_dict(weights)

    def drop_branch(module: nn.Module, inputs: tuple, output: Tensor, rate: float) -> Tensor:
        return torchvision.ops.stochastic_depth(output, rate, mode="row", training=module.training)

    blocks = trunk.transformer.resblocks
    for i, block in enumerate(blocks if drop_path else ()):
        for branch in (block.ls_1, block.ls_2):  # the ends of the two residual branches
            # A hook rather than a module, so that the state dict keeps open_clip's names.
            rate = drop_path * i / max(1, len(blocks) - 1)
            branch.register_forward_hook(functools.partial(drop_branch, rate=rate))
    if train_blocks is not None and train_blocks > len(blocks):
        raise ValueError(f"--train-blocks {train_blocks} is more than {name} has: give {len(blocks)} at most")
    if train_blocks is not None and train_blocks < len(blocks):
        trunk.requires_grad_(False)
        blocks[len(blocks) - train_blocks :].requires_grad_(True)
    if freeze_patch_embed:
        trunk.conv1.requires_grad_(False)
    trunk.set_grad_checkpointing(grad_checkpointing)
    return classifier


# ---------------------------------------------------------------------------------------------- optimization


def layer_id(name: str, num_layers: int) -> int:
    """Depth of a parameter of CLIPClassifier: 0 embeddings, i + 1 block i, num_layers + 1 norm and head.

    For another model, write another function like it: in timm's ViTs, the blocks are "blocks.<i>.", norm and
    head "norm.", "fc_norm." and "head.", and the rest is 0. Source: official optim_factory.py:22-39.

    Raises:
        ValueError: not a parameter of CLIPClassifier.
    """
    if name.startswith("trunk.transformer.resblocks."):
        return int(name.split(".")[3]) + 1
    if name.startswith(("norm.", "head.")):
        return num_layers + 1
    if name.startswith("trunk."):  # class_embedding, positional_embedding, conv1, ln_pre
        return 0
    raise ValueError(f"parameter {name} belongs to no layer: teach layer_id where it is")


def param_groups(
    model: nn.Module,
    layer_id: Callable[[str, int], int],
    num_layers: int,
    lr: float,
    layer_decay: float,
    weight_decay: float = 0.05,
    no_decay: tuple[str, ...] = ("class_embedding", "positional_embedding", "cls_token", "pos_embed"),
) -> list[dict]:
    """AdamW's parameter groups, with a learning rate that decays from the head down to the embeddings.

    Layer i learns with lr · layer_decay^(num_layers + 1 − i): near the pixels, more of CLIP stays.
    A schedule must keep to it, before each optimizer step: group["lr"] = lr_at(...) * group["lr_scale"]
    (timm's own schedulers would apply lr_scale twice). Vectors (norms and biases) and names that end in
    `no_decay` get no weight decay; frozen parameters are in no group.
    Source: official optim_factory.py:60, run_class_finetuning.py:441.

    Args:
        model: not wrapped in DDP or torch.compile, which change the names.
        layer_id: (parameter name, num_layers) → 0 for the embeddings, ..., num_layers + 1 for the head.
        num_layers: number of transformer blocks.
        lr: of the head.
        no_decay: what open_clip and timm call the class token and the positions, which are not vectors.

    Returns:
        Two groups a layer at most, from the embeddings up: {"params", "names", "layer", "lr", "lr_scale",
        "weight_decay"}.

    Raises:
        ValueError: layer_id and num_layers do not belong together.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_id(name, num_layers), parameter.ndim > 1 and not name.endswith(no_decay)
        if not 0 <= layer <= num_layers + 1:
            raise ValueError(f"{name} is in layer {layer} of {num_layers + 1}: num_layers is another model's")
        scale = layer_decay ** (num_layers + 1 - layer)
        group = {"layer": layer, "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay * decays}
        group = groups.setdefault((layer, decays), group | {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0) -> float:
    """Learning rate of optimizer step `step`, from 0: linear from 0 to lr, then half a cosine towards min_lr.

    With a warm-up of two steps or more, step 0 has lr 0 (and moves nothing), step warmup_steps − 1 has lr,
    and so has the next, the first of the cosine. Source: official utils.py:407-424.

    Args:
        step: 0 ≤ step < total_steps.
        lr: of the head; a group's own is this times its lr_scale.
    """
    if step < warmup_steps:
        return lr * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * progress))


class EMA:
    """A moving average of a model's weights: after each optimizer step, ema += (1 − decay) · (weights − ema).

    It starts from the starting weights and remembers 1 / (1 − decay) steps: 5,000 for the paper's 0.9998,
    with which the average of a much shorter run would hardly leave its start. There, ftclip remembers a third
    of the run: decay = 1 − 3 / total_steps. Source: official engine_for_finetuning.py:92.

    Args:
        model: already on its device; neither compiled nor wrapped.

    Attributes:
        module: the averaged model, in evaluation mode; save its state dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call it once per optimizer step, not per micro-batch."""
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.decay)
        for average, buffer in zip(self.module.buffers(), model.buffers()):  # CLIP has none; batch norm has
            average.copy_(buffer)


# ---------------------------------------------------------------------------------------------- augmentation


def read_image(path: str | os.PathLike) -> Tensor:
    """An image file as RGB, uint8 (3, H, W), also if it is grey, palette, transparent, 16-bit or CMYK.

    torchvision decodes JPEG, twice as fast as Pillow, which reads all else (and JPEG too, once torchvision
    has dropped its decoders, as 0.29 announces). torchvision 0.29.2 can crash at a damaged PNG.

    Raises:
        ValueError: not a whole image.
    """
    try:
        if not os.path.isfile(path):  # to open a pipe is to wait for ever
            raise ValueError("no such file")
        with open(path, "rb") as file:
            jpeg = file.read(2) == b"\xff\xd8"
        if jpeg:
            with contextlib.suppress(RuntimeError, AttributeError):
                return torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
        with Image.open(path) as file:
            if not file.mode.startswith("I"):
                return v2.functional.pil_to_tensor(file.convert("RGB"))
            grey = v2.functional.pil_to_tensor(file.convert("I"))  # 16 bits, in 32
            return (grey >> 8).to(torch.uint8).expand(3, -1, -1)
    except Exception as error:  # noqa: BLE001, each decoder has its own
        raise ValueError(f"cannot read image {path} ({error}): repair or replace it") from None


class RandAugment:
    """RandAugment (arXiv 1909.13719) as the paper used it: timm's rand-m9-mstd0.5-inc1, on RGB Pillow images.

    Two of fifteen operations, drawn with replacement; each is applied with probability 0.5, at a magnitude
    from N(9, 0.5) clipped to [0, 10], with either sign equally likely. torchvision's RandAugment(2, 9) is
    another thing: 30 % of the full strength where this is 90 %, always applied, nearest pixel, black borders.
    It goes before ToTensor; an image of another mode needs image.convert("RGB") first.

    Args:
        magnitude: mean strength, 0 to 10.
        std: standard deviation of the strength.
        num_ops: operations drawn for an image.
        probability: of applying an operation that was drawn.
        fill: colour of what comes from outside the image: CLIP's mean, in RGB from 0 to 255.
    """

    OPS = (
        *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color"),
        *("Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
    )

    def __init__(
        self,
        magnitude: float = 9.0,
        std: float = 0.5,
        num_ops: int = 2,
        probability=0.5,
        fill=(123, 117, 104),
    ) -> None:
        self.magnitude, self.std, self.num_ops, self.probability = magnitude, std, num_ops, probability
        self.fill = fill

    def __call__(self, image: Image.Image, rng: random.Random = random) -> Image.Image:
        """The image, augmented or as it was. All chance comes from rng, a random.Random or that module."""
        for op in rng.choices(self.OPS, k=self.num_ops):
            if rng.random() < self.probability:
                magnitude = min(max(rng.gauss(self.magnitude, self.std), 0.0), 10.0)
                image = self.apply(image, op, magnitude, rng.choice((-1, 1)))
        return image

    def apply(self, image: Image.Image, op: str, magnitude: float, sign: int = 1) -> Image.Image:
        """One operation, at a magnitude from 0 to 10."""
        level = magnitude / 10
        factor = max(0.1, 1 + sign * 0.9 * level)  # 1 changes nothing
        bicubic = {"resample": Image.Resampling.BICUBIC, "fillcolor": self.fill}
        match op:
            case "AutoContrast":
                return ImageOps.autocontrast(image)
            case "Equalize":
                return ImageOps.equalize(image)
            case "Invert":
                return ImageOps.invert(image)
            case "Rotate":
                return image.rotate(sign * 30 * level, **bicubic)
            case "Posterize":
                bits = 4 - int(4 * level)  # 0 bits are black, but Pillow 13 refuses them
                return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)
            case "Solarize":
                return ImageOps.solarize(image, 256 - int(256 * level))
            case "SolarizeAdd":
                add = int(110 * level)
                return image.point([value + add if value < 128 else value for value in range(256)] * 3)
            case "Color" | "Contrast" | "Brightness" | "Sharpness":
                return getattr(ImageEnhance, op)(image).enhance(factor)
            # Affine: the pixel at (x, y) is taken from (a x + b y + c, d x + e y + f).
            case "ShearX":
                matrix = (1, sign * 0.3 * level, 0, 0, 1, 0)
            case "ShearY":
                matrix = (1, 0, 0, sign * 0.3 * level, 1, 0)
            case "TranslateX":
                matrix = (1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
            case "TranslateY":
                matrix = (1, 0, 0, 0, 1, sign * 0.45 * level * image.height)
            case _:
                raise ValueError(f"RandAugment has no operation {op}: choose one of {', '.join(self.OPS)}")
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **bicubic)


class RandomErasing:
    """Random erasing (arXiv 1708.04896): a box of a normalised image becomes N(0, 1) noise, each value anew.

    The box is drawn where the sample is made, the noise where the batch is used; erasing(images) does both.

    Args:
        probability: of erasing a box in an image.
        area: least and greatest share of the image.
        aspect: least and greatest height / width, drawn log-uniformly.
    """

    def __init__(self, probability: float = 0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)) -> None:
        self.probability, self.area, self.aspect = probability, area, aspect

    def sample(self, height: int, width: int, rng: random.Random = random) -> tuple[int, int, int, int]:
        """A box (top, left, height, width) in an image of height x width pixels; all zero is none."""
        if rng.random() < self.probability:
            for _ in range(10):  # tries for a box that is smaller than the image
                area = rng.uniform(*self.area) * height * width
                aspect = math.exp(rng.uniform(*map(math.log, self.aspect)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        return 0, 0, 0, 0

    def __call__(self, images: Tensor, boxes: Iterable | None = None) -> Tensor:
        """Normalised images (N, C, H, W), erased in place in boxes (N, 4), or in new ones."""
        boxes = [self.sample(*images.shape[2:]) for _ in images] if boxes is None else boxes
        for image, (top, left, height, width) in zip(images, boxes):
            if height:
                image[:, top : top + height, left : left + width].normal_()
        return images


def train_transform(
    image: Tensor,
    rng: random.Random = random,
    image_size: int = 224,
    crop_scale: float = 0.08,
    randaugment: Callable[[Image.Image, random.Random], Image.Image] | None = None,
) -> Tensor:
    """A random crop, resized, perhaps mirrored, augmented: what a loader's workers do with a training image.

    Args:
        image: uint8 (3, H, W).
        rng: where all chance comes from.
        image_size: pixels of each side.
        crop_scale: least area of the crop, as a share of the image.

    Returns:
        uint8 (3, image_size, image_size): a quarter of the bytes of floats to copy to the GPU.
    """
    height, width = image.shape[1:]
    for _ in range(10):  # tries for a crop that lies within the image
        area = rng.uniform(crop_scale, 1) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))  # width / height
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            break
    else:  # a very long image: its middle, as long as the aspect allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    size, bicubic = [image_size, image_size], v2.InterpolationMode.BICUBIC
    image = v2.functional.resized_crop(image, top, left, h, w, size, bicubic, antialias=True)
    if rng.random() < 0.5:
        image = image.flip(-1)
    if randaugment:
        image = v2.functional.pil_to_tensor(randaugment(v2.functional.to_pil_image(image), rng))
    return image


def eval_transform(image: Tensor | Image.Image, image_size: int = 224) -> Tensor:
    """The short side resized to image_size, bicubic, and the middle square (official datasets.py:76-84).

    Args:
        image: uint8 (3, H, W), or a Pillow image of any mode.

    Returns:
        uint8 (3, image_size, image_size).
    """
    if isinstance(image, Image.Image):
        image = v2.functional.pil_to_tensor(image.convert("RGB"))
    image = v2.functional.resize(image, [image_size], v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(image, [image_size])


def normalize(images: Tensor) -> Tensor:
    """uint8 images (..., 3, H, W) as float32, with mean and standard deviation of CLIP's training images."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    images = images.float() / 255
    for channel in range(3):  # tensors of them would be copied, and the GPU waited for
        images[..., channel, :, :].sub_(mean[channel]).div_(std[channel])
    return images


# ---------------------------------------------------------------------------------------------- data


class FolderDataset(torchvision.datasets.ImageFolder):
    """ROOT/<class>/*, in which a training sample is the same pixels in any process, worker, or restart.

    Key (epoch, index) gives (image, box to erase (4,), label); all chance comes from (seed, epoch, index).
    Key index gives (image, label), for evaluation.

    Args:
        loader: path → uint8 (3, H, W).
        transform: for training (image, rng) → image, for evaluation image → image.
        erasing: whose `sample(height, width, rng)` gives the box.

    Attributes:
        left_out: files in the class folders that are no images by their names.

    Raises:
        ValueError: no such folder, no class in it, no image in a class, an unreadable or doubled folder.
    """

    IMAGES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif")

    def __init__(
        self, root: str, loader: Callable, transform: Callable, erasing: Callable | None = None, seed: int = 0
    ) -> None:
        layout = "--data DIR needs images in DIR/train/<class>/ and DIR/val/<class>/"
        if not os.path.isdir(root):
            raise ValueError(f"no folder {root}: {layout}")
        if not any(entry.is_dir() for entry in os.scandir(root)):
            raise ValueError(f"no class folders in {root}: {layout} (sort ImageNet's flat val first)")
        folders: dict[str, str] = {}

        def refuse(error: OSError) -> None:  # else the folder would be left out in silence
            raise ValueError(
                f"cannot read {error.filename} ({error.strerror}): make it readable or remove it"
            )

        is_image = lambda name: name.lower().endswith(self.IMAGES)
        self.left_out = []
        for folder, _, files in os.walk(root, onerror=refuse, followlinks=True):
            other = folders.setdefault(os.path.realpath(folder), folder)
            if other != folder:  # a link, perhaps in a circle, would count images twice or in a wrong class
                raise ValueError(f"{folder} and {other} are one folder: remove the link that makes them two")
            if folder != root:
                self.left_out += [f"{folder}/{name}" for name in files if not is_image(name)]
        super().__init__(root, transform, loader=loader, is_valid_file=is_image, allow_empty=True)
        present = set(self.targets)
        empty = [name for name, label in self.class_to_idx.items() if label not in present]
        if empty:
            some = ", ".join(empty[:5])
            raise ValueError(f"no images in {len(empty)} classes of {root} ({some}): fill or remove them")
        self.erasing, self.seed = erasing, seed

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        if isinstance(key, int):
            path, label = self.samples[key]
            return self.transform(self.loader(path)), label
        epoch, index = key
        path, label = self.samples[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        image = self.transform(self.loader(path), rng)
        return image, torch.tensor(self.erasing.sample(*image.shape[1:], rng)), label


class MicroBatches(Sampler):
    """One process's micro-batches of keys (epoch, index), from any step of a run to any other.

    An epoch is one shuffle of all images, from (seed, epoch), cut into global batches; the rest is dropped
    (official run_class_finetuning.py:431). Each global batch is cut into micro-batches in one order, whatever
    the number of processes among which they are then shared.

    Args:
        batch_size: images of a global batch, a multiple of micro_batch_size · world.
        start, stop: optimizer steps, counted from the start of the run.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        micro_batch_size: int,
        start: int,
        stop: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.micro_batch_size = num_images, batch_size, micro_batch_size
        self.start, self.stop, self.seed, self.rank, self.world = start, stop, seed, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, shuffled = self.batch_size // self.world, None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.num_images // self.batch_size)
            if epoch != shuffled:
                seed, shuffled = random.Random(f"{self.seed}/{epoch}").getrandbits(63), epoch
                generator = torch.Generator().manual_seed(seed)
                order = torch.randperm(self.num_images, generator=generator).tolist()
            first = position * self.batch_size + self.rank * share
            for i in range(first, first + share, self.micro_batch_size):
                yield [(epoch, index) for index in order[i : i + self.micro_batch_size]]


def draw_demo(root: Path) -> None:
    """The demo's images: 32x32 PNGs of six patterns in two random colours, in ImageNet's layout."""
    rng = random.Random(0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    part = root.with_name(root.name + ".part")  # renamed when whole
    for split, per_class in DEMO_IMAGES.items():
        for name, pattern in DEMO_PATTERNS.items():
            (part / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                wave = 2 * math.pi / rng.uniform(6, 10)  # radians per pixel
                left, top = rng.uniform(0, 32), rng.uniform(0, 32)
                ink = (pattern((x - left) * wave, (y - top) * wave) > 0).long()  # (32, 32)
                dark_and_light = rng.sample((0, 156), 2)
                colours = [[rng.randrange(low, low + 100) for _ in range(3)] for low in dark_and_light]
                image = torch.tensor(colours, dtype=torch.uint8)[ink]  # (32, 32, 3)
                Image.fromarray(image.numpy()).save(part / split / name / f"{i:04d}.png")
    part.rename(root)


# ---------------------------------------------------------------------------------------------- engine


def train_step(
    model: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    accumulation: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.1,
    clip_grad: float = 0.0,
) -> Tensor:
    """One optimizer step on one global batch, which comes as `accumulation` micro-batches of equal size.

    Args:
        model: plain or wrapped in DistributedDataParallel, which then exchanges gradients once per step.
        micro_batches: (images (N, 3, S, S), labels (N,) or probabilities (N, num_classes)) on the device.
        scaler: keeps fp16 gradients from vanishing and skips the step if they overflow; disabled otherwise.
        amp_dtype: of autocast, or None for float32 throughout.
        clip_grad: largest norm of the gradient, or 0.

    Returns:
        The mean loss of this process's images, on the device: to read it is to wait for the GPU.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i, (images, labels) in zip(range(accumulation), micro_batches):  # range first, to draw none too many
        sync = i == accumulation - 1 or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if sync else model.no_sync():
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing) / accumulation
            scaler.scale(loss).backward()
        total = total + loss.detach()
    if clip_grad:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return total


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of each named model, over all processes, in one pass over the images.

    Each process brings its own share of the images; every image counts once, whatever the shares' sizes.

    Args:
        batches: (normalised images (N, 3, S, S), labels (N,)) on the models' device.

    Returns:
        "NAME_top1" and "NAME_top5" in per cent, "NAME_correct" in images, for each model, and "images".
    """
    device = next(next(iter(models.values())).parameters()).device
    counts = torch.zeros(len(models), 3, dtype=torch.long, device=device)  # right at first, in five, images
    for model in models.values():
        model.eval()
    for images, labels in batches:
        for row, model in zip(counts, models.values()):
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
            row[0] += hits[:, 0].sum()
            row[1] += hits.sum()
            row[2] += len(labels)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    result: dict[str, float] = {}
    for name, (top1, top5, total) in zip(models, counts.tolist()):
        top1_share, top5_share = (100 * right / max(1, total) for right in (top1, top5))
        result |= {f"{name}_top1": top1_share, f"{name}_top5": top5_share}
        result |= {f"{name}_correct": top1, "images": total}
    return result


def save_checkpoint(path: str | os.PathLike, state: dict) -> None:
    """Write beside, then rename: under this name there is the old file or the new one, never half of one.

    Raises:
        ValueError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        while error.__context__ and not isinstance(error, OSError):  # why torch's writer failed
            error = error.__context__
        old = "; the older one is whole" if os.path.exists(path) else ""
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot write {path} ({reason}): make room or write elsewhere{old}") from None


def load_checkpoint(path: str | os.PathLike) -> dict:
    """What save_checkpoint wrote, on the CPU; a pickle of more than tensors and plain values is refused.

    Raises:
        ValueError: the file is missing, damaged, or no ftclip checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by the checksums, at which torch does not look in a mapped file
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values: do not trust it") from None
    except Exception as error:  # noqa: BLE001, whatever zip, zlib and torch say of damaged bytes
        reason = str(error).split("\n")[0]
        raise ValueError(f"cannot read checkpoint {path} ({reason}): replace or remove it") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != "ftclip 1":
        raise ValueError(f"{path} has format {found}, not 'ftclip 1': use the ftclip that wrote it, or none")
    return state


def load_classifier(
    path: str | os.PathLike, device: str | torch.device = "cpu"
) -> tuple[CLIPClassifier, list[str], Callable[[Tensor | Image.Image], Tensor]]:
    """A trained model, ready for use, from best.pt (or last.pt: its EMA weights if it has some).

    Copy load_checkpoint, build_model (and what that names), eval_transform and normalize with it.

    Returns:
        The model in evaluation mode, the class names in the order of its outputs, and the transform from one
        image, as read_image or Pillow gives it, to what the model takes: float32 (3, S, S).

    Raises:
        ValueError: the file is missing, damaged, or no ftclip checkpoint.
    """
    state = load_checkpoint(path)
    model = build_model(state["model_config"], len(state["classes"]))
    model.load_state_dict(state["model"] if state["ema"] is None else state["ema"])
    size = state["model_config"]["vision_cfg"]["image_size"]
    return model.eval().to(device), state["classes"], lambda image: normalize(eval_transform(image, size))


# ---------------------------------------------------------------------------------------------- command line


def _number(kind: type, interval: str) -> Callable[[str], float]:
    """An argparse type: a number of this kind in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text: str) -> float:
        value = kind(text)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):  # NaN is neither
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own "invalid int value"
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; what was not given comes from the recipe that fits --model and --image-size.

    Raises:
        ValueError: a flag that makes no sense, with what would.
    """
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="ftclip.py [flags]", description=__doc__, formatter_class=kind)
    on, switch = "store_true", argparse.BooleanOptionalAction
    whole, real = functools.partial(_number, int), functools.partial(_number, float)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="open_clip ViT, or a model-config JSON such as open_clip's (default ViT-B-16)")
    add("--pretrained", help="open_clip tag, weights file, or 'none': random weights (default openai)")
    add("--quick-gelu", action=switch, help="activation x·sigmoid(1.702x), OpenAI's (default: the weights')")
    add("--image-size", type=whole("[1, 8192]"), help="pixels; positions are resized (default: the model's)")
    add("--train-blocks", type=whole("[0, 999]"), help="tune the last K, 0: linear probing (default all)")
    add("--freeze-patch-embed", action=switch, help="leave conv1 as it is (default: the recipe's)")
    add("--drop-path", type=real("[0, 1)"), help="probability at the last block, 0 is off")
    add("--grad-checkpointing", action=on, help="compute blocks twice: slower, far less memory, same result")
    add = parser.add_argument_group("optimization (default: the recipe's)").add_argument
    add("--epochs", type=whole("[1, 1e6]"), help="passes over the training images")
    add("--warmup-epochs", type=real("[0, 1e6]"), help="with lr rising from 0 (default: the recipe's share)")
    add("--batch-size", type=whole("[1, 1e9]"), help="images per optimizer step, over all devices")
    add("--micro-batch-size", type=whole("[1, 1e9]"), help="images per device at once: lower it to fit")
    add("--lr", type=real("(0, 1e3]"), help="of the head, literal (default: the recipe's, by batch size)")
    add("--min-lr", type=real("[0, 1e3]"), help="of the head at the end, literal (default: likewise)")
    add("--layer-decay", type=real("(0, 1]"), help="lr of a layer over that of the one above it, 1 is off")
    add("--weight-decay", type=real("[0, 1e3]"), help="of AdamW, 0 is off")
    add("--label-smoothing", type=real("[0, 1)"), help="0 is off")
    add("--ema-decay", type=real("[0, 1)"), help="literal, 0 is off (default: 0.9998, less in a short run)")
    add("--clip-grad", type=real("[0, 1e9]"), help="greatest norm of the gradient, 0 is off")
    add = parser.add_argument_group("augmentation (default: the recipe's)").add_argument
    add("--randaug", type=real("[0, 10]"), help="magnitude of RandAugment, 0 is off")
    add("--random-erasing", type=real("[0, 1]"), help="probability, 0 is off")
    add("--crop-scale", type=real("(0, 1]"), help="least area of the random crop, as a share of the image")
    add("--mixup", type=real("[0, 1e3]"), help="alpha of MixUp, 0 is off; with --cutmix, one or the other")
    add("--cutmix", type=real("[0, 1e3]"), help="alpha of CutMix, 0 is off")
    add = parser.add_argument_group("run").add_argument
    add("--data", help="folder with train/<class>/* and val/<class>/* (default imagenet)")
    add("--output", help="folder for last.pt, best.pt and metrics.jsonl (default runs/MODEL-SIZE)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    add("--amp", choices=("auto", "bf16", "fp16", "none"), default="auto", help="auto: none on a CPU")
    add("--compile", action=on, help="torch.compile: minutes to start, then faster steps")
    add("--workers", type=whole("[0, 999]"), help="loader processes per device (default: cores / devices)")
    add("--eval-every", type=whole("[1, 1e6]"), default=1, help="epochs; the last is always evaluated")
    add("--save-every", type=whole("[0, 1e9]"), default=0, help="steps between saves of last.pt, 0: an epoch")
    add("--seed", type=whole("[0, 1e18]"), default=0, help="of everything random")
    add("--eval", action=on, help="only evaluate --checkpoint on DIR/val")
    add("--checkpoint", help="best.pt or last.pt for --eval")
    add("--demo", action=on, help="a tiny ViT on images that the script draws into OUTPUT/data")
    add("--dry-run", action=on, help="print recipe, batch chain and lr of each layer, touch nothing")

    def fail(message: str) -> None:
        raise ValueError(f"{message} (--help lists all flags)")

    parser.error = fail
    args = parser.parse_args(argv)

    model = args.model or (DEMO["model"] if args.demo else "ViT-B-16")
    vision = model_config(model)["vision_cfg"]
    size = args.image_size or vision["image_size"]
    args.name = "demo" if isinstance(model, dict) else Path(model).stem.removesuffix("-quickgelu")
    # The paper's recipe, or else the nearest: by the model's depth, then by the image size.
    base = args.name
    if base not in {name for name, _ in RECIPES}:
        base = "ViT-L-14" if vision["layers"] > 12 else "ViT-B-16"
    args.recipe = min((key for key in RECIPES if key[0] == base), key=lambda key: abs(key[1] - size))
    default = RECIPES[args.recipe] | (DEMO if args.demo else {})
    # A learning rate belongs to a batch size, a warm-up to a number of epochs: they scale together.
    scale = (args.batch_size or default["batch_size"]) / default["batch_size"]
    stretch = (args.epochs or default["epochs"]) / default["epochs"]
    default |= {"lr": default["lr"] * scale, "min_lr": default["min_lr"] * scale}
    default |= {"warmup_epochs": default["warmup_epochs"] * stretch, "model": model, "image_size": size}
    args.literal_micro_batch_size = args.micro_batch_size is not None
    for key, value in ({"output": f"runs/{args.name}-{size}"} | default).items():
        if getattr(args, key) is None:
            setattr(args, key, value)

    if args.min_lr > args.lr:
        fail(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs} to train")
    if args.eval != bool(args.checkpoint):
        fail("--eval and --checkpoint FILE go together")
    return args


def _setup(args: argparse.Namespace) -> None:
    """Choose the device and the precision, and join the processes that torchrun started; all into args."""
    env = os.environ.get
    launched = "RANK" in os.environ
    absent = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched and absent:
        raise ValueError(f"RANK is set but not {', '.join(absent)}: start with torchrun, or unset RANK")
    args.rank, args.world = (int(env("RANK")), int(env("WORLD_SIZE"))) if launched else (0, 1)
    local_rank = int(env("LOCAL_RANK", "0"))
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--device {args.device}: process {local_rank} has none of {torch.cuda.device_count()} GPUs "
            f"(torch {torch.__version__}): start a process per GPU, or give --device cpu"
        )
    if args.amp == "fp16" and not cuda:
        raise ValueError("--amp fp16 needs a GPU: give --amp none or bf16")
    if args.amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "none"
    args.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[args.amp]
    args.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, cores // int(env("LOCAL_WORLD_SIZE", "1")))
    if launched and not args.dry_run:
        if cuda:
            torch.cuda.set_device(args.device)
        backend, store = "cpu:gloo,cuda:nccl" if cuda else "gloo", _fresh_store(args.rank, args.world)
        dist.init_process_group(backend, store=store, rank=args.rank, world_size=args.world)


def _fresh_store(rank: int, world: int) -> dist.Store:
    """torchrun's store, under a prefix that only the living processes share.

    A restart by torchrun keeps the store, and in it the addresses of processes that died, which their
    successors would try to reach (torch 2.15, rendezvous.py:204). The number of restarts is no prefix: two
    nodes may count differently. So each process invents a name, and rank 0 answers those that call its own.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    me = os.urandom(8).hex()
    if rank == 0:
        store.set("leader", me)
        for other in range(1, world):
            store.set(f"{me} answers {store.get(f'{me}, this is {other}').decode()}", "")
        return dist.PrefixStore(me, store)
    while True:
        leader = store.get("leader").decode()  # perhaps one that has died: then nobody answers
        store.set(f"{leader}, this is {rank}", me)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{leader} answers {me}"], datetime.timedelta(seconds=1))
            return dist.PrefixStore(leader, store)


def _split_batch(args: argparse.Namespace, world: int) -> tuple[int, int]:
    """(micro-batch size, accumulation), such that batch size = world · micro-batch size · accumulation.

    A micro-batch size that was not given by hand is a limit: the largest one below it that divides is taken.
    """
    size, literal = args.batch_size, args.literal_micro_batch_size
    unit = world * (args.micro_batch_size if literal else 1)
    if size % unit:
        below, above = size // unit * unit, (size // unit + 1) * unit
        raise ValueError(
            f"--batch-size {size} is not a multiple of {world} device(s) x {unit // world} image(s): "
            f"try {f'{below} or ' if below else ''}{above}, or another --micro-batch-size"
        )
    share = size // world
    limit = min(share, args.micro_batch_size)
    micro = limit if literal else max(m for m in range(1, limit + 1) if share % m == 0)
    return micro, share // micro


def _plan(args: argparse.Namespace, num_images: int) -> None:
    """What follows from the number of images, into args: steps, EMA decay, batch chain."""
    args.steps_per_epoch = num_images // args.batch_size
    if not args.steps_per_epoch:
        raise ValueError(
            f"--batch-size {args.batch_size} is more than {num_images} training images: lower it"
        )
    args.total_steps = args.epochs * args.steps_per_epoch
    args.warmup_steps = min(round(args.warmup_epochs * args.steps_per_epoch), args.total_steps - 1)
    if args.ema_decay is None:  # 0.9998 in the paper's runs; a memory of at most a third of the run
        args.ema_decay = 1 - 1 / max(2, min(5000, args.total_steps / 3))
    chains = {args.world: _split_batch(args, args.world)}
    for devices in (1, 8) if args.dry_run else ():
        with contextlib.suppress(ValueError):  # not every batch can be shared among 8
            chains[devices] = _split_batch(args, devices)
    args.micro_batch_size, args.accumulation = chains[args.world]
    args.chain = [f"{n} device(s) x {micro} images x {steps} step(s)" for n, (micro, steps) in chains.items()]


def _describe(args: argparse.Namespace, model: CLIPClassifier, num_images: int) -> str:
    """The resolved run in words."""
    (name, size), recipe = args.recipe, RECIPES[args.recipe]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activation = "QuickGELU" if model.config["quick_gelu"] else "GELU"
    if model.activation_guessed:
        activation += " (was the file trained with it? else --quick-gelu or --no-quick-gelu)"
    near = "" if (args.name, args.image_size) == args.recipe else ", the nearest"
    lines = {
        "recipe": f"{name} at {size}{near}",
        "model": f"{args.name} at {args.image_size}, {activation}, {model.head.out_features} classes",
        "weights": f"{args.pretrained}; {trained:,} of {total:,} parameters are trained",
        "images": f"{num_images:,}, in {args.steps_per_epoch:,} steps per epoch",
        "steps": f"{args.total_steps:,} in {args.epochs} epoch(s), {args.warmup_steps:,} of them warm-up",
        "global batch": f"{args.batch_size} = {', or '.join(args.chain)}",
        "learning rate": f"{args.lr:.6g} to {args.min_lr:.6g} at the head (recipe: {recipe['lr']:g} at "
        f"batch {recipe['batch_size']}), times {args.layer_decay:g} for each layer below",
        "EMA decay": f"{args.ema_decay:.6g}",
    }
    regular = ("weight_decay", "label_smoothing", "drop_path", "mixup", "cutmix", "clip_grad")
    for key in (*regular, "randaug", "random_erasing", "crop_scale"):
        lines[key.replace("_", " ")] = f"{getattr(args, key):g}"
    return "\n".join(f"{key:<15} {value}" for key, value in lines.items())


def _same_classes(ours: list[str], where: str, theirs: list[str], there: str) -> None:
    """Raise if two lists of class names differ, naming some that do."""
    for names, place in ((set(ours) - set(theirs), where), (set(theirs) - set(ours), there)):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise ValueError(f"only {place} has {len(names)} class(es) ({some}): {where} and {there} differ")


# From a scheduler or torchrun, from Ctrl-C, and from a terminal that closes.
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}


def _deaf(_: int) -> None:
    """What a loader's worker does, in which stop signals are blocked: it obeys only those of its parent.

    SIGTERM and Ctrl-C often reach all processes at once, but the parent still needs its workers for its step.
    """

    def listen() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _iterate(args: argparse.Namespace, images: Dataset, **how) -> Iterator:
    """Batches from a DataLoader, whose workers survive a stop signal."""
    linux = sys.platform == "linux"
    # Python 3.14 starts workers afresh, seconds in which a stop signal still ends them; here they are forked.
    how["multiprocessing_context"] = "fork" if args.workers and linux else None
    how |= {"worker_init_fn": _deaf if linux else None, "pin_memory": args.device.type == "cuda"}
    try:
        if linux:  # blocked in the workers, from their first moment
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batches = iter(DataLoader(images, num_workers=args.workers, **how))
        finally:
            if linux:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from batches
    except RuntimeError as error:
        reason = str(error).rstrip(". \n").split("\n")[-1]
        if not re.search("DataLoader worker|shared memory|open files", reason):
            raise
        way = "if memory, /dev/shm (in Docker: --ipc=host) or ulimit -n is too small, lower --workers"
        raise ValueError(f"{reason}: {way}; the same command goes on") from None


def _val_batches(args: argparse.Namespace, val: FolderDataset) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the validation images, for evaluate: each image in exactly one process."""
    share = Subset(val, range(args.rank, len(val), args.world))
    for images, labels in _iterate(args, share, batch_size=args.micro_batch_size):
        yield normalize(images.to(args.device, non_blocking=True)), labels.to(args.device, non_blocking=True)


def _train_batches(args: argparse.Namespace, train: FolderDataset, start: int, wait: list[float]) -> Iterator:
    """This process's micro-batches for train_step, from step `start` on; wait[0] += seconds of waiting."""
    shape = (len(train), args.batch_size, args.micro_batch_size)
    keys = MicroBatches(*shape, start, args.total_steps, args.seed, args.rank, args.world)
    # One loader for the whole run: its workers read ahead into the next epoch while this one is evaluated.
    batches = _iterate(args, train, batch_sampler=keys)
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(train.classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(train.classes))] if args.cutmix else []
    for step in range(start, args.total_steps):
        for i in range(args.rank * args.accumulation, (args.rank + 1) * args.accumulation):
            began = time.perf_counter()
            images, boxes, labels = next(batches)
            wait[0] += time.perf_counter() - began
            # Noise, mixing and drop path follow from the seed, the step and the micro-batch's place i in the
            # global batch: the same after a restart and, with as large micro-batches, on one GPU as on eight.
            torch.manual_seed(random.Random(f"{args.seed}/{step}/{i}").getrandbits(63))
            images = train.erasing(normalize(images.to(args.device, non_blocking=True)), boxes.tolist())
            labels = labels.to(args.device, non_blocking=True)
            yield v2.RandomChoice(mixes)(images, labels) if mixes else (images, labels)


LOG_EVERY = 20  # steps: to read a loss is to wait for the GPU
# What may change when a run goes on: where, how fast and how precisely it computes, not what.
FREE = {"data", "output", "device", "rank", "world", "amp", "amp_dtype", "compile", "workers", "chain"}
FREE |= {"save_every", "grad_checkpointing", "micro_batch_size", "literal_micro_batch_size", "accumulation"}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """In here, SIGTERM and Ctrl-C are only recorded, in the list; the second of two does no more than one."""
    asked: list[int] = []

    def record(number: int, _) -> None:
        if not asked:
            with contextlib.suppress(OSError):  # no print: the signal may have come in the midst of one
                os.write(2, b"\nftclip: stopping when this step is done and saved\n")
        asked.append(number)

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as by nohup
    old = {number: signal.signal(number, record) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _open_output(args: argparse.Namespace, **data: FolderDataset) -> tuple[dict, dict | None]:
    """(what this run computes, what its last.pt holds); a wall if that is of another run."""
    last = Path(args.output, "last.pt")
    config = {key: value for key, value in vars(args).items() if key not in FREE}
    config["model"] = model_config(args.model)  # a file may be moved, but not changed
    for key, images in data.items():
        files = "\n".join(os.path.relpath(path, images.root) for path, _ in images.samples)
        config[f"{key}_images"] = f"{len(images)} ({hashlib.sha256(os.fsencode(files)).hexdigest()[:8]})"
    state = load_checkpoint(last) if last.exists() else None
    if state is None and last.with_name("best.pt").exists():
        raise ValueError(f"{args.output} has a best.pt of another run and no last.pt: give another --output")
    if state and "config" not in state:
        raise ValueError(f"{last} is a best.pt, with weights alone: replace it, or give another --output")
    was = state["config"] if state else config
    changes = [f"{key} {was.get(key)} → {config[key]}" for key in config if config[key] != was.get(key)]
    if changes:
        text = ", ".join(changes)
        raise ValueError(f"{last} is of another run ({text}): give its values to go on, or another --output")
    if dist.is_initialized():  # also, nobody may write before everybody has looked
        views: list = [None] * args.world
        dist.all_gather_object(views, (state and state["step"], config))
        if any(view != views[0] for view in views):
            raise ValueError(f"not all processes see the same --data and {last}: put both where all see them")
    return config, state


def _say(args: argparse.Namespace, text: str) -> None:
    """Print, in one process, above the bar if there is one."""
    if args.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def _build(args: argparse.Namespace, num_classes: int, config: dict | None = None) -> tuple:
    """(model, AdamW's parameter groups); with a checkpoint's model_config, no weights file is needed."""
    start = ("model", "pretrained", "image_size", "quick_gelu")
    start = {"model": config} if config else {key: getattr(args, key) for key in start}
    tuning = ("drop_path", "train_blocks", "freeze_patch_embed", "grad_checkpointing")
    model = build_model(num_classes=num_classes, **start, **{key: getattr(args, key) for key in tuning})
    num_layers = len(model.trunk.transformer.resblocks)
    return model, param_groups(model, layer_id, num_layers, args.lr, args.layer_decay, args.weight_decay)


class _Run:
    """All that a run has come to: weights, EMA, optimizer state, history. It starts, or goes on from last.pt.

    Attributes:
        step: optimizer steps that are done.
        history: a record for each epoch that is done and evaluated.
        loss_sum: of the steps of the present epoch.
    """

    def __init__(self, args: argparse.Namespace, train: FolderDataset, val: FolderDataset) -> None:
        self.args, self.last, self.num_val = args, Path(args.output, "last.pt"), len(val)
        self.config, state = _open_output(args, train=train, val=val)
        torch.manual_seed(args.seed)
        self.model, groups = _build(args, len(train.classes), state and state["model_config"])
        self.model.to(args.device)
        cuda = args.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=cuda)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
        self.ema = EMA(self.model, args.ema_decay) if args.ema_decay else None
        self.models = {"raw": self.model} | ({"ema": self.ema.module} if self.ema else {})
        self.chosen = list(self.models)[-1]  # best.pt holds the best of these
        # What load_classifier needs beside weights.
        self.use = {"format": "ftclip 1", "model_config": self.model.config, "classes": train.classes}
        self.step, self.history, self.loss_sum = 0, [], 0.0
        _say(args, _describe(args, self.model, len(train)))
        device = torch.cuda.get_device_name(args.device) if cuda else "CPU"
        _say(args, f"device          {device}, autocast {args.amp}")
        if state:
            self.model.load_state_dict(state["model"])
            # Copied, or it would stay in the file, whose room on the disk is wanted for the next ones.
            moments = state["optimizer"] if cuda else copy.deepcopy(state["optimizer"])
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
            if state["scaler"] and args.amp == "fp16":
                self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.step, self.history, self.loss_sum = state["step"], state["history"], state["loss_sum"]
            _say(args, f"going on        from {self.last}, step {self.step:,} of {args.total_steps:,}")
        if args.rank == 0:
            self.keep_others_out()

    def keep_others_out(self) -> None:
        """Lock --output until this process ends: a torchrun that is killed leaves its processes alive."""
        import fcntl  # here, because Windows has none, where best.pt can still be used

        output = self.args.output
        try:
            os.makedirs(output, exist_ok=True)
            self.lock = open(Path(output, "lock"), "w")  # noqa: SIM115, the lock goes with the file
        except OSError as error:
            raise ValueError(f"cannot write into --output {output} ({error}): give another") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # or else the file system has no locks
                way = "let it end, stop it, or give another"
                raise ValueError(f"another run is writing into --output {output}: {way}") from None

    def save(self) -> None:
        """Write last.pt."""
        if self.args.rank == 0:
            weights = {"model": self.model.state_dict(), "ema": self.ema and self.ema.module.state_dict()}
            rest = {"optimizer": self.optimizer.state_dict()["state"], "scaler": self.scaler.state_dict()}
            progress = {key: getattr(self, key) for key in ("config", "step", "history", "loss_sum")}
            save_checkpoint(self.last, self.use | weights | rest | progress)

    def lr(self, step: int) -> float:
        """The head's, in a step counted from 0."""
        args = self.args
        return lr_at(step, args.total_steps, args.warmup_steps, args.lr, args.min_lr)

    def advance(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One step, at the schedule's lr, of the model as it is wrapped; this process's loss."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step) * group["lr_scale"]
        how = (self.scaler, args.amp_dtype, args.label_smoothing, args.clip_grad)
        loss = train_step(model.train(), batches, args.accumulation, self.optimizer, *how)
        if self.ema:
            self.ema.update(self.model)
        self.step += 1
        return loss

    def count(self, losses: list[Tensor]) -> float:
        """Add the losses of the last steps, as means over the processes; return the last of them.

        Raises:
            ValueError: one is not finite, or a weight; in every process, and before it is saved.
        """
        args, step = self.args, self.step
        means = torch.stack(losses) / args.world
        if dist.is_initialized():
            dist.all_reduce(means)
        means = means.tolist()
        # A finite loss with an infinite gradient shows only in the weights, and in the next loss.
        norm = torch.stack(torch._foreach_norm(list(self.model.parameters()))).sum().item()
        found = [("loss", i, loss) for i, loss in enumerate(means, step - len(means))]
        for what, i, value in [*found, ("norm of the weights", step - 1, norm)]:
            if not math.isfinite(value):
                before = f"; {self.last} is from before it" if self.last.exists() else ""
                safer = "" if args.amp == "none" else "go on with --amp none, or "
                raise ValueError(
                    f"the {what} is {value} at step {i + 1} (lr {self.lr(i):.3g}, --amp {args.amp}){before}: "
                    f"{safer}start anew, with a lower --lr and another --output"
                )
        for loss in means:  # one by one: the same bits, wherever a stop has cut the epoch
            self.loss_sum += loss
        return loss

    def end_epoch(self, val_batches: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Evaluate, keep the best weights, put the epoch on record; or False, if images were left out."""
        args, epoch = self.args, len(self.history) + 1
        record = {"epoch": epoch, "train_loss": self.loss_sum / args.steps_per_epoch}
        text = f"epoch {epoch}/{args.epochs}  train loss {record['train_loss']:.4f}"
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            record |= evaluate(self.models, val_batches, args.amp_dtype)
            if record["images"] < self.num_val:  # summed: if one process left some out, all know
                return False
            text += "".join(f"  {name} top-1 {record[f'{name}_top1']:.2f} %" for name in self.models)
            top1 = f"{self.chosen}_top1"
            if args.rank == 0 and all(record[top1] > past[top1] for past in self.history if top1 in past):
                best = {"model": self.models[self.chosen].state_dict(), "ema": None, "record": record}
                save_checkpoint(self.last.with_name("best.pt"), self.use | best)
        self.history.append(record)
        self.loss_sum = 0.0
        _say(args, text)
        if args.rank == 0:
            lines = [{"config": self.config, "chain": args.chain, "amp": args.amp}, *self.history]
            part = self.last.with_name("metrics.part")
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(part, part.with_suffix(".jsonl"))
        return True

    def summary(self) -> str:
        """The best and the last accuracy. The paper's figure is the best epoch of the EMA, chosen on val."""
        scored = [record for record in self.history if "images" in record]
        lines = []
        for name in self.models:
            best = max(scored, key=lambda record: record[f"{name}_top1"])
            how = f"epoch {best['epoch']}, chosen on val itself"
            if name == self.chosen:
                kept = self.last.with_name("best.pt")
                how += f", in {kept}" if kept.exists() else f", but {kept} is gone"
            top1, end = best[f"{name}_top1"], scored[-1][f"{name}_top1"]
            lines.append(f"{name} top-1: best {top1:.2f} % ({how}), last {end:.2f} %")
        return "\n".join(lines)


def _train(args: argparse.Namespace, train: FolderDataset, val: FolderDataset, asked: list[int]) -> None:
    """The run, from its start or from last.pt: steps, and after each epoch a checkpoint and an evaluation.

    It ends early when `asked` has come to hold a signal in any process: after a step, which is then saved, or
    within an evaluation, before which everything was saved.
    """
    run = _Run(args, train, val)
    cuda, first, finished = args.device.type == "cuda", run.step, len(run.history) == args.epochs

    def leave() -> None:
        if dist.is_initialized():  # the first to go would have the others killed, in their writing
            with contextlib.suppress(RuntimeError):  # one is gone already, so all have come here
                dist.barrier()
        name = signal.Signals(asked[0]).name if asked else "a signal to another process"
        _say(args, f"stopped by {name}: the same command goes on from {run.last}")
        sys.exit(128 + (asked[0] if asked else signal.SIGTERM))

    model = torch.compile(run.model) if args.compile else run.model
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model, [args.device] if cuda else None)
        # DDP sorts its buckets anew after one backward pass, and thereby the order of sums over three processes
        # or more. It is made to do so here, or the first step after a restart would be rounded differently.
        shape = (args.micro_batch_size, 3, args.image_size, args.image_size)
        with torch.autocast(args.device.type, args.amp_dtype, enabled=args.amp_dtype is not None):
            model.train()(torch.zeros(shape, device=args.device)).sum().backward()
    wait = [0.0]
    batches = _train_batches(args, train, first, wait)
    quiet = args.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(total=args.total_steps, initial=first, unit="step", dynamic_ncols=True, disable=quiet)
    losses: list[Tensor] = []
    began = since = time.perf_counter()
    while len(run.history) < args.epochs:
        if run.step == (len(run.history) + 1) * args.steps_per_epoch:  # an epoch ended, perhaps before a stop
            if not run.end_epoch(itertools.takewhile(lambda _: not asked, _val_batches(args, val))):
                leave()
            since, wait[0] = time.perf_counter(), 0.0
            continue
        losses.append(run.advance(model, batches))

        stop = torch.tensor(len(asked))
        if dist.is_initialized():
            dist.all_reduce(stop)  # through gloo, between the CPUs: the GPUs are not waited for
        # The first step is saved too: a full disk shows before an epoch is lost to it.
        saves = stop.item() or run.step == first + 1 or run.step % args.steps_per_epoch == 0
        saves = saves or (args.save_every and run.step % args.save_every == 0)
        if not saves and run.step % LOG_EVERY:
            bar.update()
            continue
        loss, seconds = run.count(losses), time.perf_counter() - since
        if saves:
            run.save()  # before any output, which fails if the terminal is gone
        bar.update()
        text = f"loss {loss:.4f}  lr {run.lr(run.step - 1):.2e}  "
        text += f"{len(losses) * args.batch_size / seconds:,.0f} images/s  "
        text += f"{wait[0] / seconds:.0%} waiting for data"
        text += f"  {torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB" if cuda else ""
        bar.set_postfix_str(text)
        if quiet:
            left = (time.perf_counter() - began) / (run.step - first) * (args.total_steps - run.step)
            _say(args, f"step {run.step:,}/{args.total_steps:,}  {text}  {tqdm.format_interval(left)} left")
        losses.clear()
        if stop.item():
            leave()
        since, wait[0] = time.perf_counter(), 0.0
    bar.close()
    if not finished:
        run.save()  # once more, with the last evaluation
    _say(args, run.summary())


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say. Nothing but the demo's images is written before everything has been checked.

    Raises:
        ValueError: what the user can put right, in one sentence.
    """
    args = parse_args(argv)
    _setup(args)
    given, args.data = args.data, args.data or (f"{args.output}/data" if args.demo else "imagenet")
    absent = not given and not os.path.isdir(args.data)
    if args.demo and absent and args.rank == 0 and not args.dry_run:
        draw_demo(Path(args.data))
    if dist.is_initialized():
        dist.barrier()

    if args.eval:
        model, classes, _ = load_classifier(args.checkpoint, args.device)
        size = model.config["vision_cfg"]["image_size"]
        middle = functools.partial(eval_transform, image_size=size)
        val = FolderDataset(f"{args.data}/val", read_image, middle)
        _same_classes(classes, args.checkpoint, val.classes, val.root)
        result = evaluate({"model": model}, _val_batches(args, val), args.amp_dtype)
        if args.rank == 0:
            text = "{model_correct} of {images} right, top-1 {model_top1:.3f} %, top-5 {model_top5:.3f} %"
            print(f"{args.checkpoint}, at {size} pixels: {text.format(**result)}")
        return

    if args.dry_run and absent:  # the numbers of the demo, or of ImageNet-1k
        num_images, num_classes = (0, len(DEMO_PATTERNS)) if args.demo else (1_281_167, 1000)
        num_images = num_images or DEMO_IMAGES["train"] * num_classes
    else:
        randaugment = RandAugment(args.randaug) if args.randaug else None
        crop = {"image_size": args.image_size, "crop_scale": args.crop_scale, "randaugment": randaugment}
        augment, erasing = functools.partial(train_transform, **crop), RandomErasing(args.random_erasing)
        train = FolderDataset(f"{args.data}/train", read_image, augment, erasing, args.seed)
        middle = functools.partial(eval_transform, image_size=args.image_size)
        val = FolderDataset(f"{args.data}/val", read_image, middle)
        _same_classes(train.classes, train.root, val.classes, val.root)
        num_images, num_classes = len(train), len(train.classes)
        for images in (train, val):
            if images.left_out:
                some = ", ".join(images.left_out[:3])
                _say(args, f"left out        {len(images.left_out)} files that are no images by name: {some}")
    _plan(args, num_images)
    if not args.dry_run:
        with _stop_signals() as asked:
            return _train(args, train, val, asked)

    with torch.device("meta"):  # shapes without numbers: no time, no memory
        model, groups = _build(args, num_classes)
    _say(args, _describe(args, model, num_images))
    for layer, scale in dict.fromkeys((group["layer"], group["lr_scale"]) for group in groups):
        _say(args, f"layer {layer:<9} lr {args.lr * scale:.4e} = {args.lr:g} x {scale:.6g}")


def _run() -> int:
    """main(), with what a user can put right as one sentence on stderr; the exit status."""
    try:
        main()
        return 0
    except SystemExit as stop:  # --help, or a signal
        return stop.code or 0
    except KeyboardInterrupt:  # outside training there is nothing to save
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError:
        status, text = (
            2,
            "the GPU's memory is full: halve --micro-batch-size, the global batch stays the same",
        )
    except OSError as error:
        status, text = 2, f"{error.strerror}: {error.filename}" if error.filename else str(error)
    except Exception as error:  # noqa: BLE001
        status, text = 1, traceback.format_exc().rstrip()
        # A ValueError raised in this file (perhaps in a loader's worker, whose traceback is then part of the
        # message) is a sentence; all else is a fault of the program, or of another process.
        if isinstance(error, ValueError) and re.findall(r'File "(.+?)", line', text)[-1] == __file__:
            status, text = 2, re.split("^ValueError: ", text, flags=re.MULTILINE)[-1].replace("\n", " ")
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # most likely rank 0 has said the same, or has died, and torchrun now ends the others
    print(f"ftclip: {text}" if status == 2 else text, file=sys.stderr)
    return status


if __name__ == "__main__":
    status = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own end would wait for threads of gloo's, in torch 2.6 for ever. Workers end with their parent.
    os._exit(status)
