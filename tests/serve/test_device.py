"""Real models behind the batcher: answers of many clients at once are those of transformers for each text alone."""

from __future__ import annotations

import asyncio
import random
import threading

import numpy as np
import pytest
import torch

from helpers.language_models import embedding_tokenizer, tiny_model, tiny_tokenizer
from helpers.served import submit, together, work_of
from radix_ops.engine import Embedder, Scorer, UserError
from radix_ops.engine.runners import last_tokens
from radix_ops.serve.batcher import Batcher
from radix_ops.serve.device import EngineDevice
from radix_ops.serve.limits import BatchLimits
from radix_ops.serve.work import Size

SOON = 50
KINDS = ["Qwen3", "Llama"]  # ours, which keeps salts apart, and transformers'


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(request.param)
    model.save_pretrained(folder)
    tiny_tokenizer(adds_bos=False).save_pretrained(folder)
    return folder, model


def scorer_of(folder, **options) -> Scorer:
    return Scorer(folder, device="cpu", lazy=True, **options)


def computing(engine):
    """Return the computation of the log-probabilities of all tokens as the next one, and of what the runner took."""

    def compute(sequences, extras):
        states = engine.runner.states(sequences, last_tokens(sequences)).last()
        return torch.log_softmax(engine.runner.head(states).float(), -1).numpy()

    return compute


def served(engine, **options) -> Batcher:
    batcher = Batcher(EngineDevice(engine), **options)
    batcher.register("sum", computing(engine))
    return batcher


def made_sequences(rng: random.Random) -> list[list[int]]:
    """Return sequences that begin with one of a few prompts, cut and continued at random."""
    prompts = [[rng.randrange(340) for _ in range(40)] for _ in range(3)]
    return [
        (rng.choice(prompts)[: rng.randrange(1, 41)] + [rng.randrange(340) for _ in range(rng.randrange(8))])
        for _ in range(60)
    ]


@torch.no_grad()
def expected_of(model, ids) -> np.ndarray:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("salts", [("",), ("", "a", "b")])
def test_answers_of_many_clients_are_those_of_each_text_alone(model, plain, salts):
    folder, theirs = model
    engine = scorer_of(folder, plain=plain)
    with served(engine, batch=BatchLimits(max_rows=500)) as batcher:
        assert batcher.wait_until_ready(SOON)
        failures = []

        def client(seed: int) -> None:
            try:
                rng = random.Random(seed % 2)  # two clients of each seed send the same
                sequences, futures = made_sequences(rng), []
                while sequences:
                    part, sequences = sequences[:5], sequences[5:]
                    futures.append((part, submit(batcher, *part, salt=rng.choice(salts))))
                for part, future in futures:
                    for ids, found in zip(part, future.result(SOON).results, strict=True):
                        np.testing.assert_allclose(found, expected_of(theirs, ids), rtol=0, atol=1e-4)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert failures == []
        snapshot = batcher.snapshot()
        assert (snapshot["total_rows"] < snapshot["total_tokens"]) is not plain
        if plain or engine.runner.pads_states:
            return  # padding counts for rows, which no plan knows
        assert engine.runner.rows == snapshot["total_rows"]


def rows_of(batcher: Batcher, requests) -> int:
    """Return the rows of a batch of requests."""
    before = batcher.snapshot()["total_rows"]
    with together(batcher):
        futures = [submit(batcher, *sequences, salt=salt) for sequences, salt in requests]
    assert all(future.result(SOON) for future in futures)
    return batcher.snapshot()["total_rows"] - before


def test_salts_share_no_rows_in_the_model(model):
    """Two requests with one prompt cost its rows twice where their salts differ, and once where they are equal."""
    folder, _ = model
    engine = scorer_of(folder)
    prompt = list(range(20))
    with served(engine) as batcher:
        assert batcher.wait_until_ready(SOON)
        for salts, rows in ((("", ""), 22), (("a", "a"), 22), (("a", "b"), 42), (("", "a"), 42)):
            before = engine.runner.rows
            planned = rows_of(batcher, [([[*prompt, 30 + n]], salt) for n, salt in enumerate(salts)])
            assert planned == rows
            assert engine.runner.rows - before == rows


def test_plain_batches_of_a_model_of_transformers_hold_little_padding(tmp_path):
    """As those of the engine, with which the folded ones are compared."""
    tiny_model("Llama").save_pretrained(tmp_path)
    engine, rng = scorer_of(tmp_path, plain=True), random.Random(0)
    with served(engine, batch=BatchLimits(max_overtakes=1000)) as batcher:
        assert batcher.wait_until_ready(SOON)
        before = engine.runner.rows
        with together(batcher):
            futures = [submit(batcher, [1] * rng.randrange(1, 100)) for _ in range(300)]
        assert all(future.result(SOON) for future in futures)
        snapshot = batcher.snapshot()
        assert snapshot["total_tokens"] < engine.runner.rows - before <= 1.05 * snapshot["total_tokens"] + 1
        assert snapshot["total_batches"] < 100


def test_the_engine_s_own_embeddings_come_out_of_the_event_loop(tmp_path):
    tiny_model("Qwen3").model.save_pretrained(tmp_path)
    embedding_tokenizer().save_pretrained(tmp_path)
    texts = [f"Which river flows through {place}?" for place in ("Paris", "Rome", "the sea", "Paris")] * 10
    expected = Embedder(tmp_path, device="cpu").embed(texts)
    engine = Embedder(tmp_path, device="cpu", lazy=True)
    batcher = Batcher(EngineDevice(engine))
    batcher.register("embed", lambda sequences, _: engine.runner.states(sequences, last_tokens(sequences)).last())

    async def ask(text: str):
        ids = engine.tokenizer([text])["input_ids"]
        return (await batcher.ask("embed", lambda: work_of(*ids), Size.of_texts([text]))).results[0]

    async def main():
        return await asyncio.gather(*map(ask, texts))

    with batcher:
        assert batcher.wait_until_ready(SOON)
        states = torch.stack(asyncio.run(main()))
    found = torch.nn.functional.normalize(states, dim=-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_ids_that_the_model_does_not_have_are_refused(model):
    folder, _ = model
    with served(scorer_of(folder)) as batcher:
        assert batcher.wait_until_ready(SOON)
        with pytest.raises(UserError, match="the model's are from 0 to 339"):
            submit(batcher, [1, 340]).result(SOON)


def test_a_token_budget_is_the_most_rows_of_a_batch(model):
    folder, _ = model
    with served(scorer_of(folder, token_budget=64)) as batcher:
        assert batcher.wait_until_ready(SOON)
        futures = [submit(batcher, [n, *range(20)]) for n in range(100, 130)]
        assert all(future.result(SOON) for future in futures)
        assert batcher.metrics.registry.get_sample_value("radix_batch_rows_bucket", {"le": "64.0"}) >= 10
        (largest,) = (metric for metric in batcher.metrics.registry.collect() if metric.name == "radix_batch_rows")
        counts = {sample.labels.get("le"): sample.value for sample in largest.samples}
        assert counts["64.0"] == counts["+Inf"]


def test_a_folder_that_is_damaged_ends_the_load_with_its_reason(model, tmp_path):
    folder, _ = model
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    batcher = served(scorer_of(tmp_path))
    with batcher, pytest.raises(Exception, match="the model could not be loaded") as caught:
        batcher.wait_until_ready(SOON)
    assert isinstance(caught.value.__cause__, UserError)
