"""What runs on devices: every method, the refinements and the evaluation, in small.

``python tests/device_work.py`` counts all of it on the pretended device and writes
``device_figures.json`` anew; read its diff: one wait more a step is one too many. The figures of
one method, or of "maps" or "evaluation": ``python tests/device_work.py toco``.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from pretended_device import DEVICE, PretendedDevice, real
from small_runs import METHODS, PLAIN, SMALL
from torch import Tensor

from wsss.evaluation.crf_queue import CRFQueue, crf_pool
from wsss.evaluation.protocol import LABEL_MAPS, Protocol
from wsss.evaluation.tally import Tally
from wsss.maps.refine.dense_crf import CRF_PRESETS
from wsss.maps.refine.mean_field import MeanFieldPool, mean_field
from wsss.maps.refine.pamr import PAMR
from wsss.maps.refine.par import PAR
from wsss.maps.refine.random_walk import WalkSettings, walked_maps
from wsss.methods.affinity_net import AffinityNet, AffinityNetSettings
from wsss.methods.base import Batch, WSSSModule
from wsss.methods.losses import dense_energy_loss
from wsss.models.conv_backbone import ConvBackbone
from wsss.runs.compose import compose_run
from wsss.runs.folder import build_data, build_module

FIGURES = Path(__file__).parent / "device_figures.json"
CONF = Path(__file__).parent.parent / "conf" / "method"
STEPS = 6
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
# beside the settings of every small run
FURTHER = {
    "clip_cam": [
        "backbone=vit_pico",
        "backbone.name=vit_base_patch16_clip_quickgelu_224",
        "+backbone.overrides.num_classes=32",
        "backbone.overrides.patch_size=8",
        "backbone.overrides.img_size=96",
        "+backbone.frozen=true",
        "method.text=random",
        "method.static_layers=3",
    ],
    "getam": ["method.energy_weight=1e-7"],
    "segmenter": ["data.train_masks=ground_truth"],
    "segmenter_vit": ["data.train_masks=ground_truth"],
}
#: what a method may give beside the two
LOOKS = ("further_cams", "gallery_maps")
Device = torch.device
#: computes on a device what is compared between devices
Work = Callable[[Device], Any]


def small_module(name: str) -> tuple[WSSSModule, Batch]:
    """Give a method with random weights, and its first batch; the same ones every time."""
    return deepcopy(_built(name))


@cache
def _built(name: str) -> tuple[WSSSModule, Batch]:
    own = [*METHODS.get(name, []), *FURTHER.get(name, [])]
    config = compose_run([f"method={name}", *SMALL, f"budget.max_steps={STEPS}", *own])
    lightning.seed_everything(0, verbose=False)
    data = build_data(config)
    module = build_module(config, data.num_classes)
    return module, next(iter(data.train_dataloader()))


def moved(batch: Batch, device: Device) -> Batch:
    """Move the tensors of a batch."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def counted(device: Device) -> None:
    """Begin to count, where something counts: what came before was moving and building."""
    if PretendedDevice.current is not None:
        PretendedDevice.current.forget()
    torch.manual_seed(1)


def step(
    name: str, number: int, dtype: torch.dtype, device: Device, *, training: bool = True
) -> dict[str, Any]:
    """Take one training step up to its gradients; without ``training``, with no random draws."""
    module, batch = small_module(name)
    module.train(training).to(device)
    batch = moved(batch, device)
    counted(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        done = module.losses(batch, number)
    module.require_finite(done, batch)
    done.total.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"losses": done.losses, "total": done.total, "gradients": gradients}


def seen(name: str, what: str, device: Device) -> Any:
    """Compute what an evaluator or the gallery sees of a method."""
    module, batch = small_module(name)
    module.eval().to(device)
    images, labels = batch["image"].to(device), batch["labels"].to(device)
    counted(device)
    if what == "forward":
        with torch.no_grad():
            return tuple(module(images))
    return getattr(module, what)(images, labels)


def scene(device: Device) -> dict[str, Tensor]:
    """Draw two images with maps, labels and boxes."""
    draws = torch.Generator().manual_seed(0)
    made = {
        "images": torch.rand(2, 3, 24, 32, generator=draws),
        "rgb": torch.randint(0, 256, (2, 24, 32, 3), generator=draws, dtype=torch.uint8),
        "maps": torch.rand(2, 4, 24, 32, generator=draws).softmax(1),
        "features": torch.rand(2, 8, 6, 8, generator=draws),
        "label": torch.randint(0, 4, (2, 24, 32), generator=draws),
        "boxes": torch.tensor([[0, 24, 0, 32], [2, 20, 4, 32]]),
    }
    return moved(made, device)


def par(device: Device) -> Any:
    """Refine by PAR."""
    given, module = scene(device), PAR().to(device)
    counted(device)
    return module(given["images"], given["maps"])


def pamr(device: Device) -> Any:
    """Refine by PAMR."""
    given, module = scene(device), PAMR().to(device)
    counted(device)
    return module(given["images"], given["maps"])


def crf(device: Device) -> Any:
    """Run the dense CRF on the device."""
    given = scene(device)
    counted(device)
    return mean_field(given["rgb"], given["maps"], CRF_PRESETS["toco"])


def crf_of_pool(device: Device) -> Any:
    """Label one image by the dense CRF, as the evaluation does; the labels are the host's."""
    given = scene(Device("cpu"))
    image, prob = given["rgb"][0].numpy(), given["maps"][0].numpy()
    counted(device)
    with MeanFieldPool(CRF_PRESETS["toco"], device=device) as pool:
        return torch.from_numpy(pool.submit(image, prob, [1, 3]).result())


def walk(device: Device) -> Any:
    """Let maps walk along affinities."""
    given, settings = scene(device), WalkSettings(steps=4)
    counted(device)
    return walked_maps(
        given["features"], given["maps"][:, 1:], stride=4, radius=3, settings=settings
    )


def affinity(device: Device) -> Any:
    """Take a step of the random walk's network, without random draws, up to its gradients."""
    torch.manual_seed(0)
    own = {"taps": (-2, -1), "widths": (4, 4), "radius": 2, "freeze_batch_norm": False}
    settings = AffinityNetSettings(max_steps=STEPS, **own)
    encoder = ConvBackbone(name="mobilenet_v3_small")
    module = AffinityNet(backbone=encoder, num_classes=3, settings=settings).to(device)
    # labels as coarse as the grid, or no position would have one
    target = torch.randint(0, 4, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    batch = moved({"image": torch.rand(2, 3, 64, 64), "target": target}, device)
    counted(device)
    done = module.losses(batch, 0)
    done.total.backward()
    return done.losses, [p.grad for p in module.narrow.parameters()]


def energy(device: Device) -> Any:
    """Compute the dense energy and its gradient."""
    given = scene(device)
    logits = given["maps"].log().requires_grad_()
    counted(device)
    loss = dense_energy_loss(
        given["images"],
        logits,
        given["label"],
        given["boxes"],
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss, gradient


def evaluation(device: Device) -> Any:
    """Count one image of every kind of map, with the dense CRF on the device."""
    config = compose_run([*SMALL, *PLAIN, "method=toco", "eval.crf=toco", "eval.refine=par"])
    lightning.seed_everything(0, verbose=False)
    data = build_data(config)
    protocol = Protocol(**config["eval"] | {"crf_backend": "torch"})
    module = build_module(config, data.num_classes).eval().to(device)
    tally = Tally(protocol=protocol, class_names=data.class_names, full=True).to(device)
    tally.reset()
    batch = next(iter(data.eval_dataloader("val")))
    counted(device)
    with torch.no_grad(), crf_pool(protocol, device, None) as pool:
        assert pool is not None
        queue = CRFQueue(pool)
        tally.update(module, batch, queue)
        queue.drain()
    maps = {name: tally.counts(name).matrix for name in LABEL_MAPS}
    return {**maps, "curve": tally.seed.histogram}


def works(name: str) -> dict[str, Work]:
    """Give all that is counted of a method, or of what belongs to none."""
    if name == "maps":
        return {
            "PAR": par, "PAMR": pamr, "CRF": crf, "CRF of a pool": crf_of_pool,
            "random walk": walk, "affinity network": affinity, "dense energy": energy,
        }  # fmt: skip
    if name == "evaluation":
        return {"one image": evaluation}
    module, _ = _built(name)
    looks = ["forward", "cams"]
    looks += [x for x in LOOKS if getattr(type(module), x) is not getattr(WSSSModule, x)]
    steps: dict[str, Work] = {
        "first phase": partial(step, name, 0, torch.float32),
        "second phase": partial(step, name, STEPS - 1, torch.float32),
        "second phase in bfloat16": partial(step, name, STEPS - 1, torch.bfloat16),
    }
    trained = bool(module.param_groups())
    return (steps if trained else {}) | {look: partial(seen, name, look) for look in looks}


ALL = [*NAMES, "maps", "evaluation"]


def figures(work: Work) -> tuple[dict[str, Any], Any]:
    """Count a work on the pretended device; give its figures and what it computed."""
    with PretendedDevice() as device:
        found = work(DEVICE)
        counts = {
            "launches": device.launched.total(),
            "waits": dict(sorted(device.waits.items())),
        }
    return counts, real(found)


def main() -> None:
    """Write the figures anew, of all or of those named."""
    torch.set_num_threads(1)
    stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in sys.argv[1:] or ALL:
        stored[name] = {what: figures(work)[0] for what, work in works(name).items()}
    versions = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
    stored = {"versions": versions, **{name: stored[name] for name in ALL if name in stored}}
    FIGURES.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
