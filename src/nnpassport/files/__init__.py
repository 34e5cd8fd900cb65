"""Files from anybody, read once and within limits, and files of ours, written whole."""
