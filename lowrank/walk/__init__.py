"""Where a model's weights are, and how to replace them."""
