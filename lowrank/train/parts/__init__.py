"""The machinery of the controllers: attachment, factors, optimizer state, cycles, processes."""
