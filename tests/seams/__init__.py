"""Where the library meets other tools: one file a tool."""
