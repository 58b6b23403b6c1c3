"""Training one stage: the Trainer, what a batch teaches, reference log-probabilities."""
