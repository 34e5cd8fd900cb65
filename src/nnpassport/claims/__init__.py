"""What an owner commits to before a dispute, and how rival claims are heard and ruled on."""
