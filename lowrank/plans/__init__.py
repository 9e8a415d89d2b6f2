"""The decision and what came of it, printable and editable."""
