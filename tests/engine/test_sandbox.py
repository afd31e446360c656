"""Templates of users' files: rendered as jinja2 renders them, and bounded in what they may do."""

import jinja2
import pytest

from radix_ops.engine import UserError, sandbox
from radix_ops.engine.sandbox import JinjaText

FIELDS = {
    "text": "  The sea is salty.\n",
    "title": "",
    "count": 3,
    "messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}],
    "options": ["river", "sea"],
    "note": {"source": "a book", "items": 2},
}
BIG = {"text": "x" * 2**20, "options": list(range(1000))}


@pytest.mark.parametrize(
    "source",
    [
        "Review: {{ text.strip() }}\n{% if title %}Title: {{ title }}\n{% else %}None\n{% endif %}Answer:",
        "{% for message in messages %}{{ loop.index }}. {{ message.role }}: {{ message['content'] }}\n{% endfor %}",
        "{% for option in options if option != 'sea' %}{{ loop.last }}{{ option|upper }}{% endfor %}",
        "{% set first = options[0] ~ '/' ~ count %}{{ first }} {{ first|length }} {{ count + 1 }} {{ -count }}",
        "{{ missing|default('none') }} {{ missing is defined }} {{ note.source }} {{ note['items'] }}",
        "{{ options|join(', ') }} {{ messages|join(' ', attribute='content') }} {{ text|trim|replace('sea', 'lake') }}",
        "{{ text[2:9] }} {{ 'yes' if count > 2 and 'river' in options else 'no' }} {{ count * 2 - 1 }}{{ count // 2 }}",
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %} {{ text.split()|length }} {{ 'a' + 'b' }} {{ ([1] + [2])|length }} {{ count == 3 }}",
        "a\r\nb\n\n",
        "{# a comment #}{% raw %}{{ text }}{% endraw %}{{ '\\u00e9' }}"
        + "long " * 100
        + "{{ '"
        + "y" * 300
        + "'|upper }}",
    ],
)
def test_texts_are_those_of_jinja2(source):
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=["jinja2.ext.loopcontrols"]
    )
    assert JinjaText(source).render(FIELDS, "row") == environment.from_string(source).render(FIELDS)


def test_json_is_written_as_it_is():
    assert JinjaText("{{ note|tojson }} {{ text|tojson }}").render(
        {"note": {"a<b": [1, None]}, "text": "'é"}, "row"
    ) == ('{"a<b": [1, null]} "\'é"')


def test_fields_are_those_that_a_row_must_bring():
    source = (
        "{% for m in messages %}{{ m.role }}{{ loop.index }}{% endfor %}{% set x = text %}{{ x }}{{ range(2)|length }}"
    )
    assert JinjaText(source).fields == {"messages", "text"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ text", "the template's line 1 is not Jinja: unexpected end of template"),
        ("a\n{% if %}", "the template's line 2 is not Jinja: Expected an expression"),
        ("{{ text|shout }}", "the template's line 1 uses the filter shout"),
        (
            "{% macro f() %}{% endmacro %}",
            "the template's line 1 uses Macro, which it can't: it may hold output, if, for",
        ),
        ("a\n{% include 'b' %}", "the template's line 2 uses Include"),
        ("{% import 'b' as c %}", "uses Import"),
        ("{% extends 'b' %}", "uses Extends"),
        ("{% block a %}{% endblock %}", "uses Block"),
        ("{% filter upper %}a{% endfilter %}", "uses FilterBlock"),
        ("{% set x %}a{% endset %}", "uses AssignBlock"),
        ("{% set n = namespace(a=1) %}{{ text }}", "uses a call of namespace"),
        ("{% for a in text recursive %}{% endfor %}", "uses a recursive loop"),
        ("{{ text ** 2 }}", "uses Pow"),
        ("{{ text.format(1) }}", "uses a call of format"),
        ("{{ text.center(10) }}", "uses a call of center"),
        ("{{ lipsum(5) }}", "uses a call of lipsum"),
        ("{{ text() }}", "uses a call of text"),
        ("{{ range(*text) }}", "uses a call of range"),
        ("{{ self }}", "uses self"),
        ("{{ text|center(10) }}", "uses the filter center"),
        ("{{ text|attr('upper') }}", "uses the filter attr"),
        ("{{ text|map('upper') }}", "uses the filter map"),
        ("{{ text|pprint }}", "uses the filter pprint"),
        ("x" * (2**20 + 1), "the template has 1,048,577 characters, and the most are 1,048,576"),
        ("{% for a in text %}" * 30 + "{% endfor %}" * 30, "the template can't be compiled: SyntaxError"),
        ("{{ " + "(" * 5000 + "text" + ")" * 5000 + " }}", "the template can't be compiled: RecursionError"),
    ],
)
def test_what_a_template_cannot_be_is_named_with_its_line(source, message):
    with pytest.raises(UserError) as caught:
        JinjaText(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ txt }}", 'row 3: the template needs what isn\'t there: \'txt\' is undefined; it has "text", "title"'),
        ("{{ note.author }}", "isn't there: 'dict object' has no attribute 'author'"),
        ("{{ options[7] }}", "isn't there: list object has no element 7"),
        ("{% for x in missing %}{% endfor %}", "'missing' is undefined"),
        ("{% if missing %}{% endif %}{{ text }}", "'missing' is undefined"),
        ("{{ missing ~ 'a' }}", "'missing' is undefined"),
        ("{{ missing + 1 }}", "'missing' is undefined"),
        ("{{ text.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ options.append }}", "is unsafe"),
        ("{{ text['__class__'] }}", "is unsafe"),
        ("{{ none }}", "row 3: the template failed: TypeError: null can't be put into the text"),
        ("{{ 'a' ~ none }}", "null can't be put into the text"),
        ("{{ note }}", "an object can't be put into the text; the filter tojson writes it"),
        ("{{ options }}", "an array can't be put into the text"),
        ("{{ 'a' ~ options }}", "an array can't be put into the text"),
        ("{{ text.upper }}", "can't be put into the text"),
        ("{{ count // 0 }}", "the template failed: ZeroDivisionError"),
        ("{{ 'a' * 3 }}", "the template failed: TypeError: * takes numbers, and this is a string"),
        ("{{ '%9s' % text }}", "% takes numbers"),
        ("{{ options * 2 }}", "* takes numbers, and this is an array"),
        ("{{ text.get('a') }}", "has no attribute 'get'"),
        ("{{ count.upper() }}", "has no attribute 'upper'"),
    ],
)
def test_what_a_template_cannot_do_is_named_with_the_row(source, message):
    with pytest.raises(UserError) as caught:
        JinjaText(source).render(FIELDS, "row 3")
    assert message in str(caught.value)
    assert str(caught.value).startswith("row 3: ")


LOOP = "{% for a in range(100000) %}"
END = "{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP * 3 + END * 3,  # no output
        LOOP * 2 + "{{ a }}" + END * 2,
        LOOP + "{{ text }}" + END,
        LOOP + "{% if text|upper|length %}{% endif %}" + END,
        LOOP + "{% if '" + "y" * 2**19 + "'|upper|length %}{% endif %}" + END,
        LOOP + "{% if range(100000)|list|length %}{% endif %}" + END,
        "{% for a in options %}{% for b in options %}{% for c in options %}" + END * 3,
        "{% for a in text %}{% for b in text %}" + END * 2,
        "{{ range(1000000000000)|length }}",
        "{{ text|replace('x', text) }}",
        "{{ text|replace('x', text, -5)|length }}" + LOOP * 2 + END * 2,
        "{{ text|list|join(text) }}",
        "{% set a = text %}" + "{% set a = a ~ a %}" * 60 + "{{ a|length }}",
        "{% set a = text %}" + "{% set a = a + a %}" * 60 + "{{ a|length }}",
        "{% set a = options %}" + "{% set a = a + a %}" * 60 + "{{ a|length }}",
        "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a|tojson }}",
        "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a == a }}",
        "{% set a = {'b': 1} %}" + "{% set a = {'b': a, 'c': a} %}" * 60 + "{{ a|tojson }}",
        "{% set a = 3 %}" + "{% set a = a * a %}" * 60 + "{{ a }}",
        "{% set a = options|length %}" + "{% set a = a + a %}" * 80 + "{{ a }}",
        "{{ text * 1000000000 }}",
        "{{ text.strip(text) }}",
        "{{ text|trim(text) }}",
    ],
)
def test_work_and_texts_that_would_not_end_are_refused(source):
    with pytest.raises(UserError, match="row: the template (makes .*, which is refused|failed: TypeError)"):
        JinjaText(source).render(BIG, "row")


def test_a_text_of_several_megabytes_is_rendered():
    found = JinjaText("{{ text|trim }}\n{{ text|length }}").render({"text": "y" * (6 * 2**20)}, "row")
    assert len(found) == 6 * 2**20 + 8


def test_each_row_has_work_of_its_own(monkeypatch):
    monkeypatch.setattr(sandbox, "_MOST_WORK", 5000)
    template = JinjaText("{% for a in options %}{{ a }}{% endfor %}")
    for _ in range(5):
        template.render(BIG, "row")
    with pytest.raises(UserError, match="the template makes more than 5,000 steps of work, which is refused"):
        template.render({"options": list(range(2000))}, "row")
