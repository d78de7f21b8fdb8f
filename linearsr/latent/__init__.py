"""Autoencoders between pictures and the latents that the denoiser works on."""

from linearsr.latent.autoencoder import Autoencoder, DCAutoencoder, SpaceToDepth, load_autoencoder

__all__ = ["Autoencoder", "DCAutoencoder", "SpaceToDepth", "load_autoencoder"]
