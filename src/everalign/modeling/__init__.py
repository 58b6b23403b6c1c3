"""Models as policies: loading, the two adapters (long-term and short-term), sequence log-probabilities."""

import logging

# It says at import, which is peft's, that a package for faster inference on a CPU is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
