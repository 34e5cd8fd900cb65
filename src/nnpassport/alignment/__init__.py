"""Which of a suspect's channels are which of the owner's, whatever a thief moved at no cost."""
