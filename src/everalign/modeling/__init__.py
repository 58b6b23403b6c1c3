"""Models as policies: loading, the two adapters (long-term and short-term), sequence log-probabilities."""
