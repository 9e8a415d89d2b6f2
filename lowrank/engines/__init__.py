"""Serving: factored layers as inference engines run them. An engine imports its own file."""
