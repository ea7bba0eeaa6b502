"""Whatever a template makes of a client's text is marked: character by character, or as a whole."""

import pytest

from winnow.marked_text import CLIENT, FINAL, MarkedText, carried, joined, mark, plain
from winnow.template_environment import TemplateEnvironment

TEXT = "he<y "
# `#` is where a client wrote, `.` where the template did.
OPERATIONS = {
    "a{{ c }}b": ("ahe<y b", ".#####."),
    "{{ 'x' + c + 'y' }}": ("xhe<y y", ".#####."),
    "{{ 'x' ~ c ~ 3 ~ none }}": ("xhe<y 3None", ".#####....."),
    "{{ c | trim }}!": ("he<y!", "####."),
    "{{ ('(' + c).strip() }}!": ("(he<y!", ".####."),
    "{{ c[1:3] }}|{{ c[0] }}|{{ c[-1] }}": ("e<|h| ", "##.#.#"),
    "{{ ('a' + c + 'b')[::-1] }}": ("b y<eha", ".#####."),
    "{{ c * 2 }}|{{ 2 * c }}|": ("he<y he<y |he<y he<y |", "##########." * 2),
    "{{ '<%s>%s' % (c, 'z') }}": ("<he<y >z", ".#####.."),
    "{{ '<%s>' | format(c) }}": ("<he<y >", ".#####."),
    "{{ '<{}>{}'.format(c, 'q') }}": ("<he<y >q", ".#####.."),
    "{{ '<{x}>'.format(x=c) }}": ("<he<y >", ".#####."),
    "{{ [c, 't'] | join('-') }}": ("he<y -t", "#####.."),
    "{{ ','.join(['t', c]) }}": ("t,he<y ", "..#####"),
    "{{ [{'k': c}] | map(attribute='k') | join }}.": ("he<y .", "#####."),
    "{% for k in c %}{{ k }}.{% endfor %}": ("h.e.<.y. .", "#.#.#.#.#."),
    "{% macro m(t) %}[{{ t }}]{% endmacro %}{{ m(c) }}": ("[he<y ]", ".#####."),
    "{% set x %}({{ c }}){% endset %}{{ x }}": ("(he<y )", ".#####."),
    "{% macro m() %}<{{ caller() }}{% endmacro %}{% call m() %}{{ c }}!{% endcall %}": (
        "<he<y !",
        ".#####.",
    ),
    "{% generation %}g{{ c }}{% endgeneration %}": ("ghe<y ", ".#####"),
    "{{ ['lit', c] | first }}{{ ['lit', c] | last }}": ("lithe<y ", "...#####"),
    "{{ '' | default('zz', true) }}{{ c | default('zz') }}": ("zzhe<y ", "..#####"),
    "{{ [[c], ['b']] | sum(start=[]) | join }}": ("he<y b", "#####."),
    "{{ {'k': c}.values() }}{{ namespace(k=c) }}": (
        "dict_values(['he<y '])<Namespace>",
        "#" * 22 + "." * 11,
    ),
    "{{ c | upper }}|{{ c.upper() }}|": ("HE<Y |HE<Y |", "#####.#####."),
    "{{ c.split('<')[1] ~ '<' }}": ("y <", "##."),
    "{{ c.partition('<') | join }}": ("he<y ", "#####"),
    "{{ c | replace('<', '<|x|>') }}": ("he<|x|>y ", "#########"),
    "{{ c.replace('<', '<|x|>') }}": ("he<|x|>y ", "#########"),
    "{{ ('z' ~ c) | upper }}": ("ZHE<Y ", "######"),
    "{{ c | center(9) }}|": ("  he<y   |", "#########."),
    "{{ c | e }}x": ("he&lt;y x", "########."),
    "{{ c | safe }}x": ("he<y x", "#####."),
    "{{ strftime_now(c) }}": ("he<y ", "#####"),
    "{{ [c] | map('upper') | join }}": ("HE<Y ", "#####"),
    "{% filter upper %}z{{ c }}{% endfilter %}": ("ZHE<Y ", "######"),
    "{{ {'a': c} | tojson }}": ('{"a": "he<y "}', "#" * 14),
    "{{ {'a': [c]} }}": ("{'a': ['he<y ']}", "#" * 16),
    "{{ ['t', c] | string ~ '.' }}": ("['t', 'he<y '].", "#" * 14 + "."),
    "{{ '%s' % {c: 1} }}": ("{'he<y ': 1}", "#" * 12),
    "{{ '{}'.format([{c: 1}]) }}": ("[{'he<y ': 1}]", "#" * 14),
    "{{ (c ~ 'x') | length }}{{ 'he<' in c }}{{ c == 'he<y ' }}": ("6TrueTrue", "." * 9),
}


@pytest.mark.parametrize("source", OPERATIONS)
def test_marks_are_kept_by_every_operation_of_a_template(source: str) -> None:
    text = TemplateEnvironment().from_string(source).render(c=mark(TEXT, CLIENT))
    marks = text.marks if isinstance(text, MarkedText) else bytes(len(text))
    assert (plain(text), "".join(".#"[one] for one in marks)) == OPERATIONS[source]


def test_every_text_of_a_value_is_marked_with_its_keys() -> None:
    value = mark({"a": ["b", ("c", 1)], "d": None}, CLIENT)
    assert value == {"a": ["b", ["c", 1]], "d": None}
    assert all(isinstance(key, MarkedText) for key in value)
    assert all(isinstance(text, MarkedText) for text in (value["a"][0], value["a"][1][0]))


def test_a_text_made_of_several_has_the_marks_of_all() -> None:
    ours, final = mark("a", CLIENT), mark("b", FINAL)
    assert carried("xy", [ours, {"k": [final]}]).marks == bytes([CLIENT | FINAL] * 2)
    assert carried("xy", ["a", 5]) == "xy"
    assert not isinstance(carried("xy", ["a", 5]), MarkedText)


def test_joined_texts_keep_their_marks_and_plain_ones_stay_plain() -> None:
    assert not isinstance(joined(["a", "b"]), MarkedText)
    text = joined(["a", mark("bc", CLIENT), "d", mark("e", FINAL)])
    assert isinstance(text, MarkedText)
    assert text.marks == bytes([0, 1, 1, 0, 2])
    assert type(plain(text)) is str


def test_characters_for_internal_use_are_replaced() -> None:
    assert mark("a\ufdd0b\ufdd4\ufdd5", CLIENT) == "a\ufffdb\ufffd\ufdd5"
