"""From feedback to the next task: what people said, as rows, and the loop that learns them."""
