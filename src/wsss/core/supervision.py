"""Names of kinds of supervision; runs are compared under equal ones only."""

IMAGE_LABELS = "image labels"
PIXEL_MASKS = "pixel masks"
