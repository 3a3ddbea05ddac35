"""Training one run, its stages, and sweeps of runs."""
