"""An architecture a file, and what they share. Nothing here knows of the scripts."""
