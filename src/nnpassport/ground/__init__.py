"""What every floor may use: names that are loaded late, and how far a long act is."""
