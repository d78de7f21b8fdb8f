"""Noise: the path between picture and noise, who denoises which part of it, and the sampler."""
