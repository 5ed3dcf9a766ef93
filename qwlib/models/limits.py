"""How far a model sees: its positions, and the window that a layer looks back in, under every name that transformers uses.

Models that see, hear or read images keep these in a configuration of their text part. What is named nowhere is not assumed: a
model without positions (Mamba, BLOOM) has no limit here.
"""

# source: the configuration classes of transformers 5.23, which also map n_positions and n_ctx of GPT-2's kind to the first
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_window_size", "attention_chunk_size")


def positions(config) -> int | None:
    """The most positions of a transformers configuration, None where it names none."""
    return min(_numbers(config, POSITIONS), default=None)


def window(config) -> int | None:
    """How many positions back the shortest window of a layer reaches, None where all layers see everything."""
    return min(_numbers(config, WINDOWS), default=None)


def _numbers(config, names: tuple[str, ...]) -> list[int]:
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in names]
    found = [each for some in found for each in (some if isinstance(some, list | tuple) else [some])]
    return [each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0]
