"""What GLS adds to a step over batch size, width, depth and rank."""
