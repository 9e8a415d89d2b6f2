"""What controllers are made of: their common life, and the forms, states and processes in it."""
