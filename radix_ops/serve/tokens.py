"""The tokens of texts and the texts of tokens; for other threads than the event loop's."""

from __future__ import annotations

from typing import Any

from ..engine.tokenizing import in_turn


def tokenized(tokenizer: Any, texts: list[str], special: bool) -> list[list[dict[str, Any]]]:
    """Return for each text its tokens: id, text, whether it is special, and where it starts and stops."""
    has_places = tokenizer.is_fast
    with in_turn(tokenizer):
        batch = tokenizer(texts, add_special_tokens=special, return_offsets_mapping=has_places, verbose=False)
    specials, found = set(tokenizer.all_special_ids), []
    for index, text in enumerate(texts):
        ids = batch["input_ids"][index]
        places = batch["offset_mapping"][index] if has_places else [(None, None)] * len(ids)
        names = tokenizer.convert_ids_to_tokens(ids)
        found.append(
            [
                {
                    "id": token, "text": name if token in specials or start is None else text[start:stop],
                    "special": token in specials, "start": start, "stop": stop,
                }
                for token, name, (start, stop) in zip(ids, names, places, strict=True)
            ]
        )  # fmt: skip
    return found


def encoded(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    """Return the token ids of each text."""
    with in_turn(tokenizer):
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def decoded(tokenizer: Any, ids: list[list[int]], skips_special: bool = False) -> list[str]:
    """Return the text of each array of token ids."""
    return [tokenizer.decode(each, skip_special_tokens=skips_special) for each in ids]
