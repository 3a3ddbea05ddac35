"""The shared encoder: any timm ViT, at any image size, with what a WSSS method needs from it.

All methods see the same class, so a comparison never mixes position handling or weight sources.
Three things differ from calling timm directly:

* positions are resized **without** antialias on every call, as each method's official code does
  it: bicubically, GETAM bilinearly (timm's ``dynamic_img_size`` antialiases: up to 0.13 away at 96
  px);
* the hybrid's convolutions are standardised by (w - mean) / (std + 1e-5), as its weights were
  trained (timm divides by sqrt(var + 1e-8): up to 1.2 % away);
* the weights come from exactly one stated source (a pinned timm tag, a local file, a file of the
  Hugging Face hub, or random), and :attr:`Backbone.weights_info` records which, with hashes and
  what they were trained on. There is no silent fallback.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import HybridEmbed
from torch import Tensor, nn

from wsss.core.errors import WSSSError
from wsss.core.files import file_sha256
from wsss.core.pretraining import pretraining_of, stated_pretraining
from wsss.core.ranges import BelowOne, Fraction, Layers, Positive, Side, Tokens, Width
from wsss.core.schema import check_value, nearest
from wsss.core.supervision import CLIP, names_clip
from wsss.models.clip import (
    check_gelu,
    find_projection,
    image_tower,
    is_clip_state,
    projection_width,
)
from wsss.models.hub import HUB
from wsss.models.vit import (
    AttentionParts,
    block_with_attention,
    block_with_mean_attention,
    block_with_parts,
    create_vit,
    resize_positions,
)
from wsss.models.weights import load_encoder, read_state_dict, state_sha256, weights_path

#: what may be set of an architecture, with its range. timm takes more: among it files of weights,
#: which would be loaded behind the stated source
ARCHITECTURE: dict[str, Any] = {
    "img_size": Side | tuple[Side, Side],
    "patch_size": Side,
    "embed_dim": Width,
    "depth": Layers,
    "num_heads": Layers,
    "mlp_ratio": Annotated[float, Gt(0), Le(64)],
    "num_classes": Annotated[int, Ge(0), Le(2**16)],
    "reg_tokens": Tokens,
    "init_values": Positive | None,
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "no_embed_class", "pre_norm"), bool),
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm", "class_token", "final_norm"), bool),
    **dict.fromkeys(("act_layer", "norm_layer"), str | Callable[..., Any]),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate"), BelowOne),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), BelowOne),
}
LARGEST = 10**10  # weights of an encoder; more than a machine has room for


def check_overrides(overrides: Mapping[str, Any], path: str = "backbone") -> None:
    """Raise WSSSError unless the overrides of an encoder change its architecture, within limits.

    Args:
        overrides: arguments for timm's constructor.
        path: dotted key of the backbone, for the error.
    """
    for key, value in overrides.items():
        if key not in ARCHITECTURE:
            raise WSSSError(
                f"{path}.overrides.{key}: no part of an architecture{nearest(key, ARCHITECTURE)}; "
                f"weights come from {path}.weights alone"
            )
        check_value(f"{path}.overrides.{key}", value, ARCHITECTURE[key])
    depth, width = overrides.get("depth", 12), overrides.get("embed_dim", 768)
    if (count := depth * width**2 * (4 + 2 * overrides.get("mlp_ratio", 4))) > LARGEST:
        raise WSSSError(
            f"{path}.overrides: depth={depth} and embed_dim={width} make {count:.2g} weights, "
            f"expected at most {LARGEST:.0e}"
        )


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
        mean_attentions: block index -> softmax attention averaged over its heads, (B, P+N, P+N).
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
    mean_attentions: dict[int, Tensor] = field(default_factory=dict)
    stem_maps: tuple[Tensor, ...] = ()

    def as_map(self, tokens: Tensor) -> Tensor:
        """Lay patch tokens (B, N, D) out as a feature map (B, D, h, w)."""
        return token_map(tokens, self.grid)

    @property
    def patch_map(self) -> Tensor:
        """The final patch tokens as a feature map, (B, D, h, w)."""
        return self.as_map(self.patch_tokens)


def token_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay patch tokens (B, N, D) on a grid of (h, w): a contiguous map (B, D, h, w).

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
        source: ``timm:<tag>``, ``file:<file name>``, ``hf_hub:<repository>`` or ``random``.
        pretraining: the data behind the weights (:mod:`wsss.core.pretraining`).
        file_sha256: hash of the local file, or None.
        state_sha256: hash over names, shapes and values of the loaded encoder.
    """

    name: str
    source: str
    pretraining: str
    file_sha256: str | None
    state_sha256: str

    @classmethod
    def stored(cls, content: Mapping[str, Any]) -> "WeightsInfo":
        """Read what :meth:`as_dict` gave; the pretraining as it follows from the weights."""
        return cls(**{**content, "pretraining": stated_pretraining(content)})

    def as_dict(self) -> dict[str, str | None]:
        """Give a plain dictionary for ``results.json`` and hyperparameters."""
        return asdict(self)


class Backbone(nn.Module):
    """A timm ViT, DeiT, DINOv2 or ResNet-ViT hybrid encoder that accepts any image size.

    Args:
        name: timm model name; with ``weights="timm"`` it must carry its pretrained tag
            (``vit_base_patch16_224.orig_in21k_ft_in1k``), since untagged names change meaning.
        weights: ``"timm"`` (download or cache), ``"random"``, a path to a ``.pth`` /
            ``.safetensors`` file, ``package:<path>`` for a file shipped inside ``wsss``, or
            ``hf_hub:ORG/NAME`` for the file of a repository of the Hugging Face hub.
        declared_pretraining: the data behind a file that nobody knows; recorded with every result
            as declared by the user. What known weights were trained on follows from them.
        overrides: arguments for timm's constructor, those of :data:`ARCHITECTURE` (``patch_size``,
            ``depth``, ``img_size``, ...).
        frozen: the encoder learns nothing (:meth:`freeze`), so an optimiser keeps no state of it. A
            CLIP tower keeps its :attr:`projection`.
        mean: of the pixels, from 0 to 1, that the weights were trained with; None: ImageNet's, by
            which images come normalised.
        std: the same of their deviation.

    Raises:
        WSSSError: unknown name, an override that is no part of an architecture, not a plain ViT or
            the hybrid, missing or unfitting weights; a frozen CLIP tower whose weights want another
            GELU than timm builds.
    """

    #: maps a frozen CLIP tower's normed tokens to the space of its texts, (D, E); otherwise None
    projection: Tensor | None

    #: How positions are resized, see :func:`resize_positions`; a method may set them
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    position_offset: float | None = None

    #: From images normalised by ImageNet's colours to those of the weights, each (3, 1, 1); or None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        *,
        name: str,
        weights: str = "timm",
        declared_pretraining: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        frozen: bool = False,
        mean: tuple[Fraction, Fraction, Fraction] | None = None,
        std: tuple[Positive, Positive, Positive] | None = None,
    ) -> None:
        super().__init__()
        self._expect(mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD)
        changed = dict(overrides or {})
        check_overrides(changed)
        width = projection_width(name, changed) if frozen else 0
        if width:
            changed.pop("num_classes", None)
        self.vit = create_vit(
            name, pretrained=weights == "timm", overrides=changed, num_outputs=width
        )
        self.frozen = False
        self.register_buffer("projection", None)
        if width:
            check_gelu(name, self.vit)
            self.projection = self.vit.head.weight.detach().T.contiguous()
            self.vit.reset_classifier(0)
        path = None if weights in ("timm", "random") else weights_path(weights)
        file_hash = file_sha256(path) if path else None
        pretraining = pretraining_of(name, weights, file_hash, declared_pretraining)
        source = f"timm:{name}" if weights == "timm" else weights
        if path is not None:
            state = read_state_dict(path)
            if is_clip_state(state) and not names_clip(name, pretraining):
                pretraining = f"{pretraining} ({CLIP})"
            state = image_tower(state)
            load_encoder(self.vit, state, str(path))
            if self.projection is not None:
                self.projection = find_projection(state, self.projection.shape, str(path))
            source = weights if weights.startswith(HUB) else f"file:{path.name}"
        if frozen:
            self.freeze()
        self.weights_info = WeightsInfo(
            name, source, pretraining, file_hash, state_sha256(self.vit.state_dict())
        )

    def _expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Prepare to give the encoder images of these colours."""
        scale = shift = None
        if (tuple(mean), tuple(std)) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
            ours = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
            scale = (ours[1] / torch.tensor(std)).view(3, 1, 1)
            shift = ((ours[0] - torch.tensor(mean)) / torch.tensor(std)).view(3, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def take_as_given(self) -> None:
        """Leave the colours of images as they come: the method has a setting of its own."""
        self.scale = self.shift = None

    def freeze(self) -> None:
        """Learn nothing from now on: no gradient, no activation kept, eval mode for good."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def thaw(self) -> None:
        """Learn from now on, as an encoder that was never frozen; it has no :attr:`projection`."""
        self.frozen, self.projection = False, None
        self.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

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
        mean_attentions: Sequence[int] = (),
        blocks: int | None = None,
    ) -> Features:
        """Encode a batch; a frozen encoder keeps no gradient.

        Args:
            images: (B, 3, H, W), normalised by ImageNet's colours. Rows and columns beyond the last
                whole patch are dropped on the right and at the bottom, as a strided convolution
                does.
            taps: 0-based blocks whose raw tokens are wanted; negative counts from the end.
            attentions: 0-based blocks whose attention maps are wanted. Only these leave fused
                attention, since a map of N x N is what makes large images expensive.
            parts: 0-based blocks whose queries, keys, values and output are wanted; these stay on
                fused attention.
            mean_attentions: 0-based blocks whose attention averaged over the heads is wanted; it is
                averaged while it is computed.
            blocks: how many are run, from the first; None runs all. The final norm follows the last
                one that is run.

        Raises:
            WSSSError: the image is smaller than one patch.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._encode(images, taps, attentions, parts, mean_attentions, blocks)

    def _encode(
        self,
        images: Tensor,
        taps: Sequence[int],
        attentions: Sequence[int],
        parts: Sequence[int],
        mean_attentions: Sequence[int],
        blocks: int | None,
    ) -> Features:
        """Do what :meth:`forward` says, with gradients as they are set."""
        stem_maps = self._stem_maps(images)
        tokens, grid = self.embed(images, stem_maps)
        wanted_taps = {index % self.depth for index in taps}
        wanted_maps = {index % self.depth for index in attentions}
        wanted_parts = {index % self.depth for index in parts}
        wanted_means = {index % self.depth for index in mean_attentions}
        intermediates: dict[int, Tensor] = {}
        prefixes: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        kept: dict[int, AttentionParts] = {}
        means: dict[int, Tensor] = {}
        for index, block in enumerate(self.vit.blocks[:blocks]):
            if index in wanted_maps:
                tokens, maps[index] = block_with_attention(block, tokens)
            elif index in wanted_parts:
                tokens, kept[index] = block_with_parts(block, tokens)
            elif index in wanted_means:
                tokens, means[index] = block_with_mean_attention(block, tokens)
            else:
                tokens = block(tokens)
            if index in wanted_taps:
                prefixes[index], intermediates[index] = self._split(tokens)
        prefix, patches = self._split(self.vit.norm(tokens))
        return Features(
            prefix, patches, grid, intermediates, maps, prefixes, kept, means, stem_maps
        )

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Split into prefix tokens (B, P, D) and patch tokens (B, N, D)."""
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    def _stem_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Collect the outputs of a hybrid's ResNet stages (:class:`Features`); a ViT has none."""
        if not isinstance(self.vit.patch_embed, HybridEmbed):
            return ()
        stem = self.vit.patch_embed.backbone
        maps = [stem.stem(self._whole_patches(images))]
        for stage in stem.stages:
            maps.append(stage(maps[-1]))
        return (*maps[1:-1], stem.norm(maps[-1]))

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Cut images (B, 3, H, W) after the last whole patch, in the weights' own colours."""
        height, width = (side // self.patch_size * self.patch_size for side in images.shape[-2:])
        if min(height, width) == 0:
            raise WSSSError(
                f"image of {tuple(images.shape[-2:])} pixels is smaller than one {self.patch_size} "
                "px patch; use larger images"
            )
        images = images[..., :height, :width]
        if self.scale is None or self.shift is None:
            return images
        return images * self.scale + self.shift

    def embed(
        self, images: Tensor, stem_maps: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, tuple[int, int]]:
        """Make the first block's input (B, P+N, D): prefix, patches, positions; and the grid.

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
