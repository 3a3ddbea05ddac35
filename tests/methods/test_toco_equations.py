"""ToCo's equations against numbers by hand, and which parameters each term reaches (toco.md 2)."""

from math import exp, log

import pytest
import torch
from test_toco import SIDE, make_batch, tiny
from torch import Tensor

from wsss.methods.losses import pair_masks, ptc_loss
from wsss.methods.toco.contrast import CTCHead, crop_local_views, ctc_loss
from wsss.methods.toco.method import ToCo

# ---- patch tokens --------------------------------------------------------------------------------


def test_ptc_of_four_tokens_by_hand() -> None:
    """Labels 1, 1, 2, 255; cosines 0.6, -0.8 and 0 among the first three. Both orders count."""
    tokens = torch.tensor([[3.0, 0], [1.2, 1.6], [0, -5.0], [7, 7]]).T.reshape(1, 2, 2, 2)
    same, different = pair_masks(torch.tensor([[[1, 1], [2, 255]]]))
    alike, unlike = 2 * 0.6 / (2 + 1), 2 * (0 + 0.8) / (4 + 1)
    loss = ptc_loss(tokens, same, different)
    assert loss.item() == pytest.approx(0.5 * (1 - alike) + 0.5 * unlike, abs=1e-6)


def test_ptc_sums_over_the_batch_before_it_divides() -> None:
    """One image with a pair of cosine 1, one with a pair of cosine 0."""
    tokens = torch.tensor([[[1.0, 0], [2, 0]], [[1, 0], [0, 1]]]).transpose(1, 2)[..., None]
    same, different = pair_masks(torch.tensor([[[3], [3]], [[0], [0]]]))
    assert ptc_loss(tokens, same, different).item() == pytest.approx(0.5 * (1 - 2 / 5), abs=1e-6)


# ---- class tokens --------------------------------------------------------------------------------


def test_ctc_of_two_images_by_hand() -> None:
    """One-dimensional projections; negatives so weak that the constant 1e-4 counts."""
    teacher = torch.tensor([1.0, 2.0, -1.0, 1.0])[:, None]  # view-major: T1 of both, T2 of both
    student = torch.tensor([2.0, -1.0, -5.0, 3.0, 1.0, 0.5])[:, None]  # three views of both
    flags = torch.tensor([[1.0, 0, 1], [1, 1, 1]])
    temperature, total = 0.5, 0.0
    for image in range(2):
        inner = 0.0
        for view in range(2):
            each = [
                exp(teacher[2 * view + image].item() * s.item() / temperature)
                for s in student[image::2]
            ]
            negative = sum(e for e, f in zip(each, flags[image], strict=True) if f == 0) + 1e-4
            inner += sum(
                -log(e / (e + negative)) for e, f in zip(each, flags[image], strict=True) if f == 1
            )
            inner += log(1 + negative)
        total += inner / (2 * (flags[image].sum().item() + 1e-4)) / 2
    loss = ctc_loss(student, teacher, flags, temperature)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_the_projection_is_of_a_unit_vector_by_unit_rows() -> None:
    head = CTCHead(6, hidden=8, bottleneck=4, out=5)
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.normal_()
    tokens = torch.randn(3, 6)
    rows = head.last_layer.parametrizations.weight.original1
    unit_rows = rows / rows.norm(dim=1, keepdim=True)
    hidden = head.mlp(tokens)
    expected = (hidden / hidden.norm(dim=1, keepdim=True)) @ unit_rows.T
    torch.testing.assert_close(head(tokens), expected)
    assert not head.last_layer.parametrizations.weight.original0.requires_grad
    assert rows.requires_grad


def test_contrasts_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    pairs = pair_masks(torch.randint(0, 3, (2, 3, 3)))
    flags = torch.tensor([[1.0, 1, 0, 1, 0], [1.0, 1, 1, 0, 0]])
    # as encoder and heads give them there
    tokens, student, teacher = (
        torch.randn(shape).bfloat16() for shape in ((2, 8, 3, 3), (10, 16), (4, 16))
    )
    with torch.autocast("cpu", torch.bfloat16):
        ptc, ctc = ptc_loss(tokens, *pairs), ctc_loss(student, teacher, flags, 0.5)
    assert torch.equal(ptc, ptc_loss(tokens.float(), *pairs))
    assert torch.equal(ctc, ctc_loss(student.float(), teacher.float(), flags, 0.5))


# ---- local crops ---------------------------------------------------------------------------------


def test_a_crop_is_negative_up_to_a_mean_of_one_fifth() -> None:
    """Crops of 10 x 10: 20 uncertain pixels are a mean of 0.2, 21 are more; a class counts 2."""
    for uncertain, certain, positive in ((20, 0, 0), (21, 0, 1), (0, 10, 0), (1, 10, 1)):
        roi = torch.zeros(1, 13, 13, dtype=torch.long)
        inner = roi[0, 2:10, 2:10].flatten()  # inside all crops
        inner[:uncertain] = 1
        inner[uncertain : uncertain + certain] = 2
        roi[0, 2:10, 2:10] = inner.view(8, 8)
        local = crop_local_views(torch.zeros(1, 3, 13, 13), roi, 10, count=4)
        assert local.corners.amax() <= 2
        assert local.flags.tolist() == [[1, 1, *[positive] * 4]]


@pytest.mark.parametrize("candidates", [3, 4, 5])
def test_too_few_candidates_are_given_up_for_all_places(candidates: int) -> None:
    """Of 4 crops: with 3 places beside the certain foreground all places are drawn from."""
    roi = torch.full((1, 26, 26), 2)
    inner = roi[0, 5:-5, 5:-5].flatten()
    places = [0, 37, 90, 150, 255][:candidates]
    inner[places] = torch.tensor([0, 1, 1, 0, 1])[:candidates]
    roi[0, 5:-5, 5:-5] = inner.view(16, 16)
    drawn = set()
    for seed in range(6):
        torch.manual_seed(seed)
        corners = crop_local_views(torch.zeros(1, 3, 26, 26), roi, 10, count=4).corners[0]
        drawn |= {16 * row + column for row, column in corners.tolist()}
    assert (drawn <= set(places)) == (candidates >= 4)
    assert len(drawn) > 4 or candidates == 4


# ---- routes of the gradient ----------------------------------------------------------------------

REACHED = {
    "cls_loss": {"backbone", "classifier"},
    "cls_aux_loss": {"backbone", "aux_classifier"},
    "ptc_loss": {"backbone"},
    "ctc_loss": {"backbone", "ctc_student"},
    "seg_loss": {"backbone", "decoder"},
    "reg_loss": {"backbone", "decoder"},
}
FELT = {
    "cls_loss": {"image"},
    "cls_aux_loss": {"image"},
    "ptc_loss": {"image"},
    "ctc_loss": {"image", "view2", "local_view"},
    "seg_loss": {"image"},
    "reg_loss": {"image"},
}


def step_with_inputs(module: ToCo) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Losses of a late step, the images that may carry a gradient, and what the step saw."""
    batch = make_batch()
    images = {name: batch[name].requires_grad_() for name in ("image", "view2", "local_view")}
    torch.manual_seed(1)
    step = module.losses(batch, 99)
    return step.losses, images, step.seen


def test_each_term_reaches_its_own_parameters_and_images() -> None:
    module = tiny()
    losses, images, _ = step_with_inputs(module)
    assert set(losses) == set(REACHED)
    for name, loss in losses.items():
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(
            loss, [*parameters.values(), *images.values()], retain_graph=True, allow_unused=True
        )
        moved = {
            key
            for key, gradient in zip([*parameters, *images], found, strict=True)
            if gradient is not None and gradient.any()
        }
        assert {key.split(".")[0] for key in moved & parameters.keys()} == REACHED[name], name
        assert moved & images.keys() == FELT[name], name


def test_the_teacher_passes_no_gradient_to_the_tokens() -> None:
    module = tiny()
    losses, _, seen = step_with_inputs(module)
    tokens, local = seen["features"].cls_tokens[:, 0], seen["local"]
    (gradient,) = torch.autograd.grad(losses["ctc_loss"], seen["features"].cls_tokens)
    alone = tokens.detach().requires_grad_()
    crops = module.backbone(local.crops.flatten(0, 1)).cls_tokens[:, 0].detach()
    student = module.ctc_student(torch.cat([alone, crops]))
    teacher = module.ctc_teacher(tokens.detach())
    temperature = module.settings.temperature
    (expected,) = torch.autograd.grad(ctc_loss(student, teacher, local.flags, temperature), alone)
    torch.testing.assert_close(gradient[:, 0], expected, atol=1e-7, rtol=1e-4)


def test_auxiliary_maps_lead_tokens_and_crops() -> None:
    module = tiny()
    _, _, seen = step_with_inputs(module)
    batch, size = make_batch(), module.settings.local_size
    labels, boxes = batch["labels"], batch["box"]
    with torch.no_grad():
        for name in ("cam", "cam_aux"):
            tokens = module.token_labels(seen[name], labels, boxes, seen["features"].grid)
            pseudo = module.pseudo_labels(batch["image"], seen[name], labels, boxes)
            assert torch.equal(tokens, seen["token_label"]) == (name == "cam_aux")
            assert torch.equal(pseudo, seen["pseudo_label"]) == (name == "cam")
            torch.manual_seed(1)
            crops = module.local_crops(batch["local_view"], seen[name], labels)
            assert torch.equal(crops.flags, seen["local"].flags) == (name == "cam_aux")
    for index, image in ((0, 0), (7, 1)):
        row, column = seen["local"].corners[image, index].tolist()
        part = batch["local_view"][image, :, row : row + size, column : column + size]
        assert torch.equal(seen["local"].crops[index, image], part)


def test_patch_contrast_compares_the_final_tokens() -> None:
    losses, _, seen = step_with_inputs(tiny())
    pairs = pair_masks(seen["token_label"])
    expected = ptc_loss(seen["features"].patch_map[:2], *pairs)
    assert losses["ptc_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses["ptc_loss"].item() != pytest.approx(0.5, rel=1e-3)


def test_refinement_has_the_page_epsilon_and_iterations() -> None:
    par = tiny().par
    assert (par.eps, par.num_iter, par.dilations) == (1e-8, 10, (1, 2, 4, 8, 12, 24))


def test_classes_are_scored_by_the_channels_maxima() -> None:
    module, tokens = tiny(), torch.randn(2, 48, 3, 5)
    expected = tokens.amax((2, 3)) @ module.classifier.weight[:, :, 0, 0].T
    torch.testing.assert_close(module.classify(module.classifier, tokens), expected)


def test_maps_carry_no_gradient_and_absent_classes_none_at_all() -> None:
    module, batch = tiny().eval(), make_batch()
    assert not any(cam.requires_grad for cam in module.raw_cams(batch["image"].requires_grad_()))
    cams = module.cams(batch["image"].detach(), batch["labels"])
    assert cams.shape == (2, 4, SIDE, SIDE)
    assert not cams[batch["labels"] == 0].any()
    assert (cams.amax((2, 3)) > 0.9)[batch["labels"] == 1].all()
