"""I of V = (E, F, V, I): what an attacker runs. Removal is model → model, ambiguity model → key."""
