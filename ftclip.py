"""ftclip: fine-tune CLIP's image tower the way FT-CLIP does, in one file.

"CLIP Itself is a Strong Fine-tuner" (Dong et al., arXiv 2212.06138) takes CLIP ViT-B/16 to 85.7 % and
ViT-L/14 to 88.0 % top-1 on ImageNet-1k. Nothing is added to the model: a small learning rate that decays from
the head down to the embeddings, a moving average of the weights (EMA), a short training and careful
augmentation do it.

    python ftclip.py --demo                                       # no data, no GPU: a minute on two cores
    torchrun --nproc_per_node 8 ftclip.py --model ViT-B-16        # the 85.7 % recipe, on ./imagenet
    python ftclip.py --model ViT-B-16                             # the same on one GPU, by accumulation
    python ftclip.py --model ViT-L-14 --image-size 336 --dry-run  # print every number of a run, touch nothing
    python ftclip.py --data flowers                               # your own folders; batch, lr and EMA adapt
    python ftclip.py --eval --checkpoint runs/ViT-B-16-224/best.pt

Data lie as ImageNet does: DIR/train/<class>/* and DIR/val/<class>/*. A run keeps last.pt (all it needs to
resume), best.pt (the best weights, for use) and metrics.jsonl in --output; the same command again resumes it.

Read it from top to bottom: recipes, model, optimization, augmentation, data, training with its loop, `train`;
below "the program" flags become a run. "Official" is the paper's code, github.com/LightDXY/FT-CLIP 3f9cefa.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
import traceback
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- recipes

SETTINGS = {  # flag: (value in all of the paper's runs, if it is one; least; greatest; meaning)
    "epochs": (None, 1, 10**6, "passes over the training images"),
    "warmup_epochs": (None, 0.0, 1e6, "with lr rising from 0 (default: the recipe's share)"),
    "batch_size": (None, 1, 10**9, "images per optimizer step, on all devices (default: to fit the data)"),
    "micro_batch_size": (None, 1, 10**9, "images per device at once: lower it to fit"),
    "lr": (None, 1e-12, 1e3, "of the head, literal (default: scaled by the batch's square root)"),
    "min_lr": (1e-6, 0.0, 1e3, "of the head at the end, literal (default: scaled by the batch too)"),
    "layer_decay": (None, 1e-3, 1.0, "lr of a layer over that of the one above it, 1 is off"),
    "weight_decay": (0.05, 0.0, 1e3, "of AdamW, 0 is off"),
    "ema_decay": (0.9998, 0.0, 0.999999, "of the weights' average, 0 is off (default: less in a short run)"),
    "clip_grad": (0.0, 0.0, 1e9, "greatest norm of the gradient, 0 is off"),
    "label_smoothing": (0.1, 0.0, 0.99, "0 is off"),
    "drop_path": (0.0, 0.0, 0.99, "probability at the last block, 0 is off"),
    "mixup": (0.0, 0.0, 1e3, "alpha of MixUp, 0 is off; with --cutmix, one or the other"),
    "cutmix": (0.0, 0.0, 1e3, "alpha of CutMix, 0 is off"),
    "randaug": (9.0, 0.0, 10.0, "mean magnitude of RandAugment, 0 is off"),
    "random_erasing": (0.25, 0.0, 1.0, "probability of a box of noise, 0 is off"),
    "crop_scale": (0.08, 1e-4, 1.0, "least area of the random crop, as a share of the image"),
    "train_blocks": (None, 0, 999, "tune the last K, 0: linear probing (default: all, and embeddings)"),
    "image_size": (None, 1, 8192, "pixels; positions are resized (default: the model's)"),
    "eval_every": (1, 1, 10**6, "epochs; the last is always evaluated"),
    "save_every": (0, 0, 10**9, "steps between saves of last.pt, 0: an epoch"),
    "workers": (None, 0, 999, "loader processes per device (default: cores / devices)"),
    "seed": (0, 0, 10**18, "of everything random"),
}
COMMON = {name: value for name, (value, *_) in SETTINGS.items()}
COMMON |= {"pretrained": "openai", "quick_gelu": None, "betas": (0.9, 0.999), "eps": 1e-8}  # AdamW's
# timm's rand-m9-mstd0.5-inc1; width / height of a crop; share of the image, height / width of an erased box
COMMON |= {"randaug_std": 0.5, "randaug_ops": 2, "randaug_probability": 0.5}
COMMON |= {"crop_aspect": (3 / 4, 4 / 3), "erasing_area": (0.02, 1 / 3), "erasing_aspect": (0.3, 1 / 0.3)}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
B16 = COMMON | {"layer_decay": 0.6, "epochs": 50, "warmup_epochs": 10, "batch_size": 2048}
L14 = COMMON | {"layer_decay": 0.65, "epochs": 30, "warmup_epochs": 5, "batch_size": 2048}
L14_336 = L14 | {"batch_size": 1920}
# The four published runs, from the official scripts and logs. lr is the head's, for this global batch, which
# was 8 GPUs x 256 x 1 accumulation, 8 x 64 x 4, 8 x 64 x 4 and 24 x 20 x 4. All start from weights for 224;
# the patch embedding, conv1, is frozen at that resolution, the position embeddings always learn.
RECIPES = {  # in the paper 85.7, 86.6, 88.0 and 88.3 % top-1
    ("ViT-B-16", 224): B16 | {"lr": 6e-4, "micro_batch_size": 256, "freeze_patch_embed": True},
    ("ViT-B-16", 384): B16 | {"lr": 7e-4, "micro_batch_size": 64, "freeze_patch_embed": False},
    ("ViT-L-14", 224): L14 | {"lr": 4e-4, "micro_batch_size": 64, "freeze_patch_embed": True},
    ("ViT-L-14", 336): L14_336 | {"lr": 6e-4, "micro_batch_size": 20, "freeze_patch_embed": False},
}
# A tiny ViT from scratch: nothing is pretrained, so nothing is frozen and all layers learn at the same pace.
DEMO_MODEL = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4}}
DEMO = {"pretrained": "none", "freeze_patch_embed": False, "layer_decay": 1.0, "lr": 1e-3, "batch_size": 64}
DEMO |= {"epochs": 12, "warmup_epochs": 1, "crop_scale": 0.5}


def resolve(recipe: dict, given: dict, num_images: int, devices: int = 1) -> tuple:
    """The plan: all numbers of a run, the recipe's, those given, and those that follow. It never changes.

    What is given is taken literally. What is not: the batch is the recipe's, or the largest power of two that
    leaves 32 steps an epoch, as a multiple of devices (at least an image each); lr belongs to a batch and
    scales with its square root, as AdamW's steps do not grow with the gradient (arXiv 2205.10287); warm-up
    scales with the epochs; the EMA remembers a third of the run at most; the micro-batch is the largest up to
    the recipe's that divides. batch_size = devices · micro_batch_size · accumulation.
    `recipe` is one of RECIPES, `given` has values for its names (others pass through), devices are processes.
    Returns a named tuple; raises ValueError for numbers that do not go together.
    """
    batch = recipe["batch_size"]
    if num_images < 32 * batch:
        batch = 2 ** int(math.log2(max(1, num_images // 32)))
    unit = devices * given.get("micro_batch_size", 1)
    batch = given.get("batch_size", max(1, batch // unit) * unit)
    plan = recipe | {key: recipe[key] * (batch / recipe["batch_size"]) ** 0.5 for key in ("lr", "min_lr")}
    plan["warmup_epochs"] *= given.get("epochs", recipe["epochs"]) / recipe["epochs"]
    plan |= given | {"batch_size": batch}
    if batch > num_images:
        raise ValueError(f"--batch-size {batch} is more than {num_images} training images: lower it")
    if batch % unit:
        chain, near = f"{devices} device(s) x {unit // devices} image(s)", max(1, batch // unit) * unit
        raise ValueError(f"--batch-size {batch} is not a multiple of {chain}: try {near} or {near + unit}")
    if plan["min_lr"] > plan["lr"]:
        raise ValueError(f"--min-lr {plan['min_lr']:g} is above --lr {plan['lr']:g}: lower it")
    if plan["warmup_epochs"] >= plan["epochs"]:
        raise ValueError(f"--warmup-epochs {plan['warmup_epochs']:g} leaves nothing to train: lower it")
    share, steps = batch // devices, num_images // batch  # the rest is dropped, other images each epoch
    divisors = [size for size in range(1, recipe["micro_batch_size"] + 1) if share % size == 0]
    micro = given.get("micro_batch_size", divisors[-1])
    plan |= {"micro_batch_size": micro, "accumulation": share // micro, "steps_per_epoch": steps}
    plan["total_steps"] = total = plan["epochs"] * steps
    plan["warmup_steps"] = min(round(plan["warmup_epochs"] * steps), total - 1)
    plan["ema_decay"] = given.get("ema_decay", min(recipe["ema_decay"], 1 - 1 / max(2, total / 3)))
    return namedtuple("Plan", plan)(**plan)


# How a run is computed. Unlike the plan, it may change when a run is resumed.
System = namedtuple("System", "rank world device amp_dtype workers compile")
LOG_EVERY = 20  # steps: to read a loss is to wait for the GPU
STOP_SIGNALS = {1, 2, 15}  # SIGHUP (the terminal closes), SIGINT (Ctrl-C), SIGTERM (a scheduler, torchrun)


# ---------------------------------------------------------------------------------------------- model
class CLIPClassifier(nn.Module):
    """CLIP's image tower with the FT-CLIP head: a new LayerNorm per patch token, their mean, a linear layer.

    The class token takes part in attention and is then dropped; CLIP's own last norm and projection are not
    used. The head starts 1000 times smaller than usual, so that the first predictions are uniform.
    `trunk` is open_clip's VisionTransformer, which is changed to return all tokens.
    Source: official models/finetune_clip.py:167-175, 230-231.
    """

    def __init__(self, trunk: nn.Module, num_classes: int) -> None:
        super().__init__()
        # Tokens as the last block leaves them, (N, 1 + patches, width), class token first. Parameters without
        # a use would get no gradient, for which DistributedDataParallel waits: so they go.
        trunk.ln_post, trunk.proj, trunk.pool_type, trunk.output_tokens = nn.Identity(), None, "none", False
        self.trunk, width = trunk, trunk.positional_embedding.shape[1]
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        for parameter in self.head.parameters():
            parameter.data.mul_(0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes), float32 also under autocast, of normalised images (N, 3, S, S)."""
        tokens = self.trunk(images)[:, 1:]  # (N, patches, width)
        features = self.norm(tokens).mean(dim=1)
        # With bf16's eight significant bits, two classes' logits are often equal, and the first of them wins.
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features.float())


def model_config(model: str | dict) -> dict:
    """open_clip's configuration of a plain ViT, by name, from a JSON file, or as given.

    Returns {"embed_dim", "quick_gelu", "vision_cfg"}, a copy; ValueError for what is no such thing.
    """
    import open_clip  # here, because it brings timm: a second that --help and a loader's worker need not pay

    name = model if isinstance(model, str) else "dict"
    try:
        if os.path.isfile(name):
            model = json.loads(Path(name).read_text())
        config = open_clip.get_model_config(model) if isinstance(model, str) else copy.deepcopy(model)
        vision = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 768} | config["vision_cfg"]
        if type(vision["layers"]) is list or vision.get("timm_model_name") or vision.get("attentional_pool"):
            raise ValueError("a ResNet, a tower of timm's, or another head")
        config = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False)}
    except (ValueError, TypeError, KeyError):
        way = "give one such as ViT-B-16 (all: open_clip.list_models()) or an existing model-config JSON"
        raise ValueError(f"--model {name} is not a plain ViT known to open_clip: {way}") from None
    return config | {"vision_cfg": vision}


def load_weights(model: str, pretrained: str) -> tuple[dict[str, Tensor], bool | None]:
    """The image tower's weights, by open_clip's tag or from a file, and whether they need QuickGELU.

    A file may be OpenAI's own TorchScript archive, a state dict (bare, under "state_dict", with "module."
    before each name) or safetensors; a pickle with more than tensors in it is refused. Under
    torch.device("meta") nothing is downloaded or read, and the weights are empty.

    Returns weights by the tower's parameter names, and what open_clip knows of the tag, True for OpenAI's
    archive, None (unknown) for another file. Raises ValueError if there is no such tag or file, or it cannot
    be had or read, or holds no CLIP ViT.
    """
    import open_clip

    tag = {} if os.path.isfile(pretrained) else open_clip.get_pretrained_cfg(model, pretrained)
    if not tag and not os.path.isfile(pretrained):
        ways = ", ".join(["a weights file", "none", *open_clip.list_pretrained_tags_by_model(model)])
        raise ValueError(f"--pretrained {pretrained} is no file and no tag of {model}'s: give {ways}")
    names = zipfile.ZipFile(pretrained).namelist() if zipfile.is_zipfile(pretrained) else []
    torchscript = any(name.endswith("/constants.pkl") for name in names)
    quick_gelu = tag.get("quick_gelu", False) if tag else torchscript or None
    if torch.empty(0).device.type == "meta":
        return {}, quick_gelu
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or it reports each of ten retries
    try:
        if torchscript:
            weights = torch.jit.load(pretrained, map_location="cpu").state_dict()
        else:  # load_state_dict strips "module."
            path = open_clip.download_pretrained(tag) if tag else pretrained
            weights = open_clip.factory.load_state_dict(path)
    except Exception as error:  # noqa: BLE001, the first line of whatever hub, zip, pickle or safetensors say
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0][:200]
        way = "a file, none (see README), or a network once" if tag else "a whole file of weights"
        raise ValueError(f"cannot load --pretrained {pretrained} ({reason}): give {way}") from None
    # Of a whole CLIP, the text tower is left behind.
    weights = {name[7:]: value for name, value in weights.items() if name.startswith("visual.")} or weights
    for unused in ("proj", "ln_post.weight", "ln_post.bias"):
        weights.pop(unused, None)
    if "positional_embedding" not in weights:
        raise ValueError(f"--pretrained {pretrained} is no CLIP ViT, but {list(weights)[:3]}: give another")
    return weights, quick_gelu


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings for another image size: (1 + old², width) → (1 + grid², width), float32.

    Bicubic without antialias, as in the paper's runs (open_clip's own resize has antialias, which is another
    kernel); the class token's position stays as it is. Source: official run_class_finetuning.py:360-385.
    """
    positions, old = positions.float(), math.isqrt(len(positions) - 1)
    if old == grid:
        return positions
    square = positions[1:].T.reshape(1, -1, old, old)  # (1, width, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


class Block(nn.Module):
    """open_clip's residual block in fewer kernels, with stochastic depth; the same parameters, same names.

    A plain one of an image tower (no mask, GELU or QuickGELU) becomes it by block.__class__ = Block.
    `drop_path` is the probability that a sample's residual branch is dropped in training (arXiv 1603.09382).
    """

    drop_path = 0.0

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        """Tokens (N, tokens, width) to tokens; float32, or wider, also where autocast brings bf16."""
        x = x.to(
            torch.promote_types(x.dtype, torch.float32)
        )  # the stream to which all blocks add needs the bits
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.attn.num_heads, -1))  # (N, tokens, 3, heads, width of a head)
        heads = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (N, heads, tokens, ...)
        heads = heads.transpose(1, 2).flatten(2)  # (N, tokens, width)
        drop = lambda branch: torchvision.ops.stochastic_depth(branch, self.drop_path, "row", self.training)
        x = x + drop(self.ls_1(self.attn.out_proj(heads)))
        hidden, gelu = self.mlp.c_fc(self.ln_2(x)), self.mlp.gelu
        # QuickGELU, x · sigmoid(1.702 x), by silu, which keeps one tensor for its gradient
        hidden = gelu(hidden) if isinstance(gelu, nn.GELU) else F.silu(1.702 * hidden) / 1.702
        return x + drop(self.ls_2(self.mlp.c_proj(hidden)))


def build_model(
    model: str | dict,
    num_classes: int,
    pretrained: str = "none",
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    drop_path: float = 0.0,
    train_blocks: int | None = None,
    freeze_patch_embed: bool = False,
) -> CLIPClassifier:
    """open_clip's image tower with the FT-CLIP head, float32, on the CPU.

    Its `config` is the resolved configuration, from which it can be built again. Raises ValueError for an
    unknown model or tag, an image size that is not a multiple of the patch, more blocks than there are, or
    weights that do not fit or of which nothing tells the activation. Copy this part of the file as a whole.

    Args:
        model: an open_clip ViT by name, the path of a model-config JSON, or such a configuration.
        pretrained: a tag of open_clip's, a weights file, or "none".
        image_size: pixels, None for the configuration's; position embeddings are resized to fit.
        quick_gelu: None for what the tag, the file or the configuration says.
        drop_path: of the last block, falling linearly to 0 at the first one.
        train_blocks: tune only so many last blocks, norm and head (0 is linear probing); None, or as many as
            there are, is full fine-tuning, embeddings included.
        freeze_patch_embed: leave conv1 as it is.
    """
    import open_clip

    name, config = model if isinstance(model, str) else "dict", model_config(model)
    vision = config["vision_cfg"]
    size, patch = image_size or vision["image_size"], vision["patch_size"]
    if size % patch:
        near = f"{max(1, size // patch) * patch} or {(max(1, size // patch) + 1) * patch}"
        raise ValueError(f"--image-size {size} is not a multiple of the patch of {patch} pixels: try {near}")
    weights, needed = ({}, config["quick_gelu"]) if pretrained == "none" else load_weights(name, pretrained)
    known = [value for value in (quick_gelu, needed, config["quick_gelu"] or None) if value is not None]
    if not known:  # GELU where QuickGELU belongs would cost accuracy in silence
        way = "give --quick-gelu for OpenAI's weights, or else --no-quick-gelu"
        raise ValueError(f"--pretrained {pretrained} does not say its activation: {way}")
    config["quick_gelu"], vision["image_size"] = known[0], size

    # open_clip builds towers in pairs: ask for the smallest text tower, and drop it at once.
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    classifier = CLIPClassifier(open_clip.CLIP(**config, text_cfg=text).visual, num_classes)
    classifier.config, trunk = config, classifier.trunk
    try:
        if weights:
            weights["positional_embedding"] = resize_positions(weights["positional_embedding"], size // patch)
            trunk.load_state_dict(weights)
    except RuntimeError as error:
        reason, way = " ".join(str(error).split())[:300], "give the --model that it was made for"
        raise ValueError(f"--pretrained {pretrained} does not fit {name} ({reason}): {way}") from None
    blocks = trunk.transformer.resblocks
    for i, block in enumerate(blocks):
        block.__class__, block.drop_path = Block, drop_path * i / max(1, len(blocks) - 1)
    tuned = len(blocks) if train_blocks is None else train_blocks
    if tuned > len(blocks):
        raise ValueError(f"--train-blocks {tuned} is more than {name} has: give {len(blocks)} at most")
    if tuned < len(blocks):
        trunk.requires_grad_(False)
        blocks[len(blocks) - tuned :].requires_grad_(True)
    if freeze_patch_embed:
        trunk.conv1.requires_grad_(False)
    return classifier


# ---------------------------------------------------------------------------------------------- optimization
def layer_id(name: str) -> float:
    """Depth of a parameter of CLIPClassifier: 0 embeddings, i + 1 block i, infinity for norm and head.

    For another model, write another function like it: in timm's ViTs, the blocks are "blocks.<i>.", norm and
    head "norm.", "fc_norm." and "head.", embeddings "cls_token", "pos_embed", "patch_embed." and "norm_pre.".
    A name that is nowhere is a ValueError. Source: official optim_factory.py:22-39.
    """
    if name.startswith("trunk.transformer.resblocks."):
        return int(name.split(".")[3]) + 1
    if re.match(r"trunk\.(class_embedding|positional_embedding|conv1\.|ln_pre\.)", name):
        return 0
    if name.startswith(("norm.", "head.")):
        return math.inf
    raise ValueError(f"parameter {name} belongs to no layer: teach layer_id where it is")


def param_groups(
    model: nn.Module, layer_id: Callable[[str], float], lr: float, layer_decay: float, weight_decay: float
) -> list[dict]:
    """AdamW's parameter groups, with a learning rate that decays from the head down to the embeddings.

    Layer i of L blocks learns with lr · layer_decay^(L + 1 − i): near the pixels, more of CLIP stays.
    A schedule must keep to it, before each optimizer step: group["lr"] = lr_at(...) * group["lr_scale"]
    (timm's own schedulers would apply lr_scale twice). No weight decay for vectors (norms and biases), tokens
    and positions, as open_clip's and timm's plain ViTs name them. Frozen parameters are in no group. Source:
    official optim_factory.py:60, run_class_finetuning.py:441.

    Returns two groups a layer at most, from the embeddings up: {"params", "names", "layer", "lr", "lr_scale",
    "weight_decay"}. Raises ValueError if layer_id does not find embeddings, blocks and head, without a gap.

    Args:
        model: not wrapped in DDP or torch.compile, which change the names.
        layer_id: parameter name → 0 for the embeddings, 1 to L for the blocks, infinity for the head.
        lr: of the head.
    """
    depths = {name: layer_id(name) for name, _ in model.named_parameters()}
    found, top = sorted(set(depths.values())), len(set(depths.values())) - 1
    if top < 2 or found != [*range(top), math.inf]:
        raise ValueError(f"layer_id finds the layers {found}, not 0, 1, ... and inf: make it fit the model")
    groups, vectors = {}, ("_embedding", "_token", "pos_embed")
    for name, parameter in model.named_parameters():
        layer, decays = min(depths[name], top), parameter.ndim > 1 and not name.endswith(vectors)
        scale = layer_decay ** (top - layer)
        group = {"layer": layer, "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay * decays}
        if parameter.requires_grad:
            group = groups.setdefault((layer, decays), group | {"params": [], "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of optimizer step `step`, from 0: linear from 0 to lr, then half a cosine towards min_lr.

    With a warm-up, step 0 has lr 0 (and moves nothing), step warmup_steps − 1, if it is another, has lr, and
    so has the next, the first of the cosine. After the last step it is min_lr. lr and min_lr are the
    head's; a group's own are these times its lr_scale. Source: official utils.py:407-424.
    """
    if step >= total_steps:
        return min_lr
    if step < warmup_steps:
        peak = max(1, warmup_steps - 1)
        return lr * min(step, peak) / peak
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * progress))


class EMA:
    """A moving average of a model's weights: after an optimizer step, ema += (1 − decay) · (weights − ema).

    It starts from the starting weights and remembers 1 / (1 − decay) steps, 5,000 for the paper's 0.9998: in
    a run that is not several times as long, take less, or it hardly leaves its start.
    Source: official engine_for_finetuning.py:92.

    `module` is the averaged model, in evaluation mode. The model that it is made from must already be on its
    device, and neither compiled nor wrapped. A decay outside 0 ≤ decay < 1 is a ValueError.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not from 0 to less than 1: give such a one")
        self.module, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay
        self.state_dict, self.load_state_dict = self.module.state_dict, self.module.load_state_dict

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call it once per optimizer step, not per micro-batch."""
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.decay)
        for average, buffer in zip(self.module.buffers(), model.buffers()):  # CLIP has none; batch norm has
            average.copy_(buffer)


# ---------------------------------------------------------------------------------------------- augmentation
class RandAugment:
    """RandAugment (arXiv 1909.13719) as the paper used it: timm's rand-m9-mstd0.5-inc1, on RGB Pillow images.

    Operations are drawn with replacement; each is applied or not, at a magnitude drawn from N(magnitude, std)
    and clipped to [0, 10], with either sign equally likely. torchvision's RandAugment(2, 9) is another thing:
    30 % of the full strength where this is 90 %, always applied, nearest pixel, black borders. The paper's
    magnitude, std, num_ops and probability are 9, 0.5, 2 and 0.5; fill, the colour (0 to 255) of what comes
    from outside the image, is 255 · CLIP_MEAN. It goes before ToTensor, after image.convert("RGB").
    """

    # Of an image, at strength m = magnitude / 10 and with sign s; v is a colour, 0 to 255.
    OPS = {  # noqa: RUF012
        "AutoContrast": lambda self, im, m, s: ImageOps.autocontrast(im),
        "Equalize": lambda self, im, m, s: ImageOps.equalize(im),
        "Invert": lambda self, im, m, s: im.point(lambda v: 255 - v),
        "Rotate": lambda self, im, m, s: im.rotate(s * 30 * m, Image.BICUBIC, fillcolor=self.fill),
        "Posterize": lambda self, im, m, s: im.point(lambda v: v & (255 << (4 + int(4 * m)))),
        "Solarize": lambda self, im, m, s: im.point(lambda v: 255 - v if v >= 256 - int(256 * m) else v),
        "SolarizeAdd": lambda self, im, m, s: im.point(lambda v: v + int(110 * m) if v < 128 else v),
        "Color": lambda self, im, m, s: ImageEnhance.Color(im).enhance(max(0.1, 1 + s * 0.9 * m)),
        "Contrast": lambda self, im, m, s: ImageEnhance.Contrast(im).enhance(max(0.1, 1 + s * 0.9 * m)),
        "Brightness": lambda self, im, m, s: ImageEnhance.Brightness(im).enhance(max(0.1, 1 + s * 0.9 * m)),
        "Sharpness": lambda self, im, m, s: ImageEnhance.Sharpness(im).enhance(max(0.1, 1 + s * 0.9 * m)),
        "ShearX": lambda self, im, m, s: self.affine(im, 1, s * 0.3 * m, 0, 0, 1, 0),
        "ShearY": lambda self, im, m, s: self.affine(im, 1, 0, 0, s * 0.3 * m, 1, 0),
        "TranslateX": lambda self, im, m, s: self.affine(im, 1, 0, s * 0.45 * m * im.width, 0, 1, 0),
        "TranslateY": lambda self, im, m, s: self.affine(im, 1, 0, 0, 0, 1, s * 0.45 * m * im.height),
    }

    def __init__(self, magnitude: float, std: float, num_ops: int, probability: float, fill: tuple) -> None:
        self.magnitude, self.std, self.num_ops, self.probability = magnitude, std, num_ops, probability
        self.fill = tuple(round(value) for value in fill)

    def __call__(self, image: Image.Image, rng: random.Random = random) -> Image.Image:
        """The image, augmented or as it was. All chance comes from rng, a random.Random or that module."""
        for op in rng.choices(list(self.OPS), k=self.num_ops):
            if rng.random() < self.probability:
                magnitude = min(max(rng.gauss(self.magnitude, self.std), 0.0), 10.0)
                image = self.OPS[op](self, image, magnitude / 10, rng.choice((-1, 1)))
        return image

    def affine(self, image: Image.Image, *matrix: float) -> Image.Image:
        """(a, b, c, d, e, f): the pixel at (x, y) is taken from (a x + b y + c, d x + e y + f)."""
        return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=self.fill)


class RandomErasing:
    """Random erasing (arXiv 1708.04896): a box of a normalised image becomes N(0, 1) noise, each value anew.

    The box is drawn where the sample is made, the noise where the batch is used; erasing(images) does both.
    The paper's probability is 0.25; area, (0.02, 1/3), is the least and greatest share of the image; aspect,
    (0.3, 1/0.3), the least and greatest height / width, drawn log-uniformly.
    """

    def __init__(self, probability: float, area: tuple[float, float], aspect: tuple[float, float]) -> None:
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
    image: Tensor, rng: random.Random, image_size: int, crop_scale: float, crop_aspect: tuple, augment=None
) -> Tensor:
    """A random crop, resized, perhaps mirrored, augmented: what a loader's workers do with a training image.

    Returns uint8 (3, image_size, image_size): a quarter of the bytes of floats to copy to the GPU.

    Args:
        image: uint8 (3, H, W).
        rng: where all chance comes from, a random.Random or that module.
        image_size: pixels of each side.
        crop_scale: least area of the crop, as a share of the image; the paper's is 0.08.
        crop_aspect: least and greatest width / height of the crop, drawn log-uniformly; (3/4, 4/3).
        augment: (Pillow image, rng) → Pillow image, such as a RandAugment, or None.
    """
    height, width = image.shape[1:]
    for _ in range(10):  # tries for a crop that lies within the image
        area = rng.uniform(crop_scale, 1) * height * width
        aspect = math.exp(rng.uniform(*map(math.log, crop_aspect)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            break
    else:  # a very long image: its middle, as long as the aspect allows
        w, h = min(width, round(height * crop_aspect[1])), min(height, round(width / crop_aspect[0]))
        top, left = (height - h) // 2, (width - w) // 2
    size, bicubic = [image_size, image_size], v2.InterpolationMode.BICUBIC
    image = v2.functional.resized_crop(image, top, left, h, w, size, bicubic, antialias=True)
    if rng.random() < 0.5:
        image = image.flip(-1)
    if augment:
        image = v2.functional.pil_to_tensor(augment(v2.functional.to_pil_image(image), rng))
    return image


def normalize(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """uint8 images (..., 3, H, W) as float32 from 0 to 1, less mean, over standard deviation, by channel."""
    images = images.float() / 255
    for i, (m, s) in enumerate(zip(mean, std)):  # as tensors, they would be copied, and the GPU waited for
        images[..., i, :, :].sub_(m).div_(s)
    return images


def eval_transform(image: Tensor | Image.Image, image_size: int, mean: tuple, std: tuple) -> Tensor:
    """The short side resized to image_size, bicubic, and the middle square, normalised.

    From uint8 (3, H, W), or a Pillow image of 8 bits, to float32 (3, image_size, image_size), as models take
    it. Copy normalize with it. Source: official datasets.py:76-84.
    """
    if isinstance(image, Image.Image):
        image = v2.functional.pil_to_tensor(image.convert("RGB"))
    image = v2.functional.resize(image, [image_size], v2.InterpolationMode.BICUBIC, antialias=True)
    return normalize(v2.functional.center_crop(image, [image_size]), mean, std)


# ---------------------------------------------------------------------------------------------- data
def read_image(path: str | os.PathLike) -> Tensor:
    """An image file as RGB, uint8 (3, H, W), also if it is grey, palette, transparent, 16-bit or CMYK.

    torchvision decodes JPEG, twice as fast as Pillow, which reads all else (and JPEG too, once torchvision
    has dropped its decoders, as 0.29 announces). torchvision 0.29.2 can crash at a damaged PNG. EXIF rotation
    is ignored. What is no whole image is a ValueError.
    """
    try:
        with open(path, "rb") as file, contextlib.suppress(RuntimeError, AttributeError):
            if file.read(2) == b"\xff\xd8":  # JPEG
                return torchvision.io.decode_image(str(path), mode=torchvision.io.ImageReadMode.RGB)
        with Image.open(path) as file:
            if not file.mode.startswith("I"):
                return v2.functional.pil_to_tensor(file.convert("RGB"))
            grey = v2.functional.pil_to_tensor(file.convert("I"))  # 16 bits, in 32
            return (grey >> 8).to(torch.uint8).expand(3, -1, -1)
    except Exception as error:  # noqa: BLE001, each decoder has its own
        raise ValueError(f"cannot read image {path} ({error}): repair or replace it") from None


class FolderDataset(torchvision.datasets.ImageFolder):
    """ROOT/<class>/*, in which a training sample is the same pixels in any process, worker, or restart.

    Key (epoch, index) gives (image, box to erase (4,), label); all chance comes from (seed, epoch, index).
    Key index gives (image, label), for evaluation. Files that are no images by their names are left out.
    `load` turns a path into uint8 (3, H, W), `transform` for training (image, rng) into an image, for
    evaluation an image, `box` (height, width, rng) into a box to erase. Raises ValueError for a folder that
    cannot be read or is reached twice, a class without images, and classes other than the sorted `classes`.
    """

    IMAGES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif", ".avif")

    def __init__(self, root: str, load: Callable, transform, box=None, seed=0, classes=None) -> None:
        self.box, self.seed, folders, reached = box, seed, [root], {}
        try:
            for folder in folders:  # ImageFolder would leave out what cannot be read, and follow circles
                other = reached.setdefault(os.path.realpath(folder), folder)
                if other != folder:  # its images would count twice, or in the wrong class
                    raise ValueError(f"{folder} and {other} are one folder: remove the link between them")
                folders += [entry.path for entry in os.scandir(folder) if entry.is_dir()]
            is_image = lambda path: path.lower().endswith(self.IMAGES)
            super().__init__(root, transform, loader=load, is_valid_file=is_image)
        except OSError as error:
            reason = error.strerror or str(error).rstrip(". \n")
            way = "--data DIR needs readable images in DIR/train/<class>/ and DIR/val/<class>/"
            raise ValueError(f"cannot use {error.filename or root} ({reason}): {way}") from None
        if some := sorted(set(classes or self.classes) ^ set(self.classes))[:5]:
            raise ValueError(f"{root} has other classes than expected, such as {some}: match them")

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        if isinstance(key, int):
            return super().__getitem__(key)
        epoch, index = key
        path, label = self.samples[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        image = self.transform(self.loader(path), rng)
        return image, torch.tensor(self.box(*image.shape[1:], rng)), label


class MicroBatches(Sampler):
    """One process's micro-batches of keys (epoch, index), from any step of a run to any other.

    An epoch is one shuffle of all images, from (seed, epoch), cut into global batches; the rest is dropped
    (official run_class_finetuning.py:431). Each global batch is cut into micro-batches in one order, whatever
    the number of processes among which they are then shared; if it can't be, or batch_size is no multiple of
    micro_batch_size · world, that is a ValueError. `steps` are optimizer steps, from the start of the run. It
    is a DataLoader's batch_sampler; as steps go on from epoch to epoch, one loader serves the whole run.
    """

    def __init__(
        self, num_images: int, batch_size: int, micro_batch_size: int, steps: range, seed=0, rank=0, world=1
    ) -> None:
        if batch_size % (micro_batch_size * world) or batch_size > num_images:
            limit = f"a multiple of {world} x {micro_batch_size} and at most {num_images} images"
            raise ValueError(f"a global batch of {batch_size} is not {limit}: choose another")
        self.num_images, self.batch_size, self.micro_batch_size = num_images, batch_size, micro_batch_size
        self.steps, self.seed, self.rank, self.world = steps, seed, rank, world

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // self.world // self.micro_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share, per_epoch = self.batch_size // self.world, self.num_images // self.batch_size
        for epoch, steps in itertools.groupby(self.steps, lambda step: step // per_epoch):
            seed = random.Random(f"{self.seed}/{epoch}").getrandbits(63)
            order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed)).tolist()
            for step in steps:
                first = step % per_epoch * self.batch_size + self.rank * share
                for i in range(first, first + share, self.micro_batch_size):
                    yield [(epoch, index) for index in order[i : i + self.micro_batch_size]]


def start_loader(dataset: Dataset, system: System, **options) -> Iterator:
    """Batches from a DataLoader, whose workers are deaf to stop signals: the step in hand still needs them.

    They inherit the blocked signals from their first moment on, and end when they find their parent gone.
    Without a batch_sampler, it is this process's share: each image is in exactly one process.
    """
    share = {} if "batch_sampler" in options else {"sampler": range(system.rank, len(dataset), system.world)}
    pinned, mask = system.device.type == "cuda", signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(DataLoader(dataset, num_workers=system.workers, pin_memory=pinned, **share, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def train_batches(plan: tuple, system: System, dataset: Dataset, first: int, monitor: "Monitor") -> Iterator:
    """This process's micro-batches for train_step, from optimizer step `first` on.

    Workers give uint8 images (N, 3, S, S), boxes (N, 4), labels (N,). On the device they become float32,
    normalised, erased and mixed (by MixUp or CutMix, if on; labels are then (N, num_classes)). Noise, mixing
    and drop path follow from the seed, the step and the micro-batch's place in the global batch: the same
    after a restart and, with as large micro-batches, on one GPU as on eight of its kind.
    """
    erasing = RandomErasing(plan.random_erasing, plan.erasing_area, plan.erasing_aspect)
    mixes = [v2.MixUp(alpha=plan.mixup, num_classes=plan.num_classes)] if plan.mixup else []
    mixes += [v2.CutMix(alpha=plan.cutmix, num_classes=plan.num_classes)] if plan.cutmix else []
    steps, sizes = range(first, plan.total_steps), (plan.num_images, plan.batch_size, plan.micro_batch_size)
    keys = MicroBatches(*sizes, steps, plan.seed, system.rank, system.world)
    samples = start_loader(dataset, system, batch_sampler=keys)
    for step in steps:
        for place in range(system.rank * plan.accumulation, (system.rank + 1) * plan.accumulation):
            began = time.perf_counter()
            images, boxes, labels = next(samples)
            monitor.waited += time.perf_counter() - began
            torch.manual_seed(random.Random(f"{plan.seed}/{step}/{place}").getrandbits(63))
            images = normalize(images.to(system.device, non_blocking=True), CLIP_MEAN, CLIP_STD)
            images, labels = erasing(images, boxes.tolist()), labels.to(system.device, non_blocking=True)
            yield v2.RandomChoice(mixes)(images, labels) if mixes else (images, labels)


# ---------------------------------------------------------------------------------------------- training
def train_step(
    model: nn.Module,
    micro_batches: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
) -> Tensor:
    """One optimizer step on one global batch, which comes as `accumulation` micro-batches of equal size.

    Returns the mean loss of this process's images, on the device: to read it is to wait for the GPU. Raises
    ValueError if micro_batches ends too early; the weights are then as they were.

    Args:
        model: plain or in DistributedDataParallel, which then exchanges gradients once; put in training mode.
        micro_batches: an iterator, from which the next ones are taken, on the device: (images (N, 3, S, S),
            labels (N,) or probabilities (N, num_classes)).
        scaler: keeps fp16 gradients from vanishing, skips the step if they overflow; enabled=False otherwise.
        amp_dtype: of autocast, or None for float32 throughout.
        clip_grad: largest norm of the gradient, or 0.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i in range(accumulation):
        images, labels = next(micro_batches, (None, None))
        if images is None:
            raise ValueError(f"micro_batches ended after {i} of {accumulation}: give as many as accumulation")
        sync = i == accumulation - 1 or not hasattr(model, "no_sync")
        with contextlib.nullcontext() if sync else model.no_sync():
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing) / accumulation
            scaler.scale(loss).backward()
        total = total + loss.detach()
    if clip_grad > 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    return total


def all_sum(value: int | Tensor) -> Tensor:
    """The sum over all processes, into the tensor; where it is on the CPU, no GPU is waited for."""
    tensor = torch.as_tensor(value)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(models: dict[str, nn.Module], batches: Iterable, amp_dtype: torch.dtype | None = None) -> dict:
    """Top-1 and top-5 accuracy of each named model, over all processes, in one pass over the images.

    `batches` are (normalised images (N, 3, S, S), labels (N,)), such as a DataLoader's. Each process brings
    its own share of the images; every image counts once, whatever the shares' sizes. The models are left in
    evaluation mode. Logits in bf16 are often equal: let a model return float32. Copy all_sum with it.

    Returns "NAME_top1" and "NAME_top5" in per cent, "NAME_correct" in images, for each model, and "images".
    """
    device = next(next(iter(models.values())).parameters()).device
    counts = torch.zeros(len(models), 3, dtype=torch.long, device=device)  # right at first, in five, images
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        for row, model in zip(counts, models.values()):
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model.eval()(images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
            row[0] += hits[:, 0].sum()
            row[1] += hits.sum()
            row[2] += len(labels)
    result = {}
    for name, (top1, top5, total) in zip(models, all_sum(counts).tolist()):
        result |= {f"{name}_top1": 100 * top1 / max(1, total), f"{name}_top5": 100 * top5 / max(1, total)}
        result |= {f"{name}_correct": top1, "images": total}
    return result


def save_checkpoint(path: str | os.PathLike, state: dict, format: str = "ftclip 2") -> None:
    """Write beside, then rename: under this name there is the old file or the new one, never half of one.

    Holds tensors and plain values: NumPy or a Path is not read back. What the disk refuses is a ValueError.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # its own, whoever else may write
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state | {"format": format}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = str(error.__context__ or error).split("\n")[0]  # what the disk said, before torch's writer
        raise ValueError(f"cannot write {path} ({reason}): make room or write elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # if it is still there


def load_checkpoint(path: str | os.PathLike, format: str = "ftclip 2") -> dict:
    """What save_checkpoint wrote, on the CPU; a pickle of more than tensors and plain values is not executed.

    What is missing, damaged, or not of this format is a ValueError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # by the checksums, at which torch does not look
                raise zipfile.BadZipFile(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001, whatever zip, zlib and torch say of damaged bytes
        reason = re.split(r"\n|\. ", str(error))[0]  # after it, torch advises to trust the file
        raise ValueError(f"cannot read checkpoint {path} ({reason}): give a whole one of ftclip's") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != format:
        raise ValueError(f"{path} has format {found}, not {format!r}: use the ftclip that wrote it, or none")
    return state


def load_classifier(path: str | os.PathLike, device="cpu") -> tuple[CLIPClassifier, list[str], Callable]:
    """A trained model, ready for use, from best.pt (or last.pt: its EMA weights if it has some).

    Copy load_checkpoint, build_model (and what that names), eval_transform and normalize with it.

    Returns the model in evaluation mode, the class names in the order of its outputs, and the transform from
    one image, as read_image or Pillow gives it, to what the model takes: float32 (3, S, S). Raises ValueError
    for a file that is missing, damaged, or no ftclip checkpoint.
    """
    state = load_checkpoint(path)
    model = build_model(state["model_config"], len(state["classes"]))
    model.load_state_dict(state.get("ema") or state["model"])
    size = model.config["vision_cfg"]["image_size"]
    transform = functools.partial(eval_transform, image_size=size, mean=state["mean"], std=state["std"])
    return model.eval().to(device), state["classes"], transform


def prepare(plan: tuple, system: System, classifier: CLIPClassifier, state: dict | None) -> tuple:
    """A run, new or from last.pt: the model to train (in DDP, compiled), the parts to save, how far it is."""
    groups = param_groups(classifier, layer_id, plan.lr, plan.layer_decay, plan.weight_decay)
    device, amp_dtype = system.device, system.amp_dtype
    optimizer = torch.optim.AdamW(groups, betas=plan.betas, eps=plan.eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    parts = {"model": classifier, "optimizer": optimizer, "scaler": scaler}
    parts |= {"ema": EMA(classifier, plan.ema_decay)} if plan.ema_decay else {}
    progress = {"step": 0, "history": [], "loss_sum": 0.0}  # steps done, records of epochs, of this epoch
    if state:
        for name in parts:
            if state[name]:  # a scaler that was off has nothing
                parts[name].load_state_dict(state[name])
        progress = {name: state[name] for name in progress}
    model = torch.compile(classifier) if system.compile else classifier
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        # DDP sorts its buckets anew after one backward pass, and thereby the order of sums over three or more
        # processes. It is made to do so here, or the first step after a restart would be rounded differently.
        images = torch.zeros(plan.micro_batch_size, 3, plan.image_size, plan.image_size, device=device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            model.train()(images).sum().backward()
    return model, parts, progress


def checked_losses(losses: list[Tensor], model: nn.Module, step: int, world: int) -> list[float]:
    """The losses of the steps up to `step`, as means over the processes.

    A loss or a weight that is not finite is a ValueError in every process, before anything is saved.
    """
    means = all_sum(torch.stack(losses) / world).tolist()
    # A finite loss with an infinite gradient shows only in the weights, and in the next loss.
    norm = torch.stack(torch._foreach_norm(list(model.parameters()))).sum().item()
    found = [("loss", value, i) for i, value in enumerate(means, step - len(means) + 1)]
    for what, value, i in [*found, ("norm of the weights", norm, step)]:
        if not math.isfinite(value):
            way = "resume with --amp none, or start anew, with a lower --lr and another --output"
            raise ValueError(f"the {what} is {value} at step {i}; last.pt, if any, is from before it: {way}")
    return means


def train(plan: tuple, system: System, classifier: nn.Module, state, data_sets, save, monitor) -> list | None:
    """The loop: steps, from wherever the run is, and at the end of each epoch an evaluation.

    Returns a record for each epoch, or None if it was stopped: a signal in any process ends it after a step,
    which is saved, or within an evaluation. `state` is last.pt's if there is one, data_sets are for training
    and validation, save(name, contents) writes a checkpoint.
    """
    model, parts, progress = prepare(plan, system, classifier, state)
    optimizer, scaler, ema = parts["optimizer"], parts["scaler"], parts.get("ema")
    models = {"raw": classifier} | ({"ema": ema.module} if ema else {})
    top1 = "ema_top1" if ema else "raw_top1"  # by which the best weights are chosen
    first, history, losses = progress["step"], progress["history"], []
    batches = train_batches(plan, system, data_sets[0], first, monitor)
    save_last = lambda: save("last.pt", {name: parts[name].state_dict() for name in parts} | progress)

    for epoch in range(len(history), plan.epochs):
        end = (epoch + 1) * plan.steps_per_epoch
        for step in range(progress["step"], end):
            lr = lr_at(step, plan.total_steps, plan.warmup_steps, plan.lr, plan.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            options = (scaler, system.amp_dtype, plan.label_smoothing, plan.clip_grad)
            losses.append(train_step(model, batches, plan.accumulation, optimizer, *options))
            if ema:
                ema.update(classifier)
            progress["step"] = step + 1
            monitor.bar.update()

            stop = all_sum(len(monitor.stops)).item() > 0
            # The first step of a start is saved too: a full disk shows before an epoch is lost to it.
            due = stop or step + 1 == end or step == first or (step + 1) % (plan.save_every or end) == 0
            if due or (step + 1) % LOG_EVERY == 0:
                for loss in checked_losses(losses, classifier, step + 1, system.world):
                    progress["loss_sum"] += loss  # one by one: the same bits, wherever a stop cuts the epoch
                if due:
                    save_last()
                monitor.report(step + 1, len(losses), loss, lr)
                losses.clear()
            if stop:
                return None

        record = {"epoch": epoch + 1, "train_loss": progress["loss_sum"] / plan.steps_per_epoch}
        record["lr"] = optimizer.param_groups[-1]["lr"]  # the head's, at the last step
        if (epoch + 1) % plan.eval_every == 0 or epoch + 1 == plan.epochs:
            images = start_loader(data_sets[1], system, batch_size=min(64, plan.micro_batch_size))
            images = itertools.takewhile(lambda _: not monitor.stops, images)
            record |= evaluate(models, images, system.amp_dtype)
            if record["images"] < plan.num_val:  # summed: if one process was stopped, all know
                return None
            if all(record[top1] > past[top1] for past in history if top1 in past):
                save("best.pt", {"model": models[top1[:3]].state_dict(), "record": record})
        history.append(record)
        progress["loss_sum"] = 0.0
        monitor.end_epoch(history)
    save_last()
    return history


# ---------------------------------------------------------------------------------------------- the program
# What a run computes is all above. Here flags become a plan; the rest is what is printed and refused.
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; None where one was not given. One that makes no sense ends the program with a sentence."""
    about = {"prog": "ftclip", "usage": argparse.SUPPRESS, "description": __doc__}  # no usage above errors
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on, switch = parser.add_argument, "store_true", argparse.BooleanOptionalAction
    add("--model", default="ViT-B-16", help="open_clip ViT, or a model-config JSON such as open_clip's")
    add("--data", help="folder with train/<class>/* and val/<class>/* (default imagenet)")
    add("--output", help="folder for last.pt, best.pt and metrics.jsonl (default runs/MODEL-SIZE)")
    add("--pretrained", help="open_clip tag, weights file, or 'none': random weights (default openai)")
    add("--quick-gelu", action=switch, help="activation x·sigmoid(1.702x), OpenAI's (default: the weights')")
    add("--freeze-patch-embed", action=switch, help="leave conv1 as it is (default: the recipe's)")
    add("--grad-checkpointing", action=on, help="compute blocks twice: slower, far less memory, same result")
    add("--device", choices=("cuda", "cpu"), help="(default: a GPU if there is one)")
    add("--amp", choices=("bf16", "fp16", "none"), help="(default: bf16 where the GPU has it; none on a CPU)")
    add("--compile", action=on, help="torch.compile: minutes to start, then faster steps")
    add("--eval", action=on, help="only evaluate --checkpoint on DIR/val")
    add("--checkpoint", help="best.pt or last.pt for --eval")
    add("--demo", action=on, help="a tiny ViT on images that the script draws into OUTPUT/data")
    add("--preview", help="PNG for a sheet of training images as the model gets them, instead of training")
    add("--dry-run", action=on, help="print recipe, batch chain and lr of each layer, touch nothing")
    for name, (default, least, _, meaning) in SETTINGS.items():
        meaning += f" (default {default})" * ("default" not in meaning and default is not None)
        add(f"--{name.replace('_', '-')}", type=type(least), help=meaning)
    args = parser.parse_args(argv)
    for name, (_, least, most, _) in SETTINGS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:  # NaN is neither
            parser.error(f"argument --{name.replace('_', '-')}: {value:g} is not from {least:g} to {most:g}")
    if args.eval != bool(args.checkpoint):
        parser.error("--eval and --checkpoint FILE go together: give both or none")
    args.model = DEMO_MODEL if args.demo else args.model
    return args


def make_system(args: argparse.Namespace) -> System:
    """Device, precision and so on, by the flags and torchrun, whose processes are joined."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    # What is not set is 0, or 1 for a size.
    rank, world, local, local_world, restarts = (int(os.environ.get(k, k.endswith("SIZE"))) for k in keys)
    cuda = torch.cuda.is_available() if args.device is None else args.device == "cuda"
    if cuda and local >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs (torch {torch.__version__})"
        raise ValueError(f"process {local} has none of {found}: start one per GPU, or give --device cpu")
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not args.dry_run:
        # The others may have to wait while rank 0 writes a large file to a slow disk.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
        if restarts and not rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            print("--max-restarts fails without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, one process speaks for all
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = args.amp or ("bf16" if bf16 else "fp16" if cuda else "none")
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cores // local_world) if args.workers is None else args.workers
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return System(rank, world, device, amp_dtype, workers, args.compile)


def draw_demo(root: Path) -> None:
    """The demo's images: 32x32 PNGs of six patterns in two random colours, in ImageNet's layout."""
    rng, part = random.Random(0), root.with_name(root.name + ".part")  # renamed when whole
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    classes = ("checkerboard", "diagonals", "dots", "pillars", "rings", "stripes")
    for split, name in itertools.product(("train", "val"), classes):
        (part / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(500 if split == "train" else 100):
            wave = 2 * math.pi / rng.uniform(6, 10)  # radians per pixel
            x, y = (columns - rng.uniform(0, 32)) * wave, (rows - rng.uniform(0, 32)) * wave
            waves = {"checkerboard": x.sin() * y.sin(), "dots": x.sin() + y.sin() - 1, "stripes": y.sin()}
            waves |= {"diagonals": (x + y).sin(), "rings": x.hypot(y).sin(), "pillars": x.sin()}
            colours = [[rng.randrange(low, low + 100) for _ in range(3)] for low in rng.sample((0, 156), 2)]
            image = torch.tensor(colours, dtype=torch.uint8)[(waves[name] > 0).long()]  # (32, 32, 3)
            Image.fromarray(image.numpy()).save(part / split / name / f"{i:04d}.png")
    part.rename(root)


def plan_of(args: argparse.Namespace, system: System) -> tuple:
    """(plan, data sets, output folder) of the flags; without data, a dry run is of ImageNet or the demo."""
    config = model_config(args.model)
    name = "demo" if args.demo else Path(args.model).stem.removesuffix("-quickgelu")
    size = args.image_size or config["vision_cfg"]["image_size"]
    output = Path(args.output or ("runs/demo" if args.demo else f"runs/{name}-{size}"))
    data = args.data or (f"{output}/data" if args.demo else "imagenet")
    absent, data_sets = args.data is None and not os.path.isdir(data), None
    if args.demo and absent and not args.dry_run and system.rank == 0:
        draw_demo(Path(data))
    all_sum(0)  # the others wait for the images
    # The paper's recipe of this model, or of the nearest one: first by depth, then by image size.
    like = "ViT-L-14" if config["vision_cfg"]["layers"] > 12 else "ViT-B-16"
    key = min((key for key in RECIPES if key[0] == like), key=lambda key: abs(key[1] - size))
    scratch = {"freeze_patch_embed": False} if args.pretrained == "none" else {}  # it would stay random
    recipe = RECIPES[key] | (DEMO if args.demo else scratch)
    given = {flag: value for flag, value in vars(args).items() if flag in recipe and value is not None}
    given |= {"recipe": key, "name": name, "model": config, "image_size": size}
    if args.dry_run and absent:
        given["num_classes"], given["num_images"] = (6, 3000) if args.demo else (1000, 1_281_167)
    else:
        values = recipe | given
        ops = (values[f"randaug{key}"] for key in ("", "_std", "_ops", "_probability"))
        augment = RandAugment(*ops, tuple(255 * mean for mean in CLIP_MEAN)) if values["randaug"] else None
        erasing = RandomErasing(values["random_erasing"], values["erasing_area"], values["erasing_aspect"])
        crop = {key: values[key] for key in ("image_size", "crop_scale", "crop_aspect")}
        crop = functools.partial(train_transform, augment=augment, **crop)
        middle = functools.partial(eval_transform, image_size=size, mean=CLIP_MEAN, std=CLIP_STD)
        train_set = FolderDataset(f"{data}/train", read_image, crop, erasing.sample, values["seed"])
        val_set = FolderDataset(f"{data}/val", read_image, middle, classes=train_set.classes)
        data_sets, given["num_val"] = (train_set, val_set), len(val_set)
        given |= {"num_classes": len(train_set.classes), "num_images": len(train_set)}
        names = "\n".join(path[len(data) :] for path, _ in train_set.samples + val_set.samples)
        given["files"] = hashlib.sha256(os.fsencode(names)).hexdigest()[:8]
    return resolve(recipe, given, given["num_images"], system.world), data_sets, output


def describe(plan: tuple, system: System, model: CLIPClassifier) -> None:
    """Print the resolved run, a line for each value."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    groups = param_groups(model, layer_id, plan.lr, plan.layer_decay, plan.weight_decay)
    chain = f"{system.world} device(s) x {plan.micro_batch_size} images x {plan.accumulation} step(s)"
    paper, device = RECIPES[plan.recipe], system.device
    values = plan._asdict() | {
        "recipe": f"{plan.recipe}: lr {paper['lr']:g} for a batch of {paper['batch_size']}",
        "batch_size": f"{plan.batch_size} = {chain}",
        "lr": " ".join(dict.fromkeys(f"{group['lr']:.4e}" for group in groups)) + " from embeddings to head",
        "workers": system.workers,
        "activation": "QuickGELU" if model.config["quick_gelu"] else "GELU",
        "parameters": f"{sum(n for n, on in sizes if on):,} of {sum(n for n, _ in sizes):,} are trained",
        "curves": "each epoch" if importlib.util.find_spec("matplotlib") else "no: pip install matplotlib",
        "device": f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, {system.amp_dtype}",
    }
    print("\n".join(f"{name:<20} {value}" for name, value in values.items()))


def draw_preview(file: str, plan: tuple, system: System, dataset: FolderDataset) -> None:
    """24 training images as the model gets them, enlarged to 128 pixels or more, classes beneath."""
    batches = train_batches(plan, system, dataset, 0, argparse.Namespace(waited=0.0))
    tiles, back = [], ([-m / s for m, s in zip(CLIP_MEAN, CLIP_STD)], [1 / s for s in CLIP_STD])
    for image, label in itertools.islice((sample for batch in batches for sample in zip(*batch)), 24):
        tile = v2.functional.to_pil_image(normalize(255 * image.cpu(), *back).clamp(0, 1))
        tile = ImageOps.scale(tile, math.ceil(128 / tile.width), Image.Resampling.NEAREST)
        tile, mixed = ImageOps.expand(tile, (0, 0, 0, 14)), label.nonzero() if label.ndim else [label]
        ImageDraw.Draw(tile).text((2, tile.height - 13), " + ".join(dataset.classes[i] for i in mixed))
        tiles.append(v2.functional.pil_to_tensor(tile))
    v2.functional.to_pil_image(torchvision.utils.make_grid(tiles)).save(file, "PNG")


class Monitor:
    """What a run tells, on a terminal by a bar, and in files; and the stop signals that it is sent."""

    def __init__(self, plan: tuple, system: System, metrics: Path) -> None:
        self.plan, self.system, self.metrics = plan, system, metrics
        quiet = True if system.rank else None  # None: if it is no terminal
        self.bar = tqdm(total=plan.total_steps, unit="step", dynamic_ncols=True, delay=0.1, disable=quiet)
        self.since, self.waited = time.perf_counter(), 0.0  # seconds of waiting for data since then
        self.stops: list[int] = []  # only noted: torchrun may send several, which mean no more than one
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
                signal.signal(number, self.note_stop)

    def note_stop(self, number: int, _) -> None:
        """What a stop signal does from now on."""
        self.stops.append(number)
        with contextlib.suppress(OSError):  # no print: the signal may have come in the midst of one
            os.write(2, b"\nftclip: stopping as soon as all is saved\n" * (len(self.stops) == 1))

    def report(self, step: int, steps: int, loss: float, lr: float) -> None:
        """Loss and lr of the last of some steps, and how fast they were."""
        seconds, device = time.perf_counter() - self.since, self.system.device
        text = f"loss {loss:.4f}  lr {lr:.2e}  {steps * self.plan.batch_size / seconds:,.0f} images/s"
        text += f"  {self.waited / seconds:.0%} waiting for data"
        if device.type == "cuda":
            text += f"  {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = tqdm.format_interval(seconds / steps * (self.plan.total_steps - step))
            print(f"step {step:,}/{self.plan.total_steps:,}  {text}  {left} left", flush=True)
        self.since, self.waited = time.perf_counter(), 0.0

    def end_epoch(self, history: list[dict]) -> None:
        """The last record and the best, in words; the plan and all records in metrics.jsonl."""
        record = history[-1]
        text = f"epoch {record['epoch']}/{self.plan.epochs}  train loss {record['train_loss']:.4f}"
        for key in [key for key in ("raw_top1", "ema_top1") if key in record]:
            best = max((past for past in history if key in past), key=lambda past: past[key])
            text += f"  {key[:3]} top-1 {record[key]:.2f} % (best {best[key]:.2f} %, epoch {best['epoch']})"
        tqdm.write(text)
        if self.system.rank == 0:
            lines = ({"config": self.plan._asdict()}, *history)
            self.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            with contextlib.suppress(ImportError):  # without matplotlib, describe has told how to get it
                from matplotlib.figure import Figure

                figure = Figure((9, 2.6), layout="constrained")
                panels, epochs = figure.subplots(1, 3)[[0, 1, 1, 2]], range(1, len(history) + 1)
                for panel, key in zip(panels, ("train_loss", "raw_top1", "ema_top1", "lr")):
                    panel.plot(epochs, [record.get(key, math.nan) for record in history], ".-", label=key)
                    panel.legend()
                figure.savefig(self.metrics.with_name("curves.png"))
        self.since, self.waited = time.perf_counter(), 0.0


def main(argv: list[str] | None = None) -> int:
    """Do what the flags say; nothing but the demo's images is written before everything has been checked.

    Returns the exit status: 0, or 128 + the signal that stopped the run. Raises ValueError for what the user
    can put right.
    """
    args = parse_args(argv)
    system = make_system(args)
    if args.eval:
        model, classes, transform = load_classifier(args.checkpoint, system.device)
        val_set = FolderDataset(f"{args.data or 'imagenet'}/val", read_image, transform, classes=classes)
        images = start_loader(val_set, system, batch_size=args.micro_batch_size or 64)
        result = evaluate({"model": model}, images, system.amp_dtype)
        text = "{model_correct} of {images} right, top-1 {model_top1:.3f} %, top-5 {model_top5:.3f} %"
        print(f"{args.checkpoint}, {model.config['vision_cfg']['image_size']} pixels:", text.format(**result))
        return 0
    plan, data_sets, output = plan_of(args, system)
    keys = ("num_classes", "image_size", "quick_gelu", "drop_path", "train_blocks", "freeze_patch_embed")
    build = functools.partial(build_model, **{key: getattr(plan, key) for key in keys})
    if args.dry_run:
        with torch.device("meta"):  # shapes without numbers: no time, no memory
            describe(plan, system, build(args.model, pretrained=plan.pretrained))
    elif args.preview and system.rank == 0:
        draw_preview(args.preview, plan, system, data_sets[0])
        print(f"{args.preview}: 24 training images as the model gets them")
    if args.dry_run or args.preview:
        return 0

    monitor = Monitor(plan, system, output / "metrics.jsonl")  # early: from here, all hear a stop signal
    may_change = ("name", "micro_batch_size", "accumulation", "save_every", "workers")
    config = {key: value for key, value in plan._asdict().items() if key not in may_change}
    last, best = output / "last.pt", output / "best.pt"
    state = load_checkpoint(last) if last.exists() else None
    if best.exists() if state is None else "step" not in state:
        raise ValueError(f"{output} has a run's weights but no last.pt of it: give another --output")
    step, was = (state["step"], state["config"]) if state else (0, config)
    monitor.bar.n = monitor.bar.initial = step  # by which it estimates the time left
    changes = [f"{key} {was.get(key)} → {config[key]}" for key in config if config[key] != was.get(key)]
    if changes:
        way = "give its values to resume it, or another --output"
        raise ValueError(f"{last} is of another run ({', '.join(changes)}): {way}")
    if dist.is_initialized():  # also, nobody may write before everybody has looked
        views: list = [None] * system.world
        dist.all_gather_object(views, (step, config))
        if any(view != views[0] for view in views):
            raise ValueError(f"not all processes see the same --data and {last}: put both where all see them")
    torch.manual_seed(plan.seed)
    classifier = build(state["model_config"]) if state else build(args.model, pretrained=plan.pretrained)
    classifier.to(system.device).trunk.set_grad_checkpointing(args.grad_checkpointing)
    describe(plan, system, classifier)
    print(f"resumed from {last}, step {step}" if state else f"a new run in {output}")
    head = {"model_config": classifier.config, "classes": data_sets[0].classes, "config": config}
    head |= {"mean": CLIP_MEAN, "std": CLIP_STD}

    def save(name: str, contents: dict) -> None:
        if system.rank == 0:
            save_checkpoint(output / name, head | contents)

    history, signals = train(plan, system, classifier, state, data_sets, save, monitor), monitor.stops
    monitor.bar.close()
    with contextlib.suppress(RuntimeError):  # the first to go would have torchrun end the others
        all_sum(0)
    if history:
        print(f"finished: {best} has the {'EMA' if plan.ema_decay else 'raw'} weights of val's best epoch")
        return 0
    name = signal.Signals(signals[0]).name if signals else "a signal to another process"
    print(f"stopped by {name}: the same command resumes from {last}")
    return 128 + (signals[0] if signals else signal.SIGTERM)


def run() -> int:
    """main(), with what a user can put right as one sentence on stderr; the exit status."""
    try:
        return main()
    except KeyboardInterrupt:  # outside training, where there is nothing to save
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # most likely rank 0 has said the same, or died, and torchrun now ends the others
        trace, text = traceback.format_exc().rstrip(), str(error).rstrip(". \n").split("\n")[-1]
        # A sentence of this file's, perhaps from a loader's worker, whose traceback is part of its message.
        if isinstance(error, ValueError) and re.findall(r'File "(.+?)", line', trace)[-1] == __file__:
            text = re.split("^ValueError: ", trace, flags=re.MULTILINE)[-1].replace("\n", " ")
        elif "out of memory" in trace:
            text = "the GPU's memory is full: halve --micro-batch-size, the global batch stays the same"
        elif re.search("DataLoader worker|shared memory|open files", text):
            text += ": if memory, /dev/shm (in Docker: --ipc=host) or ulimit -n is too small, lower --workers"
        elif not isinstance(error, OSError):
            print(trace, file=sys.stderr)
            return 1
        print(f"ftclip: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = run()
    sys.stdout.flush()
    # Python's own end would wait for threads of gloo's, in torch 2.6 for ever. Workers end with their parent.
    os._exit(status)
