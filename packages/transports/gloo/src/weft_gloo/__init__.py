"""weft transport over torch.distributed gloo: CPU memory, any network."""
