"""WeCLIP's CAM: Grad-CAM of CLIP's softmax over texts (weclip.md section 3).

All images share one forward pass of the last block. The gradient of each class's probability is
written out, and only what the channel weights need of it is computed: the last matrix products of
the backward pass come after the sum over patches (section 9, items 1 and 2).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.maps.pseudo_labels import present_slots
from wsss.models.vit import merge_heads, split_heads

PAIRS = 16  # of image and class, differentiated at once: bounds the memory of many classes


@dataclass(frozen=True)
class Normed:
    """What a layer norm's backward pass needs of its input.

    Attributes:
        unit: input of mean 0 and variance 1, (B, L, D).
        inverse: one over the standard deviation, (B, L, 1).
        weight: of the norm, (D,).
    """

    unit: Tensor
    inverse: Tensor
    weight: Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm, tokens: Tensor) -> "Normed":
        """Normalise tokens (B, L, D) without weight and bias."""
        inverse = (tokens.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
        return cls(F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps), inverse, norm.weight)

    def gradient(self, images: Tensor, gradient: Tensor) -> Tensor:
        """Give the gradient at the input of each pair's image, from that at the norm's output.

        Args:
            images: index of the image of every pair, (P,).
            gradient: (P, L, D), or (P, 1, D) where all tokens have the same.
        """
        unit, gradient = self.unit[images], gradient * self.weight
        centred = gradient - gradient.mean(-1, keepdim=True)
        return self.inverse[images] * (centred - unit * (gradient * unit).mean(-1, keepdim=True))


@dataclass(frozen=True)
class LastBlock:
    """A forward pass of the last block, its attention ordinary, with all that Grad-CAM needs.

    L = P + N tokens, prefix first.

    Attributes:
        block: timm's block.
        target: a = LN1(x), patch rows, (B, N, D).
        queries: scaled, patch rows, (B, heads, N, d).
        keys: (B, heads, L, d).
        values: (B, heads, L, d).
        attention: (B, heads, L, L).
        middle: LN2 at the patch rows of y = x + Attn(a).
        slope: derivative of the MLP's activation at the patch rows, (B, N, 4 D).
        last: LN_post at the patch rows of z = y + MLP(LN2(y)).
        embedding: mean of LN_post(z) over patch rows, projected, (B, E).
        projection: (D, E), or None for the identity.
    """

    block: Any
    target: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    middle: Normed
    slope: Tensor
    last: Normed
    embedding: Tensor
    projection: Tensor | None

    @property
    def count(self) -> int:
        """N."""
        return self.queries.shape[2]

    @property
    def num_prefix(self) -> int:
        """P."""
        return self.keys.shape[2] - self.count

    @classmethod
    def run(
        cls, block: Any, norm: nn.LayerNorm, projection: Tensor | None, tokens: Tensor, prefix: int
    ) -> "LastBlock":
        """Run the block on tokens (B, P+N, D) of the one before; ``projection`` is (D, E)."""
        attn = block.attn
        target = block.norm1(tokens)
        queries, keys, values = split_heads(attn.qkv(target), attn.num_heads)
        queries = queries * attn.scale
        attention = (queries @ keys.transpose(-2, -1)).softmax(-1)  # (B, heads, L, L)
        mixed = attention[:, :, prefix:] @ values
        # the class token is not averaged, and no other row needs its own: it ends here
        tokens = tokens[:, prefix:] + attn.proj(merge_heads(mixed))
        hidden = block.mlp.fc1(block.norm2(tokens))
        with torch.enable_grad():
            inner = hidden.detach().requires_grad_()
            active = block.mlp.act(inner)
            (slope,) = torch.autograd.grad(active.sum(), inner)  # entry by entry
        middle = Normed.of(block.norm2, tokens)
        tokens = tokens + block.mlp.fc2(active.detach())
        embedding = norm(tokens).mean(1)
        if projection is not None:
            embedding = embedding @ projection
        last = Normed.of(norm, tokens)
        return cls(
            block, target[:, prefix:], queries[:, :, prefix:], keys, values, attention, middle,
            slope, last, embedding, projection,
        )  # fmt: skip

    def branch_gradients(self, images: Tensor, cotangents: Tensor) -> Tensor:
        """Compute the gradient of scores in the attention branch before its projection, (P, N, D).

        The residual is no function of a, so nothing else of the gradient at y is needed.

        Args:
            images: index of the image of every pair, (P,).
            cotangents: gradient of each pair's score in its image's embedding, (P, E).
        """
        mlp = self.block.mlp
        if self.projection is not None:
            cotangents = cotangents @ self.projection.T
        row = cotangents[:, None] / self.count  # (P, 1, D), the same for every patch
        outer = self.last.gradient(images, row)  # at z, (P, N, D)
        inner = (outer @ mlp.fc2.weight) * self.slope[images]
        branch = outer + self.middle.gradient(images, inner @ mlp.fc1.weight)  # at y
        return branch @ self.block.attn.proj.weight

    def channel_weights(self, gradients: Tensor) -> Tensor:
        """Compute alpha (B, S, D): the mean over patches of a score's gradient in ``target``.

        With g the given gradient, O attention x values and r_i = g_i O_i, the gradient of the
        attention's logits is A_ij (g_i v_j - r_i). Of it only sums over patches are needed, and
        these are products with A alone: no N x L matrix is made for a class.

        Args:
            gradients: of :meth:`branch_gradients`, for the slots of every image, (B, S, N, D).
        """
        attn, heads = self.block.attn, self.block.attn.num_heads
        g = gradients.unflatten(3, (heads, -1)).permute(0, 3, 2, 1, 4)  # (B, heads, N, S, d)
        rows = self.attention[:, :, self.num_prefix :]  # (B, heads, N, L)
        prefix, values = rows[..., : self.num_prefix], self.values[:, :, : self.num_prefix]
        mixed = (rows @ self.values)[:, :, :, None]  # O, (B, heads, N, 1, d)
        r = (g * mixed).sum(-1)  # (B, heads, N, S)
        # sum_i A_ij (g_i v_j - r_i), for every key j: (B, heads, L, S)
        spread = rows.transpose(2, 3) @ torch.cat([g.flatten(3), r], dim=3)
        along, less = spread.split([g.shape[3] * g.shape[4], g.shape[3]], dim=3)
        columns = (along.unflatten(3, g.shape[3:]) * self.values[:, :, :, None]).sum(-1) - less
        query = columns.transpose(2, 3) @ self.keys * attn.scale  # (B, heads, S, d)
        # sum over patches j of the same, for every query i: what the prefix leaves of zero
        left = prefix.sum(-1, keepdim=True) * r - (g @ (prefix @ values)[..., None])[..., 0]
        key = left.transpose(2, 3) @ self.queries
        value = ((1 - prefix.sum(-1))[..., None, None] * g).sum(2)  # (B, heads, S, d)
        sums = torch.stack([query, key, value], dim=1)  # (B, 3, heads, S, d)
        return sums.permute(0, 3, 1, 2, 4).flatten(2) @ attn.qkv.weight / self.count


@dataclass(frozen=True)
class Texts:
    """Text features, unit rows.

    Attributes:
        foreground: of the classes, (K, E).
        background: (G, E).
        scale: the inverse temperature, a scalar.
    """

    foreground: Tensor
    background: Tensor
    scale: Tensor


#: class indices of each image's slots, and which slots are valid; each (B, S)
Slots = tuple[Tensor, Tensor]


def class_slots(labels: Tensor) -> Slots:
    """Give the present classes of every image, ascending, (B, S), and which slots are valid.

    S is the largest number of classes in one image; there is one empty slot where none has any.
    """
    ids, valid = present_slots(labels)  # the background leads
    if ids.shape[1] == 1:
        return ids, torch.zeros_like(valid)
    return ids[:, 1:] - 1, valid[:, 1:]


def text_logits(embedding: Tensor, texts: Texts, slots: Slots) -> tuple[Tensor, Tensor]:
    """Compare images with the texts of their slots and of the background.

    Args:
        embedding: (B, E).
        texts: of classes and background.
        slots: as of :func:`class_slots`.

    Returns:
        Logits s (B, S+G), minus infinity in empty slots, and the texts (B, S+G, E).
    """
    ids, valid = slots
    common = texts.background.expand(len(ids), -1, -1)
    rows = torch.cat([texts.foreground[ids], common], dim=1)
    logits = texts.scale * (rows @ F.normalize(embedding, dim=1)[..., None])[..., 0]
    empty = F.pad(~valid, (0, len(texts.background)), value=False)
    return logits.masked_fill(empty, -torch.inf), rows


def score_gradients(
    embedding: Tensor,
    logits: Tensor,
    texts: Tensor,
    pairs: tuple[Tensor, Tensor],
    scale: Tensor | None,
) -> Tensor:
    """Give the gradient (P, E) of each pair's probability in the embedding e of its image.

    dp_c/de = scale p_c (I - u u^T) (t_c - sum_j p_j t_j) / |e|, u = e / |e|.

    Args:
        embedding: (B, E).
        logits: (B, S+G) of :func:`text_logits`.
        texts: (B, S+G, E).
        pairs: index of image and of slot, each (P,).
        scale: the inverse temperature; None leaves out the factor scale p_c (1 - p_c) / |e|, which
            vanishes where a class is sure. Every map is divided by its maximum anyway.
    """
    image, slot = pairs
    logits, texts, own = logits[image], texts[image], slot[:, None]
    others = logits if scale is not None else logits.scatter(1, own, -torch.inf)
    mean = (others.softmax(1)[..., None] * texts).sum(1)
    place = own[..., None].expand(-1, 1, texts.shape[2])
    direction = texts.gather(1, place)[:, 0] - mean
    unit = F.normalize(embedding, dim=1)[image]
    gradient = direction - unit * (unit * direction).sum(1, keepdim=True)
    if scale is None:
        return gradient
    factor = scale * logits.softmax(1).gather(1, own)
    return gradient * factor / embedding.norm(dim=1)[image, None]


def unit_range(maps: Tensor, eps: float = 1e-7) -> Tensor:
    """Subtract each map's (..., h, w) minimum and divide by its maximum plus ``eps``."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (maps.amax((-2, -1), keepdim=True) + eps)


@dataclass(frozen=True)
class ClassMaps:
    """Grad-CAMs of a batch.

    Attributes:
        cam: of every slot, normalised twice, (B, S, N); zero in empty slots.
        weights: alpha of every slot, (B, S, D).
        logits: of all texts, (B, S+G).
    """

    cam: Tensor
    weights: Tensor
    logits: Tensor


def grad_cam(
    last: LastBlock, texts: Texts, slots: Slots, *, of_probability: bool = False
) -> ClassMaps:
    """Compute the CAM of every slot: ReLU(sum_d alpha_d a_id), its range stretched twice to [0, 1).

    Args:
        last: forward pass of the last block on B images.
        texts: of classes and background.
        slots: as of :func:`class_slots`.
        of_probability: take the gradient of p_c itself, see :func:`score_gradients`.
    """
    ids, valid = slots
    logits, rows = text_logits(last.embedding, texts, slots)
    scale = texts.scale if of_probability else None
    branch = last.target.new_zeros(*ids.shape, *last.target.shape[1:])  # (B, S, N, D)
    image, slot = valid.nonzero(as_tuple=True)
    for part in zip(image.split(PAIRS), slot.split(PAIRS), strict=True):
        gradients = score_gradients(last.embedding, logits, rows, part, scale)
        branch[part] = last.branch_gradients(part[0], gradients)
    weights = last.channel_weights(branch)  # (B, S, D)
    cam = (weights @ last.target.transpose(1, 2)).relu()[:, :, None]  # (B, S, 1, N)
    return ClassMaps(unit_range(unit_range(cam))[:, :, 0], weights, logits)
