"""What data showed of a model."""
