"""What a mark needs to know of a network: its layers, its axes and its branches."""
