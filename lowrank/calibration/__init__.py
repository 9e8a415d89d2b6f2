"""Statistics and structure of a model, gathered on data."""
