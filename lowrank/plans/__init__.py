"""The decision and its result, printable and editable."""
