"""weft adapter for Megatron-Core models, as source and as target."""
