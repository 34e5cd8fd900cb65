"""Every scheme against every attack."""
