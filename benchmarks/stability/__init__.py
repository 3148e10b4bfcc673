"""Where GLS is stable: learning rates x damping x ways to scale a step, beside Adam's."""
