"""What a claim rests on: secrets derived from one seed, and the files that hold them."""
