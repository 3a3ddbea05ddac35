"""The shared encoder: any timm ViT, at any image size, with what a WSSS method needs from it.

All methods see the same class, so a comparison never mixes position handling or weight sources.
Three things differ from calling timm directly:

* positions are resized **without** antialias on every call, as each method's official code does
  it: bicubically, GETAM bilinearly (timm's ``dynamic_img_size`` antialiases: up to 0.13 away at 96
  px);
* the hybrid's convolutions are standardised by (w - mean) / (std + 1e-5), as its weights were
  trained (timm divides by sqrt(var + 1e-8): up to 1.2 % away);
* the weights come from exactly one stated source (a pinned timm tag, a local file, or random),
  and :attr:`Backbone.weights_info` records which, with hashes. There is no silent fallback.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, PatchEmbed, StdConv2dSame, pad_same
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wsss.checkpoints import (
    file_sha256,
    first_line,
    fit_positions,
    load_state_dict_strictly,
    read_state_dict,
)
from wsss.errors import WSSSError
from wsss.places import PACKAGE

HYBRID = "vit_base_r50_s16_384"  # the one convolutional stem that is supported


@dataclass(frozen=True)
class AttentionParts:
    """What one block's attention was made of, without the N x N map itself.

    Attributes:
        queries: already scaled, (B, heads, P+N, d).
        keys: (B, heads, P+N, d).
        values: (B, heads, P+N, d).
        output: attention times values, (B, heads, P+N, d), in the graph of all that follows.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor


@dataclass(frozen=True)
class Features:
    """What the encoder gives for a batch of B images on a token grid of h x w (N = h*w).

    Attributes:
        cls_tokens: prefix tokens after the final norm, (B, P, D); class token(s), then registers.
        patch_tokens: patch tokens after the final norm, (B, N, D), row-major.
        grid: (h, w) in tokens.
        intermediates: block index -> patch tokens after that block, (B, N, D), *not* normed.
        attentions: block index -> softmax attention of that block, (B, heads, P+N, P+N).
        prefixes: block index -> prefix tokens after that block, (B, P, D), *not* normed.
        parts: block index -> queries, keys, values and output of that block's attention.
        stem_maps: outputs of a hybrid's ResNet stages, (B, 256, H/4, W/4), (B, 512, H/8, W/8) and
            (B, 1024, H/16, W/16); empty for a plain ViT.
    """

    cls_tokens: Tensor
    patch_tokens: Tensor
    grid: tuple[int, int]
    intermediates: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    prefixes: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[int, AttentionParts] = field(default_factory=dict)
    stem_maps: tuple[Tensor, ...] = ()

    def as_map(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, D) as a feature map (B, D, h, w)."""
        return token_map(tokens, self.grid)

    @property
    def patch_map(self) -> Tensor:
        """The final patch tokens as a feature map, (B, D, h, w)."""
        return self.as_map(self.patch_tokens)


def token_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, D) on a grid of (h, w) as a contiguous feature map (B, D, h, w).

    A transposed view would pass for channels-last, and so would all that convolutions make of it:
    their backward pass then takes three times as long on a CPU. Where channels-last helps, the
    weights say so (``trainer.channels_last``).
    """
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


@dataclass(frozen=True)
class WeightsInfo:
    """Where a backbone's weights came from; part of every result's protocol.

    Attributes:
        name: timm model name.
        source: ``timm:<tag>``, ``file:<file name>`` or ``random``.
        pretraining: the data behind the weights, as the configuration states it.
        file_sha256: hash of the local file, or None.
        state_sha256: hash over names, shapes and values of the loaded encoder.
    """

    name: str
    source: str
    pretraining: str
    file_sha256: str | None
    state_sha256: str

    def as_dict(self) -> dict[str, str | None]:
        """A plain dictionary for ``results.json`` and hyperparameters."""
        return asdict(self)


class Backbone(nn.Module):
    """A timm ViT, DeiT, DINOv2 or ResNet-ViT hybrid encoder that accepts any image size.

    Args:
        name: timm model name; with ``weights="timm"`` it must carry its pretrained tag
            (``vit_base_patch16_224.orig_in21k_ft_in1k``), since untagged names change meaning.
        weights: ``"timm"`` (download or cache), ``"random"``, a path to a ``.pth`` /
            ``.safetensors`` file, or ``package:<path>`` for a file shipped inside ``wsss``.
        pretraining: the data behind the weights, recorded with every result.
        overrides: arguments for timm's constructor (``patch_size``, ``depth``, ``img_size``, ...).

    Raises:
        WSSSError: unknown name, not a plain ViT or the hybrid, missing or unfitting weights.
    """

    #: How positions are resized, see :func:`resize_positions`; a method may set them
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    position_offset: float | None = None

    def __init__(
        self,
        *,
        name: str,
        weights: str = "timm",
        pretraining: str = "unstated",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.vit = _create_vit(name, pretrained=weights == "timm", overrides=dict(overrides or {}))
        source, file_hash = weights, None
        if weights == "timm":
            source = f"timm:{name}"
        elif weights != "random":
            path = _weights_path(weights)
            load_encoder(self.vit, read_state_dict(path), str(path))
            source, file_hash = f"file:{path.name}", file_sha256(path)
        self.weights_info = WeightsInfo(
            name, source, pretraining, file_hash, state_sha256(self.vit.state_dict())
        )

    @property
    def dim(self) -> int:
        """Width D of the tokens."""
        return int(self.vit.embed_dim)

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, a hybrid's stem included."""
        return int(self.vit.patch_embed.feat_ratio())

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of :attr:`Features.stem_maps`."""
        if not isinstance(self.vit.patch_embed, HybridEmbed):
            return ()
        return tuple(info["num_chs"] for info in self.vit.patch_embed.backbone.feature_info[1:])

    @property
    def num_prefix_tokens(self) -> int:
        """Number P of class, distillation and register tokens."""
        return int(self.vit.num_prefix_tokens)

    def forward(
        self,
        images: Tensor,
        *,
        taps: Sequence[int] = (),
        attentions: Sequence[int] = (),
        parts: Sequence[int] = (),
    ) -> Features:
        """Encode a batch.

        Args:
            images: (B, 3, H, W), normalised. Rows and columns beyond the last whole patch are
                dropped on the right and at the bottom, as a strided convolution does.
            taps: 0-based blocks whose raw tokens are wanted; negative counts from the end.
            attentions: 0-based blocks whose attention maps are wanted. Only these leave fused
                attention, since a map of N x N is what makes large images expensive.
            parts: 0-based blocks whose queries, keys, values and output are wanted; these stay on
                fused attention.

        Raises:
            WSSSError: the image is smaller than one patch.
        """
        stem_maps = self._stem_maps(images)
        tokens, grid = self.embed(images, stem_maps)
        wanted_taps = {index % self.depth for index in taps}
        wanted_maps = {index % self.depth for index in attentions}
        wanted_parts = {index % self.depth for index in parts}
        intermediates: dict[int, Tensor] = {}
        prefixes: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        kept: dict[int, AttentionParts] = {}
        for index, block in enumerate(self.vit.blocks):
            if index in wanted_maps:
                tokens, maps[index] = _block_with_attention(block, tokens)
            elif index in wanted_parts:
                tokens, kept[index] = _block_with_parts(block, tokens)
            else:
                tokens = block(tokens)
            if index in wanted_taps:
                prefixes[index], intermediates[index] = self._split(tokens)
        prefix, patches = self._split(self.vit.norm(tokens))
        return Features(prefix, patches, grid, intermediates, maps, prefixes, kept, stem_maps)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, P, D) and patch tokens (B, N, D)."""
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    def _stem_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of a hybrid's ResNet stages, see :class:`Features`; none of a plain ViT."""
        if not isinstance(self.vit.patch_embed, HybridEmbed):
            return ()
        stem = self.vit.patch_embed.backbone
        maps = [stem.stem(self._whole_patches(images))]
        for stage in stem.stages:
            maps.append(stage(maps[-1]))
        return (*maps[1:-1], stem.norm(maps[-1]))

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) without the rows and columns beyond the last whole patch."""
        height, width = (side // self.patch_size * self.patch_size for side in images.shape[-2:])
        if min(height, width) == 0:
            raise WSSSError(
                f"image of {tuple(images.shape[-2:])} pixels is smaller than one {self.patch_size} "
                "px patch; use larger images"
            )
        return images[..., :height, :width]

    def embed(
        self, images: Tensor, stem_maps: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, tuple[int, int]]:
        """Input of the first block, (B, P+N, D): patches and prefix with positions; and the grid.

        Args:
            images: (B, 3, H, W), normalised.
            stem_maps: what a hybrid's stem made of them, where the caller has that already.

        Raises:
            WSSSError: the image is smaller than one patch.
        """
        vit, patch = self.vit, self.patch_size
        stem_maps = stem_maps or self._stem_maps(images)
        square = images.shape[-2] == images.shape[-1]
        images = self._whole_patches(images)
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        embedded = vit.patch_embed.proj(stem_maps[-1] if stem_maps else images)  # (B, D, h, w)
        patches = embedded.flatten(2).transpose(1, 2)  # (B, N, D)
        if not stem_maps:
            patches = vit.patch_embed.norm(patches)
        names = ("cls_token", "dist_token", "reg_token")
        prefix = [getattr(vit, name) for name in names if getattr(vit, name, None) is not None]
        prefix = [token.expand(len(images), -1, -1) for token in prefix]
        positions = resize_positions(
            vit.pos_embed,
            grid,
            0 if vit.no_embed_class else self.num_prefix_tokens,
            mode=self.position_mode,
            offset=self.position_offset,
            square=square,
        )
        if vit.no_embed_class:  # DINOv2 with registers: prefix tokens carry no position
            tokens = torch.cat([*prefix, patches + positions], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + positions
        return vit.norm_pre(vit.pos_drop(tokens)), grid


def resize_positions(
    positions: Tensor,
    grid: tuple[int, int],
    num_prefix: int,
    *,
    mode: str = "bicubic",
    offset: float | None = None,
    square: bool = True,
) -> Tensor:
    """Positions (1, P+n*n, D) for a grid of (h, w): no antialias, prefix untouched.

    Args:
        positions: as stored.
        grid: (h, w) that is wanted; the stored one is left as it is.
        num_prefix: P.
        mode: of interpolation, ``bicubic`` or ``bilinear``.
        offset: None resizes to (h, w). A number scales by (h + offset) / n and (w + offset) / n, as
            DINO's descendants do with 0.1: pixel i is then sampled at (i + 1/2) n / (h + offset) -
            1/2, about 1e-3 away from the former (clustercam.md section 1, "Stem").
        square: whether the image is; with an offset only then the stored grid is left as it is.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if (side, side) == grid and (offset is None or square):
        return positions
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    if offset is None:
        patches = F.interpolate(patches, size=grid, mode=mode, align_corners=False)
    else:
        scale = ((grid[0] + offset) / side, (grid[1] + offset) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode=mode, align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, T, D / heads), of a projection (B, T, 3 D)."""
    batch, count, _ = qkv.shape
    queries, keys, values = qkv.reshape(batch, count, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return queries, keys, values


def merge_heads(mixed: Tensor) -> Tensor:
    """Heads (B, heads, T, D / heads) side by side again, (B, T, D)."""
    return mixed.transpose(1, 2).flatten(2)


def _block_with_attention(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One pre-norm block with its softmax attention, (B, heads, N, N), kept in the graph."""
    queries, keys, values = _queries_keys_values(block, tokens)
    attention = (queries @ keys.transpose(-2, -1)).softmax(dim=-1)
    mixed = block.attn.attn_drop(attention) @ values
    return _after_attention(block, tokens, mixed), attention


def _block_with_parts(block: Any, tokens: Tensor) -> tuple[Tensor, AttentionParts]:
    """One pre-norm block on fused attention, with what its attention was made of."""
    queries, keys, values = _queries_keys_values(block, tokens)
    dropout = block.attn.attn_drop.p if block.training else 0.0
    mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=1.0)
    return _after_attention(block, tokens, mixed), AttentionParts(queries, keys, values, mixed)


def _queries_keys_values(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block's attention, each (B, heads, N, D / heads); queries are scaled already."""
    attn = block.attn
    queries, keys, values = split_heads(attn.qkv(block.norm1(tokens)), attn.num_heads)
    return attn.q_norm(queries) * attn.scale, attn.k_norm(keys), values


def _after_attention(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a block, from attention times values (B, heads, N, D / heads)."""
    attn = block.attn
    mixed = merge_heads(mixed)
    mixed = attn.proj_drop(attn.proj(attn.norm(mixed)))
    tokens = tokens + block.drop_path1(block.ls1(mixed))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


class StandardisedConv(StdConv2dSame):
    """Convolution with standardised weight: (w - mean) / (population std + 1e-5), SAME padding.

    Source: getam.md section 1, "Hybrid stem"; it is how the weights of the hybrid were trained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Filters (B, C, H, W)."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        if self.same_pad:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _hybrid_embed(**arguments: Any) -> HybridEmbed:
    """The ResNet-50 stem of three stages with :class:`StandardisedConv`."""
    stem = ResNetV2(
        layers=(3, 4, 9),
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=StandardisedConv,
    )
    return HybridEmbed(backbone=stem, **arguments)


def _create_vit(name: str, *, pretrained: bool, overrides: dict[str, Any]) -> VisionTransformer:
    """A plain timm ViT without classification head."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise WSSSError(f"backbone.name={name} is not a timm model{hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if (pretrained or "." in name) and name not in tagged:
        reason = "is not a pretrained tag" if "." in name else "has no pretrained tag"
        raise WSSSError(
            f"backbone.name={name} {reason}, and untagged names change meaning; "
            f"pin one of: {', '.join(tagged) or 'none known to timm'}"
        )
    if architecture == HYBRID:
        overrides = {"embed_layer": _hybrid_embed, **overrides}
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **overrides)
    except OSError as error:
        raise WSSSError(
            f"backbone {name}: its weights are not cached and cannot be downloaded "
            f"({first_line(error)}); fetch the file on a machine with internet "
            "and pass backbone.weights=/path/to/file.safetensors"
        ) from error
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise WSSSError(
            f"backbone {name}: timm cannot build it with overrides {overrides} "
            f"({first_line(error)})"
        ) from error
    if type(vit) is not VisionTransformer and not hasattr(vit, "dist_token"):
        raise WSSSError(
            f"backbone.name={name} is a {type(vit).__name__}; only ViT, DeiT and DINOv2 "
            "(timm's VisionTransformer) are supported"
        )
    if not isinstance(vit.patch_embed, PatchEmbed) and architecture != HYBRID:
        raise WSSSError(
            f"backbone.name={name} has a convolutional stem; choose a plain ViT or {HYBRID}"
        )
    if not hasattr(vit.blocks[0], "ls1"):
        raise WSSSError(f"backbone.name={name} uses an unusual block; choose a plain ViT")
    return vit


def load_encoder(vit: VisionTransformer, state: Mapping[str, Tensor], origin: str) -> None:
    """Load timm-style encoder weights; the position grid follows the file.

    Args:
        vit: the encoder, changed in place.
        state: parameters, with or without ``module.`` / ``encoder.`` / ``backbone.`` prefixes;
            classification heads are ignored, since no method uses them.
        origin: what to call the source in an error.

    Raises:
        WSSSError: missing, extra or misshapen keys, by name.
    """
    state = {_plain_key(key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(("head", "fc_norm"))}
    fit_positions(vit, state.get("pos_embed"))
    load_state_dict_strictly(vit, state, origin)


def _plain_key(key: str) -> str:
    for prefix in ("module.", "encoder.", "backbone.", "vit."):
        key = key.removeprefix(prefix)
    return key


def _weights_path(weights: str) -> Path:
    path = Path(weights).expanduser()
    if weights.startswith("package:"):
        path = PACKAGE / weights.removeprefix("package:")
    if not path.is_file():
        raise WSSSError(
            f"backbone.weights={weights}: no such file; put the weights there, or use "
            "backbone.weights=timm (needs internet once) or backbone.weights=random"
        )
    return path


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes and float32 values of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
