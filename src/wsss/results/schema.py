"""What ``results.json`` may hold; keys that are not named here are anything."""

from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from wsss.core.records import Record
from wsss.evaluation.protocol import LABEL_MAPS

SCHEMA = 1
# null where a number does not exist; no count, hour or byte is beyond the bounds
Figure = Annotated[float, Ge(-1e18), Le(1e18)] | None
Share = Annotated[float, Ge(0), Le(1 + 1e-6)] | None  # float32 may round above 1
Size = Annotated[int, Ge(0), Le(2**53)]


class _Configuration(Record):
    """The stored configuration as far as a comparison reads it; `wsss.runs.stored` checks all."""

    method: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)


class Cost(Record):
    """What training or evaluating cost."""

    train_wall_hours: Figure = None
    train_gpu_hours: Figure = None
    train_peak_memory_bytes: Figure = None
    seconds_per_image: Figure = None


class _Source(Record):
    """The folder of maps that somebody else made."""

    cams: str | None = None
    masks: str | None = None
    first_class: int = 0


class _Maps(Record):
    """Scores of one kind of label map."""

    miou: Share = None
    precision: Share = None
    recall: Share = None
    over: Figure = None
    under: Figure = None
    image_miou: Share = None
    boundary_iou: Share = None
    trimap_iou: dict[str, Share] = Field(default_factory=dict)
    size_iou: dict[str, Share] = Field(default_factory=dict)
    hallucinated: Share = None


class _Curve(Record):
    """Seed scores over the threshold."""

    thresholds: list[float]
    miou: list[Share]
    precision: list[Share] | None = None
    recall: list[Share] | None = None

    @model_validator(mode="after")
    def _of_equal_length(self) -> Self:
        for column in (self.miou, self.precision, self.recall):
            if column is not None and len(column) != len(self.thresholds):
                raise ValueError("its lists differ in length")
        return self


class _PerClass(Record):
    """Columns of one row a class."""

    names: list[str] = Field(alias="class")
    __pydantic_extra__: dict[str, list[Figure]]

    @model_validator(mode="after")
    def _of_equal_length(self) -> Self:
        for key, column in self.__pydantic_extra__.items():
            if len(column) != len(self.names):
                raise ValueError(f"{key} has {len(column)} values for {len(self.names)} classes")
        return self


class _Holdout(Record):
    """Images of the training data whose masks chose a threshold."""

    list_sha256: str | None = None


class _Card(Record):
    """How the numbers were taken."""

    list_sha256: str | None = None
    supervision: str | None = None
    backbone: dict[str, Any] | None = None
    choice: str | None = None
    num_images: Size | None = None
    holdout: _Holdout | None = None


class _Split(Record):
    """Numbers of one split."""

    num_images: Size | None = None
    readings: Size | None = None
    maps: dict[str, _Maps] = Field(default_factory=dict)
    per_class: _PerClass | None = None
    confusion: dict[str, list[list[Size]] | list[Size]] = Field(default_factory=dict)
    protocol: _Card | None = None
    cost: Cost | None = None
    notes: list[str] = Field(default_factory=list)
    data_sha256: dict[str, str | None] | None = None
    seed_curve: _Curve | None = None
    seed_miou: Share = None
    seed_miou_predicted_labels: Share = None
    seed_miou_holdout: Share = None
    seed_threshold: Share = None
    seed_threshold_holdout: Share = None
    seed_miou_oracle: Share = None
    seed_threshold_oracle: Share = None
    seed_pixel_map: Share = None
    lam_miou: Share = None
    lam_miou_oracle: Share = None
    lam_threshold_oracle: Share = None
    pseudo_label_miou_ignored_as_background: Share = None
    pseudo_label_miou_excluded: Share = None
    pseudo_label_coverage: Share = None
    seg_miou: Share = None
    seg_miou_crf: Share = None
    seg_miou_ms: Share = None
    seg_miou_ms_crf: Share = None
    image_map: Share = None
    image_f1: Share = None

    @model_validator(mode="after")
    def _of_known_maps(self) -> Self:
        for kind in self.maps:
            if kind not in LABEL_MAPS:
                raise ValueError(f"maps.{kind} is none of {', '.join(LABEL_MAPS)}")
        return self


class Results(Record):
    """The whole file."""

    version: Literal[1] = Field(alias="schema")
    method: str | None = None
    data: str | None = None
    seed: int | None = None
    study: str | None = None
    config_hash: str | None = None
    status: str | None = None
    run: str | None = None
    config: _Configuration = _Configuration()
    cost: Cost | None = None
    source: _Source | None = None
    splits: dict[str, _Split]
