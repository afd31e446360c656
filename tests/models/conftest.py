"""A small Qwen3 of transformers, and ours with its weights."""

import pytest

from helpers.qwen3_models import VARIANTS, oracle
from radix_ops.models.qwen3 import Qwen3ForCausalLM


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    theirs = oracle(tmp_path, **VARIANTS[request.param])
    return theirs, Qwen3ForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def plain(tmp_path):
    theirs = oracle(tmp_path)
    return theirs, Qwen3ForCausalLM.from_pretrained(tmp_path)
