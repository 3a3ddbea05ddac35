"""Refinement of score maps along image edges: PAR on the device, dense CRF on the CPU."""
