"""Many prompts through a model: shared-prefix forward passes, batches, and where they run. Knows tokens, no questions."""
