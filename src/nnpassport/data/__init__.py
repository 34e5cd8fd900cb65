"""Images and triggers, held as uint8."""
