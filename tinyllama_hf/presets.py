"""The sizes of the presets. Imports nothing, so that a recipe is checked without torch."""

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PRESETS: dict[str, dict[str, int]] = {
    "1.1b": dict(zip(_SIZES, (22, 2048, 5632, 32, 4), strict=True)),
    "120m": dict(zip(_SIZES, (12, 768, 2048, 12, 1), strict=True)),
    "nano": dict(zip(_SIZES, (4, 256, 640, 4, 2), strict=True)),
    "micro": dict(zip(_SIZES, (2, 256, 512, 4, 2), strict=True)),
}
