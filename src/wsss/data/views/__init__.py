"""One training transform a method."""

import os

# albumentations asks the network for a newer version of itself when imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import cv2

# Workers are processes already: OpenCV's own threads would only fight over the cores, and a
# thread pool that exists before the fork can hang the child.
cv2.setNumThreads(0)
