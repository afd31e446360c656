"""Every snippet of the README and of docs/ runs: Python as it stands, commands on small files.

Tiny local models stand in for those of the hub."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_ID = re.compile(r"\b(?:Qwen|HuggingFaceTB|meta-llama|google|tomaarsen)/[\w.-]+")


def blocks(page: Path, language: str) -> list:
    """(text) of the page's fenced blocks in a language, named by page and line."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page.name} leaves a block open"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        if lines[start] == f"```{language}":
            name = f"{page.relative_to(ROOT)}:{start + 1}"
            found.append(pytest.param("\n".join(lines[start + 1 : end]) + "\n", id=name))
    return found


SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]
COMMANDS = [
    pytest.param(command, id=f"{block.id}-{command.split()[0]}")
    for page in PAGES
    for block in blocks(page, "")
    for command in block.values[0].replace("\\\n", " ").splitlines()
    # Output stands in the same kind of block, behind the command or without one.
    if command.split()[:1] and command.split()[0] in ("make", "pip", "python", "radix-ops", "torchrun")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models for each kind of model that is named."""
    folder = tmp_path_factory.mktemp("models")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    )
    inner.train_from_iterator(["yes no"] * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=0.2, num_labels=1,
        pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    names = {"AutoModelForCausalLM": "causal", "AutoModel": "base", "AutoModelForSequenceClassification": "cross"}
    for kind, name in names.items():
        getattr(transformers, kind).from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names.values()}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The working directory, with the files that commands read."""
    questions = [{"context": f"Q: Is {x} blue?\nA:", "choices": [" yes", " no"]} for x in ("the sky", "grass")]
    queries = [{"query": "a river", "documents": ["the Seine", "a hill", "the Rhine"]}]
    for name, lines in (("questions", questions), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "texts.txt").write_text("the Seine\nthe Rhine\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local(text: str, models: dict[str, str]) -> str:
    """The text with a folder in place of each name of the hub."""

    def folder(match: re.Match) -> str:
        name = match.group().lower()
        return models["base" if "embedding" in name else "cross" if "seq-cls" in name else "causal"]

    return HUB_ID.sub(folder, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 7
    assert {command.values[0].split()[0] for command in COMMANDS} >= {"make", "pip", "radix-ops"}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_runs_as_it_stands(snippet, models, workplace):
    if "from trl " in snippet:
        pytest.importorskip("trl")  # which wants Python 3.11
    exec(compile(local(snippet, models), "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, models, workplace):
    program, *arguments = shlex.split(local(command, models).split("  #")[0])
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "pip":
        section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        for extras in re.findall(r"(?:radix-ops|\.)\[([\w,-]+)\]", command):
            assert set(extras.split(",")) <= set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))
    elif program == "radix-ops":
        from radix_ops import cli

        assert cli.main([argument.replace("FOLDER_OR_HUB_ID", models["causal"]) for argument in arguments]) == 0
    elif arguments[:2] == ["-m", "radix_ops.lm_eval"]:
        # tests/test_lm_eval.py runs the harness; its own parser says whether it would take these.
        from lm_eval._cli.harness import HarnessCLI

        found = HarnessCLI()._parser.parse_args(arguments[2:])
        assert found.model == "radix"
    else:
        scripts = [argument for argument in arguments if argument.endswith(".py")]
        assert scripts
        assert (ROOT / scripts[0]).is_file()
