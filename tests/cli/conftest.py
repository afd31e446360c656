import pytest

from helpers.language_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Save a language model and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=256).save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder
