"""How numbers are made: confusion matrices, image-level scores, protocols and the evaluator."""
