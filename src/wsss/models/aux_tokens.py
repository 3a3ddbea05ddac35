"""Final tokens and those of an auxiliary block, each with a classifier of its own (toco.md 1)."""

from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from wsss.models.backbone import Backbone, Features, token_map


def encode_with_aux(backbone: Backbone, images: Tensor, block: int) -> Features:
    """Give features of images (B, 3, H, W), with the tokens of an auxiliary 0-based block."""
    # the last "intermediate" is the normed output, so it needs no tap
    return backbone(images, taps=() if block == backbone.depth - 1 else (block,))


def aux_map(features: Features, block: int) -> Tensor:
    """Give tokens of the auxiliary block as a map (B, D, h, w); they are not normed."""
    return features.as_map(features.intermediates.get(block, features.patch_tokens))


def aux_map_alone(backbone: Backbone, images: Tensor, block: int) -> Tensor:
    """Give :func:`aux_map` of images (B, 3, H, W) and nothing else; no block above is run."""
    if block == backbone.depth - 1:
        return backbone(images).patch_map
    tokens, grid = backbone.embed(images)
    for layer in backbone.vit.blocks[: block + 1]:
        tokens = layer(tokens)
    return token_map(tokens[:, backbone.num_prefix_tokens :], grid)


def max_pooled_logits(classifier: nn.Conv2d, tokens: Tensor) -> Tensor:
    """Take the channel-wise maximum over tokens (B, D, h, w), then the linear map: (B, K)."""
    logits: Tensor = classifier(adaptive_max_pool2d(tokens, 1))
    return logits.flatten(1)
