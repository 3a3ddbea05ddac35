"""The random walk as a refinement of any run's maps: certain labels, and maps that walk.

The affinity network is trained by :mod:`wsss.training.random_walk`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss.core.files import file_sha256
from wsss.core.supervision import supervision_on
from wsss.evaluation.crf_queue import CRFPoolLike, crf_pool
from wsss.maps.pseudo_labels import alpha_background, confident_labels
from wsss.maps.refine.random_walk import WalkSettings, walked_maps
from wsss.methods.affinity_net import AffinityNet
from wsss.runs.folder import Run
from wsss.runs.label_folder import Labels, digest_of, fill_folder, plain_values
from wsss.runs.map_cache import Maps, maps_of
from wsss.runs.origin import check_origin
from wsss.runs.supervision import supervision_of_run

FOLDER = "random_walk"  # inside a run folder


@dataclass(frozen=True)
class RandomWalk:
    """A trained affinity network, and how maps walk along its affinities.

    Attributes:
        network: beside the run's module, in eval mode.
        settings: of the walk.
        checkpoint_sha256: of the network.
        trained: what is said of its training: steps, parameters, cost, settings.
    """

    network: AffinityNet
    settings: WalkSettings
    checkpoint_sha256: str
    trained: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides how maps walk, as JSON would give it back."""
        settings = self.settings
        return {
            "name": "random_walk",
            "beta": settings.beta,
            "steps": settings.steps,
            "background": settings.background,
            "affinity_sha256": self.checkpoint_sha256,
        }

    @property
    def card(self) -> dict[str, Any]:
        """What is said of the refinement on the card of the labels."""
        settings = plain_values(asdict(self.settings))
        return {"name": "random_walk", "settings": settings, "affinity_network": self.trained}

    @torch.no_grad()
    def label(self, image: Tensor, cams: Tensor, labels: Tensor) -> Labels:
        """Label an image by the best of the background and its classes after the walk.

        Args:
            image: (1, 3, H, W), normalised.
            cams: (1, K, H, W) in [0, 1].
            labels: (1, K) in {0, 1}.

        Returns:
            (H, W) class ids.
        """
        ids = labels[0].nonzero().flatten()
        walked = walked_maps(
            self.network.features(image),
            cams[:, ids],
            stride=self.network.backbone.patch_size,
            radius=self.network.settings.radius,
            settings=self.settings,
        )
        label = torch.cat([ids.new_zeros(1), ids + 1])[walked[0].argmax(0)]
        return label.cpu().numpy().astype(np.uint8)


def supervision_with(run: Run, walk: RandomWalk) -> str:
    """Name the supervision of labels that a run and an affinity network made together."""
    own = supervision_of_run(run)
    return supervision_on(own, walk.network.backbone.weights_info.as_dict())


class ConfidentLabeller:
    """Make the labels that affinities are learnt from: a class, background, or 255.

    Scores of the image's classes compete with two background scores in a dense CRF.

    Args:
        run: a trained run.
        settings: exponents and CRF.
        maps: gives the run's maps; None: they are computed.
    """

    def __init__(self, run: Run, settings: WalkSettings, maps: Maps | None = None) -> None:
        self.run, self.settings, self.maps = run, settings, maps or maps_of(run)

    def crf(self, jobs: int | None) -> AbstractContextManager[CRFPoolLike | None]:
        """Open what computes the settings' CRF, with the backend of the protocol."""
        protocol = replace(self.run.protocol, crf=self.settings.crf)
        return crf_pool(protocol, self.run.device, jobs)

    def begin(self, item: dict[str, Any], crf: CRFPoolLike | None) -> Callable[[], Labels]:
        """Give an item to the CRF at both levels; give what waits for it."""
        assert crf is not None  # the settings name one
        cams = self.maps(item)
        ids = item["labels"].to(self.run.device).nonzero().flatten()
        futures = []
        for alpha in self.settings.alphas:
            scores = torch.cat([alpha_background(cams, alpha), cams[:, ids]], dim=1)
            futures.append(crf.submit(item["rgb"], scores[0].float().cpu().numpy()))
        table = torch.cat([ids.new_zeros(1), ids + 1]).cpu()

        def finish() -> Labels:
            high, low = (table[torch.from_numpy(f.result()).long()] for f in futures)
            return confident_labels(high, low).numpy().astype(np.uint8)

        return finish


def write_confident_labels(
    run: Run, settings: WalkSettings, *, crf_jobs: int | None = None, maps: Maps | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write the labels that affinities are learnt from, of the training list.

    Args:
        run: a trained run, with its checkpoint.
        settings: exponents and CRF.
        crf_jobs: processes of the dense CRF.
        maps: gives the run's maps of the training list; None: they are computed.

    Returns:
        Their folder, inside the run folder, and all that decides them.
    """
    split = run.data.train_split
    check_origin(run, [split], with_masks=False)
    identity = plain_values(
        {
            "checkpoint_sha256": file_sha256(run.checkpoint),
            "split": split,
            "list_sha256": run.data.list_hash(split),
            "label_source": run.data.label_source,
            "cam_resize": run.protocol.cam_resize,
            "resize_long": run.protocol.resize_long,
            "alphas": settings.alphas,
            "crf": settings.crf,
            "crf_backend": run.protocol.crf_backend,
        }
    )
    folder = run.folder / FOLDER / f"labels-{digest_of(identity)}"
    supervision = supervision_of_run(run)
    card = {"made_from": identity, "supervision": supervision, "run": run.folder.name}
    fill_folder(
        run,
        split,
        ConfidentLabeller(run, settings, maps),
        folder,
        card,
        what="confident labels",
        crf_jobs=crf_jobs,
    )
    return folder, identity
