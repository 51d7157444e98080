"""The sizes of the presets, and how a recipe trains them by default. Imports nothing, so that a recipe is checked
without torch.
"""

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PRESETS: dict[str, dict[str, int]] = {
    "1.1b": dict(zip(_SIZES, (22, 2048, 5632, 32, 4), strict=True)),
    "120m": dict(zip(_SIZES, (12, 768, 2048, 12, 1), strict=True)),
    "nano": dict(zip(_SIZES, (4, 256, 640, 4, 2), strict=True)),
    "micro": dict(zip(_SIZES, (2, 256, 512, 4, 2), strict=True)),
}

# Sequence length and highest learning rate. 1.1b: as published; 120m: as GPT-3 of this size (Brown et al. 2020, table
# 2.1); nano and micro: as in their recipes.
TRAINED_WITH: dict[str, tuple[int, float]] = {
    "1.1b": (2048, 4e-4),
    "120m": (2048, 6e-4),
    "nano": (256, 1.5e-3),
    "micro": (128, 2e-3),
}
