"""E: marking networks, alone or while they are trained, and what is published of them."""
