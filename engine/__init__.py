"""What both stages run: models, cache, batches and the step loop, on torch."""
