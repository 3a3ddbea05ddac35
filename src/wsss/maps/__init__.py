"""Pure tensor functions on score maps and pixels."""
