"""Every snippet of the documents runs, Python as it stands and commands on small files, and every link leads somewhere.

Tiny local models stand in for those of the hub."""

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

import radix_ops
import radix_ops_command
from helpers.commands import parsed

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HUB_ID = re.compile(r"\b(?:Qwen|HuggingFaceTB|meta-llama|google|tomaarsen)/[\w.-]+")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Block(NamedTuple):
    name: str  # page:line
    language: str
    text: str
    output: str | None  # the text block right behind it


def blocks(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page.name} leaves a block open"
    found: list[Block] = []
    end_before = 0
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        language, text = lines[start].removeprefix("```"), "\n".join(lines[start + 1 : end]) + "\n"
        if language == "text" and found and not any(lines[end_before + 1 : start]):
            found[-1] = found[-1]._replace(output=text)
        found.append(Block(f"{page.relative_to(ROOT)}:{start + 1}", language, text, None))
        end_before = end
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
SNIPPETS = [pytest.param(block, id=block.name) for block in BLOCKS if block.language == "python"]
COMMANDS = [
    pytest.param(command, id=f"{block.name}-{command.split()[0]}")
    for block in BLOCKS
    if block.language == "bash"
    for command in block.text.replace("\\\n", " ").splitlines()
    if command.split()[:1] and command.split()[0] in ("make", "pip", "python", "radix-ops", "torchrun")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Save a folder of a tiny model for each kind of model that is named."""
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
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=0.2, num_labels=1,
        pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    names = {"AutoModelForCausalLM": "causal", "AutoModel": "base", "AutoModelForSequenceClassification": "cross"}
    for kind, name in names.items():
        getattr(transformers, kind).from_config(config).save_pretrained(folder / name)
        tokenizer.chat_template = CHAT_TEMPLATE if name == "causal" else None
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names.values()}


@pytest.fixture
def workplace(models, tmp_path, monkeypatch) -> Path:
    """Make the working directory, with the files that commands read."""
    questions = [{"context": f"Q: Is {x} blue?\nA:", "choices": [" yes", " no"]} for x in ("the sky", "grass")]
    queries = [{"query": "a river", "documents": ["the Seine", "a hill", "the Rhine"]}]
    exam = [{"question": "Is the sea salty?", "choices": ["yes", "no"], "gold": "A"}]
    for name, lines in (("questions", questions), ("exam", exam), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reviews = [{"text": "I laughed all evening.", "label": "good"}, {"text": "I left early.", "label": "bad"}]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    prompt = {"template": "Review: {{ text }}\nThe film was", "labels": {"good": " good", "bad": " bad"}}
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    (tmp_path / "texts.txt").write_text("the Seine\nthe Rhine\n")
    parquet.write_table(pyarrow.Table.from_pylist(questions), tmp_path / "questions.parquet")
    (tmp_path / "articles.csv.gz").write_bytes(gzip.compress(b"body\nthe Seine\nthe Rhine\n"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "exam.jsonl").write_text(json.dumps(exam[0]) + '\n{"question": \n')
    beir = {
        "corpus.jsonl": '{"_id": "d1", "text": "the Seine"}\n{"_id": "d2", "text": "a hill"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "a river"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        "../bm25.trec": "q1 Q0 d2 1 0.5 bm25\nq1 Q0 d1 2 0.25 bm25\n",
    }
    (tmp_path / "scifact" / "qrels").mkdir(parents=True)
    for name, text in beir.items():
        (tmp_path / "scifact" / name).write_text(text)
    settings = next(block.text for block in BLOCKS if block.language == "toml")
    (tmp_path / "run.toml").write_text(local(settings, models))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local(text: str, models: dict[str, str]) -> str:
    """Put a folder in place of each name of the hub, and ids of its vocabulary in place of token ids."""

    def folder(match: re.Match) -> str:
        name = match.group().lower()
        return models["base" if "embedding" in name else "cross" if "seq-cls" in name else "causal"]

    def ids(match: re.Match) -> str:
        return re.sub(r"\d+", lambda number: str(int(number.group()) % 256), match.group())

    return re.sub(r'(?<=_ids": )\[[\d, \[\]]+\]', ids, HUB_ID.sub(folder, text))


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub, and the site with its slugify, give the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    named = r"`(?:python )?((?:\.ci|\.github|benchmarks|csrc|docs|examples|radix_ops|tests|tools)/[\w./-]*)[`\s]"
    for name in re.findall(named, page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 950


def test_the_readme_counts_the_proven_types():
    proven = json.loads((ROOT / "radix_ops/hf/models.json").read_text(encoding="utf-8"))["proven"]
    assert f"[{len(proven)} model types]" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_citation_names_the_version():
    assert radix_ops_command.__version__ == radix_ops.__version__
    assert f"version: {radix_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_there_are_snippets_outputs_and_commands():
    assert len(SNIPPETS) >= 12
    assert any(block.output for block in BLOCKS if block.language == "python")
    assert {command.values[0].split()[0] for command in COMMANDS} >= {"make", "pip", "radix-ops"}
    assert {block.language for block in BLOCKS} <= {"bash", "json", "python", "text", "toml", "yaml"}


def test_applications_of_a_cluster_name_options_of_the_server():
    applications = [
        application
        for block in BLOCKS
        if block.language == "yaml"
        for application in yaml.safe_load(block.text)["applications"]
    ]
    assert applications
    for application in applications:
        module, name = application["import_path"].split(":")
        assert re.search(rf"^def {name}\(", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.MULTILINE)
        options = radix_ops_command.options_of("serve", application["args"], "args")
        assert options.model == application["args"]["model"]


def without_numbers(text: str) -> str:
    """Take out counts of tokens and times, which are those of the model that is named; single digits are not."""
    return re.sub(r"\d+\.\d+(?:e-\d+)?|\d{2,}", "#", text)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_runs_as_it_stands(snippet, models, workplace, capsys):
    if "from trl " in snippet.text:
        pytest.importorskip("trl")  # which wants Python 3.11
    exec(compile(local(snippet.text, models), "snippet", "exec"), {"__name__": "snippet"})
    if snippet.output is not None:
        assert without_numbers(capsys.readouterr().out) == without_numbers(snippet.output)


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
    elif program == "radix-ops" and arguments[0] == "serve":
        assert parsed(*arguments).run == "radix_ops.serve._command"
    elif program == "curl":
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
        from radix_ops.engine import Embedder
        from radix_ops.serve import create_app

        url, body = arguments[0], arguments[arguments.index("-d") + 1] if "-d" in arguments else "{}"
        paths = create_app(Embedder(models["base"], lazy=True)).openapi()["paths"]
        assert url.removeprefix("http://localhost:8080") in paths
        assert isinstance(json.loads(body), dict)
    elif program == "radix-ops":
        from radix_ops import cli

        assert cli.main([argument.replace("FOLDER_OR_HUB_ID", models["causal"]) for argument in arguments]) == 0
    elif arguments[:2] == ["-m", "radix_ops.lm_eval"]:
        # tests/test_lm_eval_tasks.py runs the harness; its own parser says whether it would take these.
        from lm_eval._cli.harness import HarnessCLI

        found = HarnessCLI()._parser.parse_args(arguments[2:])
        assert found.model == "radix"
    else:
        scripts = [argument for argument in arguments if argument.endswith(".py")]
        assert scripts
        assert (ROOT / scripts[0]).is_file()
