"""Nothing that a test does may need the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
