"""How much of published models GLS covers, and what takes Adam's update."""
