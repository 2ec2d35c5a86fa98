"""Files that others may have made or be making: how they are read, and how they come to be."""
