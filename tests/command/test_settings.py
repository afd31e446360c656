"""Options come from the command line, before the environment, before the file of --config."""

import pytest

from helpers.commands import parsed, refused_usage
from radix_ops.ops import flash_packages
from radix_ops_command import UsageError, options_of, settings
from radix_ops_command._main import make_parser


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that writes run.toml and stands beside it."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "run.toml").write_text(text)
        return "--config", "run.toml"

    return write


@pytest.mark.parametrize(
    ("arguments", "variable", "key", "model"),
    [
        (["-m", "typed"], "set", "kept", "typed"),
        (["-m", "typed"], None, "kept", "typed"),
        ([], "set", "kept", "set"),
        ([], "set", None, "set"),
        ([], None, "kept", "kept"),
    ],
)
def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    config, monkeypatch, arguments, variable, key, model
):
    if variable:
        monkeypatch.setenv("RADIX_OPS_MODEL", variable)
    options = config(f'model = "{key}"\n' if key else "")
    assert parsed("score", *options, *arguments, "q.jsonl").model == model


def test_values_of_every_kind_come_from_a_file(config):
    options = config(
        'files = "data.jsonl"\nbatch-sizes = [4, 2]\ntoken_budget = 512\njson = true\nprompt = "--model"\n'
        '[score]\nmodel = "other"\n'
    )
    args = parsed("inspect", *options)
    assert (args.files, args.batch_sizes, args.token_budget) == (["data.jsonl"], [4, 2], 512)
    assert (args.json, args.prompt, args.model, args.text_key) == (True, "--model", None, "text")


def test_values_from_elsewhere_are_those_of_the_command_line(config, monkeypatch):
    typed = ["embed", "-m", "m", "--token-budget", "9", "--prompt", "a  b", "--no-normalize", "-o", "x.npy", "t.txt"]
    for name, value in {"TOKEN_BUDGET": "9", "PROMPT": "a  b", "NO_NORMALIZE": "yes", "MODEL": "m"}.items():
        monkeypatch.setenv(f"RADIX_OPS_{name}", value)
    assert parsed("embed", "-o", "x.npy", "t.txt") == parsed(*typed)


def test_a_commands_own_table_goes_before_the_top_of_the_file(config):
    options = config('model = "top"\ndevice = "cpu"\n[embed]\nmodel = "own"\n')
    assert vars(parsed("embed", *options, "t.txt")).items() >= {"model": "own", "device": "cpu"}.items()
    assert parsed("score", *options, "q.jsonl").model == "top"


def test_the_environment_names_the_file(config, monkeypatch):
    config('model = "kept"\n')
    monkeypatch.setenv("RADIX_OPS_CONFIG", "run.toml")
    assert parsed("score", "q.jsonl").model == "kept"


@pytest.mark.parametrize(("typed", "expected"), [(["--compare"], (False, True)), (["--plain"], (True, False))])
def test_of_options_that_exclude_each_other_the_one_that_goes_before_counts(config, typed, expected):
    args = parsed("score", *config("plain = true\n"), "-m", "m", *typed, "q.jsonl")
    assert (args.plain, args.compare) == expected


def test_a_flag_that_the_environment_takes_back_is_not_set_by_the_file(config, monkeypatch):
    options = config("plain = true\n")
    assert parsed("score", *options, "-m", "m", "q.jsonl").plain
    monkeypatch.setenv("RADIX_OPS_PLAIN", "0")
    assert not parsed("score", *options, "-m", "m", "q.jsonl").plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "m"', "run.toml: score has no option modle (did you mean model?)"),
        ('pooling = "last"', "run.toml: score has no option pooling; embed has: it may stand under [embed]"),
        ('config = "other.toml"', "run.toml: score has no option config"),
        ("help = true", "run.toml: score has no option help"),
        ('dtype = "float8"', "run.toml: argument --dtype: invalid choice: 'float8'"),
        ("token-budget = 0", "run.toml: argument --token-budget: '0' is not a whole number from 1"),
        ("token-budget = true", "run.toml: token-budget is True; it must be a string or a number"),
        ('plain = "yes"', "run.toml: plain is 'yes'; it must be true or false"),
        ("plain = true\ncompare = true", "run.toml: argument --compare: not allowed with argument --plain"),
        ("model = {a = 1}", "run.toml: model is {'a': 1}; it must be a string or a number"),
        ("[scor]\nplain = true", "run.toml: score has no option scor"),
        ("model = m", "--config run.toml is no TOML: "),
    ],
)
def test_what_a_file_may_not_hold_is_refused_by_name(config, capsys, text, message):
    assert message in refused_usage(capsys, "score", *config(text), "q.jsonl")


def test_a_file_is_named_by_no_other_file(config, capsys):
    message = refused_usage(capsys, "score", *config('config = "other.toml"'), "q.jsonl")
    assert "may stand under" not in message


def test_a_file_that_is_not_there_is_refused(capsys):
    message = refused_usage(capsys, "score", "-m", "m", "--config", "no.toml", "q.jsonl")
    assert message.endswith("--config no.toml can't be read: No such file or directory")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RADIX_OPS_MODLE", "m", "RADIX_OPS_MODLE, and no option has that name (did you mean RADIX_OPS_MODEL?)"),
        ("RADIX_OPS_FILES", "t.jsonl", "RADIX_OPS_FILES, and no option has that name"),
        ("RADIX_OPS_PLAIN", "maybe", "the environment: plain is 'maybe'; it must be true or false"),
        ("RADIX_OPS_DTYPE", "float8", "the environment: argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_variables_that_cannot_be_used_are_refused_by_name(capsys, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    assert message in refused_usage(capsys, "score", "-m", "m", "q.jsonl")


def test_a_variable_of_the_library_is_left_to_it(capsys, monkeypatch):
    assert settings.LIBRARY == (flash_packages.VARIABLE,)
    monkeypatch.setenv(flash_packages.VARIABLE, "fa3-fwd")
    assert not hasattr(parsed("score", "-m", "m", "q.jsonl"), "flash_attention")
    monkeypatch.setenv("RADIX_OPS_FLASH_ATENTION", "fa3-fwd")
    assert f"did you mean {flash_packages.VARIABLE}?" in refused_usage(capsys, "score", "-m", "m", "q.jsonl")


def test_a_variable_of_another_command_is_left_aside(monkeypatch):
    monkeypatch.setenv("RADIX_OPS_POOLING", "mean")
    assert not hasattr(parsed("score", "-m", "m", "q.jsonl"), "pooling")


FLAGS = {
    "score": (
        "quiet",
        "overwrite",
        "plain",
        "compare",
        "trust-remote-code",
        "letters",
        "chat",
        "truncate-left",
        "calibration",
    ),
    "embed": ("truncate-right", "no-normalize"),
    "rerank": ("texts", "truncate-right"),
    "classify": ("plain", "truncate-right"),
    "inspect": ("letters", "json", "trust-remote-code"),
}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in FLAGS.items() for flag in flags])
def test_the_command_line_takes_back_a_flag_from_elsewhere(config, monkeypatch, command, flag):
    given, dest = (command, "-m", "m", "q.jsonl"), flag.replace("-", "_")
    back = f"--{flag.removeprefix('no-')}" if flag.startswith("no-") else f"--no-{flag}"
    monkeypatch.setenv(f"RADIX_OPS_{dest.upper()}", "1")
    assert getattr(parsed(*given), dest) is True
    assert getattr(parsed(*given, back), dest) is False
    monkeypatch.delenv(f"RADIX_OPS_{dest.upper()}")
    options = config(f"{flag} = true\n")
    assert getattr(parsed(*given, *options), dest) is True
    assert getattr(parsed(*given, *options, back), dest) is False
    assert getattr(parsed(*given, back, f"--{flag}"), dest) is True
    assert getattr(parsed(*given), dest) is False


def test_all_flags_can_be_taken_back_and_help_does_not_show_how(capsys):
    for name, command in make_parser()[1].items():
        flags = [action for action in command.arguments if action.nargs == 0]
        for action in flags:
            back = f"--no-{action.option_strings[-1][2:]}".replace("--no-no-", "--")
            assert back in command._option_string_actions, (name, action.dest)
            assert back not in command.format_help().replace(action.option_strings[-1], "")
        assert {action.dest for action in flags} >= {flag.replace("-", "_") for flag in FLAGS.get(name, ())}


def test_a_flag_that_is_taken_back_leaves_its_rival_free(config):
    options = config("plain = true\n")
    args = parsed("score", *options, "-m", "m", "--no-plain", "--compare", "q.jsonl")
    assert (args.plain, args.compare) == (False, True)


def test_a_file_says_false_and_knows_no_negative_names(config, capsys):
    assert "score has no option no-plain" in refused_usage(capsys, "score", *config("no-plain = true"), "q.jsonl")


def test_values_of_a_host_are_those_of_the_command_line(monkeypatch):
    monkeypatch.setenv("RADIX_OPS_TOKEN_BUDGET", "9")
    monkeypatch.setenv("RADIX_OPS_DTYPE", "bfloat16")
    typed = ["serve", "-m", "m", "--dtype", "float32", "--plain", "--served-model-name", "a,b", "--max-body", "2MB"]
    given = {"model": "m", "dtype": "float32", "plain": "yes", "served_model_name": ["a", "b"], "max-body": "2MB"}
    found = options_of("serve", {**given, "warm_up": False}, "the arguments")
    expected = {name: value for name, value in vars(parsed(*typed)).items() if name in vars(found)}
    assert vars(found) == expected
    assert (found.token_budget, found.plain, found.warm_up) == (9, True, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "modle": "m"}, r"the arguments: serve has no option modle \(did you mean model\?\)"),
        ({"model": "m", "config": "x.toml"}, "the arguments: serve has no option config"),
        ({"model": None}, "the arguments: model is None; it must be a string or a number"),
        ({"model": "m", "plain": "perhaps"}, "the arguments: plain is 'perhaps'; it must be true or false"),
        ({"model": "m", "token_budget": 0}, "the arguments: .*'0' is not a whole number"),
        ({}, "required: -m/--model"),
    ],
)
def test_values_of_a_host_that_cannot_be_used_are_named(values, message):
    with pytest.raises(UsageError, match=message):
        options_of("serve", values, "the arguments")
