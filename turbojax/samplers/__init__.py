"""Samplers as free functions of a velocity: `rcm` for distilled models (1-4 steps), `flow` for the others."""

from turbojax.samplers import flow, rcm

__all__ = ["flow", "rcm"]
