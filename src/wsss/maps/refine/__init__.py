"""Refinements of maps along the image: PAR, PAMR, dense CRFs."""
