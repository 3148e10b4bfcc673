"""Seconds of forward, backward and step, and bytes, against Adam's."""
