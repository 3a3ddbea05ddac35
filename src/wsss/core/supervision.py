"""Names of the supervision leagues."""

IMAGE_LABELS = "image labels"
PIXEL_MASKS = "pixel masks"
