"""`weft demo`: a Megatron-Core policy learns while a vLLM engine serves each new version of its weights.

The parent (`loop`) holds the store, draws prompts, scores and reports. It starts one engine driver (`engine`, whose
workers carry `worker`) and one process per Megatron rank (`trainer`). What checks the outcome (`reference`, `gather`,
`slices`) imports nothing from weft.
"""
