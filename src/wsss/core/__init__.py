"""The ground: errors, files, processes, checks of settings. It knows nothing of segmentation."""
