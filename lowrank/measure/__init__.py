"""Quality, time and size of a model."""
