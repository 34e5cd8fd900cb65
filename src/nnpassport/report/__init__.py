"""Pages, pictures and words that explain a result."""
