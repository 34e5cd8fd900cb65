"""V and F on files from anybody, and over a network on services."""
