"""The training loop, alone or in several processes, and how accurate a network is."""
