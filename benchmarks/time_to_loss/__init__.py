"""Seconds of training until Adam's best training loss."""
