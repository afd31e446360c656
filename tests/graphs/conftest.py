"""The model that tests of captured graphs load."""

from __future__ import annotations

import pytest

from helpers.qwen3_models import oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    oracle(folder, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=8192)
    return folder
