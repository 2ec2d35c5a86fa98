"""Times of whole teams: first tokens in several shapes, and runs from end to end."""
